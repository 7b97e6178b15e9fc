"""Sampling: class -> prior -> codes -> fusion -> masked generator and diffusion head -> latents -> KL decoder -> image.

    python sample.py --class 207                              # 16 golden retrievers by weights/tiny -> sample.png
    python sample.py --class "golf ball" --num 4 --seed 3     # by name, other pictures
    python sample.py --run runs/mine --class all              # another run, every class (over 256: --out DIR)
    python sample.py --class church --show-coarse             # the decoded codes beside each picture
    python sample.py --class 497 --frames church.gif          # also a film: the pictures after every iteration
    python sample.py --class church --edit IMAGE --keep MASK  # keeps what is white in the mask, draws the rest
    python sample.py --class church --like IMAGE              # keeps the codes of IMAGE, draws new details: variations
    python sample.py --about sample.png                       # how this picture was made, and the command for it
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --class all --out DIR   # files; DIR.npz: also one array

A command that writes a folder draws only the missing pictures when it runs again. A picture depends on the seed, its
index and the kind of device; batch size and number of GPUs change its rounding only.

From Python: `load_run`, `generate`; docs/sampling.md has an example. Classes: a string is a name or an id, as after
--class; a tensor holds indices; a number is an id or an index, and is refused if these are two classes."""
import argparse
import glob
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import checkpoints
import fast
from data import center_crop, open_image, to_float
from faults import run_script
from generator import Generator
from presets import Sampling
from prior import Prior
from runtime import UserError, autocast, barrier, print0, read_json, refuse, rng, setup, sweep, write_file, write_json
from tokenizers import KL, VQ

BAR = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "tiny")


# ------------------------------------------------------------------------------------------------------ run and classes

@dataclass
class Run:
    """The models of a run directory, in eval mode on one device; vq and prior are None if the fusion reads no codes."""
    kl: KL
    generator: Generator
    vq: VQ | None
    prior: Prior | None
    classes: list        # [external id, a number; name] by index
    sampling: Sampling   # what the run recommends
    device: torch.device
    graphs: fast.Graphs | None = None
    null: fast.Prepared | None = None  # the generator's null condition; the first call of `generate` computes it

    @property
    def pixels(self) -> int:  # side of a picture
        return self.generator.config.grid * self.kl.config.merge * self.kl.stride


def load_run(path: str, device="cpu") -> Run:
    """Reads PATH/{kl,generator}.pt and, if the generator's fusion reads codes, PATH/{vq,prior}.pt; ours or official."""
    if not os.path.isdir(path):
        raise UserError(f"there is no run directory {path}; train one (train.py), or omit --run to use weights/tiny.")
    load = lambda kind: checkpoints.load_model(os.path.join(path, f"{kind}.pt"), kind, device)
    generator, kl = load("generator"), load("kl")
    vq, prior = (load("vq"), load("prior")) if generator.fusion.reads_codes else (None, None)
    classes = generator.about.get("classes") or official_classes(path, generator.config.classes)
    run = Run(kl, generator, vq, prior, classes, Sampling(**generator.about.get("sampling", {})), torch.device(device))
    check_fit(path, run)
    kl.set_scale(generator.about.get("latent_scale", kl.config.scale))  # the generator was trained with its own scale
    refuse([(kl.config.scale is None, f"no file of {path} says the scale of the latents; train the generator again")])
    return run


def official_classes(path, n):
    """Classes of a file that does not name them: ids are indices, names come from PATH/classes.tsv if there is one."""
    named = checkpoints.read_classes(os.path.join(path, "classes.tsv"))
    classes = sorted(named.values()) if named else [[i, str(i)] for i in range(n)]
    refuse([([c[0] for c in classes] != list(range(n)),
             f"{path}/classes.tsv must give each id from 0 to {n - 1} once, for {n} classes")])
    return classes


