"""What users get wrong: exit code 1 or 2 and one sentence that names the thing, never a traceback.

Each case below is a function from the test's means (`c.toy`, `c.new`, `c.copy_run`, ...) to a command line, with words
that the sentence must contain.
"""
import argparse
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
from generator import Generator
from prior import Prior, PriorConfig
from test_checkpoints import TINY_MAR, Attack, official
from tokenizers import KL, VQ, KLConfig, VQConfig

CASES = {}


def case(*words):
    def keep(make):
        CASES[make.__name__] = make, words
        return make
    return keep


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name, toy, tmp_path, copy_run, script):
    make, words = CASES[name]
    (tmp_path / "file").write_text("a file, no folder")
    paths = {"new": str(tmp_path / "new"), "file": str(tmp_path / "file")}
    command = make(SimpleNamespace(toy=toy, tmp=tmp_path, copy_run=copy_run, **paths))
    result = script(*command)
    assert result.code in (1, 2) and "Traceback" not in result.err, result.err
    said = [line for line in result.err.splitlines() if line.startswith(f"{command[0]}.py: ")]
    assert len(said) == 1 and result.err.rstrip().endswith(said[0]) and len(said[0]) < 400, result.err
    for word in words:
        assert re.search(word, said[0]), said[0]
    assert not [p for p in tmp_path.rglob("*.tmp*")]


def train(c, stage, *more, data=None, run=None):
    default = c.toy.cache if stage else c.toy.images
    run = run or c.copy_run("vq", "kl", "prior")
    return ("train", "--stage", stage, "--preset", "toy", "--data", data or default, "--run", run, "--steps", 1,
            "--grid-every", 0, *more)


def sample(c, *more, run=None):
    return ("sample", "--run", run or c.toy.run, "--class", 1, "--num", 2, "--out", c.tmp / "a.png", *more)


def tokenise(c, images=None, run=None, out=None):
    return "data", "--images", images or c.toy.images, "--run", run or c.toy.run, "--out", out or c.new


def copy_cache(c):
    return str(shutil.copytree(c.toy.cache, c.tmp / "cache"))


def copy_images(c):
    return str(shutil.copytree(c.toy.images, c.tmp / "images"))


# ----------------------------------------------------------------------------------------------------- image folders

@case("splits", "train")
def folder_of_splits(c):
    shutil.copytree(c.toy.images, c.tmp / "images" / "train")
    shutil.copytree(c.toy.images, c.tmp / "images" / "val")
    return tokenise(c, c.tmp / "images")


@case("holds no images", "one folder per class")
def folder_without_images(c):
    os.makedirs(f"{c.new}/cat")
    return train(c, 0, data=c.new)


@case("cannot read .*new", "give a folder of class folders")
def folder_that_is_not_there(c):
    return tokenise(c, c.new)


@case("64 of 130 images cannot be read", r"cold_cross/\d+\.png|warm_disc/\d+\.png")
def folder_of_broken_images(c):
    root = copy_images(c)
    for path in data.find_images(root)[0]:
        open(os.path.join(root, path), "wb").write(b"broken")
    return tokenise(c, root)


@case("of 130 images cannot be read", "repair or remove them")
def broken_image_in_training(c):
    root = copy_images(c)
    for path in data.find_images(root)[0]:
        os.truncate(os.path.join(root, path), 300)
    return train(c, 0, data=root, run=c.new)


@case("classes.tsv has no line for the folder extra")
def folder_that_classes_tsv_lacks(c):
    root = copy_images(c)
    shutil.copytree(f"{root}/warm_disc", f"{root}/extra")
    return tokenise(c, root)


@case("classes.tsv", "folder, id")
def classes_tsv_without_a_name(c):
    root = copy_images(c)
    open(f"{root}/classes.tsv", "w").write("folder\tid\tname\nwarm_disc\t1\n")
    return tokenise(c, root)


@case("classes.tsv", "folder, id")
def classes_tsv_with_other_columns(c):
    root = copy_images(c)
    open(f"{root}/classes.tsv", "w").write("name,number\ncat,3\n")
    return tokenise(c, root)


@case("classes.tsv")
def classes_tsv_that_is_no_text(c):
    root = copy_images(c)
    open(f"{root}/classes.tsv", "wb").write(b"\xff\xfe\x00\x81")
    return tokenise(c, root)


