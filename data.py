"""Data: an image folder, its token cache, and built-in toy pictures.

    python data.py --images DIR --run RUN --out CACHE     tokenise an image folder with the tokenizers of RUN
    python data.py --toy 4000 --out DIR                   write toy pictures as an image folder, 10 classes of 64x64
    torchrun --nproc_per_node=8 -- data.py --images ...   the same over 8 GPUs; run again after a stop, it goes on
    torchrun --nnodes=4 --nproc_per_node=8 ... -- data.py --images ...          over four nodes that share a disk

An image folder has one folder a class. `classes.tsv` beside them (columns folder, id, name) gives external ids and
names; without it the sorted folder names count 0, 1, 2, ..., which for ImageNet's folders is the usual index.

A cache is a folder of memory-mapped arrays over N images, each in two views (as it is, mirrored); codes and moments
of one entry always come from the same view. The arrays are cut into parts of 65,536 images, here part 000, each of
which one node writes: two nodes that write the same page of a shared file may undo each other's work.

    codes-000.npy    [n, 2, L]        uint16   labels-000.npy [n] int32, -1 where the image could not be read
    moments-000.npy  [n, 2, 2C, h, w] float16  sums-000.npy   [n, 2] uint32, CRC-32 of an entry's codes and moments
    done-000.npy     [n/64] uint8, 1 for each chunk of 64 images that is all there, by which a stopped command goes on
    header.json      what it was made from and with, and which images could not be read

Every read checks the sum of its entry. Caches of format 1 are one part, without numbers in the names and without sums.

Stage 0 of train.py reads `Folder`, stages 1 and 2 read `Cache`; both say which images step k of a run sees, from the
seed alone.
"""
import argparse
import errno
import hashlib
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from math import pi

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import checkpoints
from tokenizers import latent_scale
from runtime import UserError, barrier, print0, run_script, setup, sweep, write_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 2**26  # of an image: 64 million; PIL's own limits only warn at first
CHUNK = 64     # images tokenised and recorded as done together
PART = 65_536  # images a part, a multiple of CHUNK

Image.MAX_IMAGE_PIXELS = None  # the limit is MAX_PIXELS, asked before anything is decoded


# ----------------------------------------------------------------------------------------------------------- images

def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (2105.05233): halve with BOX while twice too large, BICUBIC to the short side, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def read_image(path: str, size: int | None, upright=False) -> np.ndarray | None:
    """-> uint8 [3, size, size], or None if the file is no readable image, or too large. Transparency falls on white.

    size None leaves the picture as it is. upright: turned as a camera's note in it (EXIF) says; ADM's loader ignores
    that, and so do training and measuring.
    """
    try:
        with Image.open(path) as image:
            enlarged = max(1, size / min(image.size)) if size else 1  # a narrow strip grows before it is cut
            if image.width * image.height * enlarged**2 > MAX_PIXELS:
                return None
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return np.asarray(center_crop(image, size) if size else image).transpose(2, 0, 1).copy()
    except Exception:  # PIL raises almost anything on broken files
        return None


