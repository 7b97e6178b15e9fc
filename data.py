"""Data: folders of images, their cache of tokens, and the built-in toy pictures.

    python data.py --images DIR --run RUN --out CACHE     encode an image folder with RUN/vq.pt and RUN/kl.pt
    torchrun --nproc_per_node=8 -- data.py --images ...   the same on 8 GPUs; several nodes need a disk that all see
    python data.py --toy 4000 --out DIR                   write 4,000 toy pictures: 10 classes, 64x64 pixels

An image folder has one folder per class. A file `classes.tsv` in it (columns folder, id, name) gives each class its
external id and name. Without it the ids count the sorted folders (0, 1, 2, ..., for ImageNet the usual index), unless
all names are numbers, no two equal: then these are the ids, and order the folders.

The cache holds each image in V views: view 0 is the centre crop, view 1 its mirror image, every further view a random
crop. So stages 1 and 2 run no encoder. `header.json` says what data.py made the cache from, and which images could
not be read. `part-000.npy`, `part-001.npy`, ... are arrays [n, V] of entries (`entry_type`), one for each view of each
image. The file of a part is either whole or absent. After a stop, the same command makes the missing parts.

train.py reads `Folder` in stage 0 and `Cache` in stages 1 and 2. `Order` decides which images step k of a run sees."""
import argparse
import hashlib
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, cycle, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import checkpoints
from faults import run_script
from runtime import UserError, barrier, print0, read_json, refuse, setup, sweep, write_file, write_json
from tokenizers import latent_scale

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 2**26  # per image: 67 million
FORMAT = 4   # of a cache
CHUNK = 64   # images that go through the tokenizers together
PARTS = 512  # files of a cache at most; training keeps all of them open
AGAIN = "remove it and run the same data.py command again"

Image.MAX_IMAGE_PIXELS = None  # PIL only warns at its limit; `open_image` refuses by MAX_PIXELS before it decodes


# ----------------------------------------------------------------------------------------------------------- images

def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (2105.05233): halve while the result is large enough, resize the short side, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def random_crop(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """A square at a random place, its side 0.8 to 1 times the short side. Half of the crops are mirrored."""
    side = round(min(image.size) * random.uniform(0.8, 1.0))
    x, y = (int(random.integers(length - side + 1)) for length in image.size)
    crop = center_crop(image.crop((x, y, x + side, y + side)), size)  # a square, so this only resizes
    return ImageOps.mirror(crop) if random.random() < 0.5 else crop


def open_image(path: str, size: int | None = None, upright=True) -> Image.Image | None:
    """The picture in RGB, its transparent parts on white. None if unreadable, too large, of floats or of 32-bit ints.

    size: of the crop that the caller will make. upright: obey the camera's EXIF note. fid.py does not, as ADM."""
    try:
        with Image.open(path) as image:
            enlarged = max(1, size / min(image.size)) if size else 1  # center_crop would make a long strip huge
            unscaled = image.mode == "F" or image.mode == "I" and image.format == "TIFF"
            if unscaled or image.width * image.height * enlarged**2 > MAX_PIXELS:
                return None
            image = ImageOps.exif_transpose(image) if upright else image
            if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception:  # PIL raises almost anything on broken files
        return None


def read_image(path: str, size: int | None, upright=True) -> np.ndarray | None:
    """-> uint8 [3, size, size], the centre crop; the whole picture if size is None. None as in `open_image`."""
    image = open_image(path, size, upright)
    return image and np.asarray(center_crop(image, size) if size else image).transpose(2, 0, 1).copy()


def read_views(path: str, size: int, views: int, *key: int) -> np.ndarray | None:
    """-> uint8 [views, 3, size, size] from one reading of the file. None as in `open_image`.

    key: the seed and the picture's number. With the view's number they seed a random crop, on any number of ranks."""
    image = open_image(path, size)
    if image is None:
        return None
    center = center_crop(image, size)
    crops = [center, ImageOps.mirror(center)][:views]
    crops += [random_crop(image, size, np.random.default_rng((*key, v))) for v in range(2, views)]
    return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])


