"""data.py: the crop, reading images, classes, the cache, the order of training, the toy pictures."""
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import checkpoints
import data
import fid
import sample
from runtime import UserError, print0
from tokenizers import KL, VQ


def smooth(width, height, channels=3, seed=0):
    """A random smooth picture, uint8 [height, width, channels]."""
    x = torch.rand(1, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    return (x[0] * 255).byte().permute(1, 2, 0).numpy()


def make_folder(root, *folders, tsv=None):
    """An image folder with one 32x32 picture in each of `folders`."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        Image.fromarray(smooth(32, 32, seed=i)).save(root / folder / "a.png")
    if tsv is not None:
        (root / "classes.tsv").write_text(tsv, encoding="utf-8")
    return str(root)


def open_cache(path):
    """All entries of a cache: codes [n, V, L], moments [n, V, 2C, h, w], label [n, V]."""
    parts = [np.load(p) for p in sorted(Path(path).glob("part-*.npy"))]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("codes", "moments", "label")}


def assert_same_cache(a, b):
    x, y = open_cache(a), open_cache(b)
    for name in x:
        assert np.array_equal(x[name], y[name]), name
    assert data.read_header(a) == data.read_header(b)


# ------------------------------------------------------------------------------------------------------------ images

def crop_by_torch(image, size):
    """ADM's crop in PyTorch: means of 2x2 squares, antialiased bicubic, a slice."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    while min(x.shape[2:]) >= 2 * size:
        for pair in ((1, 2), (2, 1)):  # PIL rounds after each axis
            x = (F.avg_pool2d(x, pair) + 0.5).floor()
    H, W = x.shape[2:]
    H, W = round(H * size / min(H, W)), round(W * size / min(H, W))
    x = F.interpolate(x, (H, W), mode="bicubic", antialias=True, align_corners=False)
    top, left = (H - size) // 2, (W - size) // 2
    return x[0, :, top:top + size, left:left + size].permute(1, 2, 0).clamp(0, 255).round().numpy()


@pytest.mark.parametrize("width, height", [(100, 64), (64, 90), (97, 131), (400, 264), (200, 512), (40, 30), (63, 127)])
def test_crop_equals_an_independent_one(width, height):
    image = smooth(width, height)
    got = np.asarray(data.center_crop(Image.fromarray(image), 64))
    assert got.shape == (64, 64, 3)
    assert abs(got - crop_by_torch(image, 64)).max() <= 1


def test_crop_cuts_the_floor_of_half():
    image = smooth(67, 64)
    assert np.array_equal(data.center_crop(Image.fromarray(image), 64), image[:, 1:65])
    image = smooth(64, 71)
    assert np.array_equal(data.center_crop(Image.fromarray(image), 64), image[3:67])


RGB = smooth(32, 32)
GREY = RGB[..., 0]
GREY3 = np.repeat(GREY[..., None], 3, 2)
HALF = np.repeat(np.where(np.arange(32)[:, None] < 16, 0, 255), 32, 1).astype(np.uint8)  # alpha: top half transparent
ON_WHITE = lambda x: np.where(HALF[..., None] > 0, x, 255)
PALETTE = Image.fromarray(RGB).quantize(16)
MODES = {
    "rgb.png": (Image.fromarray(RGB), {}, RGB),
    "rgba.png": (Image.fromarray(np.dstack([RGB, HALF])), {}, ON_WHITE(RGB)),
    "la.png": (Image.fromarray(np.dstack([GREY, HALF])), {}, ON_WHITE(GREY3)),
    "grey.png": (Image.fromarray(GREY), {}, GREY3),
    "grey16.png": (Image.fromarray(GREY.astype(np.uint16) * 256 + 77), {}, GREY3),
    "black_and_white.png": (Image.fromarray(HALF).convert("1"), {}, np.repeat(HALF[..., None], 3, 2)),
    "palette.png": (PALETTE, {}, np.asarray(PALETTE.convert("RGB"))),
    "rgba.webp": (Image.fromarray(np.dstack([RGB, HALF])), {"lossless": True, "exact": True}, ON_WHITE(RGB)),
    "rgb.webp": (Image.fromarray(RGB), {"lossless": True}, RGB),
    "rgb.jpg": (Image.fromarray(RGB), {"quality": 100, "subsampling": 0}, RGB),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), {"quality": 100, "subsampling": 0}, RGB),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path, name):
    image, options, want = MODES[name]
    image.save(tmp_path / name, **options)
    got = data.read_image(str(tmp_path / name), 32)
    assert got.dtype == np.uint8 and got.shape == (3, 32, 32)
    error = abs(got.transpose(1, 2, 0).astype(int) - want).max()
    assert error <= (12 if name.endswith(".jpg") else 0)


