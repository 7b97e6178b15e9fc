"""sample.py: what a picture depends on, classes, files and grids, and that no broken model gives a picture."""
import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import fast
import sample
from data import read_image
from generator import Generator, GeneratorConfig
from presets import Sampling
from prior import Prior, PriorConfig
from runtime import UserError
from tokenizers import KL, VQ, KLConfig, VQConfig

QUICK = ("--iterations", 4, "--steps", 6)


@pytest.fixture(scope="module")
def run(toy):
    return sample.load_run(toy.run)


@pytest.fixture(scope="module")
def files(toy, works, tmp_path_factory):
    """Nine pictures of two classes as files -> folder."""
    out = tmp_path_factory.mktemp("files")
    works("sample", "--run", toy.run, "--class", "1,warm_ring", "--num", 9, "--out", out, "--batch", 4, *QUICK)
    return out


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*.png"))


def edit(run, kind, change):
    """Changes the content of RUN/kind.pt and writes it with a right checksum."""
    content = checkpoints.read(f"{run}/{kind}.pt")
    del content["checksum"]
    change(content)
    checkpoints.write(f"{run}/{kind}.pt", content)


# ------------------------------------------------------------------------------------------ what a picture depends on

def test_picture_does_not_depend_on_the_batch(run):
    together = sample.generate(run, range(7), seed=5)
    assert together.images.shape == together.coarse.shape == (7, 3, 32, 32) and together.images.dtype == torch.uint8
    for i in range(7):
        alone = sample.generate(run, [i], seed=5, indices=[i])
        assert torch.equal(alone.codes[0], together.codes[i])
        for a, b in ((alone.images, together.images), (alone.coarse, together.coarse)):
            assert (a[0].int() - b[i].int()).abs().max() <= 1  # a grey level: kernels round by batch size


@pytest.mark.parametrize("start", [False, True])
def test_plain_loops_draw_the_same_pictures(run, picture, monkeypatch, start):
    start = sample.start_edit(run, *map(str, picture)) if start else None
    fast_one = sample.generate(run, [3, 8], seed=2, start=start, iterations=4, frames=True)
    for name in ("generate", "generate_codes", "sample_head", "prepare_null"):
        monkeypatch.setattr(fast, name, None)
    plain = sample.generate(run, [3, 8], seed=2, start=start, iterations=4, frames=True, plain=True)
    assert torch.equal(plain.codes, fast_one.codes) and len(plain.frames) == len(fast_one.frames) == 4
    for a, b in zip((plain.images, *plain.frames), (fast_one.images, *fast_one.frames)):
        assert (a.int() - b.int()).abs().max() <= 1
    with pytest.raises(TypeError):
        sample.generate(run, [3, 8], iterations=4)


def test_plain_on_the_command_line(toy, works, monkeypatch, tmp_path):
    draw = lambda out, *more: works("sample", "--run", toy.run, "--class", 3, "--num", 2, "--out", out, *QUICK, *more)
    draw(tmp_path / "a.png")
    monkeypatch.setattr(fast, "generate", None)
    draw(tmp_path / "b.png", "--plain")
    assert abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


def test_seed_index_and_class_change_the_picture(run):
    base = sample.generate(run, [3], seed=0).images.int()
    assert torch.equal(base, sample.generate(run, [3], seed=0).images.int())
    for other in (sample.generate(run, [3], seed=1), sample.generate(run, [3], seed=0, indices=[1])):
        assert (base - other.images.int()).abs().float().mean() > 2
    assert not torch.equal(base, sample.generate(run, [8], seed=0).images.int())


def test_coarse_is_the_decoded_codes(run):
    out = sample.generate(run, [0, 5])
    assert torch.equal(out.coarse, sample.to_uint8(run.vq.decode(out.codes)))
    assert out.codes.min() >= 0 and out.codes.max() < run.vq.config.codebook_size


def test_progress_adds_up_to_one(run):
    shares = []
    sample.generate(run, [0, 1], sampling=replace(run.sampling, iterations=4, steps=4), progress=shares.append)
    assert sum(shares) == pytest.approx(1) and min(shares) > 0


