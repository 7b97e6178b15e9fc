"""What README.md and docs/ say about the files of this repository."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_line_counts():
    stated = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert stated == {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")}


def test_it_can_be_read_to_its_end():
    lines = README.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 120


def test_the_house():
    """At most 15 modules, none over 450 lines that are not blank, fewer than 4,120 together, no function over 60."""
    modules = {f: f.read_text() for f in ROOT.glob("*.py")}
    counts = [sum(bool(line.strip()) for line in text.splitlines()) for text in modules.values()]
    assert len(counts) <= 15 and max(counts) <= 450 and sum(counts) < 4120
    functions = [n for t in modules.values() for n in ast.walk(ast.parse(t)) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 60


@each_page
def test_links_and_pictures_are_there(page):
    for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / path).stat().st_size < 600_000, path


@each_page
def test_commands_name_real_flags(page):
    for script, rest in re.findall(r"(?:python|--) ((?:tools/)?\w+\.py)((?: +(?:--?[\w-]+|[^\s#`|]+))*)", page.read_text()):
        text = (ROOT / script).read_text()
        if script in ("sample.py", "fid.py"):  # these two take the flags of Sampling
            text += (ROOT / "presets.py").read_text()
        for flag in set(re.findall(r"--([a-z][a-z-]+)", rest)) - {"help"}:
            assert f"--{flag}" in text or flag.replace("-", "_") + ":" in text, (script, flag)
