"""Evaluation: FID, sFID, Inception Score, precision and recall of images, by the protocols that papers use.

    python fid.py GENERATED REFERENCE                       FID and IS as MAR computes them
    python fid.py GENERATED REFERENCE --protocol adm        FID, sFID, IS, precision and recall as ADM computes them
    python fid.py --run RUN REFERENCE --num 50000 --cfg 4   draws the images and scores them, without files
    python fid.py --reconstruct RUN IMAGES                  rFID, PSNR and SSIM of both tokenizers
    python fid.py IMAGES --save REF.npz --crop 256 --jpeg   statistics of your own images, to be used as REFERENCE
    python fid.py --table A/result.json B/result.json       prints several results as one Markdown table
    torchrun --nproc_per_node=8 -- fid.py ...               any but --table on 8 GPUs; the figures are as on one

GENERATED   a folder of lossless images at any depth, or an .npz with arr_0 uint8 [N, H, W, 3]
REFERENCE   either of these, or statistics: an .npz of ADM, pytorch-fid or --save, or torch-fidelity's cached .pt

All figures except PSNR and SSIM come from the features of one network (inception.py). They go to result.json, with all
settings behind them. gFID scores generated images, rFID reconstructions; never compare the two (docs/evaluation.md)."""
import argparse
import glob
import json
import os
import platform
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import checkpoints
import sample
from data import ahead, read_image, text_hash, to_float
from faults import run_script
from inception import Inception, exact_convolutions, file_hash, find_inception
from presets import Sampling
from runtime import UserError, barrier, gather, print0, read_json, refuse, setup, write_file, write_json

METRICS = {"fid": "pool", "sfid": "spatial", "is": "logits", "pr": "pool"}  # the output of Inception that each needs
PROTOCOLS = {
    # name            resize   metrics by default
    "torch-fidelity": ("tf1",   ["fid", "is"]),  # MAR's evaluator; D2C's paper names none
    "adm":            ("tf1",   [*METRICS]),     # ADM, DiT, LlamaGen; its IS differs, see `inception_score`
    "pytorch-fid":    ("torch", ["fid"]),        # defines no other metric
}
LOSSLESS, LOSSY = (".png", ".bmp", ".ppm", ".tif", ".tiff"), (".jpg", ".jpeg", ".webp")


# ----------------------------------------------------------------------------------------------------------- figures