@case("classes.tsv", "id|twice|same")
def classes_tsv_with_an_id_twice(c):
    """Pictures of both classes would be written into one folder."""
    root = copy_images(c)
    text = open(f"{root}/classes.tsv").read()
    open(f"{root}/classes.tsv", "w").write(text.replace("\t1\t", "\t0\t"))
    return tokenise(c, root)


# -------------------------------------------------------------------------------------------------------------- caches

@case("is not a token cache")
def folder_given_to_stage_1(c):
    return train(c, 1, data=c.toy.images)


@case("holds no images")
def cache_given_to_stage_0(c):
    return train(c, 0, data=c.toy.cache)


@case("is not a token cache")
def file_given_to_stage_1(c):
    return train(c, 1, data=c.file)


@case("header.json is damaged, changed", "make the cache again")
def edited_header(c):
    cache = copy_cache(c)
    header = json.load(open(f"{cache}/header.json"))
    json.dump({**header, "scale": 1.0}, open(f"{cache}/header.json", "w"))
    return train(c, 1, data=cache)


@case("cannot use .*header.json", "remove it or choose another folder")
def header_that_is_no_json(c):
    cache = copy_cache(c)
    os.truncate(f"{cache}/header.json", 50)
    return train(c, 2, data=cache)


@case("header.json is damaged, changed")
def header_that_is_a_list(c):
    cache = copy_cache(c)
    open(f"{cache}/header.json", "w").write("[1]")
    return train(c, 1, data=cache)


@case("part-000.npy is missing or damaged", "run the same data.py command again")
def truncated_cache(c):
    cache = copy_cache(c)
    os.truncate(f"{cache}/part-000.npy", os.path.getsize(f"{cache}/part-000.npy") - 1)
    return train(c, 1, data=cache)


@case("part-001.npy is missing or damaged")
def missing_part(c):
    cache = copy_cache(c)
    os.unlink(f"{cache}/part-001.npy")
    return train(c, 2, data=cache)


@case("part-000.npy is missing or damaged", "run the same data.py command again")
def array_of_another_cache(c):
    cache = copy_cache(c)
    np.save(f"{cache}/part-000.npy", np.zeros(7, np.int32))
    return train(c, 1, data=cache)


@case("header.json is .*of another format", "make the cache again")
def cache_of_another_format(c):
    cache = copy_cache(c)
    data.write_header(cache, {**data.read_header(cache), "format": 2})
    return train(c, 1, data=cache)


@case("not complete", "run the same data.py command again")
def incomplete_cache(c):
    cache = copy_cache(c)
    header = {k: v for k, v in data.read_header(cache).items() if k not in ("scale", "unreadable", "skipped")}
    data.write_header(cache, {**header, "complete": False})
    return train(c, 1, data=cache)


def with_other_tokenizer(c, kind):
    run = c.copy_run("vq", "kl", "prior")
    config, state = checkpoints.load(f"{run}/{kind}.pt", kind)
    state["quant_conv.bias"] += 0.01
    checkpoints.save(f"{run}/{kind}.pt", kind, config, state, image_size=32)
    return run


@case("made with another vq tokenizer", "make it again")
def cache_of_another_vq(c):
    return train(c, 1, run=with_other_tokenizer(c, "vq"))


@case("made with another kl tokenizer", "make it again")
def cache_of_another_kl(c):
    return train(c, 2, run=with_other_tokenizer(c, "kl"))


@case("other images, tokenizers, classes", "use another --out")
def cache_continued_with_another_vq(c):
    return tokenise(c, run=with_other_tokenizer(c, "vq"), out=copy_cache(c))


@case("other images, tokenizers, classes", "use another --out")
def cache_continued_with_other_images(c):
    images = copy_images(c)
    os.unlink(os.path.join(images, data.find_images(images)[0][0]))
    return tokenise(c, images=images, out=copy_cache(c))


# ------------------------------------------------------------------------------------------------------------- weights

@case("no run directory")
def run_that_is_not_there(c):
    return sample(c, run=c.new)


@case(r"prior\.pt is not there")
def missing_weights(c):
    return sample(c, run=c.copy_run("generator", "kl", "vq"))


@case(r"vq\.pt is not there")
def tokenising_without_tokenizers(c):
    os.makedirs(c.new)
    return tokenise(c, run=c.new, out=c.tmp / "cache")


@case(r"vq\.pt is not there")
def stage_1_before_stage_0(c):
    return train(c, 1, run=c.new)


