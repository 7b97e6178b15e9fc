"""Sampling: class -> prior -> codes -> fusion -> masked generator and diffusion head -> latents -> KL decoder -> image.

    python sample.py --class 207                              a grid of 16 golden retrievers, sample.png, from weights/tiny
    python sample.py --class "golf ball" --num 4 --seed 3     by name, other pictures
    python sample.py --class all --out all.png                every class the run knows
    python sample.py --run runs/mine --class 7 --show-coarse  another run; decoded codes beside the final pictures
    torchrun --nproc_per_node=8 sample.py --num 50000 --class all --out DIR    files DIR/<class id>/<index>.png; run again to go on

A picture depends on (seed, its index) and nothing else: not on the batch size, not on the number of GPUs (to rounding).
Other flags override what the run recommends (`presets.Sampling`).
"""
import argparse
import os
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
from data import read_classes
from generator import Generator
from presets import Sampling
from prior import Prior
from runtime import UserError, autocast, barrier, print0, rng, run_script, setup
from tokenizers import KL, VQ

MODULES = {"vq": VQ, "kl": KL, "prior": Prior, "generator": Generator}


@dataclass
class Run:
    """The models of a run directory, in eval mode on one device. classes: [external id, name] by index. vq, prior: None for fusion none."""
    kl: KL
    generator: Generator
    vq: VQ | None
    prior: Prior | None
    classes: list
    sampling: Sampling
    device: torch.device


@dataclass
class Samples:
    """images and coarse (the decoded codes): uint8 [B, 3, H, W]; codes [B, L] int64. coarse and codes are None without a prior."""
    images: torch.Tensor
    coarse: torch.Tensor | None
    codes: torch.Tensor | None


# -------------------------------------------------------------------------------------------------------------- run

def load_run(path: str, device="cpu") -> Run:
    """Reads RUN/{kl,generator}.pt and, unless the generator has fusion none, RUN/{vq,prior}.pt. Own and official files."""
    if not os.path.isdir(path):
        raise UserError(f"there is no run directory {path}; train one (train.py) or leave --run away for weights/tiny.")
    device, models, about = torch.device(device), {"vq": None, "prior": None}, {}
    for kind in ("generator", "kl", "vq", "prior"):
        if kind in models and models["generator"].cfg.fusion == "none":
            continue
        file = os.path.join(path, f"{kind}.pt")
        content = checkpoints.read(file)
        if kind == "generator" and "format" in content:
            about = content
        config, state = checkpoints.parse(file, kind, content)
        models[kind] = MODULES[kind](config)
        models[kind].load_state_dict(state)
        models[kind].eval().requires_grad_(False).to(device)
    n = models["generator"].cfg.classes
    named = read_classes(os.path.join(path, "classes.tsv"))
    classes = about.get("classes") or (list(named.values()) if named else [[i, str(i)] for i in range(n)])
    check_fit(path, models, classes)
    if "latent_scale" in about:  # the scale it was trained with; equals the KL file's unless that had none
        models["kl"].cfg = replace(models["kl"].cfg, scale=about["latent_scale"])
    return Run(**models, classes=classes, sampling=Sampling(**about.get("sampling", {})), device=device)


def check_fit(path, models, classes):
    """The files of a run directory must belong together."""
    g, kl, vq, prior = (models[k].cfg if models[k] else None for k in ("generator", "kl", "vq", "prior"))
    problems = [(len(classes) != g.classes, f"{len(classes)} class names for {g.classes} classes"),
                (kl.z_channels != g.token_dim, f"kl.pt has {kl.z_channels} channels, generator.pt {g.token_dim}")]
    if prior:
        problems += [((prior.vocab, prior.vocab) != (vq.codebook_size, g.vocab), f"vq.pt has {vq.codebook_size} codes, prior.pt "
                      f"{prior.vocab}, generator.pt {g.vocab}"),
                     (prior.classes != g.classes, f"prior.pt has {prior.classes} classes, generator.pt {g.classes}"),
                     (prior.grid != g.grid, f"prior.pt has a {prior.grid}x{prior.grid} grid, generator.pt {g.grid}x{g.grid}")]
    for wrong, text in problems:
        if wrong:
            raise UserError(f"the files of {path} do not belong together: {text}.")


def find_class(classes: list, text: str) -> int:
    """External id or name -> index."""
    for i, (identity, name) in enumerate(classes):
        if text.strip().lower() in (str(identity), name.lower(), name.lower().replace(" ", "_")):
            return i
    known = ", ".join(f"{identity} {name}" for identity, name in classes[:40]) + (", ..." if len(classes) > 40 else "")
    raise UserError(f"this run knows no class {text!r}; it knows: {known}")


# ----------------------------------------------------------------------------------------------------------- sample

def to_uint8(images):
    """[-1, 1] float -> uint8, MAR's rounding: round(clip((x + 1) / 2 * 255, 0, 255))."""
    if not torch.isfinite(images).all():
        raise UserError("the models produced values that are not finite; the weights are damaged or were trained badly.")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