def test_every_setting_changes_the_picture(run):
    """No flag is parsed and then ignored."""
    s = replace(run.sampling, iterations=4, steps=6, cfg=3.0)
    base = sample.generate(run, [0, 1, 2], sampling=s).images
    for name, value in dict(iterations=5, steps=7, cfg=2.0, schedule="constant", temperature=0.5, t_max=700,
                            prior_cfg=8.0, prior_temperature=9.0, top_k=1, top_p=0.1, anneal="7:3",
                            cfg_from=2.5).items():
        other = sample.generate(run, [0, 1, 2], sampling=replace(s, **{name: value})).images
        assert not torch.equal(other, base), name


# ------------------------------------------------------------------------------------------------------------ classes

def test_annealed():
    steps = lambda iterations, anneal: sample.head_steps(Sampling(iterations=iterations, steps=7, anneal=anneal))
    assert steps(4, "50:5") == [50, 35, 20, 5] and steps(1, "9:9") == [9] and steps(3, "") == [7, 7, 7]
    for wrong in ("50", "50:", "50:5:1", "a:b"):
        with pytest.raises(UserError, match="as in 50:5, not"):
            steps(4, wrong)


def test_bf16(run, monkeypatch):
    """What CUDA does, on the CPU: prior and generator in bf16, the head in fp32."""
    shape, seen = sample.generate(run, [0, 1]).images.shape, {}
    monkeypatch.setattr(sample, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(run, "null", None)
    layers = {"prior": run.prior.blocks[0].wqkv, "generator": run.generator.decoder_blocks[0].qkv,
              "head": run.generator.head.net.blocks[0].mlp[0]}
    hooks = [layer.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.dtype}))
             for name, layer in layers.items()]
    images = sample.generate(run, [0, 1]).images
    for hook in hooks:
        hook.remove()
    assert images.shape == shape and seen == {"prior": torch.bfloat16, "generator": torch.bfloat16,
                                              "head": torch.float32}


def test_class_by_id_and_by_name(run):
    for text in ("8", " 8 ", "cold ring", "Cold Ring", "cold_ring"):
        assert sample.find_classes(run.classes, text) == [8]
    assert sample.find_classes(run.classes, "all") == list(range(10))
    assert sample.find_classes(run.classes, "8, warm_ring") == [8, 3]
    imagenet = [[207, "golden retriever"], [0, "tench, Tinca tinca"], [134, "crane"], [517, "crane"]]
    assert sample.find_classes(imagenet, "207") == [0] and sample.find_classes(imagenet, "tench, Tinca tinca") == [1]
    with pytest.raises(UserError, match="several classes; give one of the ids 134, 517.$"):
        sample.find_classes(imagenet, "crane")
    with pytest.raises(UserError, match="no class 'dog'; it knows: 0 warm disc, 1 warm square.*9 cold cross"):
        sample.find_classes(run.classes, "dog")
    with pytest.raises(UserError, match=r"39 c39 and 960 more\.$"):
        sample.find_classes([[i, f"c{i}"] for i in range(1000)], "dog")


def test_classes_from_python(run):
    """Strings are names or ids; a number is the id or the index of a class, and refused where it is both, of two."""
    assert sample.find_classes(run.classes, ["cold ring", "3", 1]) == [8, 3, 1]
    tiny = [[0, "tench"], [207, "golden retriever"], [574, "golf ball"]]
    assert sample.find_classes(tiny, ["golden retriever", 574, 1, "574", np.int64(2)]) == [1, 2, 1, 2, 2]
    assert sample.find_classes(tiny, 574) == sample.find_classes(tiny, "golf ball") == [2]
    shuffled = [[2, "cat"], [0, "dog"], [1, "cow"]]
    for number, ids in ((0, "2, 0"), (1, "0, 1"), (2, "2, 1")):
        with pytest.raises(UserError, match=f"^{number} stands for several classes; give one of the ids {ids}, as a"):
            sample.find_classes(shuffled, [number])
    assert sample.find_classes(shuffled, ["0", "dog"]) == [1, 1]
    assert sample.find_classes(shuffled, torch.tensor([0, 1, 2])) == [0, 1, 2]  # a tensor: always indices
    for wrong in (7, -1, ["tench", "7"]):
        with pytest.raises(UserError, match="no class '?-?[71]"):
            sample.find_classes(tiny, wrong)
    for wrong in (-1, 4):
        with pytest.raises(UserError, match="holds indices: 0 to 2 for this run, 3 for the null class"):
            sample.find_classes(tiny, torch.tensor([wrong]))
    pictures = sample.generate(run, ["cold ring", 3], seed=2, iterations=4, steps=6)
    want = sample.generate(run, torch.tensor([8, 3]), 2, sampling=replace(run.sampling, iterations=4, steps=6))
    assert torch.equal(pictures.images, want.images)