def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """FID: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2, of means [D] and covariances [D, D] (1706.08500, Eq. 6).

    With S1 = R R^T, S1 S2 has the eigenvalues of R^T S2 R. That matrix is symmetric, so they are real, where scipy's
    sqrtm can give imaginary parts. R leaves out directions in which S1 has no variance; with N <= D images there are
    some. Rounding would give them eigenvalues of 1e-16, whose roots, 1e-8 each, would add up."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(v).to("cpu", torch.float64) for v in (mu1, cov1, mu2, cov2))
    refuse([(mu1.shape != mu2.shape, f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared"),
            (not all(v.isfinite().all() for v in (mu1, cov1, mu2, cov2)),
             "the statistics are not finite; the Inception weights or the reference file are damaged")])
    variance, axes = torch.linalg.eigh(cov1)                                        # ascending
    keep = variance > variance[-1] * len(variance) * torch.finfo(variance.dtype).eps
    root = axes[:, keep] * variance[keep].sqrt()                                    # R [D, rank]
    trace = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return max(float(distance), 0.0)  # for equal sets rounding can give about -1e-9


def inception_score(logits, splits: int = 10, seed: int = 2020, names=None, adm=False):
    """exp(mean KL(p_i || mean of p)) of each part of the logits [N, 1008] -> mean and deviation of these scores.

    torch-fidelity sorts files by path, shuffles by the seed and cuts equal parts. ADM cuts its .npz into parts of 5,000
    without a shuffle, so each part needs all classes. Therefore files in class folders are sorted by file name alone,
    which in sample.py's output is the picture's index. names: the files of the images, or None for an .npz."""
    N, logits = len(logits), torch.as_tensor(logits).cpu()
    refuse([(N < splits and not adm, f"the Inception Score needs at least {splits} images, not {N}")])
    if names:
        logits = logits[sorted(range(N), key=lambda i: os.path.basename(names[i]) if adm else names[i])]
    shuffled = logits[np.random.RandomState(seed).permutation(N)]
    parts = logits.split(5000) if adm else [shuffled[i * N // splits:(i + 1) * N // splits] for i in range(splits)]
    parts = [part.double().softmax(1) for part in parts]  # the mean KL is entropy of the mean - mean of the entropies
    scores = [float((torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp()) for p in parts]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k: int = 3):
    """Kynkäänniemi et al. 1904.06991: `pool` features real [N, D] and fake [M, D] -> (precision, recall).

    Each point has a ball that reaches its k-th nearest neighbour in its own set. Precision is the share of fakes
    inside some real ball; recall is the share of reals inside some fake ball. Distances are float32, 1,000 rows at a
    time. ADM computes them in float16, where they tie: it reads 0.001 (precision) and 0.002 (recall) higher."""
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    refuse([(min(len(real), len(fake)) <= k, f"precision and recall need more than {k} images on both sides")])
    distances = lambda a, b: (torch.cdist(block, b) for block in a.split(1000))     # [1000, len(b)] each
    # k + 1, because the nearest point of all is the point itself
    real_radius, fake_radius = (torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances(x, x)])
                                for x in (real, fake))
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for d, radius in zip(distances(fake, real), fake_radius.split(1000)):
        precise += int((d <= real_radius).any(1).sum())
        recalled |= (d <= radius[:, None]).any(0)
    return precise / len(fake), int(recalled.sum()) / len(real)


def psnr_ssim(a, b):
    """Two batches uint8 [B, 3, H, W] -> PSNR in dB and SSIM, each [B].

    SSIM (Wang et al. 2004): an 11x11 Gaussian window of deviation 1.5, wherever the image contains all of it."""
    x, y = a.float(), b.float()
    psnr = 10 * (255**2 / (x - y).square().mean((1, 2, 3)).clamp(min=1e-6)).log10()  # an exact copy: 108, not infinity
    window = torch.exp(-(torch.arange(11.0, device=x.device) - 5) ** 2 / (2 * 1.5**2))
    window = window.outer(window) / window.sum() ** 2
    blur = lambda v: F.conv2d(v.flatten(0, 1)[:, None], window[None, None])         # [B*3, 1, H-10, W-10]
    with exact_convolutions():
        mx, my, xx, yy, xy = map(blur, (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return psnr, ssim.view(len(x), -1).mean(1)


# --------------------------------------------------------------------------------------------- features of many images

def products(rows):
    """Rows [n, D] -> the sum over the rows of (1, row)' (1, row), [1 + D, 1 + D]: n, first and second moments at once.

    Such sums of batches and of ranks can be added. Float64, because float32 would move an FID by 2e-5."""
    rows = F.pad((rows.cpu() if rows.device.type == "mps" else rows).double(), (1, 0), value=1.0)  # MPS has no float64
    return rows.T @ rows


def mean_and_covariance(total):
    """Summed products [1 + D, 1 + D] -> mean [D], covariance [D, D] divided by n - 1, as np.cov does."""
    n = int(total[0, 0])
    refuse([(n < 2, f"{n} images have no covariance; an FID needs many images, in papers 50,000")])
    mean = total[0, 1:] / n
    return mean, (total[1:, 1:] - n * mean.outer(mean)) / (n - 1)


def summands(model: Inception, metrics, images) -> dict:
    """Batch [B, 3, H, W] -> {metric: what `measure` adds up: sums of products (fid, sfid), a list (is, pr)}."""
    out = model(images)
    return {m: products(out[METRICS[m]]) if m.endswith("fid") else [out[METRICS[m]].cpu()] for m in metrics}


def measure(args, world, images, features) -> dict:
    """Calls features(batch [B, 3, H, W]) on all images and adds up what it gives: a dictionary of products and lists.

    -> (mean, covariance) for products; [N, D] in the images' order for lists. Dry runs and ranks above 0 get {}."""
    print0(f"{images.about['path']}: {images.count} images of {'x'.join(map(str, images.size))} pixels; "
           f"protocol {args.protocol}, reference {args.reference or 'none'}")
    # Each rank takes a part of the batches, never of one batch: rounding inside the network depends on which images
    # share a batch, and the features must not depend on the number of ranks.
    starts = range(0, 0 if args.dry_run else images.count, args.batch)
    starts = starts[len(starts) * world.rank // world.size:len(starts) * (world.rank + 1) // world.size]
    batches = images.batches(range(i, min(i + args.batch, images.count)) for i in starts)
    bar = tqdm(batches, images.about["path"], len(starts), unit="batch", disable=args.dry_run or world.rank > 0)
    add = lambda total, more: {name: total[name] + more[name] for name in more} if total else more  # lists are joined
    sums = reduce(add, (features(pixels.to(world.device)) for pixels in bar), {})
    ranks = gather({name: x if isinstance(x, list) else x.cpu() for name, x in sums.items()}) or []  # rank 0 has all
    sums = reduce(add, filter(None, ranks), {})  # a rank without a batch gives {}
    return {name: torch.cat(x) if isinstance(x, list) else mean_and_covariance(x) for name, x in sums.items()}


# ----------------------------------------------------------------------------------------------------- image sources

class Images:
    """`count` images of `size` [H, W] in a fixed order. names: the path of each, or None. `about`: for result.json.

    batches(ranges of their numbers) yields uint8 [len(range), 3, H, W] for each range. labels: classes, if no names say
    them. settings: what drew them; by default settings.json in the folder (in X for X.npz)."""

    def __init__(self, path, identity, count, size, batches, names=None, labels=(), settings=None):
        self.count, self.size, self.batches, self.names = count, [*size], batches, names
        settings = settings or sample.read_settings(path.removesuffix(".npz")) or {}
        refuse([(settings.get("coarse"),
                 f"{path} holds images beside their decoded codes; draw them again without --show-coarse"),
                (names and count < settings.get("num", 0),
                 f"{path} holds {count} of {settings.get('num')} images; run sample.py with this --num again")])
        counts = np.unique([*map(os.path.dirname, names or ())] or labels, return_counts=True)[1].tolist()
        counts = {"classes": len(counts), "fewest": min(counts), "most": max(counts)} if counts else None
        self.about = {"path": path, "hash": identity, "per_class": counts, "settings": settings or None}


def open_images(root: str, crop: int | None = None, jpeg: bool = False) -> Images:
    """Opens an .npz, or a folder's images at any depth. crop: ADM's centre crop, in pixels; jpeg: take lossy ones."""
    if root.endswith(".npz"):
        return open_archive(root)
    files = sorted(f for f in glob.glob("**", root_dir=root, recursive=True) if f.lower().endswith(LOSSLESS + LOSSY))
    lossy = [f for f in files if f.lower().endswith(LOSSY) and not jpeg]
    places = [os.path.realpath(os.path.join(root, folder)) for folder in {*map(os.path.dirname, files)}]
    gone = [f for f in files if not os.path.exists(os.path.join(root, f))]
    refuse([(not os.path.isdir(root), f"{root} is neither a folder of images nor an .npz (or, as REFERENCE, a .pt)"),
            (not files, f"{root} holds no images ({', '.join(LOSSLESS)})"),
            (lossy, f"{root} holds {len(lossy)} compressed images, e.g. {', '.join(lossy[:1])}. Compression changes an "
                    f"FID: save PNG files, or give --jpeg if these are the originals"),
            (gone, f"{root}/{', '.join(gone[:1])} is a link to a missing file; make it again or remove it"),
            (len({*places}) < len(places), f"{root} reaches some images twice; remove the link to their folder")])

    def read(file):
        image = read_image(os.path.join(root, file), crop, upright=False)
        refuse([(image is None, f"{root}/{file} is no readable image, or too large; make it again or remove it")])
        refuse([(size and size != image.shape[1:],
                 f"{root} holds images of several sizes, see {file}; --crop cuts a reference")])
        return image

    size, threads = None, ThreadPoolExecutor(4)
    size = read(files[0]).shape[1:]
    load = lambda numbers: torch.from_numpy(np.stack([*threads.map(read, files[numbers.start:numbers.stop])]))
    identity = text_hash([[f, os.path.getsize(os.path.join(root, f))] for f in files])  # names and sizes, no contents
    return Images(root, identity, len(files), size, partial(ahead, load), files)


@contextmanager
def reading(path):
    try:
        yield
    except Exception as error:  # NumPy and zipfile raise almost anything on damaged files
        raise UserError(f"{path} is damaged, or is no .npz of images (arr_0) or statistics: {error}.") from None


def open_archive(path) -> Images:
    """arr_0 of an .npz, read piece by piece: 50,000 images of 256 pixels are 10 GB. arr_1: class ids, if there."""
    with reading(path):
        file, labels = zipfile.ZipFile(path).open("arr_0.npy"), np.load(path).get("arr_1", ())
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    refuse([(len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0],
             f"arr_0 of {path} is {dtype} {list(shape)}; images must be uint8 [N, H, W, 3]")])
    start, image_bytes = file.tell(), int(np.prod(shape[1:]))

    def load(numbers):
        with reading(path):
            file.seek(start + numbers.start * image_bytes)
            pixels = np.frombuffer(file.read(len(numbers) * image_bytes), np.uint8).reshape(len(numbers), *shape[1:])
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    return Images(path, file_hash(path), shape[0], shape[1:3], partial(ahead, load), labels=labels)