def check_fit(path, run: Run):
    """The files of a run directory must belong together."""
    g, channels = run.generator.config, run.kl.config.token_dim
    problems = [(len(run.classes) != g.classes, f"{len(run.classes)} class names for {g.classes} classes"),
                (channels != g.token_dim, f"kl.pt has {channels} channels, generator.pt {g.token_dim}")]
    if run.prior:
        K, p = run.vq.config.codebook_size, run.prior.config
        problems += [(p.grid**2 != g.codes, f"prior.pt has {p.grid**2} codes an image, generator.pt {g.codes}"),
                     (p.grid * run.vq.stride != run.pixels, "vq.pt and kl.pt make pictures of different sizes"),
                     (not K == p.vocab == g.vocab, f"vq.pt, prior.pt, generator.pt: {K}, {p.vocab}, {g.vocab} codes"),
                     (p.classes != g.classes, f"prior.pt has {p.classes} classes, generator.pt {g.classes}"),
                     (run.prior.about.get("classes", run.classes) != run.classes,
                      "prior.pt and generator.pt have different classes, or a different order of them")]
    for model in filter(None, (run.prior, run.generator)):
        for kind, trained_with in model.about.get("tokenizers", {}).items():
            other = getattr(run, kind) and checkpoints.checksum(getattr(run, kind).state_dict()) != trained_with
            problems.append((other, f"{kind}.pt is not the tokenizer that the others were trained with"))
    refuse((wrong, f"the files of {path} do not belong together: {what}") for wrong, what in problems)


def find_classes(classes: list, wanted) -> list[int]:
    """Strings, numbers or a tensor, as the head of this file says -> indices."""
    n, is_text = len(classes), isinstance(wanted, str)
    if isinstance(wanted, torch.Tensor):
        wrong = ((wanted < 0) | (wanted > n)).any()
        refuse([(wrong, f"a tensor of classes holds indices: 0 to {n - 1} for this run, {n} for the null class")])
        return wanted.flatten().tolist()
    if hasattr(wanted, "__iter__") and not is_text:
        return [i for one in wanted for i in find_classes(classes, one)]
    if wanted == "all":
        return list(range(n))
    text = str(wanted).strip().lower()
    found = [i for i, (identity, name) in enumerate(classes)
             if text in (str(identity), name.lower(), name.lower().replace(" ", "_")) or not is_text and i == wanted]
    if not found and "," in text:  # the whole text comes first, because some of ImageNet's names have commas
        return find_classes(classes, wanted.split(","))
    ids = ", ".join(str(classes[i][0]) for i in found) + ", as a string, or indices as a tensor" * (not is_text)
    known = ", ".join(f"{identity} {name}" for identity, name in classes[:40]) + f" and {n - 40} more" * (n > 40)
    refuse([(len(found) > 1, f"{wanted!r} stands for several classes; give one of the ids {ids}"),
            (not found, f"this run knows no class {wanted!r}; it knows: {known}")])
    return found


# -------------------------------------------------------------------------------------------------------------- drawing

@dataclass
class Samples:
    """B pictures, uint8 [B, 3, H, W]. Without a prior coarse and codes are None."""
    images: torch.Tensor
    coarse: torch.Tensor | None  # the decoded codes, as large as the images
    codes: torch.Tensor | None   # [B, L]
    frames: tuple = ()           # with frames=True: the images after every iteration, on the CPU

    def pil(self) -> list:  # the images as B PIL images, to show or save
        return [Image.fromarray(image) for image in self.images.permute(0, 2, 3, 1).cpu().numpy()]


@dataclass
class Start:
    """What is known of a picture before it is drawn. Known codes and latents stay as they are, to the bit."""
    codes: torch.Tensor | None   # all codes of an image, -1 where the prior draws; None without a prior
    latents: torch.Tensor        # [L, C]
    keep: torch.Tensor           # [L] bool, tokens whose latents are known
    shown: Samples               # of one picture, which each row begins with; --edit: grey where it is drawn