def test_from_python(run, capsys):
    """PIL images with one method, a bar when asked, and settings by name."""
    pictures = sample.generate(run, "cold ring, 3", iterations=2, steps=4)
    first, second = pictures.pil()
    assert not capsys.readouterr().err and first.mode == "RGB"
    assert np.array_equal(np.asarray(second), pictures.images[1].permute(1, 2, 0).numpy())
    sample.generate(run, "cold ring, 3", iterations=2, steps=4, progress=True)
    assert "2.0/2 images" in capsys.readouterr().err
    with pytest.raises(UserError, match="--steps must be"):
        sample.generate(run, "3", steps=0)
    with pytest.raises(TypeError, match="itertions"):
        sample.generate(run, "3", itertions=4)


def test_id_and_name_on_the_command_line(toy, works, tmp_path):
    for out, text in (("id.png", "8"), ("name.png", "cold ring")):
        works("sample", "--run", toy.run, "--class", text, "--num", 2, "--out", tmp_path / out, *QUICK)
    assert np.array_equal(pixels(tmp_path / "id.png"), pixels(tmp_path / "name.png"))


def test_external_ids_name_the_folders(copy_run, works, tmp_path):
    """A run whose class 3 has the id 207 elsewhere."""
    run = copy_run()
    for kind in ("prior", "generator"):
        edit(run, kind, lambda content: content["classes"].__setitem__(3, [207, "golden retriever"]))
    works("sample", "--run", run, "--class", "golden retriever", "--num", 1, "--out", tmp_path / "out", *QUICK)
    assert tree(tmp_path / "out") == ["207/000000.png"]


# --------------------------------------------------------------------------------------------------- grids and files

def test_grid_places_pictures():
    images = (torch.arange(5)[:, None, None, None] * 10).expand(5, 3, 4, 6).to(torch.uint8)
    out = np.asarray(sample.grid(images, 3))
    assert out.shape == (10, 22, 3)
    for i in range(5):
        y, x = i // 3 * 6, i % 3 * 8
        assert (out[y:y + 4, x:x + 6] == i * 10).all()
    assert (out[4:6] == 255).all() and (out[6:, 16:] == 255).all()


def test_to_uint8_rounds():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5 / 127.5, 1.0, 3.0])
    assert sample.to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255]
    with pytest.raises(UserError, match="not finite"):
        sample.to_uint8(torch.tensor([0.0, float("inf")]))


def test_files_and_grid_hold_the_same_pictures(toy, works, files, run, tmp_path):
    assert tree(files) == [f"1/{i:06d}.png" for i in range(0, 9, 2)] + [f"3/{i:06d}.png" for i in range(1, 9, 2)]
    works("sample", "--run", toy.run, "--class", "1,3", "--num", 9, "--out", tmp_path / "grid.png", *QUICK)
    grid = pixels(tmp_path / "grid.png")
    for i in range(9):  # one class a row
        y, x = i % 2 * 34, i // 2 * 34
        assert abs(grid[y:y + 32, x:x + 32] - pixels(files / str((1, 3)[i % 2]) / f"{i:06d}.png")).max() <= 1
    s = replace(run.sampling, iterations=4, steps=6)
    want = sample.generate(run, [3], 0, [7], s).images[0].permute(1, 2, 0).numpy()
    assert abs(pixels(files / "3/000007.png") - want).max() <= 1