def draw_images(args, device) -> Images:
    """Images of args.run, drawn when they are needed: the images that sample.py writes with the same flags."""
    run = sample.load_run(args.run, device)
    s, labels = sample.choose_sampling(args, run), sample.find_classes(run.classes, args.class_ or "all")
    seed, num = args.seed or 0, args.num or 50_000
    names = [sample.picture_name(run, labels, i) for i in range(num)]
    classes = lambda numbers: torch.tensor([labels[i % len(labels)] for i in numbers])
    load = lambda numbers: sample.generate(run, classes(numbers), seed, numbers, s).images
    settings = {**sample.describe(run, s, seed, labels), "num": num}
    # `map`, not `ahead`: its thread would draw while Inception runs, and `exact_convolutions` affects all threads
    return Images(args.run, None, num, [run.pixels] * 2, partial(map, load), names, settings=settings)


# -------------------------------------------------------------------------------------------------------- references

def read_arrays(path) -> dict:
    """The arrays of an .npz or .pt file of statistics. Of arr_0, which can be large, only the name."""
    if path.endswith(".npz"):
        with reading(path), np.load(path) as archive:
            return {name: None if name == "arr_0" else archive[name] for name in archive.files}
    # torch-fidelity pickles NumPy arrays, whose parts the safe loader must know. NumPy 1 and 2 name one differently.
    names = [(np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *(type(np.dtype(t)) for t in "fd")]):
        return checkpoints.read(path)