@torch.inference_mode()
def generate(run: Run, classes, seed=0, indices=None, sampling: Sampling | None = None, progress=None,
             start: Start | None = None, frames=False, plain=False, **settings) -> Samples:
    """B classes -> B pictures, drawn together.

    classes    names, ids or indices, as the head of this file says; in a tensor, index n of n classes is the null class
    indices    the numbers of the pictures, 0 to B-1 by default: each seeds the noise of its picture
    sampling   replaces what the run recommends; `settings` replace single fields of it, as in cfg=2.0
    progress   True shows a bar; a function gets the share of the work, out of 1, that was done since its last call
    start      what all pictures start from: start_edit or start_like
    frames     True also keeps the pictures after every iteration; latents that are not drawn yet are zero
    plain      True runs the textbook loops of prior.py and generator.py: the same pictures, to rounding"""
    s = check_sampling(run, replace(sampling or run.sampling, **settings), start)
    classes = torch.tensor(find_classes(run.classes, classes), dtype=torch.long, device=run.device)
    B, codes, seen = len(classes), None, []
    generators = [rng(run.device, "sample", int(seed), int(i)) for i in (range(B) if indices is None else indices)]
    with tqdm(total=B, bar_format=BAR, disable=progress is not True) as bar, autocast(run.device):  # diffloss: fp32
        advance = progress if callable(progress) else lambda share: bar.update(min(share * B, B - bar.n))

        def after_iteration(latents):
            advance((0.9 if run.prior else 1.0) / s.iterations)  # the prior takes about a tenth of the time
            if frames:
                seen.append(latents)

        if plain:
            draw_codes, draw_latents = Prior.generate, Generator.generate
        else:
            run.null = run.null or fast.prepare_null(run.generator)
            draw_codes, draw_latents = fast.generate_codes, partial(fast.generate, null=run.null, graphs=run.graphs)
        if run.prior is not None:
            codes = draw_codes(run.prior, classes, s.prior_cfg, s.prior_temperature, s.top_k, s.top_p, generators,
                               start and start.codes.expand(B, -1), lambda: advance(0.1 / run.prior.config.grid**2))
        latents = draw_latents(run.generator, classes, codes, s.iterations, head_steps(s), s.cfg, s.schedule,
                               s.temperature, generator=generators, t_max=s.t_max, cfg_from=s.cfg_from,
                               start=start and (start.latents.expand(B, -1, -1), start.keep.expand(B, -1)),
                               watch=after_iteration)
    coarse = None if codes is None else to_uint8(run.vq.decode(codes))
    seen = tuple(to_uint8(run.kl.decode(x)).cpu() for x in seen)
    return Samples(to_uint8(run.kl.decode(latents)), coarse, codes, seen)


def head_steps(s: Sampling) -> list[int]:
    """Steps of the diffusion head in each iteration. --anneal is DiSA's (2505.20297): late tokens need fewer steps."""
    try:
        first, last = map(int, s.anneal.split(":")) if s.anneal else (s.steps, s.steps)
    except ValueError:
        raise UserError(f"--anneal takes two numbers of steps, as in 50:5, not {s.anneal!r}.") from None
    return [round(first + (last - first) * k / max(s.iterations - 1, 1)) for k in range(s.iterations)]


