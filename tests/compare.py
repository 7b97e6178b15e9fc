"""The fusions side by side: the two tables in README.md.

    python tests/compare.py            # parameters and FLOPs of preset d2c-b with each fusion; some minutes
    python tests/compare.py OUT        # the same budget for all: 39 runs of 250 steps; run again, it goes on

The second makes OUT/images (2,000 toy pictures), one pair of tokenizers and one prior of preset toy, then trains a
generator for each fusion, condition and seed. All see as many pictures, and are measured on 500 others:

    true, drawn   diffusion loss given the true codes, and given codes drawn by the prior given the true past
    shuffled      diffusion loss given the codes of another picture
    frechet       distance of 500 samples, codes from the prior, to the 500 pictures: Gaussians over the 64 main
                  components of their pixels. Codes and noise of the samples are the same in all runs.
"""
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoints
import data
import sample
from fid import frechet_distance
from fusion import FUSIONS
from generator import Generator, mask_ratio
from presets import PRESETS
from runtime import rng
from test_diffloss import on_meta

CONDITIONS = ("ground_truth", "teacher_forced", "mixed:0.5")
SEEDS, TESTED = (0, 1, 2), 500


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
            null, flops = model.null_condition(), []  # the null condition: once per run
            for steps in (1, 2):
                with FlopCounterMode(display=False) as counted:
                    model.generate(torch.zeros(1).long(), torch.zeros(1, 256).long(), steps=steps, null=null)
                flops.append(counted.get_total_flops())
        print(f"{row} {(flops[0] + 99 * (flops[1] - flops[0])) / 1e12:.1f} |", flush=True)


def script(name, *args):
    subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *map(str, args)], check=True)


def frechet(a, b):
    """Images uint8 [N, 3, H, W] -> their distance over the main components of b."""
    a, b = (x.flatten(1).double() / 255 for x in (a, b))
    main = torch.linalg.svd(b - b.mean(0), full_matrices=False)[2][:64].T
    a, b = a @ main, b @ main
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


@torch.inference_mode()
def measure(run, tokens, images):
    """A run, and the held-out pictures with what `tokenised` makes of them -> its numbers."""
    codes, drawn, latents, classes, g = *tokens, rng("cpu", "compare")
    losses, L = [], codes.shape[1]
    for part in torch.arange(TESTED).split(100):
        # hidden as in training; masks, t and noise are the same for all runs
        hidden = torch.rand(100, L, generator=g).argsort(1) < mask_ratio(float(torch.rand((), generator=g))) * L
        t, noise = torch.randint(1000, (4, 100, L), generator=g), torch.randn(4, 100, L, latents.shape[2], generator=g)
        losses.append([float(run.generator.loss(latents[part], classes[part], c[part], hidden, t, noise))
                       for c in (codes, drawn, codes.roll(1, 0))])
    pictures = torch.cat([sample.generate(run, classes[part], indices=part.tolist()).images
                          for part in torch.arange(TESTED).split(100)])
    return dict(zip(("true", "drawn", "shuffled"), np.mean(losses, axis=0)), frechet=frechet(pictures, images))


@torch.inference_mode()
def tokenised(base, images):
    """Held-out pictures [N, 3, H, W], classes in turn -> codes, codes by the prior, latents, classes. Prints limits."""
    vq, kl, prior = (checkpoints.load_model(f"{base}/{kind}.pt", kind) for kind in ("vq", "kl", "prior"))
    x, classes, g = data.to_float(images.numpy()), torch.arange(TESTED) % 10, rng("cpu", "tokens")
    codes, latents = vq.encode(x), kl.sample(kl.encode(x), generator=g)
    s, generators = PRESETS["toy"].sampling, [rng("cpu", "sample", 0, i) for i in range(TESTED)]
    sampled = prior.generate(classes, s.prior_cfg, s.prior_temperature, generator=generators)
    for name, decoded in (("the pictures' own latents", kl.decode(latents)), ("their own codes", vq.decode(codes)),
                          ("codes from the prior", vq.decode(sampled))):
        print(f"frechet of {name}, decoded: {frechet(sample.to_uint8(decoded), images):.3f}")
    return codes, prior.resample(codes, classes, torch.rand(codes.shape, generator=g)), latents, classes


def main(out):
    base, cache = f"{out}/base", f"{out}/cache"
    train = lambda stage, source, run, *more: script("train", "--stage", stage, "--preset", "toy", "--data", source,
                                                     "--run", run, "--grid-every", 0, *more)
    if not os.path.exists(f"{base}/prior.pt"):
        script("data", "--toy", 2000, "--out", f"{out}/images")
        train(0, f"{out}/images", base, "--steps", 600)
        script("data", "--images", f"{out}/images", "--run", base, "--out", cache)
        train(1, cache, base, "--steps", 1500)
    # those of the training have seed 0
    pictures = [data.center_crop(data.toy_picture(i % 10, np.random.default_rng((1, i))), 32) for i in range(TESTED)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    tokens, table = tokenised(base, images), {}
    for seed, fusion, condition in itertools.product(SEEDS, FUSIONS, CONDITIONS):
        if condition != CONDITIONS[0] and not FUSIONS[fusion].reads_codes:
            continue
        path = f"{out}/{fusion}-{condition.replace(':', '-')}-{seed}"
        if not os.path.exists(f"{path}/result.json"):
            os.makedirs(path, exist_ok=True)
            for kind in ("vq", "kl", "prior"):
                shutil.copy(f"{base}/{kind}.pt", path)
            train(2, cache, path, "--fusion", fusion, "--condition", condition, "--steps", 250, "--batch", 32,
                  "--seed", seed)
            Path(f"{path}/result.json").write_text(json.dumps(measure(sample.load_run(path), tokens, images)))
        table.setdefault((fusion, condition), []).append(json.loads(Path(f"{path}/result.json").read_text()))
    names = table["none", CONDITIONS[0]][0]
    print(f"| fusion | condition | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for (fusion, condition), results in table.items():
        values = [[r[name] for r in results] for name in names]
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in values]
        print(f"| {fusion} | {condition} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:] else sizes()
