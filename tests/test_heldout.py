"""tools/heldout.py: the losses of a run on given photographs."""
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import data
import heldout
import sample


def figures(said):
    return [tuple(map(float, re.findall(r"(?:prior|generator) ([\d.]+)", line))) for line in said.splitlines()]


def test_losses(toy, works, tmp_path):
    """By hand, and for the generator with other masks and noise. Codes of noise are harder than those of pictures."""
    noise = Path(shutil.copytree(toy.images, tmp_path / "noise"))
    for path in noise.glob("*/*.png"):
        sample.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    said = works("heldout", toy.run, toy.images, noise)
    (prior, generator), (noise_prior, noise_generator) = figures(said)
    assert "130 pictures: prior" in said and "after 40 steps" in said
    assert noise_prior > prior + 0.1 and noise_generator != generator
    run = sample.load_run(toy.run)
    paths, labels, _ = data.find_images(toy.images)
    x = data.to_float(np.stack([data.read_image(os.path.join(toy.images, p), 32) for p in paths]))
    torch.manual_seed(0)  # single draws of a loss differ by up to 20%: at small t its bound has large terms
    with torch.no_grad():
        codes, latents, classes = run.vq.encode(x), run.kl.sample(run.kl.encode(x)), torch.tensor(labels)
        losses = []
        for share in (0.1, 0.5, 0.9):
            mask = (torch.rand(latents.shape[:2]).argsort(1) < round(share * latents.shape[1])).float()
            losses.append(float(run.generator.loss(latents, classes, codes, mask)))
    assert prior == pytest.approx(float(run.prior.loss(codes, classes)), abs=1e-3)
    assert generator == pytest.approx(np.mean(losses), rel=0.1)
    assert figures(works("heldout", toy.run, toy.images))[0] == (prior, generator)  # the same masks and noise again


def test_runs_that_are_not_complete(toy, works, script, copy_run, tmp_path):
    assert len(figures(works("heldout", copy_run("vq", "prior"), toy.images))[0]) == 1
    alone = Path(copy_run("kl", "generator"))
    os.remove(alone / "vq.pt"), os.remove(alone / "prior.pt")  # of the copy before
    shutil.copytree(toy.images, tmp_path / "other")
    os.makedirs(tmp_path / "other" / "zebra")
    with open(tmp_path / "other" / "classes.tsv", "a") as file:
        file.write("zebra\t340\tzebra\n")
    for args, words in (((), "give a run"), ((toy.run,), "give a run"), ((tmp_path, toy.images), "neither prior.pt"),
                        ((toy.run, tmp_path / "other"), "has the class 340 zebra"), ((alone, toy.images), "no vq.pt")):
        out = script("heldout", *args)
        assert out.code == 1 and words in out.err and "Traceback" not in out.err


def test_files_without_classes_and_steps(toy, works, copy_run):
    """As official files are: ids say the class, and no step is named."""
    run = Path(copy_run("vq", "prior"))
    prior = checkpoints.load_model(run / "prior.pt", "prior")
    checkpoints.save(str(run / "prior.pt"), "prior", prior.config, prior.state_dict())
    said = works("heldout", run, toy.images)
    assert figures(said)[0][0] == figures(works("heldout", toy.run, toy.images))[0][0] and "after" not in said


def test_other_tokenizers_than_in_the_training(toy, script, copy_run):
    run = Path(copy_run("vq", "prior"))
    config, state = checkpoints.load(str(run / "vq.pt"), "vq")
    checkpoints.save(str(run / "vq.pt"), "vq", config, {k: v + 1 for k, v in state.items()})
    out = script("heldout", run, toy.images)
    assert out.code == 1 and "vq.pt is not the tokenizer" in out.err


def test_classes_are_those_of_the_run():
    """A folder that lacks a class of the run, and has no classes.tsv, counts its classes otherwise: refused."""
    run = [[0, "cat"], [1, "dog"], [2, "horse"]]
    assert heldout.class_numbers("F", [[1, "dog"], [2, "horse"]], run) == [1, 2]
    assert heldout.class_numbers("F", [[1, "dog"], [2, "horse"]], [[i, str(i)] for i in range(3)]) == [1, 2]
    with pytest.raises(heldout.UserError, match="F has the class 0 dog, which the run does not know"):
        heldout.class_numbers("F", [[0, "dog"], [1, "horse"]], run)
