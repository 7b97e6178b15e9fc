"""The run that the repository ships, weights/tiny, and the README's first command."""
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def run():
    return sample.load_run(str(TINY))


def test_size():
    assert sum(f.stat().st_size for f in TINY.glob("*.pt")) < 25e6


def test_classes(run):
    index, = sample.find_classes(run.classes, "207")
    assert len(run.classes) == 11 and run.classes[index] == [207, "golden retriever"]


def test_first_command(tmp_path):
    """`python sample.py --class 207` from another folder: 16 pictures in one PNG, in under a minute."""
    start = time.time()
    command = [sys.executable, ROOT / "sample.py", "--class", "207"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.time() - start < 60
    picture = np.asarray(Image.open(tmp_path / "sample.png"))
    assert picture.shape == (4 * 66 - 2, 4 * 66 - 2, 3)


def python_lines():
    """The indented lines of Python in our pages that begin with `import sample`."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(page.name, textwrap.dedent(block)) for page in pages
            for block in re.findall(r"^ +import sample\n(?: +.*\n|\n(?= ))*", page.read_text(), re.M)]


@pytest.mark.parametrize("page, lines", python_lines() or [pytest.param("no page", "assert False")])
def test_lines_of_python(page, lines, tmp_path):
    """What the pages show runs as it stands, and saves the pictures that it names."""
    os.symlink(ROOT / "weights", tmp_path / "weights")
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    saved = re.findall(r"[\w-]+\.png", lines)
    assert saved and all(Image.open(tmp_path / name).size == (64, 64) for name in saved)


def test_commands_of_editing(works, tmp_path, monkeypatch):
    """docs/sampling.md: the masks, the pictures and the commands that use them, one after the other."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "sampling.md").read_text().replace("\\\n", "")
    section = text[text.index("## Editing"):text.index("## Settings")]
    commands = [shlex.split(line) for line in re.findall(r"^    (python .*)", section, re.M)]
    assert len(commands) == 7
    for _, name, *arguments in commands:
        works("sample", *arguments, "--iterations", 1, "--steps", 2) if name == "sample.py" else exec(arguments[0])
    for name, size in (("edit", (460, 262)), ("half", (460, 130)), ("like", (262, 130))):
        assert Image.open(f"{name}.png").size == size, name


def test_pictures_are_pictures(run):
    """No grey blobs, no noise: contrast inside each picture, neighbouring pixels alike, pictures unlike each other."""
    quick = replace(run.sampling, iterations=16)
    x = sample.generate(run, list(range(11)), seed=1, sampling=quick).images.float() / 255
    assert x.std((1, 2, 3)).min() > 0.05
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.5 * (x - x.roll(32, -1)).abs().mean()
    assert (x[:, None] - x[None]).abs().mean((2, 3, 4)).fill_diagonal_(1).min() > 0.05


def test_a_picture_depends_on_its_seed_alone(run):
    quick = replace(run.sampling, iterations=8, steps=25)
    classes = [1, 4, 9, 2, 2, 7, 10]
    together = sample.generate(run, classes, 5, range(7), quick)
    for i in (0, 6):
        alone = sample.generate(run, classes[i:i + 1], 5, [i], quick)
        assert torch.equal(alone.codes, together.codes[i:i + 1])
        assert (alone.images.int() - together.images[i:i + 1].int()).abs().max() <= 1