@case("no prior.pt yet", "stage 1 first")
def stage_2_before_stage_1(c):
    return train(c, 2, "--condition", "resampled", run=c.copy_run("vq", "kl"))


@case(r"kl\.pt holds prior weights where kl is expected")
def weights_under_another_name(c):
    run = c.copy_run()
    shutil.copy(f"{run}/prior.pt", f"{run}/kl.pt")
    return sample(c, run=run)


@case("do not belong together")
def weights_of_two_runs(c):
    run = c.copy_run()
    config = PriorConfig(dim=64, layers=1, heads=1, vocab=32, grid=4, classes=10)
    checkpoints.save(f"{run}/prior.pt", "prior", config, Prior(config).state_dict())
    return sample(c, run=run)


@case(r"vq\.pt", "stride|grid|belong together")
def tokenizers_of_two_strides(c):
    """Decoded codes of another size than the pictures cannot stand beside them."""
    run = c.copy_run()
    config = VQConfig(ch=32, ch_mult=(1, 1), z_channels=16, codebook_size=64, blocks=1, unshuffle=2)
    checkpoints.save(f"{run}/vq.pt", "vq", config, VQ(config).state_dict())
    return sample(c, "--show-coarse", run=run)


@case("not a PyTorch weights file, or is damaged")
def garbage_weights(c):
    run = c.copy_run()
    open(f"{run}/vq.pt", "wb").write(np.random.default_rng(0).bytes(5000))
    return sample(c, run=run)