def lies_in(path: str, folder: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def refuse_many(bad: list, paths: list, then=""):
    """Raises if more than 1% of the images cannot be read; callers skip fewer. `then` ends the sentence."""
    refuse([(len(bad) > 0.01 * len(paths), f"{len(bad)} of {len(paths)} images cannot be read, more than 1%, e.g. "
             f"{''.join(bad[:1])}; repair or remove them{then}")])


def to_float(images) -> torch.Tensor:
    """uint8 [...], an array or a tensor -> float32 [...] in [-1, 1], on the tensor's device."""
    return torch.as_tensor(images).float() / 127.5 - 1


def find_images(root: str):
    """-> relative paths, labels, classes as [external id, name]; ordered as in classes.tsv, else sorted."""
    is_image = lambda name: name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    try:
        folders = sorted(d.name for d in os.scandir(root) if d.is_dir() and not d.name.startswith("."))
        files = {f: sorted(filter(is_image, os.listdir(os.path.join(root, f)))) for f in folders}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; give a folder of class folders.") from None
    if folders and set(folders) <= {"train", "val", "valid", "test"}:
        raise UserError(f"{root} holds splits ({', '.join(folders)}), not classes; give one, e.g. {root}/{folders[0]}.")
    numbers = sorted((int(f), f) for f in folders if f.isdecimal())
    counted = numbers if len({i for i, _ in numbers}) == len(folders) else enumerate(folders)
    classes = checkpoints.read_classes(os.path.join(root, "classes.tsv")) or {f: [i, f] for i, f in counted}
    ids = [identity for identity, _ in classes.values()]
    if len(set(ids)) < len(ids):
        raise UserError(f"{root}/classes.tsv has the id {max(ids, key=ids.count)} more than once; give each its own.")
    if unknown := set(folders) - set(classes):
        raise UserError(f"{root}/classes.tsv has no line for the folder {min(unknown)}; add one or remove the file.")
    folders = [f for f in classes if f in files]
    for empty in (f for f in folders if not files[f]):
        print0(f"note: {root}/{empty} holds no images; it counts as a class all the same")
    paths = [f"{f}/{name}" for f in folders for name in files[f]]
    refuse([(not paths, f"{root} holds no images; it needs one folder per class with PNG, JPEG or WebP files")])
    return paths, [label for label, f in enumerate(folders) for _ in files[f]], [classes[f] for f in folders]


# ---------------------------------------------------------------------------------------------- the files of a cache

def entry_type(h: dict) -> np.dtype:
    """One view of one image, in a cache with header h."""
    n, g, z = h["grid"] ** 2, h["latent_grid"], h["channels"]  # codes; side and channels of KL's map
    return np.dtype([("codes", np.uint16, (n,)),              # of the VQ tokenizer, in raster order
                     ("moments", np.float16, (2 * z, g, g)),  # of the KL tokenizer: mean and log-variance
                     ("label", np.int32),                     # the class; -1 where the image could not be read
                     ("sum", np.uint32)])                     # CRC-32 of the bytes above; every read checks it


def sums(entries: np.ndarray) -> np.ndarray:
    return np.reshape([zlib.crc32(entry.tobytes()[:-4]) for entry in entries.flat], entries.shape)  # -4: `sum`


def checked(entries: np.memmap) -> np.ndarray:
    """Copies entries of a part into memory; refuses them if their checksums do not fit."""
    copy = np.array(entries)
    if (copy["sum"] != sums(copy)).any():
        raise UserError(f"{entries.filename} is damaged: its checksums do not fit; {AGAIN}.")
    return copy


def part_files(path: str, h: dict) -> dict:
    """file -> range of the images in it, for each part of a cache."""
    return {os.path.join(path, f"part-{p:03d}.npy"): range(h["images"])[start:start + h["part"]]
            for p, start in enumerate(range(0, h["images"], h["part"]))}


def open_part(file: str, numbers: range, h: dict) -> np.memmap:
    """-> the entries [n, V] of these n images."""
    try:
        entries = np.load(file, mmap_mode="r")
        if entries.dtype == entry_type(h) and entries.shape == (len(numbers), h["views"]):
            return entries
    except Exception as error:  # numpy may raise almost anything on a damaged file
        if isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
            raise UserError(f"cannot open {file}: {error.strerror}.") from None
    raise UserError(f"{file} is missing or damaged; {AGAIN}.")


def text_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_header(path: str, header: dict):
    write_json(os.path.join(path, "header.json"), {**header, "checksum": text_hash(header)})


def read_header(path: str) -> dict:
    """The header of a cache without its checksum."""
    header = read_json(file := os.path.join(path, "header.json"))
    refuse([(header is None, f"{path} is not a token cache; make it: data.py --images DIR --run RUN --out {path}")])
    right = isinstance(header, dict) and header.pop("checksum", None) == text_hash(header)
    refuse([(not right or header.get("format") != FORMAT,
             f"{file} is damaged, changed or of another format; remove {path} and make the cache again")])
    return header


# ------------------------------------------------------------------------------------------------ what training reads

class Order:
    """order(sample numbers, counted from the start of training) -> images and views.

    Every epoch is a new permutation of the images; each shows one view, drawn at random. With `labels`, one per image,
    an epoch has about as many images, equally many per class: small classes repeat some, large ones skip some."""

    def __init__(self, images: np.ndarray, seed: int, views: int = 2, labels: np.ndarray | None = None):
        self.groups = [images] if labels is None else [images[labels == k] for k in np.unique(labels)]
        self.share = -(-len(images) // len(self.groups))  # images per class and epoch, rounded up
        self.seed, self.views = seed, views
        self.epoch = lru_cache(maxsize=2)(self.draw)  # 2: the main thread may read another (e.g. Tokenizers.after)

    def __len__(self):
        return self.share * len(self.groups)

    def draw(self, number: int) -> np.ndarray:
        """-> [2, images per epoch]: the images of an epoch and their views, from nothing but the seed and `number`."""
        random, images = np.random.default_rng((self.seed, number)), []
        for members in self.groups:
            rounds = -(-self.share // len(members))
            images.append(np.concatenate([random.permutation(members) for _ in range(rounds)])[:self.share])
        images = images[0] if len(images) == 1 else random.permutation(np.concatenate(images))
        return np.stack([images, random.integers(self.views, size=len(images))])

    def __call__(self, numbers) -> np.ndarray:
        """n sample numbers -> [2, n]: images and views."""
        places = (divmod(number, len(self)) for number in numbers)
        return np.stack([self.epoch(e)[:, i] for e, i in places], axis=1)


class Folder:
    """Images of a folder, for the tokenizers: `batch(numbers)` -> (images,), float32 [n, 3, size, size] in [-1, 1]."""

    def __init__(self, root: str, size: int, seed: int = 0):
        self.root, self.size, self.unreadable = root, size, []
        self.paths, _, self.classes = find_images(root)
        self.order, self.threads = Order(np.arange(len(self.paths)), seed), ThreadPoolExecutor(4)
        self.identity = text_hash(self.paths)

    def __len__(self):
        return len(self.order)

    def _read(self, image, view):
        """The centre crop of an image, mirrored in view 1. The next image takes the place of an unreadable one."""
        for number in range(image, image + len(self.paths)):
            path = self.paths[number % len(self.paths)]
            if (pixels := read_image(os.path.join(self.root, path), self.size)) is not None:
                return pixels[:, :, ::-1] if view else pixels
            if path not in self.unreadable:
                self.unreadable.append(path)
                print0(f"note: {self.root}/{path} cannot be read; the next image takes its place")
            refuse_many(self.unreadable, self.paths)

    def batch(self, numbers):
        return (to_float(np.stack(list(self.threads.map(self._read, *self.order(numbers))))),)


class Cache:
    """A token cache. `balanced` as in `Order`: it shows every class equally often."""

    def __init__(self, path: str, seed: int = 0, balanced: bool = False):
        self.path, self.header = path, read_header(path)
        h = self.header
        refuse([(not h["complete"], f"the cache {path} is not complete; run the same data.py command again")])
        self.classes, self.scale, self.identity = h["classes"], h["scale"], text_hash(h)
        self.parts = [open_part(file, numbers, h) for file, numbers in part_files(path, h).items()]
        labels = np.repeat(np.arange(len(h["counts"])), h["counts"])  # images are numbered class by class
        readable = np.delete(np.arange(h["images"]), h["skipped"])
        self.order = Order(readable, seed, h["views"], labels[readable] if balanced else None)

    def __len__(self):  # images per epoch
        return len(self.order)

    def check_tokenizer(self, kind: str, model, path: str):
        """Refuses tokenizers other than those that made the cache."""
        other = checkpoints.checksum(model.state_dict()) != self.header[kind]
        refuse([(other, f"{self.path} was made with another {kind} tokenizer than {path}; make it again with data.py")])

    def entry(self, image, view):
        """One view of one image: a record with the fields of `entry_type`."""
        p, i = divmod(image, self.header["part"])
        return checked(self.parts[p][i, view:view + 1])[0]

    def batch(self, numbers):
        """n sample numbers -> codes [n, L] int64, moments [n, 2Z, g, g] float16, classes [n] int64."""
        entries = [self.entry(image, view) for image, view in zip(*self.order(numbers))]
        stack = lambda field, dtype: torch.from_numpy(np.stack([e[field] for e in entries]).astype(dtype, copy=False))
        return stack("codes", np.int64), stack("moments", np.float16), stack("label", np.int64)


def ahead(load, steps):
    """Yields load(step) for each step. A thread loads the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        jobs = (thread.submit(load, step) for step in steps)
        for ready, _ in pairwise(chain(jobs, [None])):  # pairwise submits the next job before it yields this one
            yield ready.result()


def batches(data, world, batch: int, micro: int, first: int, last: int):
    """Yields (rows, tensors) for each pass of steps first to last - 1; rows: this rank's slice of `micro` images."""
    cuda = world.device.type == "cuda"
    rows = [slice(start, start + micro) for start in range(world.rank * micro, batch, world.size * micro)]  # per pass
    numbers = (range(step * batch, (step + 1) * batch)[r] for step in range(first, last) for r in rows)
    load = lambda n: [x.pin_memory() if cuda else x for x in data.batch(n)]  # pinned: the copy to the GPU need not wait
    for r, tensors in zip(cycle(rows), ahead(load, numbers)):
        yield r, [x.to(world.device, non_blocking=cuda) for x in tensors]


# ------------------------------------------------------------------------------------------------- making a cache

def tokenise(images: str, run: str, out: str, world, size: int | None = None, views=2, seed=0, dry_run=False):
    """Makes the cache `out` of an image folder with RUN/vq.pt and RUN/kl.pt, or continues it. All ranks call this."""
    vq, kl = (checkpoints.load_model(os.path.join(run, f"{kind}.pt"), kind, world.device) for kind in ("vq", "kl"))
    size = size if size is not None else kl.about.get("image_size", 256)
    refuse([(os.path.isdir(images) and lies_in(out, images), f"{out} lies among the classes of {images}; move it"),
            (vq.config.codebook_size > 2**16, f"{run}/vq.pt has more than the 65,536 codes that a cache can hold"),
            (size < 1 or size % (kl.stride * kl.config.merge) or size % vq.stride,
             f"{size} pixels must be a multiple of {vq.stride} (a code) and {kl.stride * kl.config.merge} (a latent)")])
    paths, labels, classes = find_images(images)
    h = {"format": FORMAT, "images": len(paths), "part": CHUNK * -(-len(paths) // (CHUNK * PARTS)), "views": views,
         "seed": seed, "size": size, "files": text_hash(paths), "classes": classes, "latent_grid": size // kl.stride,
         "channels": kl.config.z_channels, "grid": size // vq.stride, "codebook": vq.config.codebook_size,
         "counts": np.bincount(labels, minlength=len(classes)).tolist(),  # images per class
         "vq": checkpoints.checksum(vq.state_dict()), "kl": checkpoints.checksum(kl.state_dict())}
    print0(f"{images}: {len(paths):,} images, {len(classes)} classes -> {out}: {size} pixels, {views} views, "
           f"{h['grid'] ** 2} codes per view")
    if dry_run:
        return
    if world.rank == 0:
        begin(out, h)
    barrier()
    write_parts(out, h, world, images, paths, labels, vq, kl)
    barrier()
    if world.rank == 0:
        finish(out, h, paths, kl.config.scale)
    barrier()


def begin(out, h):
    """Writes a first header, or checks that the present one has the same image names, tokenizers and settings."""
    left = sum(len(numbers) for file, numbers in part_files(out, h).items() if not os.path.exists(file))  # images
    if os.path.exists(os.path.join(out, "header.json")):
        sweep(out)  # temporary files of commands that were killed
        there = read_header(out)
        refuse([(any(there.get(k) != v for k, v in h.items()),
                 f"{out}: other images, tokenizers, classes, --size, --views, --seed; remove it or use another --out")])
    elif left < h["images"]:
        raise UserError(f"{out} holds parts of a cache without their header.json; remove it and make the cache again.")
    else:
        write_header(out, {**h, "complete": False})
    need, free = left * h["views"] * entry_type(h).itemsize / 1e6, shutil.disk_usage(out).free / 1e6  # MB
    refuse([(need > free, f"{out} needs {need:,.1f} MB, the disk has {free:,.1f}; free some space or change --out")])


def write_parts(out, h, world, images, paths, labels, vq, kl):
    """Makes this rank's share of the missing parts. A file appears when its part is whole: a kill costs a part each."""
    mine = [x for x in list(part_files(out, h).items())[world.rank::world.size] if not os.path.exists(x[0])]
    chunks = [numbers[i:i + CHUNK] for _, numbers in mine for i in range(0, len(numbers), CHUNK)]
    threads, bad = ThreadPoolExecutor(4), []
    read = lambda i: read_views(os.path.join(images, paths[i]), h["size"], h["views"], h["seed"], i)
    loaded = ahead(lambda chunk: (chunk, list(threads.map(read, chunk))), chunks)
    with tqdm(total=sum(map(len, chunks)), unit=" images", desc="tokenise", disable=world.rank > 0) as bar:
        for file, numbers in mine:
            entries = []
            for chunk, pixels in islice(loaded, -(-len(numbers) // CHUNK)):  # the chunks of this part
                bad += [paths[i] for i, x in zip(chunk, pixels) if x is None]
                refuse_many(bad, paths, f", then remove {out} and run again")
                entries.append(encode(pixels, labels[chunk.start:chunk.stop], h, vq, kl, world.device))
                bar.update(len(chunk))
            write_file(file, lambda f: np.save(f, np.concatenate(entries)))


def encode(pixels: list, labels: list, h: dict, vq, kl, device) -> np.ndarray:
    """pixels: n times uint8 [V, 3, size, size], or None where the image could not be read -> entries [n, V]."""
    entries = np.zeros((len(pixels), h["views"]), entry_type(h))
    black = np.zeros((h["views"], 3, h["size"], h["size"]), np.uint8)
    images = torch.from_numpy(np.stack([black if x is None else x for x in pixels])).to(device)
    entries["label"] = [[-1 if x is None else label] for x, label in zip(pixels, labels)]
    for v in range(h["views"]):
        view = to_float(images[:, v])                                                # [n, 3, size, size]
        entries["codes"][:, v] = vq.encode(view).cpu().numpy()
        entries["moments"][:, v] = kl.encode(view).cpu().numpy()
    entries["sum"] = sums(entries)
    return entries


def finish(out, h, paths, file_scale):
    """Checks all checksums, measures the scale of the latents over all images and views, completes the header."""
    skipped = []

    def moments():  # [n*V, 2Z, g, g] of each chunk; notes unreadable images in `skipped`
        for file, numbers in part_files(out, h).items():
            part = open_part(file, numbers, h)
            for i in range(0, len(part), CHUNK):
                entries = checked(part[i:i + CHUNK])
                readable = entries["label"][:, 0] >= 0
                skipped.extend(numbers[i + k] for k in np.flatnonzero(~readable))
                yield torch.from_numpy(entries["moments"][readable]).flatten(0, 1)

    scale = latent_scale(moments())
    refuse([(not np.isfinite(scale), f"{out} holds latents that are not finite; kl.pt is damaged or badly trained")])
    bad = [paths[i] for i in skipped]
    refuse_many(bad, paths, f", then remove {out} and run again")
    write_header(out, {**h, "complete": True, "scale": scale, "unreadable": bad, "skipped": skipped})
    print0(f"{out}: {len(paths) - len(bad)} images, {len(bad)} unreadable, latent scale {scale:.4f}")
    if file_scale and abs(scale / file_scale - 1) > 0.05:
        print0(f"note: kl.pt says {file_scale:.4f}, over 5% away (other images?); training uses kl.pt's")


# --------------------------------------------------------------------------------- toy pictures and the command line

SHAPES = {  # name -> how to draw it with colour c, centre (x, y) and "radius" r
    "disc":     lambda draw, x, y, r, c: draw.ellipse([x - r, y - r, x + r, y + r], fill=c),
    "square":   lambda draw, x, y, r, c: draw.rectangle([x - r, y - r, x + r, y + r], fill=c),
    "triangle": lambda draw, x, y, r, c: draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=c),
    "ring":     lambda draw, x, y, r, c: draw.ellipse([x - r, y - r, x + r, y + r], outline=c, width=int(r * 0.4)),
    "cross":    lambda draw, x, y, r, c: (draw.rectangle([x - r, y - r / 3, x + r, y + r / 3], fill=c),
                                          draw.rectangle([x - r / 3, y - r, x + r / 3, y + r], fill=c))}


def toy_picture(label: int, random: np.random.Generator, size: int = 64) -> Image.Image:
    """Labels 0 to 4 are the shapes in a warm colour on a smooth ground, 5 to 9 in a cold colour on stripes."""
    warm = label < 5
    y, x = np.mgrid[:size, :size] / size
    angle, phase = random.uniform(0, np.pi), random.uniform(0, 2 * np.pi)
    wave = np.cos(angle) * x + np.sin(angle) * y
    wave = wave if warm else 0.5 + 0.3 * np.sin(2 * np.pi * 6 * wave + phase)
    dark, light = random.uniform(20, 90, 3), random.uniform(110, 200, 3)
    ground = dark + (light - dark) * wave.clip(0, 1)[..., None]
    image = Image.fromarray(ground.astype(np.uint8)).resize((4 * size, 4 * size))  # shrunk at the end: soft edges
    color = (np.array([235, 120, 40]) if warm else np.array([60, 140, 240])) + random.integers(-20, 20, 3)
    color, r = tuple(int(v) for v in color.clip(0, 255)), random.uniform(0.2, 0.34) * 4 * size
    cx, cy = random.uniform(0.38, 0.62, 2) * 4 * size
    list(SHAPES.values())[label % 5](ImageDraw.Draw(image), cx, cy, r, color)
    return image.resize((size, size), Image.BOX)


def write_toy(count: int, out: str):
    """Writes toy pictures as an image folder. Picture i depends on i only, not on their count."""
    names = [f"{'warm' if k < 5 else 'cold'} {list(SHAPES)[k % 5]}" for k in range(10)]
    there = checkpoints.read_classes(os.path.join(out, "classes.tsv"))
    refuse([("warm_disc" not in there if there else os.path.isdir(out) and any(n[0] != "." for n in os.listdir(out)),
             f"{out} holds other images or files; choose another --out")])
    table = "folder\tid\tname\n" + "".join(f"{n.replace(' ', '_')}\t{k}\t{n}\n" for k, n in enumerate(names))
    write_file(os.path.join(out, "classes.tsv"), lambda f: f.write(table.encode()))  # first: the folder is then ours
    for name in names:
        os.makedirs(os.path.join(out, name.replace(" ", "_")), exist_ok=True)
    for i in tqdm(range(count), unit=" images", desc="toy"):
        picture = toy_picture(i % 10, np.random.default_rng((0, i)))
        picture.save(os.path.join(out, names[i % 10].replace(" ", "_"), f"{i:06d}.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image folder to encode")
    parser.add_argument("--run", help="run directory with the tokenizers, vq.pt and kl.pt")
    parser.add_argument("--toy", type=int, metavar="N", help="write N toy pictures instead")
    parser.add_argument("--out", required=True, help="the cache, or the folder of toy pictures")
    parser.add_argument("--size", type=int, help="side of a crop in pixels (default: kl.pt's, or 256)")
    parser.add_argument("--views", type=int, default=2, help="of each image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random crops (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be encoded, and stop")
    args = parser.parse_args()
    refuse([(not args.out, "--out takes a path"), (args.toy is not None and args.toy < 1, "--toy must be at least 1"),
            (args.toy is not None and (args.images or args.run or args.size), "--toy takes only --out"),
            (args.toy is None and not (args.images and args.run), "give --images DIR and --run RUN, or --toy N"),
            (args.views < 1 or args.seed < 0, "--views must be at least 1 and --seed at least 0")])
    if args.toy is None:
        tokenise(args.images, args.run, args.out, setup(args.device), args.size, args.views, args.seed, args.dry_run)
    elif args.dry_run:
        print(f"{args.toy:,} toy pictures of 10 classes -> {args.out}")
    else:
        try:
            write_toy(args.toy, args.out)
        except OSError as error:
            raise UserError(f"cannot write to {args.out}: {error.strerror}.") from None


if __name__ == "__main__":
    run_script(main)