def test_transparent_colours(tmp_path):
    """Transparency by a colour key, which PNG allows for palettes, RGB and grey, falls on white as well."""
    black = np.zeros((32, 32), np.uint8)
    for name, image, key in [("rgb", Image.new("RGB", (32, 32), (1, 2, 3)), (1, 2, 3)),
                             ("grey", Image.fromarray(black), 0), ("palette", Image.fromarray(black).convert("P"), 0)]:
        image.save(tmp_path / f"{name}.png", transparency=key)
        assert data.read_image(str(tmp_path / f"{name}.png"), 32).min() == 255, name
    for dtype in (np.float32, np.int32):  # nothing says which number is white
        Image.fromarray(GREY.astype(dtype)).save(tmp_path / "x.tif")
        assert data.read_image(str(tmp_path / "x.tif"), 32) is None
    grey16 = Image.fromarray(GREY.astype(np.uint16) * 256 + 77)
    grey16.save(tmp_path / "grey16.png", transparency=5)  # a grey that no pixel has
    assert np.array_equal(data.read_image(str(tmp_path / "grey16.png"), 32)[0], GREY)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_broken_files_are_none(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert data.read_image(str(tmp_path / "a.png"), 32) is None


def test_strip_that_the_crop_would_blow_up_is_none(tmp_path):
    """8 x 20,000 pixels at 256: 164 million of them before the cut."""
    Image.new("L", (8, 20_000)).save(tmp_path / "a.png")
    assert data.read_image(str(tmp_path / "a.png"), 256) is None
    assert data.read_image(str(tmp_path / "a.png"), 8).shape == (3, 8, 8)


def test_orientation(tmp_path):
    """Training, cache and editing obey the note that a camera leaves; fid.py, like ADM's loader, does not."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(smooth(40, 40)).save(tmp_path / "a.png", exif=exif)
    as_it_is, upright = (data.read_image(str(tmp_path / "a.png"), 40, upright) for upright in (False, True))
    assert np.array_equal(upright, as_it_is[:, ::-1, ::-1]) and not np.array_equal(upright, as_it_is)
    (tmp_path / "photos" / "1").mkdir(parents=True)
    (tmp_path / "a.png").rename(tmp_path / "photos" / "1" / "a.png")
    assert np.array_equal(data.read_views(str(tmp_path / "photos" / "1" / "a.png"), 40, 1)[0], upright)
    assert np.array_equal(data.Folder(str(tmp_path / "photos"), 40)._read(0, 0), upright)
    images = fid.open_images(str(tmp_path / "photos"))
    assert np.array_equal(next(iter(images.batches([range(1)])))[0], as_it_is)


def test_folder_without_a_readable_image_ends(toy, tmp_path):
    for i in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"no picture")
    folder = data.Folder(str(tmp_path), 32)
    for _ in range(2):  # the second time all are known
        with pytest.raises(UserError, match="images cannot be read"):
            folder.batch(range(16))


def test_truncated_files_are_none(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(smooth(90, 90)).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
        assert data.read_image(str(tmp_path / name), 32) is None, name


def test_pixels_map_to_minus_one_and_one():
    assert data.to_float(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


def test_random_crop_is_a_square_of_the_picture():
    """The picture's colours are its coordinates, so the corners of a crop tell which square it is."""
    y, x = np.mgrid[:100, :150].astype(np.uint8)
    image, boxes = Image.fromarray(np.stack([x, y, 0 * x], axis=2)), []
    for seed in range(400):
        crop = np.asarray(data.random_crop(image, 64, np.random.default_rng(seed))).astype(int)
        (left, right), (top, bottom) = crop[32, [0, -1], 0], crop[[0, -1], 32, 1]
        boxes.append((min(left, right), top, abs(right - left), bottom - top, left > right))
    left, top, width, height, mirrored = np.array(boxes).T
    assert abs(width - height).max() <= 2
    assert 78 <= width.min() < 82 and 97 < width.max() <= 100
    assert left.min() == 0 and (left + width).max() > 147 and top.min() == 0 and (top + height).max() > 97
    assert 0.4 < mirrored.mean() < 0.6


def test_views(tmp_path, monkeypatch):
    """Views 0 and 1 are the centre crop and its mirror image. The others depend on the key, and on nothing else."""
    Image.fromarray(smooth(90, 70)).save(tmp_path / "a.png")
    path, opened, open_file = str(tmp_path / "a.png"), [], Image.open
    monkeypatch.setattr(Image, "open", lambda p: opened.append(p) or open_file(p))
    views = data.read_views(path, 64, 5, 0, 7)
    assert len(opened) == 1
    assert views.shape == (5, 3, 64, 64) and views.dtype == np.uint8
    assert np.array_equal(views[0], data.read_image(path, 64)) and np.array_equal(views[1], views[0][..., ::-1])
    assert len({view.tobytes() for view in views}) == 5
    assert np.array_equal(data.read_views(path, 64, 3, 0, 7), views[:3])
    for key in ((1, 7), (0, 8)):
        other = data.read_views(path, 64, 5, *key)
        assert np.array_equal(other[:2], views[:2]) and all((a != b).any() for a, b in zip(other[2:], views[2:]))
    assert len(data.read_views(path, 64, 1, 0, 7)) == 1
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert data.read_views(str(tmp_path / "b.png"), 64, 5, 0, 7) is None


# ----------------------------------------------------------------------------------------------------------- classes

def test_folders_count_in_sorted_order(tmp_path):
    root = make_folder(tmp_path, "n02099601", "n01440764", "n01443537")
    paths, labels, classes = data.find_images(root)
    assert classes == [[0, "n01440764"], [1, "n01443537"], [2, "n02099601"]]
    assert paths == ["n01440764/a.png", "n01443537/a.png", "n02099601/a.png"] and labels == [0, 1, 2]


def test_numbers_as_folder_names_are_ids(tmp_path):
    """So `--class 2` means the folder 2, and not the third in the order of text, the folder 10."""
    for names, ids in ((("0", "1", "2", "10"), [0, 1, 2, 10]), (("01", "1", "2"), [0, 1, 2]), (("1", "cat"), [0, 1])):
        paths, labels, classes = data.find_images(make_folder(tmp_path / "-".join(names), *names))
        assert classes == [[i, name] for i, name in zip(ids, names)]
        assert paths == [f"{name}/a.png" for name in names] and labels == list(range(len(names)))
    assert sample.find_classes([[0, "0"], [1, "1"], [2, "2"], [10, "10"]], "2") == [2]


def test_byte_order_mark_of_spreadsheets(tmp_path):
    root = make_folder(tmp_path, "cat", tsv="\ufefffolder\tid\tname\ncat\t207\tgolden cat\n")
    assert data.find_images(root)[2] == [[207, "golden cat"]]


def test_classes_tsv_gives_ids_names_and_order(tmp_path):
    tsv = "folder\tid\tname\nzoo\t9\tWeiße Löwen\nabsent\t4\tnone\ncat\t207\tgolden cat\n"
    root = make_folder(tmp_path, "cat", "zoo", tsv=tsv)
    paths, labels, classes = data.find_images(root)
    assert classes == [[9, "Weiße Löwen"], [207, "golden cat"]]
    assert dict(zip(paths, labels)) == {"zoo/a.png": 0, "cat/a.png": 1}


def test_other_files_are_no_images(tmp_path):
    root = make_folder(tmp_path, "cat")
    for name in ("cat/notes.txt", "cat/.DS_Store", "cat/._a.png", "list.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".cache").mkdir()
    shutil.copy(tmp_path / "cat/a.png", tmp_path / "cat/B.PNG")
    assert data.find_images(root)[0] == ["cat/B.PNG", "cat/a.png"]


def test_splits_are_no_classes(tmp_path):
    with pytest.raises(UserError, match="splits.*train"):
        data.find_images(make_folder(tmp_path, "train/cat", "val/cat"))


# ------------------------------------------------------------------------------------------------------------- cache

def test_cache_holds_both_views_and_labels(toy):
    """The first two chunks again: the tokenizers see picture and mirror image; codes and moments go together."""
    a = open_cache(toy.cache)
    paths, labels, classes = data.find_images(toy.images)
    models = []
    for kind, module in (("vq", VQ), ("kl", KL)):
        config, state = checkpoints.load(os.path.join(toy.run, f"{kind}.pt"), kind)
        models.append(module(config).eval())
        models[-1].load_state_dict(state)
    vq, kl = models
    for start in (0, 64):
        pixels = np.stack([data.read_image(os.path.join(toy.images, p), 32) for p in paths[start:start + 64]])
        for view, images in enumerate((pixels, pixels[..., ::-1])):
            x = data.to_float(images.copy())
            assert np.array_equal(vq.encode(x).numpy(), a["codes"][start:start + 64, view])
            moments = kl.encode(x).numpy()
            np.testing.assert_allclose(moments, a["moments"][start:start + 64, view], rtol=2e-3, atol=2e-3)  # float16
    assert (a["codes"][:, 0] != a["codes"][:, 1]).any()
    assert a["label"].T.tolist() == [labels, labels]
    # write_toy puts class i % 10 of picture i into its name: an independent way to the label
    assert labels == [int(os.path.basename(p)[:6]) % 10 for p in paths]
    assert data.read_header(toy.cache)["classes"] == classes


def test_batch_takes_codes_and_moments_of_one_view(toy):
    cache, a = data.Cache(toy.cache, seed=3), open_cache(toy.cache)
    codes, moments, classes = cache.batch(range(200))
    images, views = data.Order(np.arange(130), 3)(range(200))
    assert codes.dtype == torch.int64 and len(cache) == 130 and 0 < views.mean() < 1
    for n, (i, view) in enumerate(zip(images, views)):
        assert np.array_equal(codes[n], a["codes"][i, view]) and np.array_equal(moments[n], a["moments"][i, view])
        assert classes[n] == a["label"][i, view]


def test_scale_is_one_over_std_of_sampled_latents(toy):
    a, header = open_cache(toy.cache), data.read_header(toy.cache)
    kl = KL(data.checkpoints.load(os.path.join(toy.run, "kl.pt"), "kl")[0])
    moments = torch.from_numpy(a["moments"]).flatten(0, 1)
    latents = kl.sample(moments, generator=torch.Generator().manual_seed(0)) / kl.config.scale
    assert header["scale"] == pytest.approx(1 / float(latents.std()), rel=0.01)
    assert abs(1 / float(moments[:, :8].float().std()) / header["scale"] - 1) > 1e-3  # the mean alone would not do


def test_stopped_and_run_again_gives_the_same_cache(toy, tmp_path, script, works, monkeypatch):
    out, encode, calls = str(tmp_path / "cache"), VQ.encode, []

    def stop_in_second_chunk(self, images):
        calls.append(1)
        if len(calls) == 3:  # two views a chunk
            raise KeyboardInterrupt
        return encode(self, images)

    command = ("data", "--images", toy.images, "--run", toy.run, "--out", out)
    with monkeypatch.context() as m:
        m.setattr(VQ, "encode", stop_in_second_chunk)
        assert script(*command).code == 130
    assert sorted(os.listdir(out)) == ["header.json", "part-000.npy"]
    with pytest.raises(UserError, match="not complete"):
        data.Cache(out)
    works(*command)
    assert_same_cache(out, toy.cache)


def test_only_missing_parts_are_made(toy, tmp_path, works, monkeypatch):
    out = shutil.copytree(toy.cache, tmp_path / "cache")
    os.unlink(out / "part-001.npy")
    header = json.loads((out / "header.json").read_text())
    header = {k: v for k, v in header.items() if k not in ("checksum", "scale", "unreadable", "skipped")}
    data.write_header(str(out), {**header, "complete": False})
    encode, calls = VQ.encode, []
    monkeypatch.setattr(VQ, "encode", lambda self, images: calls.append(len(images)) or encode(self, images))
    works("data", "--images", toy.images, "--run", toy.run, "--out", out)
    assert calls == [64, 64]  # one part in two views
    assert_same_cache(out, toy.cache)


def test_damaged_part_is_named_and_made_again(toy, tmp_path, works, script):
    """A flipped bit in a complete cache: training and data.py name the file; removing it is the whole repair."""
    out = str(shutil.copytree(toy.cache, tmp_path / "cache"))
    content = bytearray(Path(out, "part-001.npy").read_bytes())
    content[-100] ^= 1
    Path(out, "part-001.npy").write_bytes(content)
    with pytest.raises(UserError, match="part-001.npy is damaged.*remove it"):
        data.Cache(out).entry(127, 1)
    command = ("data", "--images", toy.images, "--run", toy.run, "--out", out)
    assert "part-001.npy is damaged" in script(*command).err
    os.unlink(f"{out}/part-001.npy")
    works(*command)
    assert_same_cache(out, toy.cache)


@pytest.mark.parametrize("lost", [1, 3000])
def test_truncated_part_is_never_filled_with_zeros(toy, tmp_path, script, lost):
    """data.py refuses a cache with a file that lost its end, and names the file."""
    out = str(shutil.copytree(toy.cache, tmp_path / "cache"))
    os.truncate(f"{out}/part-000.npy", os.path.getsize(f"{out}/part-000.npy") - lost)
    result = script("data", "--images", toy.images, "--run", toy.run, "--out", out)
    assert result.code == 1 and "part-000.npy is missing or damaged" in result.err
    os.unlink(f"{out}/part-000.npy")  # what the sentence tells to do
    assert script("data", "--images", toy.images, "--run", toy.run, "--out", out).code == 0
    assert_same_cache(out, toy.cache)


def test_two_ranks_make_the_same_cache(toy, tmp_path, two_ranks):
    out = str(tmp_path / "cache")
    two_ranks("data", "--images", toy.images, "--run", toy.run, "--out", out)
    assert_same_cache(out, toy.cache)


def test_cache_of_four_views(toy, tmp_path, works, script, two_ranks):
    """Made at once, continued, and made by two ranks: the same bytes. Codes and moments belong to the same picture."""
    whole, other = str(tmp_path / "whole"), str(tmp_path / "other")
    make = lambda out, *more: ("data", "--images", toy.images, "--run", toy.run, "--views", 4, "--out", out, *more)
    works(*make(whole))
    a, b = open_cache(whole), open_cache(toy.cache)
    for name in a:
        assert a[name].shape[1] == 4 and np.array_equal(a[name][:, :2], b[name])
    for i in range(4):
        assert all((a["moments"][:, i] != a["moments"][:, j]).any((1, 2, 3)).mean() > 0.9 for j in range(i))
    kl = checkpoints.load_model(os.path.join(toy.run, "kl.pt"), "kl")
    for i in (0, 63, 64, 129):
        views = data.read_views(os.path.join(toy.images, data.find_images(toy.images)[0][i]), 32, 4, 0, i)
        np.testing.assert_allclose(kl.encode(data.to_float(views)), a["moments"][i], rtol=2e-3, atol=2e-3)

    cache = data.Cache(whole)
    assert cache.header["views"] == 4 and set(cache.order(range(130))[1]) == {0, 1, 2, 3}
    shutil.copytree(whole, other)
    os.unlink(f"{other}/part-002.npy")
    works(*make(other))
    assert_same_cache(whole, other)
    shutil.rmtree(other)
    two_ranks(*make(other))
    assert_same_cache(whole, other)
    assert "--views" in script(*make(toy.cache)).err and "--seed" in script(*make(whole, "--seed", 1)).err


def test_disk_that_is_too_small_is_refused_at_once(toy, tmp_path, script, monkeypatch):
    out = tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    result = script("data", "--images", toy.images, "--run", toy.run, "--out", out)
    assert result.code == 1 and "free some space" in result.err and os.listdir(out) == ["header.json"]


@pytest.fixture
def damaged(toy, tmp_path):
    """damaged(n): the toy images with n of 130 files broken -> folder, the broken paths."""
    def damage(n):
        root = shutil.copytree(toy.images, tmp_path / "images")
        broken = data.find_images(str(root))[0][3:3 + n]
        for path in broken:
            (root / path).write_bytes(b"broken")
        return str(root), broken
    return damage


def test_unreadable_images_are_skipped_and_counted(toy, tmp_path, works, damaged):
    (images, broken), out = damaged(1), str(tmp_path / "cache")
    assert "129 images, 1 unreadable" in works("data", "--images", images, "--run", toy.run, "--out", out)
    cache = data.Cache(out)
    assert len(cache) == 129 and cache.header["unreadable"] == broken
    images, _ = cache.order(range(2 * 129))
    assert 3 not in images and len(set(images)) == 129
    a, b = open_cache(out), open_cache(toy.cache)
    keep = np.arange(130) != 3
    assert (a["label"][3] == -1).all() and np.array_equal(a["label"][keep], b["label"][keep])
    assert np.array_equal(a["codes"][keep], b["codes"][keep])


def test_more_than_one_percent_unreadable_stops(toy, tmp_path, script, works, damaged):
    (images, broken), out = damaged(2), str(tmp_path / "cache")
    command = ("data", "--images", images, "--run", toy.run, "--out", out)
    result = script(*command)
    assert result.code == 1 and "2 of 130 images cannot be read" in result.err and broken[0] in result.err
    with pytest.raises(UserError, match="not complete"):
        data.Cache(out)
    for path in broken:  # what the sentence tells to do
        shutil.copy(os.path.join(toy.images, path), os.path.join(images, path))
    shutil.rmtree(out)
    works(*command)
    assert_same_cache(out, toy.cache)


# ------------------------------------------------------------------------------------------------------------- order

def test_every_epoch_is_another_permutation_with_other_flips():
    images = np.array([4, 7, 9, 11, 30, 31, 32, 33, 34, 35])
    order = data.Order(images, seed=0)
    epochs = [order(range(10 * e, 10 * e + 10)) for e in range(20)]
    for got, _ in epochs:
        assert sorted(got) == sorted(images)
    assert len({tuple(got) for got, _ in epochs}) == 20
    views = np.array([[v for _, v in sorted(zip(*epoch))] for epoch in epochs])  # [epoch, image]
    assert set(views.flatten()) == {0, 1} and (views.min(0) < views.max(0)).all()  # no image keeps one view for ever


def test_order_depends_on_seed_and_number_alone():
    a, b = data.Order(np.arange(50), 1), data.Order(np.arange(50), 1)
    whole = np.stack(a(range(200)))
    pieces = np.concatenate([np.stack(b(range(i, i + 20))) for i in (180, 0, 100, 20)], axis=1)  # any order of asking
    assert np.array_equal(pieces, whole[:, np.r_[180:200, 0:20, 100:120, 20:40]])
    assert not np.array_equal(whole, np.stack(data.Order(np.arange(50), 2)(range(200))))


def test_balanced_order_shows_every_class_equally_often():
    """Classes of 2, 3 and 25 images, numbered as a cache numbers them: ten of each class in every epoch."""
    labels = np.repeat([0, 1, 2], [2, 3, 25])
    order = data.Order(np.arange(100, 130), seed=0, views=4, labels=labels)
    epochs = [order(range(30 * e, 30 * e + 30)) for e in range(20)]
    for images, views in epochs:
        assert len(order) == 30 and np.bincount(labels[images - 100]).tolist() == [10, 10, 10]
        seen = np.bincount(images - 100, minlength=30)
        assert seen[:2].tolist() == [5, 5] and set(seen[2:5]) == {3, 4} and seen[5:].max() == 1
    images, views = np.concatenate(epochs, axis=1)
    assert set(images) == set(range(100, 130)) and set(views) == {0, 1, 2, 3}  # no image of the large class is lost
    again = data.Order(np.arange(100, 130), seed=0, views=4, labels=labels)
    assert np.array_equal(again(range(100, 200)), np.stack([images, views])[:, 100:200])
    assert abs(np.corrcoef(np.arange(600), labels[images - 100])[0, 1]) < 0.2  # classes are mixed within an epoch


def test_balanced_cache(toy, tmp_path, works):
    images, out = shutil.copytree(toy.images, tmp_path / "images"), tmp_path / "cache"
    for path in list((images / "warm_disc").iterdir())[1:]:
        path.unlink()
    shutil.rmtree(images / "cold_ring"), (images / "cold_ring").mkdir()  # a class without images is never shown
    works("data", "--images", images, "--run", toy.run, "--out", out)
    plain, balanced = data.Cache(str(out)), data.Cache(str(out), balanced=True)
    assert len(plain) == 105 and len(balanced) == 9 * 12
    assert np.bincount(plain.batch(range(105))[2], minlength=10).tolist() == [1, *[13] * 7, 0, 13]
    assert np.bincount(balanced.batch(range(108))[2], minlength=10).tolist() == [*[12] * 8, 0, 12]


def test_ahead_keeps_the_order():
    assert list(data.ahead(lambda s: s * s, range(20))) == [s * s for s in range(20)]
    assert list(data.ahead(lambda s: s, [])) == []


def test_many_unreadable_neighbours(tmp_path, monkeypatch):
    """More of them than Python may recurse, and still fewer than 1% of the images."""
    monkeypatch.setattr(data, "find_images", lambda root: ([f"{i}" for i in range(130_000)], [], []))
    good = np.zeros((3, 2, 2), np.uint8)
    monkeypatch.setattr(data, "read_image", lambda path, size: None if int(os.path.basename(path)) < 1200 else good)
    folder = data.Folder(str(tmp_path), 2)
    assert np.array_equal(folder._read(0, 0), good) and len(folder.unreadable) == 1200


# ---------------------------------------------------------------------------------------------------------------- toy

def test_toy_pictures_do_not_depend_on_their_number(toy, tmp_path, works):
    works("data", "--toy", 12, "--out", tmp_path)
    paths, labels, classes = data.find_images(str(tmp_path))
    assert len(paths) == 12 and len(classes) == 10 and classes[7] == [7, "cold triangle"]
    for path in paths:
        a, b = (np.asarray(Image.open(os.path.join(root, path))) for root in (tmp_path, toy.images))
        assert a.shape == (64, 64, 3) and np.array_equal(a, b)


def test_toy_pictures_leave_other_images_alone(script, tmp_path):
    (tmp_path / "classes.tsv").write_text("folder\tid\tname\nmine\t0\tmine\n")
    result = script("data", "--toy", 1, "--out", tmp_path)
    assert result.code == 1 and "holds other images" in result.err and os.listdir(tmp_path) == ["classes.tsv"]


def test_names_that_are_no_utf8_are_printed(monkeypatch):
    """A file name in Latin-1 reaches Python with surrogates, which a stdout in UTF-8 refuses."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    print0(os.fsdecode(b"caf\xe9"))
    assert sys.stdout.buffer.getvalue() == b"caf\\udce9\n"


def test_toy_pictures_vary():
    picture = lambda label, seed: np.asarray(data.toy_picture(label, np.random.default_rng(seed))).astype(int)
    pictures = [picture(label, seed) for label in range(10) for seed in range(2)]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert abs(a - b).mean() > 1