def refuse_many(bad: list, paths: list, then=""):
    """Some unreadable images are left out; more than 1% are a mistake."""
    if len(bad) > 0.01 * len(paths):
        raise UserError(f"{len(bad)} of {len(paths)} images cannot be read, more than 1%, e.g. {bad[0]}; "
                        f"repair or remove them{then}.")


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 [...] -> float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def find_images(root: str):
    """-> (relative paths, labels, classes as [external id, name]), in sorted order."""
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder; give a folder with one folder of images per class.")
    folders = sorted(d.name for d in os.scandir(root) if d.is_dir() and not d.name.startswith("."))
    if folders and set(folders) <= {"train", "val", "valid", "test"}:
        raise UserError(f"{root} holds splits ({', '.join(folders)}), not classes; give one, e.g. {root}/{folders[0]}.")
    classes = checkpoints.read_classes(os.path.join(root, "classes.tsv")) or {f: [i, f] for i, f in enumerate(folders)}
    ids = [identity for identity, _ in classes.values()]
    if len(set(ids)) < len(ids):
        raise UserError(f"{root}/classes.tsv gives the id {max(ids, key=ids.count)} twice; every class needs its own.")
    if unknown := set(folders) - set(classes):
        raise UserError(f"{root}/classes.tsv has no line for the folder {min(unknown)}; add one or remove the file.")
    classes, paths, labels = {f: v for f, v in classes.items() if f in folders}, [], []
    for label, folder in enumerate(classes):
        try:
            names = os.listdir(os.path.join(root, folder))
        except OSError as error:
            raise UserError(f"cannot read {root}/{folder}: {error.strerror}.") from None
        files = sorted(f for f in names if f.lower().endswith(EXTENSIONS) and not f.startswith("."))
        if not files:
            print0(f"note: {root}/{folder} holds no images; it counts as a class all the same")
        paths += [f"{folder}/{f}" for f in files]
        labels += [label] * len(files)
    if not paths:
        raise UserError(f"{root} holds no images; it needs one folder per class with PNG, JPEG or WebP files in it.")
    return paths, labels, list(classes.values())


# ------------------------------------------------------------------------------------------- which images, and when

class Order:
    """Sample number -> (image, view). Every epoch is a new permutation, and each image shows one view at random."""

    def __init__(self, images: np.ndarray, seed: int):
        self.images, self.seed = images, seed
        self.epoch = lru_cache(2)(self.epoch)  # the thread that loads ahead may be in the next one

    def epoch(self, number):
        random = np.random.default_rng((self.seed, number))
        return random.permutation(self.images), random.integers(2, size=len(self.images))

    def __call__(self, numbers):
        """Sample numbers, counted from the start of training -> arrays of images and of views (0 or 1)."""
        places = [divmod(n, len(self.images)) for n in numbers]
        image, view = zip(*((self.epoch(e)[0][i], self.epoch(e)[1][i]) for e, i in places))
        return np.array(image), np.array(view)


class Folder:
    """Images of a folder, for the tokenizers: `batch(numbers)` -> float32 [n, 3, size, size] in [-1, 1]."""

    def __init__(self, root: str, size: int, seed: int = 0):
        self.root, self.size = root, size
        self.paths, self.labels, self.classes = find_images(root)
        self.order, self.threads = Order(np.arange(len(self.paths)), seed), ThreadPoolExecutor(4)
        self.unreadable = {}  # path -> None: a set in order
        self.identity = text_hash(self.paths)

    def __len__(self):
        return len(self.paths)

    def _read(self, image, view):
        """The image, or if it cannot be read the next one that can."""
        while (pixels := read_image(os.path.join(self.root, self.paths[image]), self.size)) is None:
            if self.paths[image] not in self.unreadable:
                self.unreadable[self.paths[image]] = None
                print0(f"note: {self.root}/{self.paths[image]} cannot be read; the next image takes its place")
            refuse_many(list(self.unreadable), self.paths)
            image = (image + 1) % len(self.paths)
        return pixels[:, :, ::-1] if view else pixels

    def batch(self, numbers):
        return (to_float(np.stack(list(self.threads.map(self._read, *self.order(numbers))))),)