def test_one_class_a_row_for_any_number(toy, works, tmp_path):
    """Seven pictures of three classes: rows of three, two and two, each filled from the left."""
    for out in ("grid.png", "files"):
        works("sample", "--run", toy.run, "--class", "0,4,8", "--num", 7, "--out", tmp_path / out, *QUICK)
    grid = pixels(tmp_path / "grid.png")
    for i in range(7):
        y, x = i % 3 * 34, i // 3 * 34
        picture = pixels(tmp_path / "files" / str((0, 4, 8)[i % 3]) / f"{i:06d}.png")
        assert abs(grid[y:y + 32, x:x + 32] - picture).max() <= 1, i


def test_all_classes(toy, works, tmp_path):
    works("sample", "--run", toy.run, "--class", "all", "--num", 20, "--out", tmp_path, "--iterations", 1, "--steps", 2)
    assert tree(tmp_path) == sorted(f"{i % 10}/{i:06d}.png" for i in range(20))


def test_one_npz(toy, works, tmp_path):
    """FILE.npz holds the pictures of the folder beside it, in order, with the ids of their classes."""
    works("sample", "--run", toy.run, "--class", "1,3", "--num", 5, "--out", tmp_path / "x.npz", *QUICK)
    packed = np.load(tmp_path / "x.npz")
    assert packed["arr_1"].tolist() == [1, 3, 1, 3, 1] and packed["arr_0"].shape == (5, 32, 32, 3)
    assert np.array_equal(packed["arr_0"][1], np.asarray(Image.open(tmp_path / "x/3/000001.png")))


def test_running_again_writes_only_what_is_missing(toy, works, tmp_path):
    command = ("sample", "--run", toy.run, "--class", "1,3", "--num", 6, "--out", tmp_path, *QUICK)
    works(*command)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*.png")}
    lost = tmp_path / "1/000004.png"
    lost.unlink()
    works(*command)
    for p, (time, content) in before.items():
        if p != lost:
            assert p.stat().st_mtime_ns == time
    assert abs(pixels(lost) - pixels(io.BytesIO(before[lost][1]))).max() <= 1
    assert len(before) == 6 and tree(tmp_path) == sorted(str(p.relative_to(tmp_path)) for p in before)


def test_folder_of_other_pictures_is_refused(toy, files, script, works):
    """Running again with another seed or setting would mix two sets of pictures."""
    command = ("sample", "--run", toy.run, "--class", "1,3", "--num", 9, "--out", files, *QUICK)
    before = tree(files)
    for other in (("--seed", 1), ("--cfg", 3), ("--class", "3,1"), ("--show-coarse",)):
        result = script(*command, *other)
        assert result.code == 1 and "choose another --out" in result.err, other
    works(*command)
    assert tree(files) == before


def about(script, path):
    """What --about says: its JSON, the arguments of the command, and the note."""
    result = script("sample", "--about", path)
    assert result.code == 0, result.err
    *facts, command = result.out.splitlines()
    python, name, *arguments = shlex.split(command)
    assert (python, name) == ("python", "sample.py")
    return json.loads("\n".join(facts)), arguments, result.err


def test_a_picture_says_how_it_was_made(toy, works, script, files, run, tmp_path):
    """And the command that it names makes it again, for a grid and for a file of a folder."""
    out = tmp_path / "a grid.png"
    works("sample", "--run", toy.run, "--class", "3,cold ring", "--num", 3, "--seed", 4, "--out", out, *QUICK)
    facts, command, said = about(script, out)
    s = replace(run.sampling, iterations=4, steps=6)
    want = {**sample.describe(run, s, 4, [3, 8]), "coarse": False, "class": "3,cold ring", "num": 3, "run": toy.run}
    assert facts == json.loads(json.dumps(want)) and not said
    before = pixels(out)
    out.unlink()
    works("sample", *command)
    assert abs(pixels(out) - before).max() <= 1
    facts, command, _ = about(script, files / "3/000007.png")
    settings = json.loads((files / "settings.json").read_text())
    assert facts == {**settings, "class": "1,warm_ring", "num": 9, "run": toy.run, "file": "3/000007.png"}
    assert command[command.index("--out") + 1] == str(files)


