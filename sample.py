"""Sampling: class -> prior -> codes -> fusion -> masked generator and diffusion head -> latents -> KL decoder -> image.

    python sample.py --class 207                              # 16 golden retrievers by weights/tiny -> sample.png
    python sample.py --class "golf ball" --num 4 --seed 3     # by name, other pictures
    python sample.py --class all --out all.png                # every class the run knows
    python sample.py --run runs/mine --class 7 --show-coarse  # another run; decoded codes beside the final pictures
    python sample.py --class 497 --frames church.gif          # beside sample.png: the pictures after every iteration
    python sample.py --class church --edit IMAGE --keep MASK  # keeps what is white in the mask, draws the rest
    python sample.py --class church --like IMAGE              # the codes of a picture, drawn anew: variations
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --class all --out DIR     # DIR/<class id>/<index>.png
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --class all --out X.npz   # folder X, then one file

The last two, run again, write what is missing.

A picture depends on (seed, its index) and the kind of device, to rounding: not on batch size or number of GPUs.
Other flags override what the run recommends (`presets.Sampling`).
"""
import argparse
import glob
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
from data import center_crop, read_image, to_float
import fast
from generator import Generator
from presets import Sampling
from prior import Prior
from runtime import UserError, autocast, barrier, print0, rng, run_script, setup, sweep, write_file
from tokenizers import KL, VQ


@dataclass
class Run:
    """The models of a run directory, in eval mode on one device; vq and prior are None if it needs no codes."""
    kl: KL
    generator: Generator
    vq: VQ | None
    prior: Prior | None
    classes: list        # [external id, name] by index
    sampling: Sampling
    device: torch.device
    graphs: fast.Graphs | None = None
    null: fast.Prepared | None = None  # the generator's unconditional condition, from the first pictures on


@dataclass
class Samples:
    """images and coarse, the decoded codes: uint8 [B, 3, H, W]; codes [B, L]. Without a prior the last two are None."""
    images: torch.Tensor
    coarse: torch.Tensor | None
    codes: torch.Tensor | None


@dataclass
class Start:
    """A picture to start from. Codes and latents that are given stay as they are, to the bit."""
    codes: torch.Tensor | None   # [L], -1 where the prior draws
    latents: torch.Tensor        # [L, C]
    keep: torch.Tensor           # [L] bool, latents that stay
    shown: Samples               # the picture, grey where it is drawn anew; its own decoded codes


# -------------------------------------------------------------------------------------------------------------- run

def load_run(path: str, device="cpu") -> Run:
    """Reads RUN/{kl,generator}.pt and, if the generator's fusion reads codes, RUN/{vq,prior}.pt; own or official."""
    if not os.path.isdir(path):
        raise UserError(f"there is no run directory {path}; train one (train.py) or leave --run away for weights/tiny.")
    file = lambda kind: os.path.join(path, f"{kind}.pt")
    generator = checkpoints.load_model(file("generator"), "generator", device)
    kl, vq, prior = checkpoints.load_model(file("kl"), "kl", device), None, None
    if generator.fusion.reads_codes:
        vq, prior = (checkpoints.load_model(file(kind), kind, device) for kind in ("vq", "prior"))
    classes = generator.about.get("classes") or official_classes(path, generator.config.classes)
    run = Run(kl, generator, vq, prior, classes, Sampling(**generator.about.get("sampling", {})), torch.device(device))
    check_fit(path, run)
    if "latent_scale" in generator.about:  # of its training: the KL file's, or measured where that has none
        kl.set_scale(generator.about["latent_scale"])
    return run


def official_classes(path, n):
    """Classes of a file that does not name them: ids are indices, names come from RUN/classes.tsv if there is one."""
    named = checkpoints.read_classes(os.path.join(path, "classes.tsv"))
    classes = sorted(named.values()) if named else [[i, str(i)] for i in range(n)]
    if [c[0] for c in classes] != list(range(n)):
        raise UserError(f"{path}/classes.tsv must give each id from 0 to {n - 1} once, for {n} classes.")
    return classes