class Cache:
    """A token cache: `batch(numbers)` -> codes [n, L] int64, moments [n, 2C, h, w] float16, classes [n] int64."""

    def __init__(self, path: str, seed: int = 0):
        self.path, self.header = path, read_header(path)
        h = self.header
        if not h["complete"]:
            raise UserError(f"the cache {path} is not complete; run the same data.py command again, it goes on.")
        self.classes, self.scale = h["classes"], h["scale"]
        self.parts = [open_arrays(path, h, p, "r") for p in range(parts(h))]
        labels = np.concatenate([a["labels"] for a in self.parts])
        if h["format"] == 1:
            print0(f"note: {path} was made by an earlier version of data.py and has no checksums")
        elif h["labels"] != zlib.crc32(labels):
            raise UserError(f"{path} was changed: its labels do not fit its header; {AGAIN}.")
        readable = np.flatnonzero(labels >= 0)
        self.order, self.size, self.identity = Order(readable, seed), len(readable), h["checksum"]

    def __len__(self):
        return self.size

    def check_tokenizer(self, kind: str, model, path: str):
        """Refuses tokenizers other than those that made the cache."""
        if checkpoints.checksum(model.state_dict()) != self.header[kind]:
            raise UserError(f"the cache {self.path} was made with another {kind} tokenizer than {path}; "
                            f"make it again: python data.py --images DIR --run {os.path.dirname(path)} --out CACHE")

    def batch(self, numbers):
        codes, moments, labels = zip(*map(self.entry, *self.order(numbers)))
        return (torch.from_numpy(np.stack(codes).astype(np.int64)), torch.from_numpy(np.stack(moments)),
                torch.from_numpy(np.array(labels, np.int64)))

    def entry(self, image, view):
        """Codes [L], moments [2C, h, w] and label of one image in one view."""
        p, i = divmod(image, self.header.get("part", self.header["images"]))
        a = self.parts[p]
        codes, moments = a["codes"][i, view], a["moments"][i, view]
        if "sums" in a and a["sums"][i, view] != entry_sum(codes, moments):
            raise UserError(f"{self.path} is damaged: the checksum of image {image} does not fit; {AGAIN}.")
        return codes, moments, a["labels"][i]