@case(r"generator\.pt", "damaged")
def truncated_weights(c):
    run = c.copy_run()
    os.truncate(f"{run}/generator.pt", os.path.getsize(f"{run}/generator.pt") // 2)
    return sample(c, run=run)


@case("could run code, and is refused")
def weights_with_code(c):
    run = c.copy_run()
    torch.save({"model": Attack(f"touch {c.new}")}, f"{run}/prior.pt")
    return sample(c, run=run)


@case(r"vq\.pt holds no weights that this code recognises")
def foreign_weights(c):
    run = c.copy_run()
    torch.save({"model": {"conv1.weight": torch.ones(64, 3, 7, 7)}}, f"{run}/vq.pt")
    return tokenise(c, run=run)


@case(r"train-2\.pt")
def foreign_training_state(c):
    run = c.copy_run("vq", "kl", "prior")
    torch.save({"epoch": 3}, f"{run}/train-2.pt")
    return train(c, 2, run=run)


INCOMPLETE = {
    "vq": (VQ, VQConfig(32, (1, 2), 32, 16), r"decoder\.mid"),
    "kl": (KL, KLConfig(32, (1, 2), 4), r"encoder\.down\.1\.block\.0\.conv1"),
    "prior": (Prior, PriorConfig(dim=64, layers=2, heads=1, vocab=8, grid=4), r"layers\.0\.attention\.wo"),
    "generator": (Generator, TINY_MAR, r"encoder_norm\.")}


def incomplete(kind):
    """An official file without some of its tensors."""
    def make(c):
        module, config, pattern = INCOMPLETE[kind]
        run, state = c.copy_run(), official(kind, module(config).state_dict())
        kept = {k: v for k, v in state.items() if not re.match(pattern, k)}
        assert len(kept) < len(state)
        torch.save({"model": kept, "args": argparse.Namespace()}, f"{run}/{kind}.pt")
        return sample(c, run=run)
    make.__name__ = f"incomplete_{kind}"
    return make


for kind in INCOMPLETE:
    case(rf"{kind}\.pt")(incomplete(kind))


# --------------------------------------------------------------------------------------------------------------- flags

@case("no class 'dog'", "0 warm disc, 1 warm square", "9 cold cross")
def unknown_class(c):
    return sample(c, "--class", "dog")


@case("no class '10'")
def class_id_out_of_range(c):
    return sample(c, "--class", "10")


def flags(script, words, *values):
    """One case per list of flags, added to a command that is right without them."""
    for value in values:
        def make(c, value=value):
            command = train(c, 2) if script == "train" else sample(c) if script == "sample" else tokenise(c)
            return *command, *value.split()
        make.__name__ = f"{script} {value}"
        case(*words)(make)


flags("sample", ["--iterations must be between 1 and 16"], "--iterations 0", "--iterations 17", "--iterations -3")
flags("sample", ["--steps must be between 1 and 951"], "--steps 0", "--steps 952")
flags("sample", ["--t-max must be"], "--t-max 1000", "--t-max -1")
flags("sample", ["--cfg-from is nan"], "--cfg-from nan")
flags("sample", ["--schedule must be"], "--schedule cosine")
flags("sample", ["temperature"], "--prior-temperature 0", "--temperature -1", "--temperature nan")
flags("sample", ["--top-"], "--top-k -1", "--top-p 0", "--top-p 1.5")
flags("sample", ["at least 1"], "--num 0", "--batch 0")
flags("sample", ["give a folder"], "--num 257")
flags("sample", ["need each other"], "--edit a.png", "--keep a.png")
flags("sample", ["exclude each other"], "--edit a.png --keep a.png --like a.png")
flags("sample", ["a.png is not there"], "--like a.png", "--edit a.png --keep b.png")
flags("sample", ["FILE.gif"], "--frames film.png")
flags("sample", ["not allowed"], "--about a.png")
flags("sample", ["--plain excludes"], "--plain --graphs", "--plain --compile")
flags("train", ["at least 1"], "--steps 0", "--steps -5", "--batch 0", "--batch -16", "--accumulate 0", "--log-every 0",
      "--save-every 0")
flags("train", ["--lr"], "--lr -1", "--lr 0", "--lr nan")
flags("train", ["--hours"], "--hours 2", "--stage all --hours 0", "--stage all --hours nan",
      "--stage all --hours 1 --condition mixed:1-0")
flags("train", ["single stage"], "--stage all", "--stage all --steps 5 --lr 1")
flags("train", ["does not divide", "change --batch"], "--batch 15 --accumulate 2", "--accumulate 32")
flags("train", ["--stage"], "--stage 3")
flags("train", ["--fusion"], "--fusion prefixes")
flags("train", ["--condition must be"], "--condition nothing", "--condition mixed", "--condition mixed:1.1",
      "--condition mixed:-0.2", "--condition mixed:0.5-", "--condition mixed:0.5-2")
flags("train", ["--preset"], "--preset huge")
flags("sample", ["--device|device"], "--device nonsense")
flags("train", ["--device|device"], "--device nonsense", "--device cpu:x", "--device cuda:", "--device mps:0")
flags("data", ["30 pixels"], "--size 30")
flags("data", ["--size|pixels"], "--size 0", "--size -32")
flags("data", ["at least 1"], "--toy 0", "--toy -3", "--views 0", "--views -2")


def edited(c, size, white):
    """sample.py with a picture of 40x40 and a mask of other pixels."""
    Image.new("RGB", (40, 40)).save(c.tmp / "picture.png")
    Image.new("L", size, white).save(c.tmp / "mask.png")
    return *sample(c), "--edit", c.tmp / "picture.png", "--keep", c.tmp / "mask.png"


@case("mask.png must be as large as .*picture.png: 40 x 40 pixels")
def mask_of_another_size(c):
    return edited(c, (32, 40), 0)


@case("mask.png keeps none of the 16 tokens")
def mask_that_keeps_nothing(c):
    return edited(c, (40, 40), 0)


@case("mask.png keeps all 16 tokens")
def mask_that_keeps_all(c):
    return edited(c, (40, 40), 255)


@case("picture.png.* no readable image")
def picture_that_is_none(c):
    (c.tmp / "picture.png").write_text("no picture")
    return *sample(c), "--like", c.tmp / "picture.png"


@case("does not say how it was made")
def picture_of_somebody_else(c):
    Image.new("RGB", (40, 40)).save(c.tmp / "picture.png")
    return "sample", "--about", c.tmp / "picture.png"


@case("does not say how it was made")
def picture_that_is_not_there(c):
    return "sample", "--about", c.new


@case("--class.*--about")
def neither_class_nor_picture(c):
    return "sample", "--run", c.toy.run


@case("--frames", "--out must be FILE.png")
def frames_beside_a_folder(c):
    return *sample(c), "--out", c.new, "--frames", c.tmp / "a.gif"


@case("CUDA")
def cuda_without_a_gpu(c):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return train(c, 2, "--device", "cuda")


@case("--fusion and --condition are for stage 2")
def condition_in_stage_1(c):
    return train(c, 1, "--condition", "ground_truth")


def other_prior(c, what, value):
    """A run whose prior.pt says that it was trained with something else."""
    run = c.copy_run("vq", "kl", "prior")
    content = checkpoints.read(f"{run}/prior.pt")
    del content["checksum"]
    checkpoints.write(f"{run}/prior.pt", {**content, what: value})
    return run


@case("prior.pt was trained on another cache, with other vq")
def prior_of_other_tokenizers(c):
    return train(c, 2, run=other_prior(c, "tokenizers", {"vq": "another", "kl": "another"}))


@case("prior.pt was trained on another cache, with other classes")
def prior_of_other_classes(c):
    names = checkpoints.read(f"{c.toy.run}/prior.pt")["classes"]
    return train(c, 2, run=other_prior(c, "classes", names[::-1]))


@case("prior.pt and generator.pt have different classes")
def sampling_with_a_prior_of_other_classes(c):
    names = checkpoints.read(f"{c.toy.run}/prior.pt")["classes"]
    run = other_prior(c, "classes", names[::-1])
    shutil.copy(f"{c.toy.run}/generator.pt", run)
    return sample(c, run=run)


@case("numbered pictures without a settings.json")
def folder_of_somebodys_pictures(c):
    os.makedirs(f"{c.new}/1")
    Image.new("RGB", (32, 32)).save(f"{c.new}/1/000000.png")
    return *sample(c), "--out", c.new


@case("settings.json is not a file of sample.py")
def folder_with_settings_of_another_program(c):
    os.makedirs(c.new)
    open(f"{c.new}/settings.json", "w").write("[1]")
    return *sample(c), "--out", c.new


@case("is there already")
def weights_onto_themselves(c):
    return "ship", c.toy.run, f"{c.toy.run}/."


@case("no mps")
def mps_without_apple(c):
    if torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU")
    return train(c, 2, "--device", "mps")


@case("give --images DIR and --run RUN")
def data_without_images(c):
    return "data", "--out", c.new


@case("--data DIR")
def stage_0_without_data(c):
    return "train", "--stage", 0, "--preset", "toy", "--run", c.new


@case("fusion reads none")
def condition_without_codes(c):
    return train(c, 2, "--fusion", "none", "--condition", "resampled")


@case("--toy takes only --out")
def toy_pictures_of_a_folder(c):
    return "data", "--toy", 3, "--images", c.toy.images, "--out", c.new


# ------------------------------------------------------------------------------------------------------- where to write

@case("--run lies among the classes of --data")
def run_among_the_images(c):
    return "train", "--stage", "all", "--preset", "toy", "--data", c.new, "--run", f"{c.new}/run"


@case("lies among the classes of")
def cache_among_the_images(c):
    shutil.copytree(c.toy.images, c.new)
    return tokenise(c, images=c.new, out=f"{c.new}/cache")


@case("--data and --run take paths")
def empty_run(c):
    return *train(c, 2), "--run", ""


@case("--out takes a path")
def empty_out(c):
    return *tokenise(c), "--out", ""


@case("--out would replace an input")
def output_that_is_the_input(c):
    return *sample(c), "--like", c.tmp / "a.png"


@case("--save takes a new file")
def statistics_over_their_images(c):
    return "fid", "./a.npz", "--save", "a.npz"


@case("--out is for figures")
def figures_of_a_table(c):
    return "fid", "--table", "a.json", "--out", "b.json"


@case("holds other images or files")
def toy_pictures_among_others(c):
    os.makedirs(f"{c.new}/cats")
    return "data", "--toy", 3, "--out", c.new


@case("file/new")
def unwritable_toy_folder(c):
    return "data", "--toy", 3, "--out", f"{c.file}/new"


@case("file/new")
def unwritable_cache(c):
    return tokenise(c, out=f"{c.file}/new")


@case("file")
def cache_that_is_a_file(c):
    return tokenise(c, out=c.file)


@case("file/new")
def unwritable_run(c):
    return train(c, 0, run=f"{c.file}/new")


@case("file/new.png")
def unwritable_grid(c):
    return sample(c, "--out", f"{c.file}/new.png")


@case("file/new")
def unwritable_folder_of_pictures(c):
    return sample(c, "--out", f"{c.file}/new")


@case("file/new")
def unwritable_copy_of_a_run(c):
    return "checkpoints", c.toy.run, f"{c.file}/new"


def test_code_in_weights_is_not_run(toy, copy_run, script, tmp_path):
    for kind in checkpoints.CONFIGS:
        run = copy_run()
        torch.save({"model": Attack(f"touch {tmp_path}/was-run")}, f"{run}/{kind}.pt")
        assert script("sample", "--run", run, "--class", "1", "--out", tmp_path / "a.png").code == 1
    assert not (tmp_path / "was-run").exists()
