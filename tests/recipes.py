"""Sizes and recipes of preset tiny at equal CPU time: tables of README.md, section Train.

    python tests/recipes.py OUT IMAGES PICTURES       # tokenizers and grids, on a folder of photographs
    python tests/recipes.py OUT RUN CACHE PICTURES    # generators: RUN's tokenizers and prior, the cache made with them

PICTURES, which no training sees, are measured. Each row is tiny with one thing changed. Run again, both go on.
The first trains tokenizers; with those of each grid and width of latents it also trains a generator without codes
(MAR), so that nothing else differs. The second trains and measures as tests/compare.py does.
"""
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from compare import PRESETS, TRUE, checkpoints, compare, data, measure, photographs, rng, script, slug, train_for

TOKENIZER_SECONDS, SECONDS, COLUMNS = 200, 240, ("true", "frechet", "steps", "cpu")
tiny = replace(PRESETS["tiny"], sampling=replace(PRESETS["tiny"].sampling, iterations=16))
recipe = lambda stage, **changes: tuple(replace(r, **changes) if i == stage else r for i, r in enumerate(tiny.recipes))
of = lambda **changes: replace(tiny, generator=replace(tiny.generator, **changes))
GENERATORS = {
    "tiny": tiny,
    "width 128": of(dim=128, heads=2), "width 256": of(dim=256, heads=4),
    "5+5 blocks": of(depth=5),
    "head of width 128": of(head_width=128), "head of width 384": of(head_width=384),
    "head of 4 blocks": of(head_depth=4),
    "4 draws of t": of(batch_mul=4),
    "50% to 100% hidden": of(mask_min=0.5), "90% to 100% hidden": of(mask_min=0.9),
    "batch 32": replace(tiny, recipes=recipe(2, batch=32, lr=2 * tiny.recipes[2].lr))}
both = lambda **changes: {kind: replace(getattr(tiny, kind), **changes) for kind in ("vq", "kl")}
TOKENIZERS = {name: replace(tiny, recipes=recipe(0, warmup=0.1), **changes) for name, changes in {
    "8x8x32, 512 codes": {},
    "32, 32, 64 channels": both(ch_mult=(1, 1, 2)),
    "2048 codes": dict(vq=replace(tiny.vq, codebook_size=2048)),
    "4x4x128": both(ch_mult=(1, 2, 2, 2), z_channels=128)}.items()}
# The latents whose generators are compared, with the generator's preset.
GRIDS = {"8x8x32": ("8x8x32, 512 codes", tiny), "4x4x128": ("4x4x128", tiny),
         "4x4x128, wide": ("4x4x128", of(dim=320, heads=5, head_width=512))}
PRESETS.update({**GENERATORS, **TOKENIZERS, **{f"MAR {name}": preset for name, (_, preset) in GRIDS.items()}})


@torch.inference_mode()
def reconstruct(path, images):
    """A run with tokenizers -> dB of VQ and KL on images, and the codes that were used."""
    x, vq, kl = data.to_float(images.numpy()), *(checkpoints.load_model(f"{path}/{k}.pt", k) for k in ("vq", "kl"))
    codes, latents = vq.encode(x), kl.sample(kl.encode(x), generator=rng("cpu", "tokens"))
    decibel = lambda y: float(-10 * (((y.clamp(-1, 1) - x) / 2) ** 2).mean((1, 2, 3)).log10().mean())  # as fid.py
    return (codes, codes, latents), dict(vq=decibel(vq.decode(codes)), kl=decibel(kl.decode(latents)),
                                         used=len(codes.unique()))


def tokenizers(out, folder, pictures):
    images, classes = photographs(pictures, tiny.image_size)
    for name in TOKENIZERS:
        path = f"{out}/{slug(name)}"
        if not os.path.exists(f"{path}/result.json"):
            shutil.rmtree(path, ignore_errors=True)
            script("tests/recipes", "train", TOKENIZER_SECONDS, "--stage", 0, "--preset", name, "--data", folder,
                   "--run", path, "--grid-every", 0)
            steps = checkpoints.load_model(f"{path}/kl.pt", "kl").about["step"]
            Path(f"{path}/result.json").write_text(json.dumps(reconstruct(path, images)[1] | {"steps": steps}))
        print(name, Path(f"{path}/result.json").read_text(), flush=True)
    for name, (base, _) in GRIDS.items():
        path, base = f"{out}/mar-{slug(name)}", f"{out}/{slug(base)}"
        if not os.path.exists(f"{base}/cache/header.json"):
            script("data", "--images", folder, "--run", base, "--out", f"{base}/cache")
        if not os.path.exists(f"{path}/result.json"):
            shutil.rmtree(path, ignore_errors=True)
            os.makedirs(path)
            for kind in ("vq", "kl"):
                shutil.copy(f"{base}/{kind}.pt", path)
            script("tests/recipes", "train", SECONDS, "--stage", 2, "--preset", f"MAR {name}", "--data",
                   f"{base}/cache", "--run", path, "--fusion", "none", "--grid-every", 0)
            tokens = (*reconstruct(base, images)[0], classes)
            Path(f"{path}/result.json").write_text(json.dumps(measure(path, tokens, images)))
        print(name, Path(f"{path}/result.json").read_text(), flush=True)


def generators(out, base, cache, folder):
    rows = [(name, "cross_attention", TRUE) for name in GENERATORS]
    how = (SECONDS,), COLUMNS, out, base, cache, *photographs(folder, tiny.image_size)
    compare("tests/recipes", rows[:1], (1, 2), *how)
    compare("tests/recipes", rows, (0,), *how)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_for(*sys.argv[2:])
    (tokenizers if len(sys.argv) == 4 else generators)(*sys.argv[1:])