def check_sampling(run: Run, s: Sampling, start: Start | None = None) -> Sampling:
    """Returns s, or raises the sentence that says what is wrong with it."""
    L = run.generator.config.grid**2 if start is None else int((~start.keep).sum())
    refuse([(not 1 <= s.iterations <= L, f"--iterations must be between 1 and {L}, the tokens to draw"),
            (not 0 <= s.t_max <= 999, "--t-max must be from 0 to 999"), (math.isnan(s.cfg_from), "--cfg-from is nan")])
    steps = head_steps(s)
    refuse([(not 1 <= min(steps) <= max(steps) <= s.t_max + 1,
             f"--steps must be between 1 and {s.t_max + 1}, and both numbers of --anneal too"),
            (s.schedule not in ("linear", "constant"), "--schedule must be linear or constant"),
            (not (0 < s.prior_temperature < math.inf and 0 <= s.temperature < math.inf),
             "--prior-temperature must be above 0 (see also --top-k 1), --temperature at least 0, both finite"),
            (not math.isfinite(s.cfg + s.prior_cfg), "--cfg and --prior-cfg must be finite"),
            (s.top_k < 0 or not 0 < s.top_p <= 1, "--top-k must be at least 0, --top-p above 0 and at most 1")])
    return s


def to_uint8(images):
    """[-1, 1] float -> uint8, MAR's rounding: round(clip((x + 1) / 2 * 255, 0, 255))."""
    refuse([(not torch.isfinite(images).all(),
             "the models gave values that are not finite; the weights are damaged or were trained badly")])
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------- a picture to start from

def start_edit(run: Run, path: str, mask: str) -> Start:
    """--edit PATH --keep MASK: codes and latents that are white as a whole in the mask stay."""
    picture, white = open_picture(path, run.pixels), open_picture(mask, run.pixels)
    W, H = picture.size
    refuse([(white.size != (W, H), f"{mask} must be as large as {path}: {W} x {H} pixels")])
    white = torch.from_numpy(np.asarray(center_crop(white, run.pixels)).min(2) >= 128).to(run.device)    # [H, W]
    h = run.generator.config.grid
    keep, side = whole_tokens(white, h), run.pixels // h
    refuse([(keep.all(), f"{mask} keeps all {h * h} tokens; black in it says what to draw anew"),
            (not keep.any(), f"{mask} keeps none of the {h * h} tokens; white in it says what stays")])
    start = start_from(run, picture)
    codes = None if run.prior is None else torch.where(whole_tokens(white, run.prior.config.grid), start.codes, -1)
    stays = keep.view(h, 1, h, 1).expand(h, side, h, side).reshape(white.shape)                          # [H, W]
    grey = replace(start.shown, images=start.shown.images.masked_fill(~stays, 128))
    return replace(start, codes=codes, keep=keep, shown=grey)


def start_like(run: Run, path: str) -> Start:
    """--like PATH: all codes of the picture stay, and all latents are drawn."""
    refuse([(run.prior is None, "--like: this run has no codes to take")])
    return start_from(run, open_picture(path, run.pixels))


def open_picture(path, size) -> Image.Image:
    picture = open_image(path, size)
    refuse([(picture is None, f"{path} is not there, is no readable image, or is too large")])
    return picture


def whole_tokens(white, grid):
    """[H, W] bool -> [grid * grid] bool: a token stays if all of its pixels do."""
    side = len(white) // grid
    return white.view(grid, side, grid, side).all(3).all(1).flatten()


@torch.inference_mode()
def start_from(run: Run, picture: Image.Image) -> Start:
    """The codes and latents of the centre crop; the latents are the posterior's means, `keep` is all False."""
    x = to_float(np.array(center_crop(picture, run.pixels)).transpose(2, 0, 1)[None]).to(run.device)   # [1, 3, H, W]
    moments = run.kl.encode(x)
    latents = run.kl.sample(moments, noise=torch.zeros_like(run.kl.posterior(moments)[0]))[0]            # [L, C]
    codes = run.vq and run.vq.encode(x)                                                                  # [1, codes]
    shown = Samples(to_uint8(x), run.vq and to_uint8(run.vq.decode(codes)), codes)
    return Start(run.vq and codes[0], latents, torch.zeros(len(latents), dtype=torch.bool, device=run.device), shown)


# -------------------------------------------------------------------------------------------------- grids and folders

TEXT_KEY = "d2c"  # the name of the text chunk of our PNG files