def ahead(load, steps):
    """Yields load(step) for each step, the next one being loaded by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        steps = iter(steps)
        waiting = [thread.submit(load, s) for s in islice(steps, 2)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [thread.submit(load, s) for s in islice(steps, 1)]


# ------------------------------------------------------------------------------------------------------------ cache

AGAIN = "remove it and make the cache again with data.py"


def read_header(path: str) -> dict:
    try:
        with open(os.path.join(path, "header.json")) as f:
            header = json.load(f)
        body = {k: v for k, v in header.items() if k != "checksum"}
        if header["checksum"] != text_hash(body):
            raise UserError(f"{path}/header.json was changed; make the cache again with data.py.")
        return header
    except (FileNotFoundError, NotADirectoryError):
        command = f"python data.py --images DIR --run RUN --out {path}"
        raise UserError(f"{path} is not a token cache; make one: {command}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}/header.json is damaged; make the cache again with data.py.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}/header.json: {error.strerror}.") from None


def write_header(path: str, header: dict):
    content = json.dumps({**header, "checksum": text_hash(header)}, indent=1).encode()
    write_file(os.path.join(path, "header.json"), lambda f: f.write(content))


def text_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def entry_sum(codes, moments) -> int:
    return zlib.crc32(moments, zlib.crc32(codes))


def parts(h: dict) -> int:
    """The number of parts of a cache."""
    return -(-h["images"] // h.get("part", h["images"]))


def layout(path: str, h: dict, p: int) -> dict:
    """The arrays of part p: name -> (file, shape, type). `done` comes last and says that the part is all there."""
    L, g, old = h["grid"] ** 2, h["grid"], h["format"] == 1
    n = h["images"] if old else min(h["part"], h["images"] - p * h["part"])
    arrays = {"codes": ((n, 2, L), np.uint16), "moments": ((n, 2, 2 * h["channels"], g, g), np.float16),
              "labels": ((n,), np.int32), "sums": ((n, 2), np.uint32), "done": ((-(-n // CHUNK),), np.uint8)}
    return {name: (os.path.join(path, f"{name}.npy" if old else f"{name}-{p:03d}.npy"), shape, dtype)
            for name, (shape, dtype) in arrays.items() if not (old and name == "sums")}


def open_arrays(path: str, h: dict, p: int, mode: str) -> dict:
    """The arrays of part p. mode: r or r+."""
    arrays = {}
    for name, (file, shape, dtype) in layout(path, h, p).items():
        try:
            array = np.lib.format.open_memmap(file, "r")  # r+ would fill up a file cut short with zeros
            if array.shape == shape and array.dtype == dtype and array.flags.c_contiguous:
                arrays[name] = np.lib.format.open_memmap(file, mode)
        except Exception as error:  # numpy reads the header of a damaged file as best it can
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise UserError(f"cannot open {file}: {error.strerror}.") from None
            raise UserError(f"{file} is missing or damaged; remove {path} and make the cache again.") from None
        if name not in arrays:
            raise UserError(f"{file} does not fit its header; remove {path} and make the cache again.")
    return arrays


def create(path: str, h: dict, p: int, labels: list):
    """Allocates the arrays of part p for real: a page of a sparse file that finds the disk full kills the process."""
    files = layout(path, h, p)
    try:
        for name, (file, shape, dtype) in files.items():
            array = np.lib.format.open_memmap(file, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                with open(file, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, os.path.getsize(file))
            if name == "labels":
                array[:] = labels[p * h["part"]:][:len(array)]
                array.flush()
    except OSError as error:
        for written, *_ in files.values():
            if os.path.exists(written):
                os.unlink(written)
        raise UserError(f"cannot write {file}: {error.strerror}; free some space or choose another --out.") from None


def tokenise(images: str, run: str, out: str, world, size: int | None = None, dry_run=False):
    """Writes the cache `out` of the image folder with RUN/vq.pt and RUN/kl.pt.

    Node k of n takes every n-th part, from the k-th on, and its ranks the chunks of these in turn.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # of this node
    (node, rank), nodes = divmod(world.rank, ranks), world.size // ranks
    vq, kl = (checkpoints.load_model(os.path.join(run, f"{kind}.pt"), kind, world.device) for kind in ("vq", "kl"))
    if vq.config.codebook_size > 2**16:
        raise UserError(f"{run}/vq.pt has {vq.config.codebook_size} codes; a cache holds at most 65,536.")
    size = size if size is not None else kl.about.get("image_size", 256)
    if size < 1 or size % vq.stride or size % kl.stride or vq.stride != kl.stride:
        raise UserError(f"{size} pixels and tokenizer strides {vq.stride} and {kl.stride} do not make one grid.")
    paths, labels, classes = find_images(images)
    header = {"format": 2, "images": len(paths), "part": PART, "grid": size // kl.stride,
              "channels": kl.config.z_channels, "size": size, "codebook": vq.config.codebook_size, "classes": classes,
              "files": text_hash(paths), "vq": checkpoints.checksum(vq.state_dict()),
              "kl": checkpoints.checksum(kl.state_dict())}
    print0(f"{images}: {len(paths):,} images of {len(classes)} classes -> {out}, {size} pixels, two views of "
           f"{header['grid'] ** 2} tokens each")
    if dry_run:
        return
    if world.rank == 0:
        begin(out, header)
    barrier()
    mine = range(node, parts(header), nodes)
    if rank == 0 and not read_header(out)["complete"]:
        for p in mine:
            if not os.path.exists(layout(out, header, p)["done"][0]):
                create(out, header, p, labels)
    barrier()

    arrays = {p: open_arrays(out, header, p, "r+") for p in mine}
    # (part, chunk) of each chunk of 64 images that is this rank's and not done
    chunks = [(p, c) for p in mine for c in range(rank, len(arrays[p]["done"]), ranks) if not arrays[p]["done"][c]]
    threads = ThreadPoolExecutor(4)
    read = lambda path: read_image(os.path.join(images, path), size)
    place = lambda p, c: slice(p * PART + c * CHUNK, p * PART + (c + 1) * CHUNK)  # of all images
    load = lambda chunk: list(threads.map(read, paths[place(*chunk)]))
    bad, look = [], dict(unit=" images", desc="tokenise", disable=world.rank > 0)
    with tqdm(total=len(chunks) * CHUNK, **look) as bar:
        for (p, c), pixels in zip(chunks, ahead(load, chunks)):
            names, a = paths[place(p, c)], arrays[p]
            bad += [name for name, x in zip(names, pixels) if x is None]
            refuse_many(bad, paths, f", then remove {out} and run again")
            good = np.array([i for i, x in enumerate(pixels) if x is not None], dtype=int)
            rows = c * CHUNK + good
            known = zip(labels[place(p, c)], pixels)
            a["labels"][c * CHUNK:][:len(pixels)] = [label if x is not None else -1 for label, x in known]
            if len(good):
                x = to_float(np.stack([pixels[i] for i in good])).to(world.device)
                for view, y in enumerate((x, x.flip(-1))):
                    a["codes"][rows, view] = vq.encode(y).cpu().numpy().astype(np.uint16)
                    a["moments"][rows, view] = kl.encode(y).cpu().numpy().astype(np.float16)
                    for i in rows:
                        a["sums"][i, view] = entry_sum(a["codes"][i, view], a["moments"][i, view])
            for name in ("codes", "moments", "labels", "sums"):
                a[name].flush()
            a["done"][c] = 1  # after its data is on disk, so that a kill loses at most this chunk
            a["done"].flush()
            bar.update(len(pixels))
    barrier()
    if world.rank == 0:
        finish(out, header, paths, kl.config.scale)
    barrier()


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --out.") from None


