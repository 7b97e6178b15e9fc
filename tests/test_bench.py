"""bench.py runs: every part at its smallest. What it measures is for quiet machines, not for tests."""
import json
import re

import pytest

import bench

QUICK = ("--preset", "toy", "--batch", 2, "--iterations", 4, "--steps", 3, "--repeats", 1, "--warmup", 0)


@pytest.mark.parametrize("part", ["head", "prior", "generator", "d2c", "train", "tokenise", "fid"])
def test_parts(part, works, tmp_path):
    out = works("bench", part, *QUICK, "--json", tmp_path / "records")
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert len(records) == len(out.splitlines()) > 0
    for r in records:
        assert r["part"] == part and r["plain_s"] > 0 and r["ratio"] == pytest.approx(r["plain_s"] / r["ours_s"])
        assert r["gflop"] > 0 and 0 < r["share"] < 2 and r["peak_mb"] > 50


def test_growth(works):
    out = works("bench", "growth", *QUICK)
    assert "batch 16" in out and "16 iterations" in out and "32 iterations" not in out and "48 images drawn" in out


def test_cost(works):
    """MAR-B by hand: 2 FLOP per weight and row forward, twice that backward; attention 4 T^2 D forward per block."""
    L, P, D, visible, draws = 256, 64, 768, bench.mean_visible(256), 4
    assert visible == 34  # the truncated normal's mean is 0.867
    rows = {12: P + visible, 11: P + L}  # blocks: rows; the last decoder block is for hidden rows only, but for K and V
    weights = sum(12 * D**2 * n * blocks for blocks, n in rows.items()) + 12 * D**2 * (L - visible) + 2 * D**2 * 98
    head = draws * (L - visible) * (34 * 1024**2 + 48 * 1024)  # 32 of the 34 in six blocks and the output
    attention = sum(2 * D * n**2 * blocks for blocks, n in rows.items())  # multiply-adds
    want = 2 * 3 * (weights + head + attention) / 1e9
    out = works("bench", "cost", "--preset", "mar-b")
    assert int(re.search(r"(\d+) GFLOP", out)[1]) == pytest.approx(want, rel=0.04)