def open_reference(args, model: Inception):
    """A folder, an .npz of images, or a file of statistics, told apart by content. It must have what the metrics need.

    Statistics have mu and sigma: pytorch-fid's, MAR's adm_in256_stats.npz, torch-fidelity's .pt (a cache of one input).
    ADM's has mu_s, sigma_s too, and arr_0, 10,000 images for precision and recall. --save writes the four, and `about`.

    -> facts for result.json; {"fid": (mean, covariance), "sfid": ...}, {} for images; the Images, or None."""
    path, metrics = args.reference, args.metrics
    arrays = read_arrays(path) if path.endswith((".npz", ".pt")) else {"arr_0": None}
    # Images beside statistics are only a part of the images behind them (ADM: 10,000 of 1.28 million). They serve
    # precision and recall; the file's statistics serve FID.
    wanted = "arr_0" in arrays and ("pr" in metrics or "mu" not in arrays)
    images = open_images(path, args.crop, args.jpeg) if wanted else None
    if images and "mu" not in arrays:
        return {**images.about, "images": images.count, "size": images.size}, {}, images
    refuse([(not {"mu", "sigma"} <= arrays.keys(), f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")])
    with reading(path):
        made = json.loads(str(arrays["about"])) if "about" in arrays else {}
    inception = made.get("inception") or ({"resize": "tf1"} if "mu_s" in arrays else {})  # mu_s without about: ADM
    if not inception:
        print0(f"note: {path} does not say how its images were resized; {model.about['resize']} is assumed")
    refuse((inception.get(key, ours) != ours,
            f"{path} was made with another {key} of Inception, {inception.get(key, ours)[:8]} instead of {ours[:8]}; "
            f"choose --protocol and --inception to fit, or make it again")
           for key, ours in model.about.items() if key != "file")
    statistics = {metric: (arrays[f"mu{s}"], arrays[f"sigma{s}"])
                  for metric, s in (("fid", ""), ("sfid", "_s")) if f"mu{s}" in arrays}
    refuse([([np.shape(sigma) for _, sigma in statistics.values()] != [(2048, 2048), (2023, 2023)][:len(statistics)],
             f"{path} has statistics of another network; an FID needs 2,048 features of Inception"),
            ("sfid" in {*metrics} - {*statistics}, f"{path} has no statistics for sFID; choose other --metrics"),
            ("pr" in metrics and not images, f"{path} has no images for precision and recall; choose other --metrics")])
    return {**made, "path": path, "hash": file_hash(path)}, statistics, images


# ------------------------------------------------------------------------------------------------------ command line

def score(args, model, world):
    """The first mode: scores generated images, from files or drawn by a run."""
    reference, real, real_images = open_reference(args, model) if args.reference else (None, {}, None)
    images = draw_images(args, world.device) if args.run else open_images(args.images, jpeg=args.jpeg)
    size = real_images.size if real_images else (reference or {}).get("size", images.size)
    refuse([(size != images.size, f"{args.reference} has or comes from images of {size} pixels, but these have "
                                  f"{images.size}; give another --crop, or a file of this size")])
    if real_images:
        real = measure(args, world, real_images, partial(summands, model, {*args.metrics} - {"is", *real})) | real
    if not (fake := measure(args, world, images, partial(summands, model, args.metrics))):
        return
    figures = {figure: frechet_distance(*real[metric], *fake[metric])
               for figure, metric in (("gfid", "fid"), ("sfid", "sfid")) if metric in fake}
    if "is" in fake:
        figures["is"], figures["is_std"] = inception_score(fake["is"], names=images.names, adm=args.protocol == "adm")
    if "pr" in fake:
        figures["precision"], figures["recall"] = precision_recall(*(x["pr"].to(world.device) for x in (real, fake)))
    report(args, images, reference, {"generated": figures}, model, world)


def reconstruct(args, model, world):
    """The second mode: compares IMAGES with what RUN/vq.pt and RUN/kl.pt, or the one that exists, make of them."""
    tokenizers = {kind: checkpoints.load_model(path, kind, world.device) for kind in ("vq", "kl")
                  if os.path.exists(path := os.path.join(args.reconstruct, f"{kind}.pt"))}
    refuse([(not tokenizers, f"{args.reconstruct} holds neither vq.pt nor kl.pt")])
    crop = args.crop or next(iter(tokenizers.values())).about.get("image_size", 256)  # an .npz is not cropped
    images = open_images(args.images, crop, args.jpeg)
    H, W = images.size
    refuse((H % t.stride or H != W or H < 11, f"squares of a multiple of {t.stride} pixels are needed, for SSIM of at "
                                              f"least 11, but these images have {images.size}; give another --crop")
           for t in tokenizers.values())

    def features(batch):
        out = {"images": products(model(batch)["pool"])}
        for kind, tokenizer in tokenizers.items():
            tokens = tokenizer.encode(to_float(batch))
            # KL decodes the posterior's mean. The latent scale is not needed: a file may not know it, and it cancels.
            decoded = tokenizer.decode(tokens) if kind == "vq" else tokenizer.to_images(tokenizer.posterior(tokens)[0])
            decoded = sample.to_uint8(decoded)
            out[kind] = products(model(decoded)["pool"])
            out[f"{kind} pixels"] = [torch.stack(psnr_ssim(batch, decoded), 1).cpu()]          # [B, 2]
        return out

    if not (found := measure(args, world, images, features)):
        return
    figures = {kind: {"rfid": frechet_distance(*found["images"], *found[kind]),
                      **dict(zip(("psnr", "ssim"), found[f"{kind} pixels"].double().mean(0).tolist()))}
               for kind in tokenizers}
    report(args, images, None, figures, model, world)


def save(args, model, world):
    """The third mode: writes the statistics of IMAGES, with what they were made from and with."""
    images = open_images(args.images, args.crop, args.jpeg)
    if not (found := measure(args, world, images, partial(summands, model, ("fid", "sfid")))):
        return
    (mu, sigma), (mu_s, sigma_s) = found["fid"], found["sfid"]
    made = json.dumps({"images": images.count, "size": images.size, "crop": args.crop, "inception": model.about,
                       "source": images.about["path"], "source_hash": images.about["hash"]})
    write_file(args.save, lambda f: np.savez(f, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, about=made))
    print0(f"{args.save}: statistics of {images.count} images")


def table(results: dict) -> str:
    """The fourth mode: {path of a result.json: its content} -> one Markdown table."""
    rows = []
    for path, r in results.items():
        try:
            settings = (r["samples"]["settings"] or {}).get("sampling", {})
            about = {k: settings[k] for k in ("iterations", "steps", "cfg", "schedule") if k in settings}
            about |= {"N": r["images"], "protocol": r["protocol"], "reference": (r["reference"] or {}).get("path", "")}
            rows += [{"of": f"{r['reconstructed'] or r['samples']['path']}, {row}", **about,
                      **labelled(figures, r["images"])} for row, figures in r["figures"].items()]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is no result.json of fid.py.") from None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def labelled(figures, n) -> dict:
    """Name and value as printed. An FID falls with the number of images, so under 10,000 its name says the number."""
    at = f"@{n}" if n < 10_000 else ""
    names = {"gfid": f"gFID{at}", "sfid": f"sFID{at}", "rfid": f"rFID{at}", "is": "IS", "psnr": "PSNR", "ssim": "SSIM"}
    deviation = {"is": f" ± {figures['is_std']:.4f}"} if "is" in figures else {}
    return {names.get(k, k): f"{v:.4f}{deviation.get(k, '')}" for k, v in figures.items() if k != "is_std"}


def report(args, images: Images, reference: dict | None, figures, model, world):
    """Writes result.json, the figures and the settings behind them (of --reconstruct the path), and prints a table."""
    n, seconds = images.count, round(time.time() - args.start, 1)
    beside = args.images if not (args.run or args.reconstruct) and os.path.isdir(args.images) else ""
    out = args.out or os.path.join(beside, "result.json")
    result = {
        "figures": figures, "images": n, "size": images.size, "protocol": args.protocol, "samples": images.about,
        "reference": reference, "reconstructed": args.reconstruct, "inception": model.about, "jpeg": args.jpeg,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": str(world.device), "ranks": world.size, "batch": args.batch, "crop": args.crop, "seconds": seconds}
    print0(table({out: result}))  # before the file, which a full disk may refuse
    write_json(out, result)
    fewest = min(n, (reference or {}).get("images", n))
    if n < 10_000 and "fid" in str(figures):
        print0(f"note: an FID falls with the number of images; compare it only with another FID@{n} (papers: 50,000)")
    if fewest <= 2048 and "fid" in str(figures):
        print0(f"warning: {fewest} images are no more than the 2,048 features, so their covariance is singular")
    print0(f"{out}: {n} images, {seconds} s")


def read_flags():
    """-> checked flags, with args.images (the path GENERATED or IMAGES) and args.reference, which may be None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="GENERATED, REFERENCE or IMAGES, as in the examples")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="torch-fidelity")
    parser.add_argument("--metrics", help="from fid,sfid,is,pr (default: fid,is; all for adm; fid for pytorch-fid)")
    parser.add_argument("--inception", metavar="FILE", help="weights (default: $D2C_INCEPTION, then torch.hub's cache)")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="centre crop of REFERENCE or IMAGES, in pixels")
    parser.add_argument("--jpeg", action="store_true", help="accept compressed images")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of IMAGES")
    parser.add_argument("--reconstruct", metavar="RUN", help="score RUN/{vq,kl}.pt on IMAGES")
    parser.add_argument("--table", nargs="+", metavar="result.json", help="print result files as a Markdown table")
    parser.add_argument("--out", metavar="FILE", help="default: result.json in the folder GENERATED, else here")
    parser.add_argument("--batch", type=int, default=32, help="images per pass")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    parser.add_argument("--dry-run", action="store_true", help="check the inputs, say what would be scored, and stop")
    draw = parser.add_argument_group("to draw the images, as in sample.py")
    draw.add_argument("--run", help="run directory")
    draw.add_argument("--num", type=int, help="default 50000")
    draw.add_argument("--class", dest="class_", metavar="CLASS", help="default: all")
    draw.add_argument("--seed", type=int, help="default 0")
    sample.add_sampling_flags(draw)
    args = parser.parse_args()
    drawing = [v for k, v in vars(args).items() if k in ("num", "class_", "seed") or hasattr(Sampling, k)]
    scoring = not (args.save or args.reconstruct or args.table)
    metrics = args.metrics.split(",") if args.metrics else PROTOCOLS[args.protocol][1]
    # --run draws GENERATED, and the Inception Score alone needs no REFERENCE
    names = ["images"] * (not args.run and not args.table) + ["reference"] * (scoring and metrics != ["is"])
    paths = dict(zip(names, args.paths))
    refuse([(bool(args.run) + bool(args.save) + bool(args.reconstruct) > 1, "take one of --run, --save, --reconstruct"),
            (not args.run and drawing != [None] * len(drawing), "--num, --class, --seed and sampling flags need --run"),
            (not scoring and args.metrics, "--metrics is for generated images"),
            (args.save and not args.save.endswith(".npz"), "--save takes FILE.npz"),
            (args.save and os.path.realpath(args.save) in map(os.path.realpath, args.paths), "--save takes a new file"),
            (args.out and (args.save or args.table), "--out is for figures; --save and --table write none"),
            (not set(metrics) <= set(METRICS), f"--metrics takes {','.join(METRICS)}"),
            (args.protocol == "pytorch-fid" and metrics != ["fid"], "pytorch-fid defines FID only"),
            (len(args.paths) != len(names), f"{len(names)} paths are needed, not {len(args.paths)}; see --help"),
            (args.crop and not os.path.isdir(paths.get("reference" if scoring else "images", "")),
             "--crop crops the images of a folder REFERENCE or IMAGES"),
            (any(v is not None and v < 1 for v in (args.batch, args.num, args.crop)),
             "--batch, --num and --crop must be at least 1")])
    vars(args).update({"metrics": metrics, "images": None, "reference": None, **paths})
    return args


def main():
    args = read_flags()
    if args.table:
        return print(table({path: read_json(path) for path in args.table}))
    world, args.start = setup(args.device), time.time()
    model = Inception(find_inception(args.inception), PROTOCOLS[args.protocol][0], world.device)
    (save if args.save else reconstruct if args.reconstruct else score)(args, model, world)
    barrier()  # the other ranks wait while rank 0 computes the figures


if __name__ == "__main__":
    run_script(main)