def check_fit(path, run: Run):
    """The files of a run directory must belong together."""
    g, kl = run.generator.config, run.kl.config
    problems = [(len(run.classes) != g.classes, f"{len(run.classes)} class names for {g.classes} classes"),
                (run.vq and run.vq.stride != run.kl.stride, "vq.pt and kl.pt have tokens of other sizes"),
                (kl.z_channels != g.token_dim, f"kl.pt has {kl.z_channels} channels, generator.pt {g.token_dim}")]
    if run.prior:
        vq, prior = run.vq.config, run.prior.config
        problems += [(vq.codebook_size != g.vocab, f"vq.pt has {vq.codebook_size} codes, generator.pt {g.vocab}"),
                     (prior.vocab != g.vocab, f"prior.pt has {prior.vocab} codes, generator.pt {g.vocab}"),
                     (prior.classes != g.classes, f"prior.pt has {prior.classes} classes, generator.pt {g.classes}"),
                     (prior.grid != g.grid, f"prior.pt has {prior.grid**2} tokens an image, generator.pt {g.grid**2}"),
                     (run.prior.about.get("classes", run.classes) != run.classes,
                      "prior.pt and generator.pt have other classes, or another order of them")]
    for model in (run.prior, run.generator):
        for kind, tokenizer in (("vq", run.vq), ("kl", run.kl)):
            trained_with = model.about.get("tokenizers", {}).get(kind) if model and tokenizer else None
            other = trained_with and trained_with != checkpoints.checksum(tokenizer.state_dict())
            problems.append((other, f"{kind}.pt is not the tokenizer that the others were trained with"))
    for wrong, text in problems:
        if wrong:
            raise UserError(f"the files of {path} do not belong together: {text}.")


def find_classes(classes: list, text: str) -> list[int]:
    """External ids or names, separated by commas, or `all` -> indices."""
    if text == "all":
        return list(range(len(classes)))
    found = [i for i, (identity, name) in enumerate(classes)
             if text.strip().lower() in (str(identity), name.lower(), name.lower().replace(" ", "_"))]
    if len(found) == 1:
        return found
    if len(found) > 1:
        ids = ", ".join(str(classes[i][0]) for i in found)
        raise UserError(f"{text!r} is the name of several classes; give one of the ids {ids}.")
    if "," in text:  # after the whole text: some of ImageNet's names have commas
        return [i for part in text.split(",") for i in find_classes(classes, part)]
    known = ", ".join(f"{identity} {name}" for identity, name in classes[:40]) + (", ..." if len(classes) > 40 else "")
    raise UserError(f"this run knows no class {text!r}; it knows: {known}")


# ---------------------------------------------------------------------------------------------------------- a picture

@torch.inference_mode()
def start_from(run: Run, path: str, mask: str | None = None) -> Start:
    """--edit, with a mask: codes and latents where it is white. --like, without: all codes, no latents."""
    f, h = run.kl.stride, run.generator.config.grid
    pictures = []
    for file in [path, mask] if mask else [path]:
        pixels = read_image(file, None, upright=True)                                            # [3, H, W]
        if pixels is None:
            raise UserError(f"{file} is not there, or is no readable image.")
        pictures.append(Image.fromarray(pixels.transpose(1, 2, 0)))
    if len({p.size for p in pictures}) > 1:
        raise UserError(f"{mask} must be as large as {path}: {pictures[0].width} x {pictures[0].height} pixels.")
    pixels, *white = (np.asarray(center_crop(p, h * f)).transpose(2, 0, 1).copy() for p in pictures)
    keep = torch.zeros(h, h, dtype=torch.bool, device=run.device)
    if mask:  # a token stays if all of its pixels do, after the crop to what the run draws
        white = torch.from_numpy(white[0].min(0) >= 128).to(run.device)                          # [h*f, h*f]
        keep = white.view(h, f, h, f).all(3).all(1)                                              # [h, h]
        if keep.all():
            raise UserError(f"{mask} keeps all {h * h} tokens; black in it says what to draw anew.")
        if not keep.any():
            raise UserError(f"{mask} keeps none of the {h * h} tokens; white in it says what stays.")
    x, codes, coarse = to_float(pixels)[None].to(run.device), None, None
    # the mean of the posterior, so that a picture has one reading
    moments = run.kl.encode(x)
    latents = run.kl.sample(moments, torch.zeros_like(moments.chunk(2, 1)[0]))[0]
    if run.vq is not None:
        codes = run.vq.encode(x)[0]
        coarse = to_uint8(run.vq.decode(codes[None]))
        codes = torch.where(keep.flatten(), codes, -1) if mask else codes
    stays = keep.repeat_interleave(f, 0).repeat_interleave(f, 1) if mask else torch.ones_like(x[0], dtype=torch.bool)
    shown = torch.where(stays, torch.from_numpy(pixels).to(run.device), 128).to(torch.uint8)
    return Start(codes, latents, keep.flatten(), Samples(shown[None], coarse, codes))