def grid(images: torch.Tensor, columns: int, classes: int = 1, first=()) -> Image.Image:
    """uint8 [N, 3, H, W] -> one picture, with 2 white pixels between the images. The images `first` begin each row.

    One class fills row after row. If there are several, image i is of class i % classes, and each class has a row."""
    rows = images.split(columns) if classes == 1 else [images[c::classes] for c in range(min(classes, len(images)))]
    H, W = images.shape[2:]
    out = np.full((len(rows) * (H + 2) - 2, (len(first) + max(map(len, rows))) * (W + 2) - 2, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate([*first, *row]):
            top, left = r * (H + 2), c * (W + 2)
            out[top:top + H, left:left + W] = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(out)


def save_picture(image: Image.Image, path: str, facts: dict | None = None):
    """A PNG; `facts` go into a text chunk of it, as JSON, which --about reads."""
    info = PngInfo()
    if facts:
        info.add_text(TEXT_KEY, json.dumps(facts), zip=True)
    write_file(path, lambda f: image.save(f, "PNG", pnginfo=info))


def picture_name(run: Run, labels: list, i: int) -> str:
    """Picture i is of class labels[i % n], so that any number of pictures is balanced."""
    return os.path.join(str(run.classes[labels[i % len(labels)]][0]), f"{i:06d}.png")


def describe(run: Run, s: Sampling, seed: int, labels: list, start: Start | None = None) -> dict:
    """What decides how pictures look, but for the kind of device. labels: indices of classes."""
    return {"sampling": asdict(s), "seed": seed, "classes": labels, "weights": checksums(run),
            "start": start and checkpoints.checksum({**vars(start), "shown": None})}


def checksums(run: Run) -> dict:  # of the loaded weights
    models = {kind: getattr(run, kind) for kind in ("vq", "kl", "prior", "generator")}
    return {kind: checkpoints.checksum(model.state_dict()) for kind, model in models.items() if model}


def read_settings(folder) -> dict | None:
    """What settings.json says about the pictures in a folder, if there is one."""
    settings = read_json(path := os.path.join(folder, "settings.json"))
    refuse([(not isinstance(settings, dict | None), f"{path} is not a file of sample.py; choose another folder")])
    return settings


def same_settings(out, settings, num):
    """Writes settings.json into the folder `out`; refuses a folder whose pictures were made with other settings."""
    there = read_settings(out) or {}
    strangers = not there and glob.glob(os.path.join(glob.escape(out), "*", "[0-9]*.png"))
    changed = [k for k in settings if there and there.get(k) != settings[k]]
    refuse([(strangers, f"{out} holds numbered pictures without a settings.json; choose another --out"),
            (changed, f"{out} holds pictures made with other {', '.join(changed)}; choose another --out")])
    num = max(num, there.get("num", 0))  # fid.py refuses a folder with fewer
    write_json(os.path.join(out, "settings.json"), {**settings, "num": num})


def about(path: str):
    """--about PICTURE.png: prints what the picture says about itself; the last line is the command."""
    try:
        with Image.open(path) as image:
            facts = json.loads(image.info[TEXT_KEY])
        command, weights, run = facts.pop("command"), facts["weights"], facts["run"] or TINY
    except (OSError, SyntaxError, LookupError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is absent or does not say how it was made; unchanged PNGs of sample.py do.") from None
    print(json.dumps(facts, indent=1), command, sep="\n")
    if os.path.isdir(run) and checksums(load_run(run)) != weights:
        print(f"note: {run} holds other weights now, so the command will draw other pictures.", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- command line

def add_sampling_flags(parser):
    for f in fields(Sampling):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type,
                            help=f"{f.metadata['help']} (default: the run's, or {f.default!r})")


def choose_sampling(args, run: Run) -> Sampling:
    """What the run recommends, under the flags that were given."""
    given = {f.name: v for f in fields(Sampling) if (v := getattr(args, f.name)) is not None}
    return check_sampling(run, replace(run.sampling, **given))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--class", dest="class_", metavar="CLASS", help="id or name, several with commas, or all")
    one.add_argument("--about", metavar="PICTURE.png", help="say how this picture was made, and stop")
    parser.add_argument("--run", help="run directory (default: weights/tiny of this repository)")
    parser.add_argument("--num", type=int, help="pictures in all (default: 16; of several classes 8 or fewer each)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--out", default="sample.png", help="a grid FILE.png (default: %(default)s), DIR, or FILE.npz")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn together (default: %(default)s)")
    parser.add_argument("--show-coarse", action="store_true", help="the decoded codes beside each picture")
    parser.add_argument("--frames", metavar="FILE.gif", help="the grid after every iteration, without decoded codes")
    parser.add_argument("--edit", metavar="IMAGE", help="draw a part of this picture anew; needs --keep")
    parser.add_argument("--keep", metavar="MASK", help="a picture as large as IMAGE; what is white in it stays")
    parser.add_argument("--like", metavar="IMAGE", help="take the codes of this picture")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--plain", action="store_true", help="the textbook loops: the same pictures, slower")
    parser.add_argument("--graphs", action="store_true", help="replay the head's step loop as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="torch.compile the generator's blocks")
    parser.add_argument("--dry-run", action="store_true", help="say what would be drawn, and stop")
    add_sampling_flags(parser)
    return parser.parse_args()


def prepare(args, run: Run, world):
    """Checks everything that can be wrong with a command before anything is drawn, and completes args:

    one_file (a grid as PNG), num, sampling, start (or None), labels: picture i is of class labels[i % len(labels)]."""
    args.one_file = args.out.lower().endswith(".png")
    real = lambda *paths: {os.path.realpath(path) for path in paths if path}
    refuse([(args.num is not None and args.num < 1 or args.batch < 1, "--num and --batch must be at least 1"),
            ("" in (args.out, args.edit, args.keep, args.like), "--out, --edit, --keep and --like take a path"),
            (real(args.out, args.frames) & real(args.edit, args.keep, args.like), "--out would replace an input"),
            ((args.edit is None) != (args.keep is None), "--edit IMAGE and --keep MASK need each other"),
            (args.edit and args.like, "--edit and --like exclude each other"),
            (args.frames and not (args.frames.lower().endswith(".gif") and args.one_file),
             "--frames takes FILE.gif and shows a grid, so --out must be FILE.png"),
            (args.out.lower().endswith((".jpg", ".jpeg", ".webp", ".gif", ".npy")),
             f"--out takes FILE.png for a grid, FILE.npz or a folder, not {args.out}"),
            (args.show_coarse and run.prior is None, "--show-coarse: this run has no codes to show"),
            (args.plain and (args.graphs or args.compile), "--plain excludes --graphs and --compile"),
            (args.graphs and run.device.type != "cuda", "--graphs is for CUDA")])
    args.sampling, args.labels = choose_sampling(args, run), find_classes(run.classes, args.class_)
    each = 16 if len(args.labels) == 1 else max(1, min(8, 256 // len(args.labels)))  # pictures of a class
    args.num = args.num or each * len(args.labels)
    refuse([(args.one_file and (world.size > 1 or args.num > 256),
             "for more than 256 pictures or several ranks give a folder: --out DIR")])
    args.start = start_like(run, args.like) if args.like else None
    if args.edit:
        args.start = start_edit(run, args.edit, args.keep)
        if (free := int((~args.start.keep).sum())) < args.sampling.iterations:
            print0(f"note: the mask leaves {free} tokens to draw, so --iterations is {free}")
            args.sampling = replace(args.sampling, iterations=free)


def draw(run: Run, args, numbers, world):
    """Draws the pictures of these numbers -> yields, batch by batch, their numbers and the Samples."""
    with tqdm(total=len(numbers), bar_format=BAR, disable=world.rank > 0) as bar:
        for batch in (numbers[a:a + args.batch] for a in range(0, len(numbers), args.batch)):
            classes = torch.tensor([args.labels[i % len(args.labels)] for i in batch])
            advance = lambda share: bar.update(min(share * len(batch), bar.total - bar.n))
            yield batch, generate(run, classes, args.seed, batch, args.sampling, advance, args.start,
                                  frames=bool(args.frames), plain=args.plain)


def view(args, samples: Samples) -> Samples:
    """With --show-coarse the images stand beside their decoded codes."""
    return replace(samples, images=torch.cat([samples.coarse, samples.images], 3)) if args.show_coarse else samples


def write_grid(run: Run, args, facts: dict, origin: dict, world):
    """--out FILE.png, and --frames FILE.gif: one picture each; each row begins with the picture of --edit or --like."""
    samples = [s for _, s in draw(run, args, range(args.num), world)]
    layout = math.ceil(args.num / int(args.num**0.5)), len(args.labels)  # columns (nearly a square), classes
    first = view(args, args.start.shown).images if args.start else ()
    images = torch.cat([view(args, s).images for s in samples])
    save_picture(grid(images, *layout, first), args.out, {**facts, **origin})
    if args.frames:
        first = args.start.shown.images if args.start else ()
        film = [grid(torch.cat(moment), *layout, first) for moment in zip(*(s.frames for s in samples))]
        options = dict(save_all=True, append_images=film[1:], loop=0, duration=[120] * (len(film) - 1) + [2000])  # ms
        write_file(args.frames, lambda f: film[0].save(f, "GIF", **options))


def write_folder(run: Run, args, facts: dict, origin: dict, world):
    """--out DIR: this rank's pictures that DIR lacks. FILE.npz: then all as arr_0 [N, H, W, 3], class ids as arr_1."""
    folder = args.out[:-4] if args.out.lower().endswith(".npz") else args.out
    if world.rank == 0:
        same_settings(folder, facts, args.num)
        sweep(folder)  # temporary files of commands that were killed
    barrier()
    names = [picture_name(run, args.labels, i) for i in range(args.num)]
    paths = [os.path.join(folder, name) for name in names]
    missing = [i for i in range(world.rank, args.num, world.size) if not os.path.exists(paths[i])]
    for numbers, samples in draw(run, args, missing, world):
        for i, picture in zip(numbers, view(args, samples).pil()):
            save_picture(picture, paths[i], {**facts, **origin, "file": names[i]})
    barrier()
    if folder != args.out and world.rank == 0:
        try:
            pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"a picture in {folder} cannot be read: {error}; remove it and run again.") from None
        ids = np.array([int(os.path.dirname(name)) for name in names])
        write_file(args.out, lambda f: np.savez(f, arr_0=pictures, arr_1=ids))


def main():
    args = parse()
    if args.about:
        return about(args.about)
    world = setup(args.device)
    run = load_run(args.run or TINY, world.device)
    prepare(args, run, world)
    print0(f"{args.num} pictures of {len(args.labels)} class{'es' if len(args.labels) > 1 else ''}, seed {args.seed}: "
           + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in asdict(args.sampling).items()))
    if args.dry_run:
        return
    begun, run.graphs = time.time(), fast.Graphs() if args.graphs else None
    if args.compile:
        fast.compile_blocks()  # for all models in this process
    facts = {**describe(run, args.sampling, args.seed, args.labels, args.start), "coarse": args.show_coarse}
    origin = {"class": args.class_, "num": args.num, "run": args.run,
              "command": shlex.join(["python", "sample.py", *sys.argv[1:]])}
    (write_grid if args.one_file else write_folder)(run, args, facts, origin, world)
    barrier()
    print0(f"{args.out}: {args.num} pictures, {time.time() - begun:.1f} s")


if __name__ == "__main__":
    run_script(main)
