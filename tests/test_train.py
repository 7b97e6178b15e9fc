"""train.py: the same curve on one and two ranks, resuming, EMA, conditions, and eight memorised pictures."""
import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoints
import data
import fast
import sample
import train
from fusion import FUSIONS
from generator import Generator
from presets import PRESETS, sized, true_share
from prior import Prior
from runtime import UserError, rng
from tokenizers import KL, VQ

RESAMPLED = ("--condition", "resampled")


def command(toy, stage, run, steps, *more):
    """train.py on the toy pictures, every step in the log."""
    return ("train", "--stage", stage, "--preset", "toy", "--data", toy.cache if stage else toy.images, "--run", run,
            "--steps", steps, "--log-every", 1, "--grid-every", 0, *more)


def log(run, stage=2):
    return [r for line in Path(run, "log.jsonl").read_text().splitlines() if (r := json.loads(line))["stage"] == stage]


def losses(run, stage=2):
    return [r["loss"] for r in log(run, stage)]


def train_state(run, stage=2):
    return checkpoints.read(os.path.join(run, f"train-{stage}.pt"))


def assert_same(a, b, where=""):
    """Nested dicts, lists, tensors and values, all equal to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def mean_difference(a, b):
    """Of two state dicts. No maximum: Adam makes whole steps of rounding where a gradient is zero but for it."""
    a, b = (torch.cat([v.flatten().float() for v in state.values()]) for state in (a, b))
    return float((a - b).abs().mean())


# ------------------------------------------------------------------------------------------------------- same curve

@pytest.fixture(scope="module")
def five_steps(toy, works, tmp_path_factory):
    """The losses of the first five steps of stage 2 in one process, and the run."""
    run = str(tmp_path_factory.mktemp("five"))
    for kind in ("vq", "kl", "prior"):
        shutil.copy(f"{toy.run}/{kind}.pt", run)
    works(*command(toy, 2, run, 5, *RESAMPLED))
    return losses(run), run


def test_five_steps_are_finite_and_fall(five_steps):
    curve, _ = five_steps
    assert len(curve) == 5 and min(curve) < curve[0] < max(curve) + 1 < 10


def test_two_ranks_have_the_same_curve(toy, copy_run, two_ranks, five_steps):
    run = copy_run("vq", "kl", "prior")
    two_ranks(*command(toy, 2, run, 5, *RESAMPLED))
    assert losses(run) == pytest.approx(five_steps[0], abs=1e-4)
    assert mean_difference(train_state(run)["raw"], train_state(five_steps[1])["raw"]) < 1e-5


@pytest.mark.parametrize("stage, passes", [(1, 2), (2, 2), (2, 4)])
def test_accumulation_has_the_same_curve(toy, copy_run, works, stage, passes):
    curves = []
    for n in (1, passes):
        run = copy_run("vq", "kl", "prior")
        works(*command(toy, stage, run, 3, "--accumulate", n))
        curves.append(losses(run, stage))
        shutil.rmtree(run)
    assert len(curves[0]) == 3 and curves[1] == pytest.approx(curves[0], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resumed_equals_uninterrupted(toy, copy_run, works, stage):
    batch = () if stage else ("--batch", 2)
    states = {}
    for parts in ((4,), (2, 4)):
        run = copy_run("vq", "kl", "prior")
        for steps in parts:
            works(*command(toy, stage, run, steps, *batch))
        states[parts] = (train_state(run, stage), losses(run, stage))
        shutil.rmtree(run)
    (a, curve_a), (b, curve_b) = states.values()
    assert a["step"] == b["step"] == 4 and a["configs"] == b["configs"]
    assert curve_a == curve_b
    assert_same(a, b)


def test_saved_in_the_middle(toy, copy_run, works, monkeypatch, script):
    """Stopped at step 3, after a save at step 2: the same command goes on from there and ends as if never stopped."""
    run, calls, batch = copy_run("vq", "kl", "prior"), [], data.Cache.batch
    more = ("--save-every", 2, "--condition", "mixed:1-0.2")  # whose share of true codes follows from the step

    def stop_later(self, numbers):
        calls.append(numbers)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch(self, numbers)

    with monkeypatch.context() as m:
        m.setattr(data.Cache, "batch", stop_later)
        assert script(*command(toy, 2, run, 4, *more)).code == 130
    assert train_state(run)["step"] == 2
    result = script(*command(toy, 2, run, 5, *more))
    assert result.code == 1 and "trained with other settings (steps)" in result.err
    assert "at step 2" in works(*command(toy, 2, run, 4, *more))
    interrupted = train_state(run)
    shutil.rmtree(run)
    works(*command(toy, 2, copy_run("vq", "kl", "prior"), 4, *more))
    assert_same(interrupted, train_state(run))


def test_finished_run_is_left_alone(toy, works, five_steps):
    _, run = five_steps
    before = train_state(run)
    works(*command(toy, 2, run, 5, *RESAMPLED))
    assert_same(before, train_state(run))


def test_other_settings_do_not_resume(toy, five_steps, script):
    """What decides which images a step sees, and what is learned, must be that of the first part."""
    _, run = five_steps
    for word, other in [("generator", ("--fusion", "qformer")), ("condition", ("--condition", "ground_truth")),
                        ("batch", ("--batch", 8)), ("seed", ("--seed", 1))]:
        result = script(*command(toy, 2, run, 6, *RESAMPLED, *other))
        assert result.code == 1 and re.search(rf"trained with other settings \(.*{word}", result.err), result.err


def test_loss_that_is_not_finite_stops_and_saves_nothing(toy, copy_run, script):
    run = copy_run("vq", "kl", "prior")
    result = script(*command(toy, 2, run, 30, "--lr", 1e9))
    assert result.code == 1 and "not finite" in result.err and not os.path.exists(f"{run}/generator.pt")
    assert all(r["loss"] == r["loss"] for r in log(run))


# ------------------------------------------------------------------------------------------------------- what is saved

def test_generator_file_holds_the_ema(toy):
    state = train_state(toy.run)
    saved = checkpoints.load(os.path.join(toy.run, "generator.pt"), "generator")[1]
    ema, raw = ({k.removeprefix("generator."): v for k, v in state[name].items()} for name in ("ema", "raw"))
    assert_same(saved, ema)
    learned = [k for k in ema if k != "fusion.embedding.weight"]
    assert all(not torch.equal(ema[k], raw[k]) for k in learned if raw[k].abs().sum() > 0)
    assert torch.equal(ema["fusion.embedding.weight"], raw["fusion.embedding.weight"])


def test_ema_warms_up(toy, copy_run, works):
    """The second step keeps (1 + step) / (10 + step) = 2/11 of the average."""
    run, weights, name = copy_run("vq", "kl", "prior"), [], "generator.head.net.output.weight"
    for steps in (1, 2):
        works(*command(toy, 2, run, steps))
        state = train_state(run)
        weights.append((state["raw"][name], state["ema"][name]))
    (_, before), (raw, after) = weights
    assert torch.allclose(after, before * 2 / 11 + raw * 9 / 11, atol=1e-7) and (after - raw).abs().max() > 1e-5


def test_ema_keeps_no_graph(toy, copy_run, works, monkeypatch):
    """An average taken with gradients on would hold on to every step so far."""
    lerp, graphs = torch._foreach_lerp_, []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda ema, *rest: (lerp(ema, *rest), graphs.append(ema[0].grad_fn)))
    works("train", "--stage", 1, "--preset", "toy", "--data", toy.cache, "--run", copy_run("vq", "kl"), "--steps", 3)
    assert graphs == [None] * 3


@pytest.mark.parametrize("stage, kinds", [(0, {"Encoder", "Decoder"}), (1, {"Block"}), (2, {"Block", "HeadBlock"})])
def test_flags_reach_the_blocks_that_run(toy, copy_run, works, monkeypatch, stage, kinds):
    """A step calls what --compile has compiled, and checkpoints what --recompute names."""
    def note(seen, function, *args, **more):
        seen.add(type(function.__self__).__name__)
        return function(*args, **more)

    compiled, recomputed = set(), set()
    monkeypatch.setattr(torch, "compile", lambda call: partial(note, compiled, call))  # the compiler takes a minute
    monkeypatch.setattr(train, "checkpoint", lambda function, *args, use_reentrant: note(recomputed, function, *args))
    works(*command(toy, stage, copy_run("vq", "kl", "prior"), 1, "--compile", "--recompute", "--fresh"))
    assert compiled == kinds and recomputed == kinds & {"Block"}


def test_frozen_table_is_the_priors(toy):
    prior = checkpoints.load(os.path.join(toy.run, "prior.pt"), "prior")[1]["code_embedding.weight"]
    generator = checkpoints.load(os.path.join(toy.run, "generator.pt"), "generator")[1]["fusion.embedding.weight"]
    assert torch.allclose(generator, prior / prior.std())


def test_files_describe_themselves(toy):
    content = checkpoints.read(os.path.join(toy.run, "generator.pt"))
    assert content["step"] == 40 and content["preset"] == "toy" and content["classes"][8] == [8, "cold ring"]
    assert content["sampling"]["iterations"] == PRESETS["toy"].sampling.iterations
    kl = checkpoints.read(os.path.join(toy.run, "kl.pt"))
    assert kl["image_size"] == 32 and kl["config"]["scale"] is not None
    cache = data.read_header(toy.cache)["scale"]
    assert kl["config"]["scale"] == pytest.approx(cache, rel=0.05)  # both measured, on other draws of the same images
    assert sorted(os.listdir(toy.run)) == ["generator.pt", "grids", "kl.pt", "log.jsonl", "prior.pt", "train-0.pt",
                                           "train-1.pt", "train-2.pt", "vq.pt"]
    assert os.listdir(os.path.join(toy.run, "grids")) == ["stage2-0000040.png"]


def test_log(toy):
    records = log(toy.run)
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    for r in records:
        assert r.keys() == {"time", "stage", "step", "loss", "lr", "grad_norm", "skipped", "images_per_s"}
        assert 0 < r["loss"] < 10 and r["lr"] == 1e-3 and r["grad_norm"] > 0 and r["images_per_s"] > 0
    assert records[-1]["loss"] < records[0]["loss"]
    prior = log(toy.run, 1)
    assert prior[-1]["loss"] < 4.16 and [r["step"] for r in prior] == [20, 40]  # ln 64 = 4.159


def test_learning_rate_follows_batch_and_warm_up(toy, copy_run, works, monkeypatch):
    toy_preset = PRESETS["toy"]
    recipes = (*toy_preset.recipes[:2], replace(toy_preset.recipes[2], warmup=0.5))
    monkeypatch.setitem(PRESETS, "toy", replace(toy_preset, recipes=recipes))
    run = copy_run("vq", "kl", "prior")
    out = works(*command(toy, 2, run, 6, "--batch", 13, "--lr", 2.56e-2))
    lr, warmup = 2.56e-2 * 13 / 256, 5  # half an epoch of 130 images
    assert f"learning rate {lr:.2e} after 5 steps" in out
    assert [r["lr"] for r in log(run)] == pytest.approx([lr * min(1, (k + 1) / (warmup + 1)) for k in range(6)])


# ------------------------------------------------------------------------------------------------------- combinations

@pytest.mark.parametrize("fusion, condition", [(fusion, condition) for fusion in FUSIONS for condition in
                                               ("resampled", "ground_truth", "mixed:0.5") if FUSIONS[fusion].reads_codes]
                         + [(fusion, None) for fusion in FUSIONS if not FUSIONS[fusion].reads_codes])
def test_fusions_and_conditions_train_and_sample(toy, copy_run, works, tmp_path, fusion, condition):
    run = copy_run("vq", "kl", "prior")
    works(*command(toy, 2, run, 2, "--fusion", fusion, *(("--condition", condition) if condition else ())))
    if not FUSIONS[fusion].reads_codes:
        os.unlink(f"{run}/vq.pt"), os.unlink(f"{run}/prior.pt")
    out = tmp_path / "a.png"
    works("sample", "--run", run, "--class", "3", "--num", 2, "--iterations", 2, "--steps", 4, "--out", out)
    assert out.exists()
    content = checkpoints.read(f"{run}/generator.pt")
    assert content["config"]["fusion"] == fusion and content["condition"] == (condition or "ground_truth")


def test_conditions_differ(toy, copy_run, works):
    curves = {}
    for condition in ("resampled", "mixed:0", "mixed:.5", "mixed:1-0", "mixed:1", "ground_truth"):
        run = copy_run("vq", "kl", "prior")
        works(*command(toy, 2, run, 3, "--condition", condition))
        curves[condition] = tuple(losses(run)[1:])  # the head starts at zero, so the first loss knows no condition
        shutil.rmtree(run)
    assert curves["resampled"] == curves["mixed:0"] and curves["ground_truth"] == curves["mixed:1"]
    assert len(set(curves.values())) == 4


def test_old_word_for_resampled(toy, copy_run, script):
    result = script(*command(toy, 2, copy_run("vq", "kl", "prior"), 1, "--condition", "teacher_forced"))
    assert result.code == 1 and "teacher_forced is now called resampled" in result.err


def test_share_of_true_codes(toy, copy_run, works, monkeypatch):
    """A prior that draws code 63 only, and a generator that counts it: the share moves linearly with the step."""
    assert true_share("ground_truth") == (1, 1) and true_share("resampled") == (0, 0)
    assert true_share("mixed:0.7") == (0.7, 0.7) and true_share("mixed:1.0-.3") == (1, 0.3)
    drawn = []
    monkeypatch.setattr(Prior, "resample", lambda self, codes, classes, uniform: torch.full_like(codes, 63))

    def loss(model, latents, classes, codes, draws):
        drawn.append(float((codes == 63).float().mean()))
        return model.mask_token.sum()
    monkeypatch.setattr(fast, "loss", loss)
    works(*command(toy, 2, copy_run("vq", "kl", "prior"), 5, "--condition", "mixed:1-0", "--batch", 64))
    drawn = [(d - drawn[0]) / (1 - drawn[0]) for d in drawn]  # some true codes are 63
    assert drawn == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.06)  # 1,024 codes a step


def test_share_of_masked_tokens(toy, copy_run, works, monkeypatch):
    """A preset's smallest share of masked tokens: at 1 all 16 in every step, at 0.3 fewer in some."""
    visible, preset = [], PRESETS["toy"]

    def loss(model, latents, classes, codes, draws):
        assert draws.mask.sum(1).tolist() == [draws.masked] * len(latents)
        visible.append(16 - draws.masked)
        return model.mask_token.sum()
    monkeypatch.setattr(fast, "loss", loss)
    for low in (1.0, 0.3):
        monkeypatch.setitem(PRESETS, "toy", replace(preset, generator=replace(preset.generator, mask_min=low)))
        works(*command(toy, 2, copy_run("vq", "kl", "prior"), 8, "--fresh"))
    assert visible[:8] == [0] * 8 and 4 < max(visible[8:]) <= 11


