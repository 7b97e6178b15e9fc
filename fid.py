"""Evaluation: FID, sFID, Inception Score, precision and recall of pictures, by the protocols that papers use.

    python fid.py GENERATED REFERENCE                       FID and IS the way MAR computes them
    python fid.py GENERATED REFERENCE --protocol adm        FID, sFID, IS, precision and recall the way ADM does
    python fid.py --run RUN REFERENCE --num 50000 --cfg 4   draws the pictures and scores them, without files
    python fid.py --reconstruct RUN IMAGES                  rFID, PSNR and SSIM of both tokenizers
    python fid.py IMAGES --save REF.npz --crop 256 --jpeg   statistics of your own images, for use as REFERENCE
    python fid.py --table A/result.json B/result.json       several results as one Markdown table
    torchrun --nproc_per_node=8 -- fid.py ...               the same over 8 GPUs; the figures are those of one

GENERATED   a folder of lossless pictures at any depth, or an .npz with arr_0 uint8 [N, H, W, 3]
REFERENCE   either of these, or statistics: ADM's .npz, pytorch-fid's .npz, torch-fidelity's cached .pt, --save's

All figures but PSNR and SSIM are statistics of one network's features, so they depend on its weights and on how a
picture is resized for it. The network here is the TensorFlow Inception of 2015 that papers use, from the published
file pt_inception-2015-12-05-6726825d.pth. Figures and every knob behind them go to result.json beside the samples.
gFID scores generated pictures, rFID reconstructions; the two are never comparable.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoints
import sample
from data import ahead, read_image, text_hash
from presets import Sampling
from runtime import UserError, barrier, gather, print0, run_script, setup, write_file

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # two names, one layout
METRICS = ("fid", "sfid", "is", "pr")
PROTOCOLS = {
    # name            resize   metrics by default
    "torch-fidelity": ("tf1",   ("fid", "is")),  # MAR's evaluator; D2C names none
    "adm":            ("tf1",   METRICS),        # ADM's, DiT's and LlamaGen's; they differ in IS, see `score_logits`
    "pytorch-fid":    ("torch", ("fid",)),       # defines nothing else
}
LOSSLESS, LOSSY = (".png", ".bmp", ".ppm", ".tif", ".tiff"), (".jpg", ".jpeg", ".webp")


# -------------------------------------------------------------------------------------------------------- Inception
# A unit is a convolution without bias, a batch norm and a ReLU, written channels@kernel, 1x1 when no kernel is given.
# It keeps the size of the map, except with stride 2 ("/2") and where marked valid ("v"). A branch is its published
# name and its units one after the other; "+" sets two side by side. A block is its branches, in the order in which
# their outputs are concatenated, which fixes the channel numbers.

STEM = ("Conv2d_1a_3x3 32@3x3/2", "Conv2d_2a_3x3 32@3x3v", "Conv2d_2b_3x3 64@3x3",
        "Conv2d_3b_1x1 80", "Conv2d_4a_3x3 192@3x3v")
A = "branch1x1 64 | branch5x5 48 64@5x5 | branch3x3dbl 64 96@3x3 96@3x3 | branch_pool {}"
B = "branch3x3 384@3x3/2 | branch3x3dbl 64 96@3x3 96@3x3/2 | pool"
C = "branch1x1 192 | branch7x7 {0} {0}@1x7 192@7x1 | branch7x7dbl {0} {0}@7x1 {0}@1x7 {0}@7x1 192@1x7 | branch_pool 192"
D = "branch3x3 192 320@3x3/2 | branch7x7x3 192 192@1x7 192@7x1 192@3x3/2 | pool"
E = "branch1x1 320 | branch3x3 384 384@1x3+384@3x1 | branch3x3dbl 448 384@3x3 384@1x3+384@3x1 | branch_pool 192"

halve = partial(F.max_pool2d, kernel_size=3, stride=2)
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # torchvision includes it
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
BLOCKS = (  # name, branches, what takes the place of {}, pooling
    ("Mixed_5b", A, 32, average), ("Mixed_5c", A, 64, average), ("Mixed_5d", A, 64, average),
    ("Mixed_6a", B, 0, halve),
    ("Mixed_6b", C, 128, average), ("Mixed_6c", C, 160, average), ("Mixed_6d", C, 160, average),
    ("Mixed_6e", C, 192, average),
    ("Mixed_7a", D, 0, halve),
    ("Mixed_7b", E, 0, average), ("Mixed_7c", E, 0, maximum))  # max in the last: an oddity of the 2015 graph


def convolution(cin, text):
    """'96@3x3/2' -> the convolution. Its bias is the folded batch norm's."""
    out, kh, kw, mark = re.fullmatch(r"(\d+)(?:@(\d)x(\d))?(v|/2)?", text).groups()
    kh, kw = int(kh or 1), int(kw or 1)
    return nn.Conv2d(cin, int(out), (kh, kw), 2 if mark == "/2" else 1, 0 if mark else (kh // 2, kw // 2))


class Mixed(nn.Module):
    """A block of parallel branches. [B, cin, h, w] -> [B, cout, h', w']"""

    def __init__(self, cin, layout, pooling):
        super().__init__()
        self.pooling, self.branches, self.cout = pooling, [], 0
        for branch, *steps in map(str.split, layout.split(" | ")):
            chain, c = [], cin
            for i, step in enumerate(steps, 1):
                parts = step.split("+")
                name = branch + f"_{i}" * (len(steps) > 1)  # published names count the units of a chain
                names = [name + letter for letter in ("ab" if len(parts) > 1 else [""])]
                for name, part in zip(names, parts):
                    self.add_module(name, convolution(c, part))
                c = sum(getattr(self, name).out_channels for name in names)
                chain.append(names)
            self.branches.append((branch.endswith("pool"), chain))
            self.cout += c

    def forward(self, x):
        out = []
        for pooled, chain in self.branches:
            y = [self.pooling(x) if pooled else x]
            for names in chain:  # two names only at the end of a chain
                y = [F.relu(getattr(self, name)(y[0]), inplace=True) for name in names]
            out += y
        return torch.cat(out, 1)


def exact_convolutions():
    """Without TF32, whose 10 bits can move the third decimal of a FID; cuDNN uses it unless told otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def resize_tf1(images):
    """uint8 [B, 3, h, w] -> [B, 3, 299, 299] in [-1, 1). TensorFlow 1's bilinear: no antialias, no half pixel.

    In the order of its operations, so that the result is bit for bit the graph's. 299 pixels stay as they are.
    """
    def places(n):  # source = target * n/299, between the pixels lo and hi
        source = torch.arange(299, dtype=torch.float32) * (torch.tensor(float(n)) / 299)
        lo = source.long()
        return [v.to(images.device) for v in (lo, (lo + 1).clamp(max=n - 1), source - lo)]

    x = images.float()
    (top, bottom, dy), (left, right, dx) = places(x.shape[2]), places(x.shape[3])
    a = x[..., left]
    x = a + (x[..., right] - a) * dx                                                # [B, 3, h, 299]
    a = x[..., top, :]
    x = a + (x[..., bottom, :] - a) * dy[:, None]                                   # [B, 3, 299, 299]
    return (x - 128) / 128


def resize_torch(images):
    """pytorch-fid's: half-pixel centres, and 255 maps to 1. Moves pool features by some 0.3% of their spread, so
    statistics made with one resize are of no use with the other."""
    return F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1


class Inception(nn.Module):
    """TensorFlow's Inception of 2015-12-05. images uint8 [B, 3, h, w] ->

    pool     [B, 2048]  what FID, precision and recall look at (TensorFlow's pool_3)
    spatial  [B, 2023]  sFID: the first 7 channels of a 17x17 map, flattened row by row with channels last
    logits   [B, 1008]  without the bias, which the graph's IS node and therefore every IS leaves out
    """

    def __init__(self, weights_path: str, resize: str = "tf1"):
        super().__init__()
        self.resize = {"tf1": resize_tf1, "torch": resize_torch}[resize]
        with torch.device("meta"):
            c = 3
            for name, text in map(str.split, STEM):
                self.add_module(name, unit := convolution(c, text))
                c = unit.out_channels
            for name, layout, width, pooling in BLOCKS:
                self.add_module(name, block := Mixed(c, layout.format(width), pooling))
                c = block.cout
            self.fc = nn.Linear(c, 1008, bias=False)
        self.about = {"file": os.path.basename(weights_path), "sha256": file_hash(weights_path), "resize": resize}
        digits = re.search(r"-([0-9a-f]{8})\.\w+$", weights_path)
        if digits and not self.about["sha256"].startswith(digits[1]):
            raise UserError(f"{weights_path} is damaged: its SHA-256 does not begin with {digits[1]}; get it again.")
        self.load_state_dict(self.folded(weights_path), assign=True)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def folded(self, path):
        """The published tensors, with each batch norm (eps 0.001) folded into its convolution: w*s, b - m*s."""
        content = {k: v for k, v in checkpoints.read(path).items() if not k.endswith("num_batches_tracked")}
        units = [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)]
        norm = [f"bn.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
        keys = {f"{u}.{p}" for u in units for p in ["conv.weight", *norm]} | {"fc.weight", "fc.bias"}
        if different := sorted(keys ^ set(content)):
            raise UserError(f"{path} is not the Inception of pytorch-fid and torch-fidelity: see the tensor "
                            f"{different[0]!r}; torchvision's has other weights and will not do.")
        state = {"fc.weight": content["fc.weight"].float()}
        for u in units:
            weight, bias, mean, var = (content[f"{u}.{p}"].double() for p in norm)
            scale = weight / (var + 0.001).sqrt()
            state[f"{u}.weight"] = (content[f"{u}.conv.weight"].double() * scale[:, None, None, None]).float()
            state[f"{u}.bias"] = (bias - mean * scale).float()
        return state

    @torch.no_grad()
    def forward(self, images):
        x = self.resize(images)                                                     # [B, 3, 299, 299]
        with exact_convolutions():
            for name, _ in map(str.split, STEM):
                x = F.relu(getattr(self, name)(x), inplace=True)
                if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                    x = halve(x)                                                    # [B, 64, 73, 73], [B, 192, 35, 35]
            for name, *_ in BLOCKS:
                x = getattr(self, name)(x)
                if name == "Mixed_6d":  # its channels 0 to 6 are of branch1x1: TensorFlow's mixed_6/conv, after ReLU
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)               # [B, 17*17*7]
        pool = x.mean((2, 3))                                                       # [B, 2048], of 8x8 places
        return {"pool": pool, "spatial": spatial, "logits": self.fc(pool)}


def file_hash(path):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def find_inception(path: str | None) -> str:
    """--inception, else the variable D2C_INCEPTION, else where torch.hub keeps what the two evaluators download."""
    hub = os.path.join(torch.hub.get_dir(), "checkpoints")
    named = path or os.environ.get("D2C_INCEPTION")
    for place in [named] if named else [os.path.join(hub, name) for name in WEIGHTS]:
        if os.path.isfile(place):
            return place
    raise UserError(f"{f'{named} is not there' if named else 'the Inception weights are missing'}: get {WEIGHTS[0]} "
                    f"(96 MB, release fid_weights of mseitzer/pytorch-fid on GitHub), then give --inception FILE, set "
                    f"D2C_INCEPTION, or put it into {hub}.")


# ------------------------------------------------------------------------------------------------------- the figures

@dataclass
class Statistics:
    """Mean and covariance of rows that come in batches. Float64 sums: memory does not grow with the number of rows.

    Sums of different ranks add up. In float32 the covariance would be off by 2e-5 of an FID.
    """
    n: int = 0
    total: torch.Tensor | int = 0                                                   # [D]
    products: torch.Tensor | int = 0                                                # [D, D]

    def add(self, rows):
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
        self.n += len(rows)
        self.total = self.total + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def __add__(self, other):
        return Statistics(self.n + other.n, self.total + other.total, self.products + other.products)

    def cpu(self):
        return Statistics(self.n, *(v.cpu() if self.n else v for v in (self.total, self.products)))

    def result(self):
        """-> mean [D], covariance [D, D] with n - 1, as np.cov has it."""
        if self.n < 2:
            raise UserError(f"{self.n} pictures have no covariance; a FID needs many, 50,000 in papers.")
        mean = self.total / self.n
        return mean, (self.products - self.n * mean.outer(mean)) / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """FID: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2, of means [D] and covariances [D, D] (1706.08500, Eq. 6).

    The eigenvalues of S1 S2 are those of R' S2 R with S1 = R R', which is symmetric: real roots, no scipy sqrtm with
    its imaginary parts. Directions in which S1 has no variance (always some when N <= D) leave R at once: their
    eigenvalues are rounding, 1e-16, but the roots of these, 1e-8 each, would add up.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(v).to("cpu", torch.float64) for v in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise UserError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared.")
    if not all(v.isfinite().all() for v in (mu1, cov1, mu2, cov2)):
        raise UserError("the statistics are not finite; the Inception weights or the reference file are damaged.")
    power, axes = torch.linalg.eigh(cov1)                                           # ascending
    keep = power > power[-1] * len(power) * torch.finfo(power.dtype).eps
    root = axes[:, keep] * power[keep].sqrt()                                       # R [D, rank]
    trace = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return max(float(distance), 0.0)  # a squared distance; below 0 is rounding, up to 1e-9 or so for equal sets


def inception_score(logits, splits: int = 10, seed: int = 2020):
    """torch-fidelity's: all rows [N, 1008] shuffled by that seed, ten equal parts -> (mean, deviation)."""
    N = len(logits)
    if N < splits:
        raise UserError(f"the Inception Score needs at least {splits} pictures, not {N}.")
    logits = torch.as_tensor(logits).cpu()[np.random.RandomState(seed).permutation(N)]
    return score_of([logits[i * N // splits:(i + 1) * N // splits] for i in range(splits)])


def score_of(parts):
    """exp(mean KL(p_i || mean of p)) of each part [n, 1008] of the logits -> mean and deviation of these scores."""
    scores = []
    for part in parts:
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def score_logits(logits, names, protocol):
    """The Inception Score of pictures in the order of the protocol. names: of their files; None in an .npz.

    torch-fidelity sorts files by path and shuffles. ADM takes 5,000 at a time as they come in its .npz, which must not
    be by class (one class a chunk: 62 for 298, guided-diffusion issue 165); of a folder that order is the file name,
    sample.py's index. ADM's float32 softmax is left out: it moves the seventh digit.
    """
    if names:
        key = os.path.basename if protocol == "adm" else str
        logits = logits[sorted(range(len(names)), key=lambda i: key(names[i]))]
    return score_of(logits.split(5000)) if protocol == "adm" else inception_score(logits)


def precision_recall(real, fake, k: int = 3):
    """Kynkäänniemi et al. 1904.06991: real [N, D] and fake [M, D] pool features -> (precision, recall).

    Around each point a ball that reaches its k-th nearest neighbour in its own set. Precision: the share of fakes
    inside some real ball; recall: the share of reals inside some fake ball. In float32, 1,000 rows of distances at a
    time. ADM computes them in float16, where distances tie: it reads 0.001 (precision) and 0.002 (recall) higher.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} pictures on both sides.")

    def radii(points):  # the nearest of all is the point itself, hence k + 1
        rows = (torch.cdist(block, points) for block in points.split(1000))
        return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in rows])

    real_radius, fake_radius = radii(real), radii(fake)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block, radius in zip(fake.split(1000), fake_radius.split(1000)):
        d = torch.cdist(block, real)                                                # [1000, N]
        precise.append((d <= real_radius).any(1))
        recalled |= (d <= radius[:, None]).any(0)
    return float(torch.cat(precise).cpu().double().mean()), float(recalled.cpu().double().mean())


def psnr_ssim(a, b):
    """uint8 [B, 3, H, W] twice -> PSNR in dB and SSIM, each [B].

    SSIM (Wang et al. 2004): Gaussian window 11x11 of deviation 1.5, inside the picture, mean over colours and places.
    """
    x, y = a.float(), b.float()
    psnr = 10 * (255**2 / (x - y).square().mean((1, 2, 3))).log10()
    window = torch.exp(-(torch.arange(11.0, device=x.device) - 5) ** 2 / (2 * 1.5**2))
    window = window / window.sum()
    rows = lambda v: F.conv2d(v.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
    blur = lambda v: F.conv2d(rows(v), window.view(1, 1, 1, 11))                    # [B*3, 1, H-10, W-10]
    with exact_convolutions():
        mx, my, xx, yy, xy = map(blur, (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return psnr, ssim.view(len(x), -1).mean(1)


# ----------------------------------------------------------------------------------------- pictures and their features

@dataclass
class Images:
    """N pictures in a fixed order; load(a, b) -> uint8 [b - a, 3, H, W]."""
    count: int
    size: list                 # [H, W]
    load: Callable
    about: dict                # for result.json
    names: list | None = None  # of the files, where there are any
    drawn: bool = False        # by the models, on the device


def open_images(path: str, crop: int | None = None, jpeg: bool = False) -> Images:
    """A folder or an .npz of pictures. crop: ADM's centre crop of photographs to so many pixels."""
    return open_archive(path) if path.endswith(".npz") else open_folder(path, crop, jpeg)


def open_folder(root, crop, jpeg):
    if not os.path.isdir(root):
        raise UserError(f"{root} is neither a folder of pictures nor an .npz or .pt file.")
    files = sorted(name for folder, _, found in os.walk(root, followlinks=True) for f in found
                   if f.lower().endswith(LOSSLESS + LOSSY)
                   and not re.search(r"(^|[/\\])\.", name := os.path.relpath(os.path.join(folder, f), root)))  # hidden
    if not files:
        raise UserError(f"{root} holds no pictures ({', '.join(LOSSLESS)}).")
    if not jpeg and (lossy := [f for f in files if f.lower().endswith(LOSSY)]):
        raise UserError(f"{root} holds {len(lossy)} compressed pictures, e.g. {lossy[0]}, and a FID sees the losses; "
                        f"save pictures as PNG, or give --jpeg if these are the originals.")
    settings = drawn_by(root)
    if settings and len(files) < settings.get("num", 0):
        raise UserError(f"{root} holds {len(files)} of {settings['num']} pictures; run the same sample.py command "
                        f"again, it goes on.")
    threads = ThreadPoolExecutor(4)

    def read(file):
        if (image := read_image(os.path.join(root, file), crop)) is None:
            raise UserError(f"{root}/{file} is no readable picture; make it again or remove it.")
        return image

    def load(a, b):
        images = list(threads.map(read, files[a:b]))
        if odd := [f for f, image in zip(files[a:b], images) if [*image.shape[1:]] != size]:
            raise UserError(f"{root} holds pictures of several sizes, see {odd[0]}; --crop SIZE cuts a reference.")
        return torch.from_numpy(np.stack(images))

    size = [*read(files[0]).shape[1:]]
    if gone := [f for f in files if not os.path.exists(os.path.join(root, f))]:
        raise UserError(f"{root}/{gone[0]} is a link to a file that is not there; make it again or remove it.")
    content = [[f, os.path.getsize(os.path.join(root, f))] for f in files]
    return Images(len(files), size, load, about(root, text_hash(content), map(os.path.dirname, files), settings), files)


def drawn_by(folder) -> dict | None:
    """What sample.py says of its pictures in a folder."""
    settings = sample.read_settings(folder)
    if settings and settings.get("coarse"):
        raise UserError(f"{folder} holds pictures with their codes beside them; draw them without --show-coarse.")
    return settings


def open_archive(path):
    """arr_0 of an .npz, read piece by piece: 50,000 pictures of 256 pixels are 10 GB. arr_1: class ids, if there."""
    damaged = (OSError, EOFError, LookupError, ValueError, zipfile.BadZipFile, zlib.error)
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(file)
        labels = np.load(path)["arr_1"].ravel().tolist() if "arr_1.npy" in archive.namelist() else None
    except damaged as error:
        raise UserError(f"{path} holds no pictures that can be read, as arr_0: {error}.") from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0]:
        raise UserError(f"arr_0 of {path} is {dtype} {list(shape)}; pictures are uint8 [N, H, W, 3].")
    start, size = file.tell(), int(np.prod(shape[1:]))

    def load(a, b):
        try:
            file.seek(start + a * size)
            pixels = np.frombuffer(file.read((b - a) * size), np.uint8).reshape(b - a, *shape[1:])
        except damaged as error:
            raise UserError(f"{path} is damaged, make it again: {error}.") from None
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    settings = drawn_by(path.removesuffix(".npz"))
    return Images(shape[0], [*shape[1:3]], load, about(path, file_hash(path), labels, settings))


def draw_images(args, device) -> Images:
    """Pictures that a run draws when they are asked for: those that sample.py writes with the same flags."""
    run = sample.load_run(args.run, device)
    s, labels = sample.choose_sampling(args, run), sample.find_classes(run.classes, args.class_ or "all")
    seed, num, pixels = args.seed or 0, args.num or 50_000, run.generator.config.grid * run.kl.stride
    names = [sample.picture_name(run, labels, i) for i in range(num)]

    def load(a, b):
        return sample.generate(run, [labels[i % len(labels)] for i in range(a, b)], seed, range(a, b), s).images

    told = about(args.run, None, map(os.path.dirname, names), {**sample.describe(run, s, seed, labels), "num": num})
    return Images(num, [pixels, pixels], load, told, names, drawn=True)


def about(path, content_hash, labels, settings):
    """What result.json says of pictures. labels: the class of each, None if unknown."""
    counts = Counter(labels or []).values()
    counts = {"classes": len(counts), "fewest": min(counts), "most": max(counts)} if counts else None
    return {"path": path, "hash": content_hash, "per_class": counts, "settings": settings}


def measure(images: Images, features: Callable, sums: set, rows: set, world, batch: int):
    """All pictures through `features`, images [B, 3, H, W] -> name: [B, D]. On rank 0 -> (the Statistics of the names
    in `sums`, all rows [N, D] of those in `rows`); on the others None.

    Every rank takes every size-th batch, never other batches: rounding inside the network depends on what shares a
    batch, so the features are those of one process to the bit. Names in neither set are not kept.
    """
    starts = range(0, images.count, batch)[world.rank::world.size]
    load = lambda a: images.load(a, min(a + batch, images.count))
    total, kept = {name: Statistics() for name in sums}, {name: [] for name in rows}
    look = tqdm(total=len(starts) * batch, unit=" images", desc=images.about["path"], disable=world.rank > 0)
    # Files are read ahead by a thread. Models must not run in one: `exact_convolutions` would reach them too.
    for pixels in map(load, starts) if images.drawn else ahead(load, starts):
        out = features(pixels.to(world.device))
        for name in sums:
            total[name].add(out[name])
        for name in rows:
            kept[name].append(out[name].cpu())
        look.update(batch)
    look.close()
    parts = gather(({name: s.cpu() for name, s in total.items()}, kept))
    if parts is None:
        return None
    batches = range(-(-images.count // batch))  # batch b is the (b // size)-th of rank b % size
    order = lambda name: torch.cat([parts[b % world.size][1][name][b // world.size] for b in batches])
    return {name: sum((p[0][name] for p in parts), Statistics()) for name in sums}, {n: order(n) for n in rows}


# -------------------------------------------------------------------------------------------------------- references

@dataclass
class Reference:
    """What pictures are compared with: statistics ("pool", "spatial": mean and covariance), pictures, or both."""
    about: dict
    statistics: dict
    images: Images | None
    pool: torch.Tensor | None = None   # [N, 2048]


def read_arrays(path) -> dict:
    """The arrays of a file of statistics. arr_0, which can be large, is only mentioned."""
    if path.endswith(".npz"):
        try:
            with np.load(path) as archive:
                wanted = set(archive.files) & {"mu", "sigma", "mu_s", "sigma_s", "about", "arr_0"}
                return {k: archive[k] if k != "arr_0" else None for k in wanted}
        except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is no .npz file, or is damaged: {error}.") from None
    reconstruct = np.empty(0).__reduce__()[0]  # NumPy 1 and 2 pickle it under different names
    names = [(reconstruct, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *(type(np.dtype(t)) for t in "fd")]):
        return checkpoints.read(path)


def open_reference(path: str, model: Inception, crop=None, jpeg=False) -> Reference:
    """A folder, an .npz of pictures, or statistics, told apart by content:

    ADM             mu, sigma, mu_s, sigma_s of all of ImageNet, and arr_0, 10,000 pictures for precision and recall
    pytorch-fid     mu, sigma; MAR's adm_in256_stats.npz, two arrays of ADM's, looks the same
    torch-fidelity  mu, sigma in a .pt, its cache of one input
    ours            all four, and what they were made from and with
    """
    arrays = read_arrays(path) if path.endswith((".npz", ".pt")) else {"arr_0": None}
    images = open_images(path, crop, jpeg) if "arr_0" in arrays else None
    if images and "mu" not in arrays:
        return Reference({**images.about, "images": images.count, "size": images.size}, {}, images)
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} holds neither pictures (arr_0) nor statistics (mu, sigma).")
    made = json.loads(str(arrays["about"])) if "about" in arrays else {}
    inception = made.get("inception") or ({"resize": "tf1"} if "mu_s" in arrays else {})  # ADM's: TensorFlow's
    if not inception:
        print0(f"note: {path} does not say how its pictures were resized; taken for {model.about['resize']}")
    for key in ("resize", "sha256"):
        if inception.get(key, model.about[key]) != model.about[key]:
            raise UserError(f"{path} was made with another {key} of Inception, {inception[key][:8]} for "
                            f"{model.about[key][:8]}; choose --protocol and --inception to fit, or make it again.")
    statistics = {}
    for name, s, D in (("pool", "", 2048), ("spatial", "_s", 2023)):
        if f"mu{s}" in arrays:
            statistics[name] = arrays[f"mu{s}"], arrays[f"sigma{s}"]
            if [np.shape(v) for v in statistics[name]] != [(D,), (D, D)]:
                raise UserError(f"{path} has statistics of another network: mu{s} should have {D} entries.")
    return Reference({**made, "path": path, "hash": file_hash(path)}, statistics, images)


def complete(reference: Reference, model, sums: set, rows: set, world, batch):
    """Runs Inception over the reference's pictures for what it lacks. Pictures beside statistics are a part of those
    that the statistics come from (ADM: 10,000 of 1.28 million) and serve precision and recall only."""
    sums = sums - reference.statistics.keys()
    rows = rows & {"pool"}
    if sums and reference.statistics or rows and not reference.images:
        what = "statistics for sFID" if sums else "pictures for precision and recall"
        raise UserError(f"{reference.about['path']} has no {what}; choose other --metrics or another reference.")
    if (sums or rows) and (out := measure(reference.images, model, sums, rows, world, batch)):
        reference.statistics |= {name: s.result() for name, s in out[0].items()}
        reference.pool = out[1].get("pool")


# ------------------------------------------------------------------------------------------------------ as a script

def evaluate(args, model, world):
    """Scores generated pictures."""
    reference = open_reference(args.paths[-1], model, args.crop, args.jpeg) if args.compares else None
    images = draw_images(args, world.device) if args.run else open_images(args.paths[0], None, args.jpeg)
    if reference and reference.statistics and reference.about.get("size", images.size) != images.size:
        raise UserError(f"{args.paths[-1]} comes from pictures of {reference.about['size']} pixels, these have "
                        f"{images.size}; make it again with another --crop.")
    if announce(args, images):
        return
    sums = {name for m, name in (("fid", "pool"), ("sfid", "spatial")) if m in args.metrics}
    rows = {name for m, name in (("is", "logits"), ("pr", "pool")) if m in args.metrics}
    if reference:
        complete(reference, model, sums, rows, world, args.batch)
    if (out := measure(images, model, sums, rows, world, args.batch)) is None:
        return
    statistics, rows = out
    figures = {}
    for metric, key, name in (("fid", "gfid", "pool"), ("sfid", "sfid", "spatial")):
        if metric in args.metrics:
            figures[key] = frechet_distance(*reference.statistics[name], *statistics[name].result())
    if "is" in args.metrics:
        figures["is"], figures["is_std"] = score_logits(rows["logits"], images.names, args.protocol)
    if "pr" in args.metrics:
        pair = (pool.to(world.device) for pool in (reference.pool, rows["pool"]))
        figures["precision"], figures["recall"] = precision_recall(*pair)
    report(args, images, reference, {"generated": figures}, model, world)


def reconstruct(args, model, world):
    """Scores RUN/{vq,kl}.pt, whichever is there, by what they make of IMAGES. KL decodes its mean, without noise."""
    files = {kind: os.path.join(args.reconstruct, f"{kind}.pt") for kind in ("vq", "kl")}
    tokenizers = {kind: checkpoints.load_model(f, kind, world.device) for kind, f in files.items() if os.path.exists(f)}
    if not tokenizers:
        raise UserError(f"{args.reconstruct} holds neither vq.pt nor kl.pt.")
    if os.path.isdir(args.paths[0]):
        args.crop = args.crop or next(iter(tokenizers.values())).about.get("image_size", 256)
    images = open_images(args.paths[0], args.crop, args.jpeg)
    if any(images.size[0] % t.stride or images.size[0] != images.size[1] for t in tokenizers.values()):
        raise UserError(f"tokenizers cannot take {images.size} pixels; give --crop SIZE.")

    def features(images):
        out = {"pool": model(images)["pool"]}
        for kind, tokenizer in tokenizers.items():
            tokens = tokenizer.encode(images.float() / 127.5 - 1)
            decoded = sample.to_uint8(tokenizer.decode(tokenizer.sample(tokens, noise=torch.zeros_like(tokens.chunk(2, 1)[0])) if kind == "kl" else tokens))
            out[kind] = model(decoded)["pool"]
            out[f"{kind} pixels"] = torch.stack(psnr_ssim(images, decoded), 1)      # [B, 2]
        return out

    if announce(args, images):
        return
    rows = {f"{kind} pixels" for kind in tokenizers}
    if out := measure(images, features, {"pool", *tokenizers}, rows, world, args.batch):
        statistics, rows = out
        figures = {}
        for kind in tokenizers:
            figures[kind] = {"rfid": frechet_distance(*statistics["pool"].result(), *statistics[kind].result())}
            figures[kind]["psnr"], figures[kind]["ssim"] = rows[f"{kind} pixels"].double().mean(0).tolist()
        report(args, images, None, figures, model, world)


def save(args, model, world):
    """Writes the statistics of a folder or .npz, with what they were made from and with."""
    images = open_images(args.paths[0], args.crop, args.jpeg)
    if announce(args, images):
        return
    if out := measure(images, model, {"pool", "spatial"}, set(), world, args.batch):
        (mu, sigma), (mu_s, sigma_s) = (out[0][name].result() for name in ("pool", "spatial"))
        made = json.dumps({"images": images.count, "size": images.size, "crop": args.crop, "inception": model.about,
                           "source": images.about["path"], "source_hash": images.about["hash"]})
        write_file(args.save, lambda f: np.savez(f, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, about=made))
        print0(f"{args.save}: statistics of {images.count} pictures")


def announce(args, images: Images) -> bool:
    """Says what will be measured; True if that was all."""
    print0(f"{images.count} pictures of {images.size[0]}x{images.size[1]} pixels: {images.about['path']}"
           + (f" against {args.paths[-1]}" if args.compares else "") + f", protocol {args.protocol}")
    return args.dry_run


NAMES = {"gfid": "gFID", "sfid": "sFID", "rfid": "rFID", "is": "IS", "precision": "precision", "recall": "recall",
         "psnr": "PSNR", "ssim": "SSIM"}


def labelled(figures, n):
    """As printed. A FID falls with the number of pictures: under 10,000 it bears that number in its name."""
    at = f"@{n}" if n < 10_000 else ""
    text = {NAMES[k] + (at if k.endswith("fid") else ""): f"{figures[k]:.4f}" for k in NAMES if k in figures}
    return text | ({"IS": f"{text['IS']} ± {figures['is_std']:.4f}"} if "IS" in text else {})


def report(args, images: Images, reference: Reference | None, figures, model, world):
    """Prints the figures and writes result.json with all that they depend on."""
    n, path = images.count, images.about["path"]
    beside = path if os.path.isdir(path) and not args.run and not args.reconstruct else ""
    out, seconds = args.out or os.path.join(beside, "result.json"), round(time.time() - args.start, 1)
    result = {"figures": figures, "images": n, "size": images.size, "protocol": args.protocol, "samples": images.about,
              "reference": reference and reference.about, "reconstructed": args.reconstruct, "inception": model.about,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
              "device": str(world.device), "ranks": world.size, "batch": args.batch, "seconds": seconds}
    for row, values in figures.items():
        for name, text in labelled(values, n).items():
            print0(f"{row:12} {name:12} {text}")
    write_file(out, lambda f: f.write(json.dumps(result, indent=1).encode()))
    if n < 10_000 and "fid" in str(figures):
        print0(f"note: a FID falls with the number of pictures; papers use 50,000, and {n} compare only with {n}")
    fewest = min(n, reference and reference.about.get("images") or n)
    if fewest < 2048 and "fid" in str(figures):
        print0(f"warning: {fewest} pictures are fewer than the 2,048 features, so their covariance is singular")
    print0(f"{out}: {n} pictures, {seconds} s")


def table(paths):
    """Several result.json -> one Markdown table."""
    rows = []
    for path in paths:
        try:
            with open(path) as f:
                r = json.load(f)
            knobs = (r["samples"]["settings"] or {}).get("sampling", {})
            about = {k: knobs.get(k) for k in ("iterations", "steps", "cfg", "schedule")}
            about |= {"N": r["images"], "protocol": r["protocol"], "reference": (r["reference"] or {}).get("path")}
            for row, figures in r["figures"].items():
                name = r["samples"]["path"] if row == "generated" else f"{r['reconstructed']}, {row}"
                rows.append({"of": name, **about, **labelled(figures, r["images"])})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is no result.json of fid.py.") from None
    columns = list(dict.fromkeys(c for row in rows for c, value in row.items() if value is not None))
    text = lambda value: "" if value is None else str(value)
    lines = [columns, ["---"] * len(columns), *([text(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="GENERATED REFERENCE", help="or what stands in the examples")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="torch-fidelity")
    parser.add_argument("--metrics", help="of fid,sfid,is,pr (default: fid,is; with adm all; with pytorch-fid fid)")
    parser.add_argument("--inception", metavar="FILE", help="weights (default: $D2C_INCEPTION, then torch.hub's cache)")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="centre crop of REFERENCE or IMAGES, in pixels")
    parser.add_argument("--jpeg", action="store_true", help="accept compressed pictures")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of IMAGES")
    parser.add_argument("--reconstruct", metavar="RUN", help="score RUN/{vq,kl}.pt on IMAGES")
    parser.add_argument("--table", action="store_true", help="print result files as a Markdown table")
    parser.add_argument("--out", metavar="FILE", help="default: result.json in GENERATED, for others in this folder")
    parser.add_argument("--batch", type=int, default=32, help="pictures a pass")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dry-run", action="store_true", help="check the inputs, say what would be scored, and stop")
    draw = parser.add_argument_group("to draw the pictures, as in sample.py")
    draw.add_argument("--run", help="run directory")
    draw.add_argument("--num", type=int, help="default 50000")
    draw.add_argument("--class", dest="class_", metavar="CLASS", help="default: all")
    draw.add_argument("--seed", type=int, help="default 0")
    sample.add_sampling_flags(draw)
    args = parser.parse_args()
    if args.table:
        if not args.paths:
            raise UserError("--table takes the result files to put into it.")
        return print(table(args.paths))
    resize, default = PROTOCOLS[args.protocol]
    modes = [args.run, args.save, args.reconstruct]
    drawing = [getattr(args, name) for name in ("num", "class_", "seed", *(f.name for f in fields(Sampling)))]
    checks = [(modes.count(None) >= 2, "take one of --run, --save and --reconstruct"),
              (args.run or drawing == [None] * len(drawing), "--num, --class, --seed and sampling flags need --run"),
              (not args.metrics or not (args.save or args.reconstruct), "--metrics is for generated pictures"),
              (not args.save or args.save.endswith(".npz"), "--save takes FILE.npz"),
              (not args.reconstruct or not args.crop or args.crop >= 11, "SSIM needs a --crop of at least 11 pixels")]
    args.metrics = args.metrics.split(",") if args.metrics else default
    args.compares = not args.save and not args.reconstruct and args.metrics != ["is"]
    paths, last = (not args.run) + args.compares, (args.paths or [""])[-1]
    checks += [({*args.metrics} <= {*METRICS}, f"--metrics takes {','.join(METRICS)}"),
               (args.protocol != "pytorch-fid" or {*args.metrics} == {"fid"}, "pytorch-fid defines FID only"),
               (len(args.paths) == paths, f"{paths} paths are needed, not {len(args.paths)}; see --help"),
               (not args.crop or os.path.isdir(last), "--crop cuts the pictures of a folder"),
               (all(v is None or v >= 1 for v in (args.batch, args.num, args.crop)),
                "--batch, --num and --crop must be at least 1")]
    for fine, text in checks:
        if not fine:
            raise UserError(text + ".")

    world, args.start = setup(args.device), time.time()
    model = Inception(find_inception(args.inception), resize)
    if world.device.type != "cpu":
        model.to(world.device, memory_format=torch.contiguous_format)
    job = reconstruct if args.reconstruct else save if args.save else evaluate
    job(args, model, world)
    barrier()  # rank 0 may still be at its eigenvalues


if __name__ == "__main__":
    run_script(main)