def test_about_says_when_the_weights_are_others(copy_run, works, script, tmp_path):
    run = copy_run()
    works("sample", "--run", run, "--class", "3", "--num", 1, "--out", tmp_path / "a.png", *QUICK)
    edit(run, "prior", lambda content: content["state"]["norm.weight"].mul_(2))
    assert "holds other weights now" in about(script, tmp_path / "a.png")[2]


def test_show_coarse_doubles_the_width(toy, works, run, tmp_path):
    works("sample", "--run", toy.run, "--class", "2", "--num", 1, "--out", tmp_path, "--show-coarse", *QUICK)
    picture = pixels(tmp_path / "2/000000.png")
    assert picture.shape == (32, 64, 3)
    out = sample.generate(run, [2], sampling=replace(run.sampling, iterations=4, steps=6))
    for half, want in ((picture[:, :32], out.coarse), (picture[:, 32:], out.images)):
        assert abs(half - want[0].permute(1, 2, 0).numpy()).max() <= 1


# ------------------------------------------------------------------------------------------------ seeing and editing

@pytest.fixture
def picture(toy, tmp_path):
    """A toy picture of 64x64 and a mask that keeps its lower half and one pixel less than the token above on the left.

    Both are halved for the run's 32x32 pixels, 4x4 tokens.
    """
    path = next(Path(toy.images, "warm_ring").glob("*.png"))
    mask = np.zeros((64, 64), np.uint8)
    mask[32:], mask[16:32, :14] = 255, 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return path, tmp_path / "mask.png"


def test_start(run, picture):
    path, mask = picture
    image = torch.from_numpy(read_image(str(path), 32))
    edit, like = sample.start_edit(run, str(path), str(mask)), sample.start_like(run, str(path))
    assert edit.keep.tolist() == [False] * 8 + [True] * 8 and not like.keep.any()
    codes = run.vq.encode(sample.to_float(image.numpy())[None])[0]
    assert torch.equal(like.codes, codes) and torch.equal(edit.codes, torch.where(edit.keep, codes, -1))
    assert torch.equal(like.shown.images[0], image) and torch.equal(edit.shown.images[0, :, 16:], image[:, 16:])
    assert (edit.shown.images[0, :, :16] == 128).all()
    decoded = sample.to_uint8(run.kl.decode(edit.latents[None]))[0]
    assert (decoded.float() - image.float()).abs().mean() < 15
    turned, exif = Image.open(path).transpose(Image.ROTATE_180), Image.Exif()  # as a camera held upside down
    exif[0x0112] = 3
    turned.save(mask.parent / "turned.png", exif=exif)
    assert torch.equal(sample.start_edit(run, str(mask.parent / "turned.png"), str(mask)).shown.images,
                       edit.shown.images)


def test_edit_keeps_codes_and_latents(run, picture, monkeypatch):
    """To the bit, in every picture; the rest is drawn anew, and the same when drawn again."""
    start, drawn = sample.start_edit(run, *map(str, picture)), []
    decode = run.kl.decode
    monkeypatch.setattr(run.kl, "decode", lambda latents: drawn.append(latents) or decode(latents))
    out = sample.generate(run, [3, 3, 8], start=start, sampling=replace(run.sampling, iterations=4), frames=True)
    assert len(out.frames) == 4 and torch.equal(out.frames[3], out.images) and len(drawn) == 5
    for latents in drawn:  # after every iteration, and at the end
        assert (latents[:, start.keep] == start.latents[start.keep]).all()
    assert [int((x[0].abs().sum(1) == 0).sum()) for x in drawn] == [7, 5, 3, 0, 0]  # of eight: 8 cos(pi/8 (k+1))
    assert (out.codes[:, start.keep] == start.codes[start.keep]).all() and out.codes.min() >= 0
    images = out.images.int()
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    alone = sample.generate(run, [3], indices=[1], start=start, sampling=replace(run.sampling, iterations=4))
    assert (alone.images[0].int() - images[1]).abs().max() <= 1


