"""tools/bench.py, compare.py, curves.py, recipes.py run, at their smallest. Their figures are for quiet machines."""
import json
import os
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from presets import PRESETS

shipped = dict(PRESETS)
import bench  # noqa: E402
import compare  # noqa: E402
import curves  # noqa: E402
import data  # noqa: E402
import fast  # noqa: E402
import gpu  # noqa: E402
import measure  # noqa: E402
import recipes  # noqa: E402
from generator import Generator  # noqa: E402
from runtime import UserError  # noqa: E402

for name in PRESETS.keys() - shipped:  # compare.py and recipes.py add theirs; other tests must not see them
    del PRESETS[name]
QUICK = ("--preset", "toy", "--batch", 2, "--iterations", 4, "--steps", 3, "--repeats", 1, "--warmup", 0)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["head", "prior", "generator", "d2c", "train", "tokenise", "fid"])
def test_parts(part, works, tmp_path):
    out = works("bench", part, *QUICK, "--json", tmp_path / "records")
    figures = records(tmp_path / "records")
    assert len(figures) == len(out.splitlines()) > 0
    for r in figures:
        assert r["part"] == part and r["plain_s"] > 0 and r["ratio"] == pytest.approx(r["plain_s"] / r["fast_s"])
        assert r["gflop"] > 0 and 0 < r["share"] < 2 and r["peak_mb"] > 50


def test_growth(works):
    out = works("bench", "growth", *QUICK)
    assert "batch 16" in out and "16 iterations" in out and "32 iterations" not in out and "48 images drawn" in out


def test_cost(works):
    """MAR-B by hand: 2 FLOP per weight and row forward, twice that backward; attention 4 T^2 D forward per block.

    Kept for the backward pass: in a block of the generator two fp32 inputs of LayerNorm and 15 bf16 numbers per channel
    (inputs of the four products, q, k, v, attention's output, GELU's input and output); in one of the head, which is
    fp32, three modulations and seven numbers per channel; about as much as for six more of them around the blocks."""
    L, P, D, draws = 256, 64, 768, 4
    with torch.device("meta"):
        visible = L - measure.average_draws(Generator(PRESETS["mar-b"].generator), 1).masked
    assert visible == 34  # the truncated normal's mean is 0.867
    rows = P + visible, P + L  # of the encoder's 12 blocks, of the decoder's
    weights = sum(12 * D**2 * n * 12 for n in rows) + 2 * D**2 * 98
    head = draws * (L - visible) * (34 * 1024**2 + 48 * 1024)  # 32 of the 34 in six blocks and the output
    attention = sum(2 * D * n**2 * 12 for n in rows)  # multiply-adds
    want = 2 * 3 * (weights + head + attention) / 1e9
    out = works("bench", "cost", "--preset", "mar-b")
    assert float(re.search(r"([\d.]+) GFLOP", out)[1]) == pytest.approx(want, rel=0.01)
    kept = sum(n * 12 * D * (2 * 4 + 15 * 2) for n in rows) + draws * (L - visible) * 1024 * 4 * (6 * 10 + 6)
    assert float(re.search(r"([\d,]+) MB per image", out)[1].replace(",", "")) == pytest.approx(kept / 1e6, rel=0.1)


def test_fusions(works):
    out = works("bench", "fusions", *QUICK)
    assert re.findall(r"fusions +(\w+):", out) == ["none", "qformer", "cross_attention", "prefix", "mask_tokens"]
    flops = [float(n) for n in re.findall(r"([\d.]+) GFLOP", out)]
    assert flops[0] == min(flops) and flops[3] == max(flops)  # prefix doubles the sequence


def test_flops_include_attention():
    x = torch.randn(2, 4, 16, 8)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert measure.count_flops(attend) == 2 * (2 * 2 * 4 * 16 * 16 * 8)


@torch.no_grad()
def test_flops_include_few_rows():
    layer, x, before = torch.nn.Linear(1024, 512), torch.randn(8, 1024), fast.ONEDNN
    assert measure.count_flops(lambda: fast.FewRows()(layer, x)) == 2 * 8 * 1024 * 512 and fast.ONEDNN == before