# ----------------------------------------------------------------------------------------------------------- sample

def to_uint8(images):
    """[-1, 1] float -> uint8, MAR's rounding: round(clip((x + 1) / 2 * 255, 0, 255))."""
    if not torch.isfinite(images).all():
        raise UserError("the models gave values that are not finite; the weights are damaged or were trained badly.")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def annealed(text: str, iterations: int) -> list[int]:
    """"50:5" -> head steps per iteration, linearly from 50 to 5. DiSA (2505.20297): late tokens are nearly known."""
    try:
        first, last = (int(n) for n in text.split(":"))
    except ValueError:
        raise UserError(f"--anneal takes two numbers of steps, as in 50:5, not {text!r}.") from None
    return [round(first + (last - first) * k / max(iterations - 1, 1)) for k in range(iterations)]


@torch.inference_mode()
def generate(run: Run, classes, seed=0, indices=None, sampling: Sampling | None = None, progress=None,
             start: Start | None = None, frames: list | None = None) -> Samples:
    """classes: B class indices (0..n-1) -> B pictures. indices: the global index of each, which seeds its noise.

    progress: called with a number from 0 to 1, the share of work done since the last call. start: what all B start
    from. frames: gets the pictures after every iteration, uint8 [B, 3, H, W], unknown latents decoded as zeros.
    """
    s, B = sampling or run.sampling, len(classes)
    steps = annealed(s.anneal, s.iterations) if s.anneal else s.steps
    classes = torch.as_tensor(classes, dtype=torch.long).to(run.device)
    generators = [rng(run.device, "sample", seed, i) for i in (range(B) if indices is None else indices)]
    step = lambda share: (lambda: progress(share)) if progress else lambda: None
    for_all = lambda x: x.expand(B, *x.shape)
    codes = coarse = None
    seen = []  # latents after every iteration
    with autocast(run.device):  # the prior and the masked autoencoder; the head stays in fp32
        if run.prior is not None:
            codes = fast.generate_codes(run.prior, classes, s.prior_cfg, s.prior_temperature, s.top_k, s.top_p, generators,
                                       watch=step(0.1 / run.prior.config.grid**2),
                                       given=start and for_all(start.codes))
        if run.null is None and s.cfg != 1:
            run.null = fast.null_condition(run.generator)
        advance, shown = step((0.9 if run.prior else 1.0) / s.iterations), seen.append if frames is not None else id
        latents = fast.generate(run.generator, classes, codes, s.iterations, steps, s.cfg, s.schedule, s.temperature,
                                         generator=generators, t_max=s.t_max, cfg_from=s.cfg_from, null=run.null,
                                start=start and (for_all(start.latents), for_all(start.keep)), graphs=run.graphs,
                                watch=lambda x: (advance(), shown(x)))
    if run.prior is not None:
        coarse = to_uint8(run.vq.decode(codes))
    if frames is not None:
        frames += [to_uint8(run.kl.decode(x)) for x in seen]
    return Samples(to_uint8(run.kl.decode(latents)), coarse, codes)


