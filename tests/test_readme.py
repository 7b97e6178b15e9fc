"""What README.md says about the files of this repository."""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def lines(path):
    return len((ROOT / path).read_text().splitlines())


def test_line_counts():
    stated = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert stated == {f.name: str(lines(f.name)) for f in ROOT.glob("*.py")}
    total = int(re.search(r"in ([\d,]+) lines of plain", README)[1].replace(",", ""))
    assert total == sum(lines(f.name) for f in ROOT.glob("*.py"))


def test_pictures_are_there():
    for path in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (ROOT / path).stat().st_size < 600_000


def test_commands_name_real_flags():
    scripts = {f.name: f.read_text() + (ROOT / "presets.py").read_text() for f in ROOT.glob("*.py")}
    for script, rest in re.findall(r"(\w+\.py)((?: +(?:--?[\w-]+|[^\s#`|]+))*)", README):
        for flag in re.findall(r"--([a-z][a-z-]+)", rest):
            assert f"--{flag}" in scripts[script] or flag.replace("-", "_") + ":" in scripts[script], (script, flag)