def test_gpu(works, tmp_path, monkeypatch):
    """The GPU's run at toy size on this CPU: every figure is there, and saved as soon as it is known."""
    saved = []
    monkeypatch.setattr(gpu.Bench, "whole", lambda bench, B: saved.extend(records(tmp_path / "g")) or {"seconds": 1.0})
    works("bench", "gpu", *QUICK, "--batches", 1, 2, "--forms", "fast", "plain", "--json", tmp_path / "g")
    figures = {r["what"]: r for r in records(tmp_path / "g")}
    assert not any("error" in r for r in figures.values()), figures
    for form in ("fast", "plain"):
        for B in (1, 2):
            d2c, mar = figures[f"D2C, {form}, batch {B}"], figures[f"MAR, {form}, batch {B}"]
            assert d2c["images_per_s"] == pytest.approx(B / d2c["seconds"]) and 0 < d2c["share"] < 2
            assert figures[f"MAR's time over D2C's, {form}, batch {B}"]["ratio"] == \
                pytest.approx(mar["seconds"] / d2c["seconds"])
    assert figures["D2C, plain, batch 2"]["gflop"] == 2 * figures["D2C, plain, batch 1"]["gflop"]
    for name in ("D2C", "MAR"):
        for recompute in ("", ", --recompute"):
            assert figures[f"{name}, training, passes of 64{recompute}"]["images_per_s"] > 0
    assert [r["what"] for r in saved] == list(figures)[:len(saved)] and len(saved) == 11


def test_gpu_estimate(monkeypatch):
    """The estimate from short runs against a whole count: FLOPs are exact numbers, and behave as time does."""
    model = measure.random_weights(Generator(PRESETS["toy"].generator), torch.device("cpu"))
    given = measure.classes_and_codes(model.config, 2, "cpu")
    for form, whole in (("fast", lambda: fast.generate(model, *given, 8, 40, 3.0)),
                        ("plain", lambda: model.generate(*given, 8, 40, 3.0))):
        estimate = gpu.cost_of_decoding(measure.count_flops, form, model, 2, 8, 40)
        assert estimate == pytest.approx(measure.count_flops(whole), rel=0.01)
    monkeypatch.setattr(gpu, "SHORT", 8)
    estimate = gpu.cost_of_decoding(measure.count_flops, "fast", model, 2, 16, 40)
    assert estimate == pytest.approx(measure.count_flops(lambda: fast.generate(model, *given, 16, 40, 3.0)), rel=0.05)


def test_gpu_figures_that_fail_or_come_too_late(works, tmp_path, monkeypatch):
    """Out of memory in one figure loses no other; after the time is over, nothing new starts."""
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu.Bench, "sampling", fail)
    monkeypatch.setattr(gpu.Bench, "training", lambda bench, name, recompute: {"images_per_s": 1.0})
    monkeypatch.setattr(gpu.Bench, "whole", lambda bench, B: {"seconds": 1.0})
    out = works("bench", "gpu", *QUICK, "--batches", 1, "--forms", "fast", "--json", tmp_path / "g")
    assert "CUDA out of memory" in out and "MAR, training, passes of 64: 1 images/s" in out
    out = works("bench", "gpu", *QUICK, "--minutes", 0, "--json", tmp_path / "g")
    assert out.count("minutes are over") == len(out.splitlines())


def test_bad_input(script):
    for flags, sentence in ((("--batch", 0), "must be at least 1"), (("--iterations", 17), "between 1 and the 16")):
        result = script("bench", "head", "--preset", "toy", *flags)
        assert result.code == 1 and sentence in result.err and "Traceback" not in result.err


@pytest.fixture
def held_out():
    return compare.held_out_toys(10)


def test_compare(toy, held_out, tmp_path, capsys):
    """A row is trained and measured once per seed; the same command again reads what was measured."""
    rows, columns = [("toy", "mask_tokens", "mixed:0.5")], (*compare.LOSSES, "frechet", "steps", "cpu")
    call = lambda: compare.compare(compare.__file__, rows, 0, columns, tmp_path, toy.run, toy.cache, held_out,
                                   "--steps", 2, seeds=(0, 1))
    call()
    table = capsys.readouterr().out.splitlines()[-1]
    run = tmp_path / "toy-mask_tokens-mixed-0.5-0"
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 2 and all(0 < result[name] < 10 for name in compare.LOSSES) and result["cpu"] > 0
    assert len(list((run / "pictures").glob("*/*.png"))) == 10
    assert f"| toy | mask_tokens | mixed:0.5 | {np.mean([result['true'], seed_1(tmp_path)['true']]):.3f} ±" in table
    (run / "generator.pt").unlink()
    call()
    assert capsys.readouterr().out.splitlines()[-1] == table and not (run / "generator.pt").exists()


