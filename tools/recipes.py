"""Experiments with sizes and recipes of the preset tiny: two tables of docs/experiments.md.

    python tools/recipes.py OUT RUN CACHE PICTURES    # "Sizes and recipe"
    python tools/recipes.py OUT IMAGES PICTURES       # "Tokenizers and grids"

Each row is tiny with one change; all trainings take the same CPU time. The first command trains generators on CACHE
with the tokenizers and the prior of RUN, as compare.py does. The second trains tokenizers on the folder IMAGES, then
generators without codes (MAR) on the latents of three of them. Both measure on PICTURES, which no training sees. The
same command again goes on.
"""
import os
import sys
from dataclasses import replace

import torch

from compare import PRESETS, ROOT, compare, held_out, measure_generator, once, run, train_for, train_generator
import checkpoints
import data
from faults import run_script
from runtime import UserError, rng

TOKENIZER_SECONDS, GENERATOR_SECONDS = 200, 240
tiny = replace(PRESETS["tiny"], sampling=replace(PRESETS["tiny"].sampling, iterations=16))


def generator(**changes):
    return replace(tiny, generator=replace(tiny.generator, **changes))


def tokenizers(vq, kl):
    """tiny with codes and latents of 8x8 pixels, these changes of VQConfig and KLConfig, and a shorter warm-up."""
    return replace(tiny, vq=replace(tiny.vq, **{"ch_mult": (1, 2, 2)} | vq), kl=replace(tiny.kl, **kl),
                   recipes=(replace(tiny.recipes[0], warmup=0.1), *tiny.recipes[1:]))


batch_64 = replace(tiny.recipes[2], batch=64, lr=tiny.recipes[2].lr / 2)  # half the rate at 256: the same at 64
GENERATORS = {
    "tiny": tiny,
    "width-128": generator(dim=128, heads=2), "width-256": generator(dim=256, heads=4),
    "5+5-blocks": generator(depth=5),
    "head-of-width-128": generator(head_width=128), "head-of-width-384": generator(head_width=384),
    "head-of-4-blocks": generator(head_depth=4),
    "4-draws-of-t": generator(batch_mul=4),
    "50%-to-100%-masked": generator(mask_min=0.5), "90%-to-100%-masked": generator(mask_min=0.9),
    "batch-64": replace(tiny, recipes=(*tiny.recipes[:2], batch_64))}
narrow, coarse = dict(ch_mult=(1, 1, 2)), dict(ch_mult=(1, 2, 2, 2), z_channels=128)
TOKENIZERS = {
    "8x8x32-512-codes": tokenizers({}, {}),
    "32-32-64-channels": tokenizers(narrow, narrow),
    "2048-codes": tokenizers(dict(codebook_size=2048), {}),
    "4x4x128": tokenizers(coarse, coarse)}
MAR = {  # tokenizers, and the generator on their latents
    "mar-8x8x32": ("8x8x32-512-codes", tiny),
    "mar-4x4x128": ("4x4x128", tiny),
    "mar-4x4x128-wide": ("4x4x128", generator(dim=320, heads=5, head_width=512))}
PRESETS |= GENERATORS | TOKENIZERS | {name: preset for name, (_, preset) in MAR.items()}


@torch.inference_mode()
def reconstruct(path, images):
    """The tokenizers of the run PATH on images -> codes and latents, and the decibels of both with the codes in use."""
    vq, kl = (checkpoints.load_model(f"{path}/{kind}.pt", kind) for kind in ("vq", "kl"))
    x = data.to_float(images)
    codes, latents = vq.encode(x), kl.sample(kl.encode(x), generator=rng("cpu", "tokens"))
    decibel = lambda y: float(-10 * (((y.clamp(-1, 1) - x) / 2) ** 2).mean((1, 2, 3)).log10().mean())  # as in fid.py
    return codes, latents, {"vq": decibel(vq.decode(codes)), "kl": decibel(kl.decode(latents)),
                            "codes": len(codes.unique()), "steps": kl.about["step"]}


def compare_tokenizers(out, folder, pictures):
    images, classes = held_out(pictures, data.find_images(folder)[2])

    def make_tokenizers():
        run(__file__, "train", TOKENIZER_SECONDS, "--stage", 0, "--preset", name, "--data", folder, "--run", path,
            "--grid-every", 0)
        return reconstruct(path, images)[2]

    def make_generator():
        if not os.path.exists(f"{base}/cache/header.json"):
            run(ROOT / "data.py", "--images", folder, "--run", base, "--out", f"{base}/cache")
        train_generator(__file__, path, base, f"{base}/cache", GENERATOR_SECONDS, name, "--fusion", "none")
        codes, latents, _ = reconstruct(base, images)
        return measure_generator(path, (codes, codes, latents, classes), images)

    for name in TOKENIZERS:
        path = f"{out}/{name}"
        once(path, make_tokenizers)
    for name, (tokenizers_of, _) in MAR.items():
        path, base = f"{out}/{name}", f"{out}/{tokenizers_of}"
        once(path, make_generator)


def compare_generators(out, base, cache, folder):
    rows = [(name, tiny.generator.fusion, "ground_truth") for name in GENERATORS]
    for chosen, seeds in ((rows[:1], (0, 1, 2)), (rows[1:], (0,))):
        compare(__file__, chosen, GENERATOR_SECONDS, ("true", "frechet", "steps", "cpu"), out, base, cache,
                held_out(folder, data.read_header(cache)["classes"]), seeds=seeds)


def main():
    commands = {3: compare_tokenizers, 4: compare_generators}
    if len(sys.argv) - 1 not in commands:
        raise UserError("give OUT RUN CACHE PICTURES, or OUT IMAGES PICTURES; the head of the file explains both.")
    commands[len(sys.argv) - 1](*sys.argv[1:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_for(*sys.argv[2:])
    run_script(main)
