"""The fusions side by side: the tables in README.md.

    python tests/compare.py                             # parameters and FLOPs of preset d2c-b with each fusion; minutes
    python tests/compare.py OUT                         # toy pictures, 250 steps each: 39 runs; run again, it goes on
    python tests/compare.py OUT RUN CACHE PICTURES      # photographs, equal CPU time: RUN's tokenizers and prior, the
                                                        # cache made with them, a folder of pictures not in it

The second makes OUT/images (2,000 toy pictures), one pair of tokenizers and one prior of preset toy. Both then train a
generator for each row and seed, and measure it on held-out pictures:

    true, drawn   diffusion loss given the true codes, and given codes drawn by the prior given the true past
    shuffled      diffusion loss given the codes of another picture
    frechet       distance of as many samples, codes from the prior, to these pictures: Gaussians over the 64 main
                  components of their pixels. Codes and noise of the samples are the same in all runs.
    steps, cpu    steps that were trained, and CPU seconds a sample took, prior and decoder included
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
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoints
import data
import fast
import sample
from fid import frechet_distance
from fusion import FUSIONS
from generator import Generator, GeneratorConfig, mask_ratio
from presets import PRESETS
from runtime import rng, run_script
from test_diffloss import on_meta
from train import main as train

SEEDS, SECONDS = (0, 1, 2), 120  # CPU time of a training on photographs
COLUMNS = "true", "drawn", "shuffled", "frechet", "steps", "cpu"
# Rows of the tables: preset, fusion, condition.
TRUE, READING = "ground_truth", [name for name, fusion in FUSIONS.items() if fusion.reads_codes]
TOYS = [("toy", "none", TRUE)] + [("toy", fusion, condition) for fusion in READING
                                  for condition in (TRUE, "resampled", "mixed:0.5")]
# Photographs: the tokens of preset tiny, and a generator that learns something from them in minutes.
g = replace(PRESETS["tiny"].generator, dim=128, depth=2, heads=4, prefix=8, head_width=192, queries=4,
            qformer_width=128, qformer_heads=4)
small = lambda **changes: replace(
    PRESETS["tiny"], generator=replace(g, **changes), recipes=(*PRESETS["tiny"].recipes[:2], replace(
        PRESETS["tiny"].recipes[2], batch=32, lr=6.4e-3, warmup=0.1, ema=0.99)),
    sampling=replace(PRESETS["tiny"].sampling, iterations=16, steps=25, cfg=4.0, prior_cfg=3.0))
PRESETS.update({"small": small(), "small, 1 query": small(queries=1), "small, 8 queries": small(queries=8),
                "small, decoder only": small(qformer_encoder=False)})
PHOTOGRAPHS = [("small", fusion, TRUE) for fusion in FUSIONS]
PHOTOGRAPHS += [("small", "cross_attention", condition) for condition in ("resampled", "mixed:0.5")]
PHOTOGRAPHS += [(preset, "qformer", TRUE) for preset in PRESETS if preset.startswith("small, ")]


def sizes():
    """FLOPs of one image at 64 iterations, 100 steps and guidance; linear in the steps, so 1 and 2 of them tell."""
    print("| fusion | parameters | trained | TFLOP an image |\n|---|---|---|---|")
    for fusion in FUSIONS:
        with torch.device("meta"):
            model = Generator(replace(PRESETS["d2c-b"].generator, fusion=fusion)).eval()
        count = lambda trained: sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6
        row = f"| `{fusion}` | {count(False):.1f}M | {count(True):.1f}M |"
        model.requires_grad_(False)  # with gradients the counter's hooks fail
        with torch.device("meta"), on_meta():
            null, flops = fast.null_condition(model), []  # the null condition: once per run
            for steps in (1, 2):
                with FlopCounterMode(display=False) as counted:
                    fast.generate(model, torch.zeros(1).long(), torch.zeros(1, 256).long(), steps=steps, null=null)
                flops.append(counted.get_total_flops())
        print(f"{row} {(flops[0] + 99 * (flops[1] - flops[0])) / 1e12:.1f} |", flush=True)


slug = lambda name: name.replace(",", "").replace(" ", "-")


def script(name, *args):
    code = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]).returncode
    if code not in (0, 128 + signal.SIGTERM):
        sys.exit(code)


def frechet(a, b):
    """Images uint8 [N, 3, H, W] -> their distance over the main components of b."""
    a, b = (x.flatten(1).double() / 255 for x in (a, b))
    main = torch.linalg.svd(b - b.mean(0), full_matrices=False)[2][:64].T
    a, b = a @ main, b @ main
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


@torch.inference_mode()
def measure(path, tokens, images):
    """A run, the held-out pictures, and what `tokenised` makes of them -> its numbers; samples go to path/pictures."""
    run, (codes, drawn, latents, classes), g = sample.load_run(path), tokens, rng("cpu", "compare")
    losses, parts = [], torch.arange(len(images)).split(100)
    for part in parts:
        # hidden as in training; masks, t and noise are the same for all runs
        n, L, C = latents[part].shape
        order, uniform = torch.rand(n, L, generator=g).argsort(1), float(torch.rand((), generator=g))
        hidden = order < mask_ratio(uniform, GeneratorConfig.mask_min) * L
        t, noise = torch.randint(1000, (4, n, L), generator=g), torch.randn(4, n, L, C, generator=g)
        losses.append([len(part) * float(run.generator.loss(latents[part], classes[part], c[part], hidden.float(), t, noise))
                       for c in (codes, drawn, codes.roll(1, 0))])
    start = time.process_time()
    pictures = torch.cat([sample.generate(run, classes[part], indices=part.tolist()).images for part in parts])
    cpu = time.process_time() - start
    for i, (k, picture) in enumerate(zip(classes.tolist(), pictures)):
        sample.save_picture(Image.fromarray(picture.permute(1, 2, 0).numpy()),
                            f"{path}/pictures/{run.classes[k][0]}/{i:06}.png")
    return dict(zip(("true", "drawn", "shuffled"), np.sum(losses, axis=0) / len(images)), cpu=cpu / len(images),
                frechet=frechet(pictures, images), steps=run.generator.about["step"])


@torch.inference_mode()
def tokenised(base, images, classes, s):
    """Held-out pictures [N, 3, H, W], Sampling -> codes, codes by the prior, latents, classes. Prints limits."""
    vq, kl, prior = (checkpoints.load_model(f"{base}/{kind}.pt", kind) for kind in ("vq", "kl", "prior"))
    x, g = data.to_float(images.numpy()), rng("cpu", "tokens")
    codes, latents = vq.encode(x), kl.sample(kl.encode(x), generator=g)
    generators = [rng("cpu", "sample", 0, i) for i in range(len(images))]
    sampled = prior.generate(classes, s.prior_cfg, s.prior_temperature, generator=generators)
    for name, decoded in (("the pictures' own latents", kl.decode(latents)), ("their own codes", vq.decode(codes)),
                          ("codes from the prior", vq.decode(sampled))):
        print(f"frechet of {name}, decoded: {frechet(sample.to_uint8(decoded), images):.3f}")
    return codes, prior.resample(codes, classes, torch.rand(codes.shape, generator=g)), latents, classes


def toys(out):
    """-> tokenizers and prior, their cache, and 500 pictures with classes."""
    base, cache = f"{out}/base", f"{out}/cache"
    how = "--preset", "toy", "--run", base, "--grid-every", 0
    if not os.path.exists(f"{base}/prior.pt"):
        script("data", "--toy", 2000, "--out", f"{out}/images")
        script("train", "--stage", 0, "--data", f"{out}/images", "--steps", 600, *how)
        script("data", "--images", f"{out}/images", "--run", base, "--out", cache)
        script("train", "--stage", 1, "--data", cache, "--steps", 1500, *how)
    classes = torch.arange(500) % 10  # seed 1: those of the training have seed 0
    pictures = [data.toy_picture(int(k), np.random.default_rng((1, i))) for i, k in enumerate(classes)]
    return base, cache, stacked(pictures, 32), classes


def stacked(pictures, size):
    """PIL images -> uint8 [N, 3, size, size], the middle of each."""
    return torch.from_numpy(np.stack([data.center_crop(p, size) for p in pictures])).permute(0, 3, 1, 2)


def photographs(folder, size):
    """Pictures of a folder, uint8 [N, 3, size, size], and their classes [N], equally many of each."""
    paths, labels, _ = data.find_images(folder)
    labels = np.array(labels)
    count = np.bincount(labels).min()
    chosen = np.concatenate([np.flatnonzero(labels == k)[:count] for k in np.unique(labels)])
    pictures = [Image.open(f"{folder}/{paths[i]}").convert("RGB") for i in chosen]
    return stacked(pictures, size), torch.tensor(labels[chosen])


def compare(name, rows, seeds, budget, columns, out, base, cache, images, classes):
    """Trains and measures rows (preset, fusion, condition) under OUT, each with every seed, and prints the table.

    name: of the script that calls. budget: CPU seconds of a training, or 0, and flags for train.py.
    """
    tokens, table = tokenised(base, images, classes, PRESETS[rows[0][0]].sampling), {}
    for seed in seeds:
        for row in rows:
            preset, fusion, condition = row
            path = f"{out}/{slug(preset)}-{fusion}-{condition.replace(':', '-')}-{seed}"
            if not os.path.exists(f"{path}/result.json"):
                shutil.rmtree(path, ignore_errors=True)  # a training that was stopped would get more time
                os.makedirs(path)
                for kind in ("vq", "kl", "prior"):
                    shutil.copy(f"{base}/{kind}.pt", path)
                script(name, "train", budget[0], "--stage", 2, "--preset", preset, "--data", cache, "--run", path,
                       "--fusion", fusion, "--condition", condition, "--seed", seed, "--grid-every", 0, *budget[1:])
                Path(f"{path}/result.json").write_text(json.dumps(measure(path, tokens, images)))
            table.setdefault(row, []).append(json.loads(Path(f"{path}/result.json").read_text()))
            print(row, seed, table[row][-1], flush=True)
    print(f"| preset | fusion | condition | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}")
    for row, results in table.items():
        values = [[r[name] for r in results] for name in columns]
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in values]
        print(f"| {' | '.join([*row, *cells])} |")


def main(out, base=None, cache=None, folder=None):
    if base is None:
        compare("tests/compare", TOYS, SEEDS, (0, "--steps", 250, "--batch", 32), COLUMNS[:4], out, *toys(out))
    else:
        compare("tests/compare", PHOTOGRAPHS, SEEDS, (SECONDS,), COLUMNS, out, base, cache, *photographs(folder, 64))


def train_for(seconds, *args):
    """train.py, for that much CPU time if it is not 0: then what a cluster sends, SIGTERM, on which it saves."""
    signal.signal(signal.SIGPROF, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_PROF, float(seconds))
    sys.argv = ["train.py", *args]
    run_script(train)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_for(*sys.argv[2:])
    main(*sys.argv[1:]) if sys.argv[1:] else sizes()