def seed_1(folder):
    return json.loads((folder / "toy-mask_tokens-mixed-0.5-1" / "result.json").read_text())


def test_held_out_classes_are_the_runs(toy, tmp_path):
    """A folder that lacks classes of the run: its labels are the run's indices, equally many of each."""
    paths, labels, known = data.find_images(toy.images)
    folders = {label: path.split("/")[0] for path, label in zip(paths, labels) if label in (1, 3)}
    for folder in folders.values():
        shutil.copytree(os.path.join(toy.images, folder), tmp_path / folder)
    shutil.copy(os.path.join(toy.images, "classes.tsv"), tmp_path)
    os.remove(sorted((tmp_path / folders[1]).iterdir())[0])
    n = labels.count(1) - 1
    images, labels = compare.held_out(str(tmp_path), known, 32)
    assert labels.tolist() == [1] * n + [3] * n and len(images) == 2 * n


def test_frechet(held_out):
    images, _ = held_out
    assert compare.frechet(images, images) == pytest.approx(0, abs=1e-6)
    assert compare.frechet(images, images.flip(1)) > 1


@pytest.mark.slow
def test_recipes(toy, held_out, tmp_path, monkeypatch, capsys):
    """Tokenizers, then a generator without codes on their latents. The presets are ones that a new process knows."""
    monkeypatch.setattr(recipes, "TOKENIZERS", {"toy": PRESETS["toy"]})
    monkeypatch.setattr(recipes, "MAR", {"tiny": ("toy", recipes.tiny)})
    monkeypatch.setattr(recipes, "held_out", lambda folder, classes: held_out)
    monkeypatch.setattr(recipes, "TOKENIZER_SECONDS", 25)
    monkeypatch.setattr(recipes, "GENERATOR_SECONDS", 15)
    recipes.compare_tokenizers(tmp_path, toy.images, "not read")
    tokenizers, mar = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("toy", "tiny"))
    assert 5 < tokenizers["vq"] < tokenizers["kl"] < 40 and 0 < tokenizers["codes"] <= 64 and tokenizers["steps"] > 0
    assert mar["true"] == mar["resampled"] == mar["shuffled"] and mar["steps"] > 0


def test_curves(toy, held_out, tmp_path, monkeypatch, capsys):
    """Both methods, measured twice in a training and for two numbers of iterations, as tables and as a plot."""
    spent = []

    def train(file, path, base, cache, seconds, *args):
        spent.append(seconds)
        shutil.copytree(base, path, dirs_exist_ok=True)

    monkeypatch.setattr(curves, "train_generator", train)
    for fusion in curves.METHODS:
        path = str(tmp_path / f"{fusion}-0")
        compare.once(path, lambda: curves.train_and_measure("", path, toy.run, toy.cache, *held_out, "toy", fusion, 0,
                                                            (5, 20), (2, 4)))
    assert spent == [5, 15] * 2  # it goes on, so 20 s in all
    found = curves.read(tmp_path)
    (_, values), (cpu, at_four) = curve = curves.curve(found["D2C"], "sampling", "cpu")
    assert [f["iterations"] for f in found["MAR"][0]["sampling"]] == [2, 4] and values != at_four and cpu > 0
    assert len(curve) == 2 and len(list((tmp_path / "none-0" / "pictures-4").glob("*/*.png"))) == 10
    capsys.readouterr()
    curves.print_table(found)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| MAR |" in line]
    assert [row[1] for row in rows] == ["5", "20", "2", "4"] and float(rows[-1][-1].rstrip(" |")) == round(at_four[0])
    drawn = ElementTree.fromstring(curves.plot(found))
    points = [e.get("points") for e in drawn.iter() if e.tag.endswith("polyline")]
    assert len(points) == 4 and all(len(p.split()) == 2 for p in points)
    with pytest.raises(UserError, match="no finished training of each method"):
        curves.read(tmp_path / "none-0")


def test_experiments_need_their_arguments(script):
    for name in ("compare", "recipes", "curves"):
        result = script(name)
        assert result.code == 1 and "explains both" in result.err and "Traceback" not in result.err
