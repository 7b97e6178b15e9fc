"""Experiments with the fusions: the tables of docs/experiments.md, "Five fusions".

    python tools/compare.py OUT                         # toy pictures, 250 steps each: 39 trainings
    python tools/compare.py OUT RUN CACHE PICTURES      # photographs, equal CPU time for each training

The first command makes OUT/images (2,000 toy pictures), one pair of tokenizers and one prior of the preset toy. The
second takes the tokenizers and the prior of RUN, the CACHE that they made, and a folder of PICTURES outside that cache.
Both train a generator for every row and seed, and measure it on held-out pictures. The same command again goes on.

    true         diffusion loss, given the codes of the picture
    resampled    diffusion loss, given codes that the prior drew from the true codes before them
    shuffled     diffusion loss, given the codes of another picture
    frechet      Frechet distance between samples and the pictures: Gaussians over the 64 principal components of their
                 pixels. All rows sample with the same codes and the same noise.
    steps, cpu   steps of the training; CPU seconds per sample, prior and decoder included
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoints
import data
import fast
import sample
from faults import run_script
from fid import frechet_distance
from fusion import FUSIONS
from generator import GeneratorConfig, mask_ratio
from heldout import class_numbers
from presets import PRESETS
from runtime import UserError, make_folder, refuse, rng, write_json
from train import main as train

SECONDS = 120  # CPU time of a training on photographs
LOSSES = ("true", "resampled", "shuffled")

# Rows of the tables: preset, fusion, condition.
CONDITIONS = ("ground_truth", "resampled", "mixed:0.5")
TOYS = [("toy", "none", "ground_truth")]
TOYS += [("toy", fusion, condition) for fusion in FUSIONS if fusion != "none" for condition in CONDITIONS]
PHOTOGRAPHS = [("small", fusion, "ground_truth") for fusion in FUSIONS]
PHOTOGRAPHS += [("small", "cross_attention", "resampled"), ("small", "cross_attention", "mixed:0.5")]
PHOTOGRAPHS += [(f"small-{name}", "qformer", "ground_truth") for name in ("1-query", "8-queries", "decoder-only")]


def small(**changes):
    """Preset tiny with a generator that learns something in two minutes of CPU time."""
    tiny = PRESETS["tiny"]
    generator = replace(tiny.generator, dim=128, depth=2, heads=4, prefix=8, head_width=192, queries=4,
                        qformer_width=128, qformer_heads=4)
    recipe = replace(tiny.recipes[2], batch=32, lr=6.4e-3, warmup=0.1, ema=0.99)
    sampling = replace(tiny.sampling, iterations=16, steps=25, cfg=4.0, prior_cfg=3.0)
    return replace(tiny, generator=replace(generator, **changes), recipes=(None, None, recipe), sampling=sampling)


PRESETS |= {"small": small(), "small-1-query": small(queries=1), "small-8-queries": small(queries=8),
            "small-decoder-only": small(qformer_encoder=False)}


# -------------------------------------------------------------------------------------------------------- trainings

def run(file, *args):
    """`python FILE ARGS` in a process of its own; ends this one if it fails."""
    code = subprocess.run([sys.executable, str(file), *map(str, args)]).returncode
    if code not in (0, 128 + signal.SIGTERM):  # which train_for sends itself
        sys.exit(code)


def train_for(seconds, *args):
    """train.py in this process, with the presets of this file. After that much CPU time (0: never) it gets the SIGTERM
    that a cluster would send, and saves."""
    signal.signal(signal.SIGPROF, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_PROF, float(seconds))
    sys.argv = ["train.py", *args]
    run_script(train)


def once(path, make):
    """The figures in PATH/result.json; if there are none, make() trains and returns them."""
    result = Path(path, "result.json")
    if not result.exists():
        shutil.rmtree(path, ignore_errors=True)  # a training that was cut off would get more time than the others
        make_folder(path)
        write_json(str(result), make())
    figures = json.loads(result.read_text())
    print(path, figures, flush=True)
    return figures


def train_generator(file, path, base, cache, seconds, preset, *args):
    """Trains a generator into the run PATH, with the tokenizers and the prior of BASE. file: the calling script, which
    knows the preset."""
    for kind in ("vq", "kl", "prior"):
        if os.path.exists(f"{base}/{kind}.pt"):
            shutil.copy(f"{base}/{kind}.pt", path)
    run(file, "train", seconds, "--stage", 2, "--preset", preset, "--data", cache, "--run", path, "--grid-every", 0,
        *args)


def compare(file, rows, seconds, columns, out, base, cache, pictures, *flags, seeds=(0, 1, 2)):
    """Trains and measures every row with every seed, and prints the table. pictures: what `held_out` returns."""
    tokens, table = tokenise(base, *pictures, PRESETS[rows[0][0]].sampling), {}
    for seed in seeds:
        for row in rows:
            preset, fusion, condition = row
            path = f"{out}/{preset}-{fusion}-{condition.replace(':', '-')}-{seed}"

            def make():
                source = ("--condition", condition) if FUSIONS[fusion].reads_codes else ()
                train_generator(file, path, base, cache, seconds, preset, "--fusion", fusion, *source, "--seed", seed,
                                *flags)
                return measure_generator(path, tokens, pictures[0])

            table.setdefault(row, []).append(once(path, make))
    print(f"| preset | fusion | condition | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}")
    for row, results in table.items():
        values = [[result[name] for result in results] for name in columns]
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in values]
        print(f"| {' | '.join([*row, *cells])} |")


# -------------------------------------------------------------------------------------------------------- measuring

def frechet(a, b):
    """Images uint8 [N, 3, H, W] -> their Frechet distance over the 64 principal components of b."""
    a, b = (x.flatten(1).double() / 255 for x in (a, b))
    components = torch.linalg.svd(b - b.mean(0), full_matrices=False)[2][:64].T
    a, b = a @ components, b @ components
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


@torch.inference_mode()
def tokenise(base, images, classes, sampling):
    """Held-out images [N, 3, H, W] -> their codes, codes resampled by the prior, latents, classes.

    Prints how far the images are from their own latents, their own codes and codes of the prior, decoded.
    """
    vq, kl, prior = (checkpoints.load_model(f"{base}/{kind}.pt", kind) for kind in ("vq", "kl", "prior"))
    x, g = data.to_float(images), rng("cpu", "tokens")
    codes, latents = vq.encode(x), kl.sample(kl.encode(x), generator=g)
    generators = [rng("cpu", "sample", 0, i) for i in range(len(images))]
    drawn = fast.generate_codes(prior, classes, sampling.prior_cfg, sampling.prior_temperature, generator=generators)
    for name, decoded in (("the pictures' own latents", kl.decode(latents)), ("their own codes", vq.decode(codes)),
                          ("codes from the prior", vq.decode(drawn))):
        print(f"frechet of {name}, decoded: {frechet(sample.to_uint8(decoded), images):.3f}")
    return codes, prior.resample(codes, classes, torch.rand(codes.shape, generator=g)), latents, classes


def save_pictures(images, classes, run, folder):
    """Images [N, 3, H, W] -> FOLDER/<class id>/<index>.png."""
    for i, (k, picture) in enumerate(zip(classes.tolist(), sample.Samples(images, None, None).pil())):
        sample.save_picture(picture, f"{folder}/{run.classes[k][0]}/{i:06}.png")


@torch.inference_mode()
def measure_generator(path, tokens, images):
    """The run PATH on what `tokenise` returned -> its figures. Samples go to PATH/pictures."""
    run, (codes, resampled, latents, classes), g = sample.load_run(path), tokens, rng("cpu", "compare")
    losses, pictures, cpu = np.zeros(3), [], 0.0
    for part in torch.arange(len(images)).split(100):
        # Masks, timesteps and noise are the same in all runs, whatever masking range and draws their training had.
        n, L, C = latents[part].shape
        ratio = mask_ratio(float(torch.rand((), generator=g)), GeneratorConfig.mask_min)
        mask = (torch.rand(n, L, generator=g).argsort(1) < ratio * L).float()
        t, noise = torch.randint(1000, (4, n, L), generator=g), torch.randn(4, n, L, C, generator=g)
        losses += [n * float(run.generator.loss(latents[part], classes[part], given[part], mask, t, noise))
                   for given in (codes, resampled, codes.roll(1, 0))]
        start = time.process_time()
        pictures.append(sample.generate(run, classes[part], indices=part.tolist()).images)
        cpu += time.process_time() - start
    pictures = torch.cat(pictures)
    save_pictures(pictures, classes, run, f"{path}/pictures")
    return {**dict(zip(LOSSES, losses / len(images))), "cpu": cpu / len(images), "frechet": frechet(pictures, images),
            "steps": run.generator.about["step"]}


def held_out(folder, classes, size=64):
    """Images of a folder, uint8 [N, 3, size, size], and their classes [N] among `classes`; equally many of each."""
    paths, labels, found = data.find_images(folder)
    labels = np.array(class_numbers(folder, found, classes))[labels]
    count = np.unique(labels, return_counts=True)[1].min()
    chosen = np.concatenate([np.flatnonzero(labels == k)[:count] for k in np.unique(labels)])
    images = [data.read_image(f"{folder}/{paths[i]}", size) for i in chosen]
    bad = [paths[i] for i, image in zip(chosen, images) if image is None]
    refuse([(bad, f"{folder}/{''.join(bad[:1])} cannot be read; repair or remove it")])
    return torch.from_numpy(np.stack(images)), torch.tensor(labels[chosen])


def held_out_toys(n):
    """n toy pictures of 32 pixels, likewise. Their seed is 1; the pictures of the training have seed 0."""
    classes = torch.arange(n) % 10
    toys = (data.toy_picture(int(k), np.random.default_rng((1, i))) for i, k in enumerate(classes))
    images = np.stack([data.center_crop(toy, 32) for toy in toys])
    return torch.from_numpy(images).permute(0, 3, 1, 2), classes


def make_toys(out):
    """-> a run with tokenizers and prior, and the cache; makes what is missing."""
    base, cache = f"{out}/base", f"{out}/cache"
    how = "--preset", "toy", "--run", base, "--grid-every", 0
    if not os.path.exists(f"{base}/prior.pt"):
        run(ROOT / "data.py", "--toy", 2000, "--out", f"{out}/images")
        run(ROOT / "train.py", "--stage", 0, "--data", f"{out}/images", "--steps", 600, *how)
        run(ROOT / "data.py", "--images", f"{out}/images", "--run", base, "--out", cache)
        run(ROOT / "train.py", "--stage", 1, "--data", cache, "--steps", 1500, *how)
    return base, cache


def main():
    out, *given = sys.argv[1:] or [None]
    if out and not given:
        compare(__file__, TOYS, 0, (*LOSSES, "frechet"), out, *make_toys(out), held_out_toys(500),
                "--steps", 250, "--batch", 32)
    elif len(given) == 3:
        base, cache, folder = given
        columns = *LOSSES, "frechet", "steps", "cpu"
        pictures = held_out(folder, data.read_header(cache)["classes"])
        compare(__file__, PHOTOGRAPHS, SECONDS, columns, out, base, cache, pictures)
    else:
        raise UserError("give OUT, or OUT RUN CACHE PICTURES; the head of the file explains both.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_for(*sys.argv[2:])  # does not return
    run_script(main)