def test_start_without_a_warning(toy, picture, tmp_path):
    """In a process of its own, because PyTorch warns once per process of an array that cannot be written."""
    command = [sys.executable, "-W", "error::UserWarning", sample.__file__, "--run", toy.run, "--class", "3",
               "--num", "1", "--like", picture[0], "--out", tmp_path / "a.png", "--device", "cpu"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_like_takes_the_codes(run, picture):
    start = sample.start_like(run, str(picture[0]))
    out = sample.generate(run, [3, 5], start=start)
    assert (out.codes == start.codes).all() and not torch.equal(out.images[0], out.images[1])


def test_edit_on_the_command_line(toy, works, script, picture, run, tmp_path):
    """A grid begins each row with the picture; frames are grids too; a folder remembers what it started from."""
    path, mask = picture
    command = ("sample", "--run", toy.run, "--class", "3,8", "--num", 4, "--edit", path, "--keep", mask, "--steps", 6)
    said = works(*command, "--out", tmp_path / "a.png", "--frames", tmp_path / "a.gif", "--iterations", 9)
    assert "8 tokens to draw" in said and "iterations 8" in said
    grid, start = pixels(tmp_path / "a.png"), sample.start_edit(run, str(path), str(mask))
    assert grid.shape == (66, 100, 3)
    for y in (0, 34):
        assert (grid[y:y + 32, :32] == start.shown.images[0].permute(1, 2, 0).numpy()).all()
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 8 and film.size == (100, 66)
        film.seek(7)
        assert abs(np.asarray(film.convert("RGB")).astype(int) - grid).mean() < 8  # 256 colours
    works(*command, "--out", tmp_path / "wide.png", "--show-coarse")
    assert pixels(tmp_path / "wide.png").shape == (66, 196, 3)
    folder = (*command, "--out", tmp_path / "files")
    works(*folder)
    assert script("sample", "--run", toy.run, "--class", "3,8", "--num", 4, "--steps", 6, "--iterations", 8, "--out",
                  tmp_path / "files").err.endswith("made with other start; choose another --out.\n")
    assert abs(pixels(tmp_path / "files/3/000002.png") - grid[:32, 68:]).max() <= 1


def test_tokens_and_codes_of_other_sizes(picture):
    """Latents merged 2x2, codes of 8 pixels: 4 tokens and 16 codes. Each stays if all of its own pixels do."""
    small = dict(ch=32, ch_mult=(1, 1, 1), blocks=1, unshuffle=2)
    kl = KL(KLConfig(**small, z_channels=4, scale=1.0, merge=2))
    vq = VQ(VQConfig(**small, z_channels=4, codebook_size=9))
    prior = Prior(PriorConfig(dim=64, layers=1, heads=1, vocab=9, grid=4, classes=2))
    generator = Generator(GeneratorConfig("cross_attention", dim=64, depth=1, heads=1, prefix=2, token_dim=16, grid=2,
                                          code_grid=4, classes=2, head_depth=1, head_width=32, vocab=9, code_dim=64))
    for model in (kl, vq, prior, generator):
        model.eval()
    run = sample.Run(kl, generator, vq, prior, [[0, "a"], [1, "b"]], Sampling(iterations=2, steps=3, t_max=900),
                     torch.device("cpu"))
    start = sample.start_edit(run, *map(str, picture))
    assert run.pixels == 32 and start.keep.tolist() == [False] * 2 + [True] * 2 and start.latents.shape == (4, 16)
    assert (start.codes >= 0).tolist() == [False] * 8 + [True] * 8
    mask = Image.open(picture[1])
    mask.paste(255, (0, 16, 16, 32))  # one more code, and a quarter of a token
    mask.save(picture[1])
    start = sample.start_edit(run, *map(str, picture))
    assert start.keep.tolist() == [False] * 2 + [True] * 2
    assert (start.codes >= 0).tolist() == [False] * 4 + [True] + [False] * 3 + [True] * 8
    drawn, decode = [], kl.decode
    kl.decode = lambda latents: drawn.append(latents) or decode(latents)
    out = sample.generate(run, torch.tensor([0, 1, 1]), start=start)
    assert (drawn[0][:, start.keep] == start.latents[start.keep]).all() and not (drawn[0][:, ~start.keep] == 0).any()
    assert (out.codes[:, start.codes >= 0] == start.codes[start.codes >= 0]).all()


def test_a_run_without_codes_edits_too(copy_run, works, picture, tmp_path, script):
    """MAR inpaints; it has no codes to take."""
    run = copy_run("kl", "generator")

    def make_mar(content):
        content["config"]["fusion"] = "none"
        content["state"] = {k: v for k, v in content["state"].items() if "fusion" not in k and ".cross." not in k}
    edit(run, "generator", make_mar)
    path, mask = picture
    command = ("sample", "--run", run, "--class", 3, "--num", 1, "--out", tmp_path / "a.png", *QUICK)
    works(*command, "--edit", path, "--keep", mask)
    assert pixels(tmp_path / "a.png").shape == (32, 66, 3)
    assert "no codes" in script(*command, "--like", path).err


def test_two_ranks_write_the_same_files(toy, files, two_ranks, tmp_path):
    said = two_ranks("sample", "--run", toy.run, "--class", "1,3", "--num", 9, "--out", tmp_path, *QUICK)
    assert "5.0/5 images" in said  # rank 0's share
    assert tree(tmp_path) == tree(files)
    for name in tree(files):
        assert abs(pixels(tmp_path / name) - pixels(files / name)).max() <= 1


def test_dry_run_writes_nothing(toy, works, tmp_path):
    out = works("sample", "--run", toy.run, "--class", "all", "--out", tmp_path / "out", "--dry-run", "--cfg", 2.5)
    assert not (tmp_path / "out").exists() and "cfg 2.5" in out and "80 pictures of 10 classes" in out
    # so many classes that 8 pictures of each would not go into one file
    assert "240 pictures of 40 classes" in works("sample", "--run", toy.run, "--class", "all,all,all,all", "--dry-run")


# ------------------------------------------------------------------------------------------------------- broken models

@pytest.mark.parametrize("kind, tensor", [("generator", "mask_token"), ("kl", "decoder.conv_in.weight"),
                                          ("vq", "decoder.conv_in.weight"), ("prior", "norm.weight")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_no_picture(copy_run, script, tmp_path, kind, tensor, value):
    run = copy_run()
    edit(run, kind, lambda content: content["state"][tensor].view(-1)[:1].fill_(value))
    for other in ("prior", "generator"):  # which otherwise say that this is not the tokenizer they were trained with
        edit(run, other, lambda content: content.pop("tokenizers"))
    result = script("sample", "--run", run, "--class", "1", "--num", 2, "--out", tmp_path / "a.png", *QUICK)
    assert result.code == 1 and "finite" in result.err and not (tmp_path / "a.png").exists()
    assert "Traceback" not in result.err


def test_files_that_do_not_belong_together(copy_run):
    run = copy_run()
    config, state = checkpoints.load(f"{run}/vq.pt", "vq")
    checkpoints.save(f"{run}/vq.pt", "vq", config, {k: v + 0.01 for k, v in state.items()})
    with pytest.raises(UserError, match="vq.pt is not the tokenizer that the others were trained with"):
        sample.load_run(run)
    run = copy_run()
    config, state = checkpoints.load(f"{run}/prior.pt", "prior")
    checkpoints.save(f"{run}/prior.pt", "prior", replace(config, grid=5), state)
    with pytest.raises(UserError, match="do not belong together: prior.pt has 25 codes"):
        sample.load_run(run)


def test_latents_without_a_scale_are_refused(copy_run):
    run = copy_run()
    edit(run, "kl", lambda content: content["config"].update(scale=None))
    assert sample.load_run(run).kl.config.scale  # generator.pt says it
    edit(run, "generator", lambda content: content.pop("latent_scale"))
    with pytest.raises(UserError, match="no file of .* says the scale of the latents; train the generator again"):
        sample.load_run(run)


def test_run_takes_what_the_files_recommend(copy_run):
    """Sampling, classes and the latent scale come with generator.pt, and win over kl.pt's scale."""
    run = copy_run()
    edit(run, "generator", lambda content: content["sampling"].update(iterations=3))
    edit(run, "generator", lambda content: content.update(latent_scale=0.125))
    loaded = sample.load_run(run)
    assert loaded.sampling.iterations == 3 and loaded.kl.config.scale == 0.125
    assert loaded.classes[9] == [9, "cold cross"]