def begin(out, header):
    """Writes a first header, or checks that the one already there belongs to the same images and tokenizers."""
    if os.path.exists(os.path.join(out, "header.json")):
        sweep(out)
        there = read_header(out)
        if any(there.get(k) != v for k, v in header.items()):
            raise UserError(f"{out} holds a cache of other images or tokenizers, or of an earlier version; choose "
                            "another --out or remove it.")
    else:
        make_folder(out)
        write_header(out, {**header, "complete": False})


def finish(out, header, paths, file_scale):
    """Checks every sum, measures the scale of the latents, 1 / std over all images and views; completes the header."""
    labels, moments, damaged = [], [], 0
    for p in range(parts(header)):
        a = open_arrays(out, header, p, "r+")
        labels.append(a["labels"])
        for c in range(len(a["done"])):
            rows = c * CHUNK + np.flatnonzero(a["labels"][c * CHUNK:(c + 1) * CHUNK] >= 0)
            sums = [[entry_sum(a["codes"][i, v], a["moments"][i, v]) for v in (0, 1)] for i in rows]
            if not a["done"][c] or not np.array_equal(a["sums"][rows], np.reshape(sums, (-1, 2))):
                a["done"][c], damaged = 0, damaged + 1
            moments.append((a["moments"], rows))
    if damaged:
        raise UserError(f"{damaged} chunks of {out} are not on disk as they were written; run the same command again.")
    labels = np.concatenate(labels)
    bad = [paths[i] for i in np.flatnonzero(labels < 0)]
    refuse_many(bad, paths, f", then remove {out} and run again")
    scale = latent_scale(torch.from_numpy(m[rows]).flatten(0, 1) for m, rows in moments)
    if not np.isfinite(scale):
        raise UserError(f"{out} holds latents that are not finite; kl.pt is damaged or was trained badly.")
    write_header(out, {**header, "complete": True, "scale": scale, "unreadable": bad, "labels": zlib.crc32(labels)})
    print0(f"{out}: {len(paths) - len(bad)} images, {len(bad)} unreadable, {len(header['classes'])} classes, "
           f"latent scale {scale:.4f}")
    if file_scale and abs(scale / file_scale - 1) > 0.05:
        print0(f"note: kl.pt says {file_scale:.4f}, more than 5% away; its latents were measured on other images")