def grid(images: torch.Tensor, columns: int, pad: int = 2) -> Image.Image:
    """uint8 [B, 3, H, W] -> one picture, white between the images."""
    B, _, H, W = images.shape
    rows = -(-B // columns)
    out = np.full((rows * (H + pad) - pad, columns * (W + pad) - pad, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (H + pad), i % columns * (W + pad)
        out[y:y + H, x:x + W] = image
    return Image.fromarray(out)


def save_picture(image: Image.Image, path: str, format="PNG", **options):
    write_file(path, lambda f: image.save(f, format, **options))


def pack(paths, ids, out):
    """Writes PNG files as one .npz: arr_0 uint8 [N, H, W, 3], arr_1 class ids [N]."""
    try:
        pictures = np.stack([np.asarray(Image.open(p)) for p in paths])
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"a picture beside {out} cannot be read: {error}; remove it and run again.") from None
    write_file(out, lambda f: np.savez(f, arr_0=pictures, arr_1=np.array(ids)))


def picture_name(run: Run, labels: list, i: int) -> str:
    """Picture i is of class labels[i % n], so that any number of pictures is balanced."""
    return os.path.join(str(run.classes[labels[i % len(labels)]][0]), f"{i:06d}.png")


def describe(run: Run, s: Sampling, seed: int, labels: list, start: Start | None = None) -> dict:
    """All that pictures depend on. Weights are the EMA wherever a file has one."""
    models = {kind: getattr(run, kind) for kind in ("vq", "kl", "prior", "generator")}
    return {"sampling": asdict(s), "seed": seed, "classes": labels, "ema": True,
            "start": start and checkpoints.checksum({**vars(start), "shown": None}),
            "weights": {kind: checkpoints.checksum(m.state_dict()) for kind, m in models.items() if m}}


def read_settings(folder) -> dict | None:
    """What `same_settings` wrote about the pictures in a folder, if anything."""
    path = os.path.join(folder, "settings.json")
    try:
        with open(path) as f:
            return dict(json.load(f))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot use {path}: {error}; choose another folder.") from None


def same_settings(out, settings, num, world):
    """Writes settings.json into the folder of pictures; refuses one whose pictures were made with other settings.

    `num`, the most pictures asked for so far, lets fid.py see that some are missing.
    """
    if world.rank == 0:
        there = read_settings(out)
        if there is None and glob.glob(os.path.join(glob.escape(out), "*", "[0-9]*.png")):
            raise UserError(f"{out} holds pictures that sample.py knows nothing of; choose another --out.")
        there = there or {}
        if changed := [k for k in settings if there and there.get(k) != settings[k]]:
            raise UserError(f"{out} holds pictures made with other {', '.join(changed)}; choose another --out.")
        sweep(out)
        content = json.dumps({**settings, "num": max(num, there.get("num", 0))}, indent=1)
        write_file(os.path.join(out, "settings.json"), lambda f: f.write(content.encode()))
    barrier()


def add_sampling_flags(parser):
    for f in fields(Sampling):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type,
                            help=f"{f.metadata['help']} (default: the run's, or {f.default!r})")


def choose_sampling(args, run: Run) -> Sampling:
    """What the run recommends, under the flags that were given."""
    s = replace(run.sampling, **{f.name: v for f in fields(Sampling) if (v := getattr(args, f.name)) is not None})
    L = run.generator.config.grid**2
    steps = annealed(s.anneal, s.iterations) if s.anneal else [s.steps]
    checks = [(1 <= s.iterations <= L, f"--iterations must be between 1 and {L}, the tokens of an image"),
              (0 <= s.t_max <= 999, "--t-max must be between 0 and 999"),
              (1 <= min(steps, default=1) <= max(steps, default=1) <= s.t_max + 1,
               f"--steps must be between 1 and {s.t_max + 1}, those of --anneal too"),
              (s.schedule in ("linear", "constant"), "--schedule must be linear or constant"),
              (s.prior_temperature > 0 and s.temperature >= 0,
               "--prior-temperature must be above 0 (see also --top-k 1), --temperature not negative"),
              (all(map(math.isfinite, (s.cfg, s.prior_cfg, s.temperature, s.prior_temperature))),
               "--cfg, --prior-cfg and the temperatures must be finite"),
              (s.top_k >= 0 and 0 < s.top_p <= 1, "--top-k must be at least 0, --top-p above 0 and at most 1")]
    for fine, text in checks:
        if not fine:
            raise UserError(text + ".")
    return s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="class_", required=True, metavar="CLASS",
                        help="id or name, several with commas, or all")
    parser.add_argument("--run", help="run directory (default: weights/tiny of this repository)")
    parser.add_argument("--num", type=int, help="pictures in all (default: 16, for several classes 8 each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png", help="FILE.png for a grid, a folder, or FILE.npz and its folder")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn together")
    parser.add_argument("--show-coarse", action="store_true", help="the decoded codes beside each picture")
    parser.add_argument("--frames", metavar="FILE.gif", help="the grid after every iteration")
    parser.add_argument("--edit", metavar="IMAGE", help="draw a part of this picture anew, see --keep")
    parser.add_argument("--keep", metavar="MASK", help="white: what stays of it; as large as the picture")
    parser.add_argument("--like", metavar="IMAGE", help="take the codes of this picture")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--graphs", action="store_true", help="replay the head's step loop as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="torch.compile the generator's blocks")
    parser.add_argument("--dry-run", action="store_true", help="say what would be drawn, and stop")
    add_sampling_flags(parser)
    args = parser.parse_args()

    world = setup(args.device)
    here = os.path.dirname(os.path.abspath(__file__))
    run = load_run(args.run or os.path.join(here, "weights", "tiny"), world.device)
    s = choose_sampling(args, run)
    if args.num is not None and args.num < 1 or args.batch < 1:
        raise UserError("--num and --batch must be at least 1.")
    if "" in (args.edit, args.keep, args.like):
        raise UserError("--edit, --keep and --like take the name of a file.")
    if (args.edit is None) != (args.keep is None):
        raise UserError("--edit IMAGE and --keep MASK need each other.")
    if args.edit and args.like:
        raise UserError("--edit and --like exclude each other.")
    if args.like and run.prior is None:
        raise UserError("--like: this run has no codes to take.")
    if args.frames and not args.frames.lower().endswith(".gif"):
        raise UserError("--frames takes FILE.gif.")
    if args.graphs:
        if run.device.type != "cuda":
            raise UserError("--graphs is for CUDA.")
        run.graphs = fast.Graphs()
    if args.compile:
        fast.compile_blocks()
    labels = find_classes(run.classes, args.class_)
    num = args.num or (16 if len(labels) == 1 else 8 * len(labels))
    to_grid = args.out.lower().endswith(".png")
    if args.out.lower().endswith((".jpg", ".jpeg", ".webp", ".gif", ".npy")):
        raise UserError(f"--out takes FILE.png for a grid, FILE.npz or a folder, not {args.out}.")
    folder = args.out.removesuffix(".npz")
    if to_grid and (world.size > 1 or num > 256):
        raise UserError("for more than 256 pictures or several ranks give a folder: --out DIR.")
    if args.frames and not to_grid:
        raise UserError("--frames shows a grid, so --out must be FILE.png.")
    if args.show_coarse and run.prior is None:
        raise UserError("--show-coarse: this run has no codes to show.")
    start = start_from(run, args.edit or args.like, args.keep) if args.edit or args.like else None
    if start and (free := int((~start.keep).sum())) < s.iterations:
        print0(f"note: {free} tokens to draw, so as many iterations")
        s = replace(s, iterations=free)
    print0(f"{num} pictures of {len(labels)} class{'es' if len(labels) > 1 else ''}, seed {args.seed}: "
           + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in asdict(s).items()))
    if args.dry_run:
        return

    if not to_grid:
        same_settings(folder, {**describe(run, s, args.seed, labels, start), "coarse": args.show_coarse}, num, world)
    path = lambda i: os.path.join(folder, picture_name(run, labels, i))
    mine = range(world.rank, num, world.size)
    todo = list(mine) if to_grid else [i for i in mine if not os.path.exists(path(i))]
    begun, pictures, frames = time.time(), {}, {}
    beside = lambda o: torch.cat([o.coarse, o.images], dim=3) if args.show_coarse else o.images
    look = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
    with tqdm(total=len(todo), disable=world.rank > 0, bar_format=look) as bar:
        for chunk in (todo[a:a + args.batch] for a in range(0, len(todo), args.batch)):
            advance = lambda share: bar.update(min(share * len(chunk), bar.total - bar.n))
            seen = [] if args.frames else None
            out = generate(run, [labels[i % len(labels)] for i in chunk], args.seed, chunk, s, advance, start, seen)
            for k, i in enumerate(chunk):
                image = beside(out)[k].cpu()
                if to_grid:
                    pictures[i] = image
                    frames[i] = [frame[k].cpu() for frame in seen or ()]
                else:
                    save_picture(Image.fromarray(image.permute(1, 2, 0).numpy()), path(i))
    if to_grid:  # one class a row
        several = len(labels) > 1
        rows = len(labels) if several else int(num**0.5)
        columns = -(-num // rows)
        places = [[c * rows + r if several else r * columns + c for c in range(columns)] for r in range(rows)]

        def arrange(pictures, first):
            """A grid; before each row the picture it started from, if any."""
            white = torch.full_like(pictures[0], 255)
            cells = [x for row in places for x in first + [pictures.get(i, white) for i in row]]
            return grid(torch.stack(cells), columns + len(first))
        save_picture(arrange(pictures, [beside(start.shown)[0].cpu()] if start else []), args.out)
        if args.frames:
            still = [start.shown.images[0].cpu()] if start else []
            film = [arrange({i: f[k] for i, f in frames.items()}, still) for k in range(s.iterations)]
            save_picture(film[0], args.frames, "GIF", save_all=True, append_images=film[1:], loop=0,
                         duration=[120] * (len(film) - 1) + [2000])  # milliseconds
    barrier()
    if folder != args.out and world.rank == 0:
        pack([path(i) for i in range(num)], [run.classes[labels[i % len(labels)]][0] for i in range(num)], args.out)
    barrier()
    print0(f"{args.out}: {num} pictures, {time.time() - begun:.1f} s")


if __name__ == "__main__":
    run_script(main)