@torch.inference_mode()
def generate(run: Run, classes, seed: int = 0, indices=None, sampling: Sampling | None = None, progress=None) -> Samples:
    """classes: B class indices (0..n-1) -> B pictures. indices: the global index of each, from which its noise is seeded.

    progress: called with a number from 0 to 1, the share of work done since the last call.
    """
    s, B = sampling or run.sampling, len(classes)
    classes = torch.as_tensor(classes, dtype=torch.long).to(run.device)
    generators = [rng(run.device, "sample", seed, i) for i in (range(B) if indices is None else indices)]
    step = (lambda share: lambda: progress(share)) if progress else lambda share: None
    codes = coarse = None
    with autocast(run.device):
        if run.prior is not None:
            codes = run.prior.generate(classes, s.prior_cfg, s.prior_temperature, s.top_k, s.top_p, generators,
                                       progress=step(0.1 / run.prior.cfg.grid**2))
            coarse = to_uint8(run.vq.decode(codes))
        latents = run.generator.generate(classes, codes, s.iterations, s.steps, s.cfg, s.schedule, s.temperature, generator=generators,
                                         t_max=s.t_max, progress=step((0.9 if run.prior else 1.0) / s.iterations))
        images = to_uint8(run.kl.decode(latents))
    return Samples(images, coarse, codes)


def grid(images: torch.Tensor, columns: int | None = None, pad: int = 2) -> Image.Image:
    """uint8 [B, 3, H, W] -> one picture, white between the images."""
    B, _, H, W = images.shape
    columns = columns or int(np.ceil(B**0.5))
    rows = -(-B // columns)
    out = np.full((rows * (H + pad) - pad, columns * (W + pad) - pad, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (H + pad), i % columns * (W + pad)
        out[y:y + H, x:x + W] = image
    return Image.fromarray(out)


def save_picture(image: Image.Image, path: str):
    """Writes a PNG that is either complete or not there."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        image.save(f"{path}.tmp{os.getpid()}", format="PNG")
        os.replace(f"{path}.tmp{os.getpid()}", path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="class_", required=True, metavar="CLASS", help="id or name, several with commas, or all")
    parser.add_argument("--run", help="run directory (default: weights/tiny of this repository)")
    parser.add_argument("--num", type=int, help="pictures in all (default: 16, for several classes 8 each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png", help="FILE.png for a grid, or a folder for one file a picture")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn together")
    parser.add_argument("--show-coarse", action="store_true", help="the decoded codes beside each picture")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be drawn, and stop")
    for f in fields(Sampling):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f"default: the run's; {f.default} where it says nothing")
    args = parser.parse_args()

    world = setup(args.device)
    run = load_run(args.run or os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "tiny"), world.device)
    s = replace(run.sampling, **{f.name: v for f in fields(Sampling) if (v := getattr(args, f.name)) is not None})
    L = run.generator.cfg.grid**2
    checks = [(1 <= s.iterations <= L, f"--iterations must be between 1 and {L}, the tokens of an image"),
              (0 <= s.t_max <= 999, "--t-max must be between 0 and 999"),
              (1 <= s.steps <= s.t_max + 1, f"--steps must be between 1 and {s.t_max + 1}"),
              (s.schedule in ("linear", "constant"), "--schedule must be linear or constant"),
              (s.prior_temperature > 0 and s.temperature >= 0, "temperatures must be positive; for the likeliest codes use --top-k 1"),
              (s.top_k >= 0 and 0 < s.top_p <= 1, "--top-k must be at least 0, --top-p above 0 and at most 1"),
              (args.num is None or args.num >= 1, "--num must be at least 1"), (args.batch >= 1, "--batch must be at least 1")]
    for fine, text in checks:
        if not fine:
            raise UserError(text + ".")
    labels = list(range(len(run.classes))) if args.class_ == "all" else [find_class(run.classes, t) for t in args.class_.split(",")]
    num = args.num or (16 if len(labels) == 1 else 8 * len(labels))
    to_grid = args.out.lower().endswith(".png")
    if to_grid and (world.size > 1 or num > 256):
        raise UserError("for more than 256 pictures or several ranks give a folder: --out DIR.")
    print0(f"{num} pictures of {len(labels)} class{'es' if len(labels) > 1 else ''}, seed {args.seed}: "
           + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in asdict(s).items()))
    if args.dry_run:
        return

    # Picture i is of class labels[i % n], so that any number of pictures is balanced; a grid shows one class a row.
    path = lambda i: os.path.join(args.out, str(run.classes[labels[i % len(labels)]][0]), f"{i:06d}.png")
    mine = range(world.rank, num, world.size)
    todo = list(mine) if to_grid else [i for i in mine if not os.path.exists(path(i))]
    start, pictures = time.time(), {}
    with tqdm(total=len(todo), unit=" images", disable=world.rank > 0, bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]") as bar:
        for chunk in (todo[a:a + args.batch] for a in range(0, len(todo), args.batch)):
            out = generate(run, [labels[i % len(labels)] for i in chunk], args.seed, chunk, s, lambda share: bar.update(share * len(chunk)))
            images = out.images
            if args.show_coarse and out.coarse is not None:
                images = torch.cat([out.coarse, out.images], dim=3)
            for i, image in zip(chunk, images.cpu()):
                if to_grid:
                    pictures[i] = image
                else:
                    save_picture(Image.fromarray(image.permute(1, 2, 0).numpy()), path(i))
    if to_grid:
        order = sorted(pictures, key=lambda i: (i % len(labels), i // len(labels)))
        save_picture(grid(torch.stack([pictures[i] for i in order]), -(-num // len(labels)) if len(labels) > 1 else None), args.out)
    barrier()
    print0(f"{args.out}: {num} pictures, {time.time() - start:.1f} s")


if __name__ == "__main__":
    run_script(main)