# -------------------------------------------------------------------------------------------------------- toy images

SHAPES = ("disc", "square", "triangle", "ring", "cross")


def toy_picture(label: int, random: np.random.Generator, size: int = 64) -> Image.Image:
    """One of 10 classes: five shapes, warm on a smooth background (0 to 4) or cold on a striped one (5 to 9)."""
    warm, shape = label < 5, SHAPES[label % 5]
    y, x = np.mgrid[:size, :size] / size
    angle, phase = random.uniform(0, pi), random.uniform(0, 2 * pi)
    wave = np.cos(angle) * x + np.sin(angle) * y
    wave = wave if warm else 0.5 + 0.3 * np.sin(2 * pi * 6 * wave + phase)
    dark, light = random.uniform(20, 90, 3), random.uniform(110, 200, 3)
    ground = dark + (light - dark) * wave.clip(0, 1)[..., None]
    image = Image.fromarray(ground.astype(np.uint8)).resize((4 * size, 4 * size))
    color = (np.array([235, 120, 40]) if warm else np.array([60, 140, 240])) + random.integers(-20, 20, 3)
    color, r = tuple(int(v) for v in color.clip(0, 255)), random.uniform(0.2, 0.34) * 4 * size
    cx, cy = random.uniform(0.38, 0.62, 2) * 4 * size
    draw = ImageDraw.Draw(image)
    box = [cx - r, cy - r, cx + r, cy + r]
    if shape == "disc":
        draw.ellipse(box, fill=color)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=int(r * 0.4))
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(cx, cy - r), (cx - r, cy + r), (cx + r, cy + r)], fill=color)
    else:
        draw.rectangle([cx - r, cy - r / 3, cx + r, cy + r / 3], fill=color)
        draw.rectangle([cx - r / 3, cy - r, cx + r / 3, cy + r], fill=color)
    return image.resize((size, size), Image.BOX)


def write_toy(count: int, out: str, seed: int = 0):
    """Writes `count` toy pictures as an image folder; picture i is the same whatever the count."""
    names = [f"{'warm' if k < 5 else 'cold'} {SHAPES[k % 5]}" for k in range(10)]
    for name in names:
        make_folder(os.path.join(out, name.replace(" ", "_")))
    with open(os.path.join(out, "classes.tsv"), "w") as f:
        f.write("folder\tid\tname\n" + "".join(f"{n.replace(' ', '_')}\t{k}\t{n}\n" for k, n in enumerate(names)))
    for i in tqdm(range(count), unit=" images", desc="toy"):
        picture = toy_picture(i % 10, np.random.default_rng((seed, i)))
        picture.save(os.path.join(out, names[i % 10].replace(" ", "_"), f"{i:06d}.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image folder to tokenise")
    parser.add_argument("--run", help="run directory whose vq.pt and kl.pt are used")
    parser.add_argument("--toy", type=int, metavar="N", help="write N toy pictures instead")
    parser.add_argument("--out", required=True, help="the cache, or the folder of toy pictures")
    parser.add_argument("--size", type=int, help="crop in pixels (default: what kl.pt was trained at; 256 if official)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be tokenised, and stop")
    args = parser.parse_args()
    if args.toy is not None:
        if args.toy < 1:
            raise UserError("--toy needs a number of pictures of at least 1.")
        if args.dry_run:
            return print(f"{args.toy:,} toy pictures of 10 classes -> {args.out}")
        try:
            return write_toy(args.toy, args.out)
        except OSError as error:
            raise UserError(f"cannot write to {args.out}: {error.strerror}.") from None
    if not args.images or not args.run:
        raise UserError("give --images DIR and --run RUN to tokenise, or --toy N; see --help.")
    tokenise(args.images, args.run, args.out, setup(args.device), args.size, args.dry_run)


if __name__ == "__main__":
    run_script(main)