def test_one_tokenizer_at_a_time(toy, works, tmp_path):
    """Neither overwrites files of the other, its grids and its part of the log included."""
    for kind in ("kl", "vq"):
        works(*command(toy, 0, tmp_path, 1, "--only", kind, "--batch", 2, "--grid-every", 1))
    assert {"vq.pt", "kl.pt", "train-0-vq.pt", "train-0-kl.pt"} <= set(os.listdir(tmp_path))
    assert sorted(os.listdir(tmp_path / "grids")) == ["stage0-kl-0000001.png", "stage0-vq-0000001.png"]
    works("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>Stage (.*?): ", page) == ["0-vq", "0-kl"] and page.count("<figcaption>") == 2


def test_only_belongs_to_stage_0(toy, copy_run, script):
    """In stage 1 the flag would name another file to resume from."""
    result = script(*command(toy, 1, copy_run(), 1, "--only", "vq"))
    assert result.code == 1 and "--only" in result.err


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_dry_run_writes_nothing(toy, copy_run, works, tmp_path, stage):
    run = copy_run("vq", "kl", "prior") if stage else str(tmp_path / "new")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    out = works(*command(toy, stage, run, 7, "--dry-run"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert f"stage {stage}" in out and "130 images, 7 steps of 16" in out


def test_stages_come_in_order(toy, copy_run, script, works, tmp_path):
    run = str(tmp_path / "run")
    result = script(*command(toy, 1, run, 1))
    assert result.code == 1 and "vq.pt is not there" in result.err
    run = copy_run("vq", "kl")
    result = script(*command(toy, 2, run, 1, *RESAMPLED))
    assert result.code == 1 and "run stage 1 first, or use --condition ground_truth" in result.err
    works(*command(toy, 2, run, 1, "--condition", "ground_truth"))


# ------------------------------------------------------------------------------------------------------- all stages

@pytest.fixture(scope="module")
def ten(works, tmp_path_factory):
    """Ten toy pictures, one of each class: 12, 38 and 75 steps of preset toy."""
    works("data", "--toy", 10, "--out", out := str(tmp_path_factory.mktemp("ten") / "images"))
    return out


def all_stages(images, run, *more):
    return "train", "--stage", "all", "--preset", "toy", "--data", images, "--run", run, "--grid-every", 0, *more


def steps_of(run):
    return [train_state(run, stage)["step"] for stage in (0, 1, 2)]


def test_all_stages_resume_where_they_were_stopped(ten, works, script, tmp_path, monkeypatch):
    """From a folder to a picture of every class; stopped in stage 1, the run ends as if it had never been stopped."""
    whole, run, batch, calls = str(tmp_path / "whole"), str(tmp_path / "run"), data.Cache.batch, []
    with monkeypatch.context() as m:
        m.setattr(train, "FORECAST", -1)
        said = works(*all_stages(ten, whole))
    assert "steps: 12 of vq and kl, 38 of prior, 75 of generator" in said
    assert all(f"stage {n}: about 0.0" in said for n in (1, 2))  # stage 0 has no log before its end
    assert f"sample.py --run {whole}" in said and steps_of(whole) == [12, 38, 75]
    assert Image.open(f"{whole}/samples.png").size == (6 * 34 - 2, 10 * 34 - 2)  # ten rows of six

    def stop_later(self, numbers):
        calls.append(numbers)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return batch(self, numbers)
    with monkeypatch.context() as m:
        m.setattr(data.Cache, "batch", stop_later)
        assert script(*all_stages(ten, run, "--save-every", 10)).code == 130
    assert train_state(run, 1)["step"] == 20 and not os.path.exists(f"{run}/generator.pt")
    said = works(*all_stages(ten, run, "--save-every", 10))
    assert "train-0.pt at step 12" in said and "train-1.pt at step 20" in said
    for stage in (0, 1, 2):
        assert_same(train_state(run, stage), train_state(whole, stage))
    before = {p.name: p.stat().st_mtime_ns for p in Path(run).glob("*.*") if p.name != "plan.json"}
    works(*all_stages(ten, run))
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(run).glob("*.*") if p.name != "plan.json"}


def test_all_stages_in_given_hours(ten, works, two_ranks, script, tmp_path):
    """On two ranks, with hardly any time: as many steps as it takes to measure. A later start keeps to them."""
    run, less = str(tmp_path / "run"), ("--hours", 1e-6, "--log-every", 1)
    two_ranks(*all_stages(ten, run, *less))
    assert steps_of(run) == [3, 3, 3] and json.loads(Path(run, "plan.json").read_text())["steps"] == [3, 3, 3]
    works(*all_stages(ten, run))
    assert steps_of(run) == [3, 3, 3]
    result = script(*all_stages(ten, run, "--hours", 2))
    assert result.code == 1 and "plan.json is for other --hours" in result.err
    result = script(*all_stages(ten, run, "--batch", 5))  # its steps would be other epochs
    assert result.code == 1 and "plan.json is for another --batch" in result.err
    result = script(*all_stages(ten, tmp_path / "new", "--condition", "ressampled"))  # before hours of tokenizers
    assert result.code == 1 and "not ressampled" in result.err and not (tmp_path / "new").exists()
    result = script(*all_stages(ten, run, "--condition", "mixed:1-0.3"))  # the hours of the first command still count
    assert result.code == 1 and "exclude --condition P-Q" in result.err
    said = works(*all_stages(ten, run, "--fresh", "--dry-run", "--hours", 2))  # neither moves nor obeys what is there
    assert "moved to" not in said and "steps: 12 of vq and kl" in said and "if 2.0 hours" in said
    photographs = shutil.copytree(ten, f"{run}/photographs")  # in the run: --fresh must not move them
    assert "steps: 12 of vq and kl" in works(*all_stages(photographs, run, "--fresh", *less))
    assert os.path.isdir(photographs)
    assert {"plan.json", "cache", "samples.png", "vq.pt", "log.jsonl"} <= set(os.listdir(f"{run}/before-1"))


def test_hours_shorten_each_stage_to_its_share(tmp_path):
    path, plan = str(tmp_path / "plan.json"), {"hours": 1.0, "steps": [2000, 6000, 12000], "seconds": [None] * 3}
    assert train.fix_steps(path, plan, [0, 1, 2], per_step=0.1, least=60) == 2000  # 200 s where 828 s are allowed
    assert plan["seconds"][0] == 200
    assert train.fix_steps(path, deepcopy(plan), [2], per_step=1.0, least=60) == 3400  # no prior: all that is left
    assert train.fix_steps(path, plan, [1, 2], per_step=1.0, least=60) == int(3400 * 0.42 / 0.77)
    assert train.fix_steps(path, plan, [2], per_step=100.0, least=60) == 60 and plan["seconds"][2] == 6000
    assert json.loads(Path(path).read_text()) == plan and plan["steps"] == [2000, 1854, 60]


def test_all_stages_skip_tokenizers_of_another_training(toy, ten, copy_run, works, script, monkeypatch):
    """With rates that decay, and with few --hours, which change the number of steps."""
    decaying = tuple(replace(recipe, decay=0.5) for recipe in PRESETS["toy"].recipes)
    monkeypatch.setitem(PRESETS, "toy", replace(PRESETS["toy"], recipes=decaying))
    run, less = copy_run("vq", "kl"), ("--hours", 1e-6, "--log-every", 1)
    before = {kind: Path(run, f"{kind}.pt").read_bytes() for kind in ("vq", "kl")}
    assert "stage 0 is skipped" in works(*all_stages(ten, run, *less))
    assert before == {kind: Path(run, f"{kind}.pt").read_bytes() for kind in ("vq", "kl")}
    os.unlink(f"{run}/vq.pt")
    result = script(*all_stages(ten, run))
    assert result.code == 1 and "has no vq.pt; train it first" in result.err


def test_all_stages_in_another_size_without_a_prior(ten, works, script, tmp_path):
    """Fusion none reads no codes, so nothing would use a prior. The command for the report comes once per stage."""
    run, less = str(tmp_path / "run"), ("--fusion", "none", "--hours", 1e-6, "--log-every", 1)
    said = works(*all_stages(ten, run, "--size", 64, *less))
    assert "steps: 12 of vq and kl, 75 of generator" in said and not os.path.exists(f"{run}/prior.pt")
    assert said.count(f"python tools/report.py {run} --watch    # this training as a page: {run}/report.html") == 2
    assert train_state(run, 0)["step"] == train_state(run, 2)["step"] == 3
    header, plan = data.read_header(f"{run}/cache"), json.loads(Path(run, "plan.json").read_text())
    assert (header["size"], header["grid"]) == (64, 8) and plan["seconds"][1] is None
    assert Image.open(f"{run}/samples.png").size == (6 * 66 - 2, 10 * 66 - 2)
    assert "tools/report.py" not in works(*all_stages(ten, run, "--size", 64, *less))
    result = script(*all_stages(ten, run, *less))
    assert result.code == 1 and "trained with other settings (size)" in result.err


def test_codes_and_latents_have_grids_of_their_own(ten, works, monkeypatch, tmp_path):
    """A code for 4 x 4 pixels and a latent for 16 x 16, from the images to the picture of every class."""
    toy, run = PRESETS["toy"], str(tmp_path / "run")
    preset = replace(toy, vq=replace(toy.vq, ch_mult=(1, 1)), kl=replace(toy.kl, merge=2))
    monkeypatch.setitem(PRESETS, "toy", preset)
    works(*all_stages(ten, run, "--hours", 1e-6, "--log-every", 1))
    header, config = data.read_header(f"{run}/cache"), checkpoints.load_model(f"{run}/generator.pt", "generator").config
    assert (header["grid"], header["latent_grid"]) == (8, 4)
    assert (config.grid, config.token_dim, config.codes) == (2, 4 * toy.kl.z_channels, 64)
    codes, moments, _ = data.Cache(f"{run}/cache").batch(range(3))
    assert codes.shape == (3, 64) and moments.shape == (3, 2 * toy.kl.z_channels, 4, 4)
    assert checkpoints.load_model(f"{run}/prior.pt", "prior").config.grid == 8 and os.path.exists(f"{run}/samples.png")


def test_sizes_of_presets(script, ten, tmp_path):
    tiny = PRESETS["tiny"]
    assert sized(tiny, None) == sized(tiny, 64) == tiny and sized(PRESETS["d2c-b"], 256) == PRESETS["d2c-b"]
    for size, channels in ((128, 32), (256, 64)):
        preset = sized(tiny, size)
        images, kl = torch.zeros(1, 3, size, size), KL(replace(preset.kl, scale=1.0))
        assert preset.image_size == size and preset.kl.z_channels == channels
        assert VQ(preset.vq).encode(images).shape == (1, 32 * 32)
        latents = kl.sample(kl.encode(images))
        assert latents.shape == (1, 16 * 16, channels) and kl.decode(latents).shape == images.shape
    for name, size, nearest in (("tiny", 100, 128), ("tiny", 1, 64), ("tiny", 512, 256), ("d2c-b", 128, 256)):
        with pytest.raises(UserError, match=f"--size {size} is not possible .* the nearest, --size {nearest}"):
            sized(PRESETS[name], size)
    result = script(*all_stages(ten, tmp_path / "run", "--size", 100, "--dry-run"))
    assert result.code == 1 and "the nearest, --size 128" in result.err and not (tmp_path / "run").exists()
    result = script("train", "--stage", 1, "--size", 64)
    assert result.code == 1 and "--size is for stages 0 and all" in result.err


# ------------------------------------------------------------------------------------------------------- memorised

def test_eight_pictures_are_memorised(works, tmp_path):
    """All stages on eight pictures. Given its class and codes, or its class alone, each picture comes back.

    Mean absolute errors in grey levels: the KL tokenizer alone 7, this test 10, another one of the eight 48, a
    generator before training 115.
    """
    images, cache, run = str(tmp_path / "images"), str(tmp_path / "cache"), str(tmp_path / "run")
    common = ("--preset", "toy", "--run", run, "--grid-every", 0)
    works("data", "--toy", 8, "--out", images)
    works("train", "--stage", 0, "--data", images, "--steps", 40, "--batch", 8, "--lr", 1.6e-2, *common)
    works("data", "--images", images, "--run", run, "--out", cache)
    works("train", "--stage", 1, "--data", cache, "--steps", 400, "--lr", 3.2e-2, *common)
    works("train", "--stage", 2, "--data", cache, "--steps", 450, "--lr", 8e-2, "--condition", "ground_truth", *common)

    paths, labels, _ = data.find_images(images)
    read = lambda path: torch.from_numpy(data.read_image(os.path.join(images, path), 32))
    pixels = torch.stack([read(p) for p in paths]).float()  # [8, 3, 32, 32]
    stored = torch.from_numpy(data.Cache(cache).parts[0]["codes"].astype("int64"))  # [8, 2, L]
    codes, classes = stored[:, 0], torch.tensor(labels)
    models = sample.load_run(run)
    error = lambda a, b: (a.float()[:, None] - b[None]).abs().mean((2, 3, 4))  # [8, 8]

    def draw(generator):
        s = models.sampling
        g = rng("cpu", 0)
        latents = generator.generate(classes, codes, s.iterations, s.steps, s.cfg, generator=g, t_max=s.t_max)
        return error(sample.to_uint8(models.kl.decode(latents)), pixels)

    learned = draw(models.generator)
    assert learned.argmin(1).tolist() == list(range(8)) and learned.diagonal().mean() < 20
    assert draw(Generator(models.generator.config).eval()).diagonal().mean() > 60
    drawn = sample.generate(models, classes, sampling=replace(models.sampling, top_k=1))  # the prior's likeliest codes
    assert all((drawn.codes[i] == stored[i]).all(-1).any() for i in range(8))  # the picture's or its mirror image's
    from_class = torch.minimum(error(drawn.images, pixels), error(drawn.images, pixels.flip(-1)))
    assert from_class.argmin(1).tolist() == list(range(8)) and from_class.diagonal().mean() < 20
