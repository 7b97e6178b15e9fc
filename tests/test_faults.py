"""What goes wrong on the way: kills, signals, full disks, damaged files, numbers that are not finite, ranks that die.

The quick part runs with all other tests. The long one, whose counts docs/reliability.md states, takes some minutes:

    python -m pytest -m slow tests/test_faults.py
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import checkpoints
import data
import faults
import runtime
import sample
from conftest import ROOT, run_in_process
from runtime import UserError
from test_data import assert_same_cache
from test_train import assert_same, command, log, losses, mean_difference, train_state

RANKS = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STAGE_2 = ("vq", "kl", "prior")


@pytest.fixture(scope="module")
def undisturbed(toy, works, tmp_path_factory):
    """A run after eight steps of stage 2."""
    run = str(tmp_path_factory.mktemp("undisturbed"))
    for kind in STAGE_2:
        shutil.copy(f"{toy.run}/{kind}.pt", run)
    works(*command(toy, 2, run, 8))
    return run


def flip(path, place):
    """Flips one bit of a file."""
    with open(path, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << place % 8]))


@contextmanager
def largest_file(size):
    """As on a disk that is full: no file may grow beyond `size` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def litter(folder):
    return [str(p) for p in Path(folder).rglob("*.tmp*")]


def by_hand(code, size, args=(), **env):
    """Starts `size` ranks of a program without torchrun, which would end the others when one dies."""
    port = str(random.randrange(20_000, 60_000))
    start = lambda rank: subprocess.Popen([sys.executable, "-c", code, *args], text=True, stderr=subprocess.PIPE, env={
        **os.environ, **RANKS, "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(size), **env})
    return [start(rank) for rank in range(size)]


# ------------------------------------------------------------------------------------------ the checkpoint before

@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_previous_checkpoint_is_used(toy, copy_run, works, undisturbed, fault):
    """Nothing is lost but time: the run ends with the bits of one that was never disturbed."""
    run, often = copy_run(*STAGE_2), ("--save-every", 2)
    works(*command(toy, 2, run, 6, *often))
    newest = f"{run}/train-2.pt"
    if fault == "damaged":
        flip(newest, os.path.getsize(newest) // 2)
    else:
        os.unlink(newest)  # a kill between the two renames of a save
    said = works(*command(toy, 2, run, 8, *often))
    assert "at step 4" in said and ("train-2.pt is damaged" in said or fault == "gone")
    assert_same(train_state(run), train_state(undisturbed))
    assert checkpoints.read(checkpoints.previous(newest))["step"] == 6


def test_two_damaged_checkpoints_are_refused(toy, copy_run, works, script):
    run = copy_run(*STAGE_2)
    works(*command(toy, 2, run, 2, "--save-every", 1))
    for name in ("train-2.pt", "train-2.previous.pt"):
        os.truncate(f"{run}/{name}", 5000)
    result = script(*command(toy, 2, run, 4))
    assert result.code == 1 and "train-2.previous.pt is not a PyTorch weights file, or is damaged" in result.err
    assert os.path.getsize(f"{run}/train-2.pt") == 5000  # not written over


def test_fresh_starts_over_and_deletes_nothing(toy, copy_run, works, undisturbed):
    run = copy_run(*STAGE_2)
    works(*command(toy, 2, run, 2))
    before = {name: Path(run, name).read_bytes() for name in ("train-2.pt", "generator.pt")}
    said = works(*command(toy, 2, run, 8, "--fresh"))
    assert "resuming" not in said and "before-1" in said
    assert_same(train_state(run), train_state(undisturbed))
    assert before == {p.name: p.read_bytes() for p in Path(run, "before-1").iterdir()}
    works(*command(toy, 2, run, 1, "--fresh"))
    assert sorted(os.listdir(f"{run}/before-2")) == ["generator.pt", "train-2.pt"]


# --------------------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_says_so(toy, copy_run, works, script, undisturbed, monkeypatch, number):
    run, batch, calls = copy_run(*STAGE_2), data.Cache.batch, []

    def signal_at_the_fifth(self, numbers):
        calls.append(numbers)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return batch(self, numbers)

    with monkeypatch.context() as m:
        m.setattr(data.Cache, "batch", signal_at_the_fifth)
        result = script(*command(toy, 2, run, 8))
    step = train_state(run)["step"]
    assert result.code == 128 + number and 3 <= step <= 5
    assert f"{number.name}: stopped after step {step}, which is saved" in result.err
    assert f"at step {step}" in works(*command(toy, 2, run, 8))
    assert_same(train_state(run), train_state(undisturbed))


def test_signal_after_the_last_step_is_not_lost():
    """It must stop what follows a stage in the same process."""
    before = signal.getsignal(signal.SIGTERM)
    watch = faults.Watch(runtime.World(torch.device("cpu")))
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(faults.Stopped) as stopped:
        watch.close()
    assert stopped.value.args[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    faults.Watch(runtime.World(torch.device("cpu"))).close()


@pytest.mark.parametrize("torchrun", [False, True])
def test_second_ctrl_c(monkeypatch, torchrun):
    """It ends a run of one process at once, but not under torchrun, which sends two for one of the user."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    watch = faults.Watch(runtime.World(torch.device("cpu")))
    watch.note(signal.SIGINT, None)
    with nullcontext() if torchrun else pytest.raises(KeyboardInterrupt):
        watch.note(signal.SIGINT, None)
    with pytest.raises(faults.Stopped):
        watch.close()


# --------------------------------------------------------------------------------------- numbers that are not finite

def poison(monkeypatch, steps):
    """One latent of the batches of these steps becomes infinite."""
    batch = data.Cache.batch

    def with_infinity(self, numbers):
        codes, moments, labels = batch(self, numbers)
        if numbers.start // 16 in steps:
            moments[0, 0, 0, 0] = float("inf")
        return codes, moments, labels

    monkeypatch.setattr(data.Cache, "batch", with_infinity)


def test_step_that_is_not_finite_is_skipped_and_counted(toy, copy_run, works, monkeypatch):
    run = copy_run(*STAGE_2)
    works(*command(toy, 2, run, 2))
    before = train_state(run)
    poison(monkeypatch, {2, 4})
    works(*command(toy, 2, run, 3))
    after = train_state(run)
    assert_same(before["raw"], after["raw"])
    for a, b in zip(before["optimizer"]["state"].values(), after["optimizer"]["state"].values()):
        assert_same(a, b)
    works(*command(toy, 2, run, 6))
    assert [r["skipped"] for r in log(run)] == [0, 0, 1, 1, 2, 2]
    assert [r["loss"] is None for r in log(run)] == [False, False, True, False, True, False]
    assert all(torch.isfinite(v).all() for v in train_state(run)["raw"].values())


def test_ten_in_a_row_stop_and_keep_the_last_good_checkpoint(toy, copy_run, works, script, monkeypatch):
    run = copy_run(*STAGE_2)
    works(*command(toy, 2, run, 4, "--save-every", 2))
    before = {p.name: p.read_bytes() for p in Path(run).glob("*.pt")}
    poison(monkeypatch, range(4, 100))
    result = script(*command(toy, 2, run, 40, "--save-every", 2))
    assert result.code == 1 and "not finite for 10 steps in a row" in result.err
    assert before == {p.name: p.read_bytes() for p in Path(run).glob("*.pt")} and len(log(run)) == 4 + 9


def test_weights_of_another_training_are_set_aside(toy, copy_run, works):
    """A stage that starts anew where its weights lie already: they go to before-1."""
    run = copy_run("vq", "kl", "prior")
    assert "prior.pt moved to" in works(*command(toy, 1, run, 1))
    assert_same(checkpoints.read(f"{run}/before-1/prior.pt"), checkpoints.read(f"{toy.run}/prior.pt"))


def test_sweep_leaves_what_is_being_written(tmp_path):
    """Temporary files of dead processes go; those of living ones stay, as does what only looks like one."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stays = {f"a.pt.tmp{os.getpid()}", "notes.tmp1x", "deep/er/a.pt.tmp1", "folder.tmp1/file"}
    for name in (*stays, f"a.pt.tmp{dead.pid}", f"deep/b.png.tmp{dead.pid}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runtime.sweep(str(tmp_path))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == stays


def test_restart_of_one_process_is_known(monkeypatch):
    assert not faults.is_restart()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert faults.is_restart()


# ------------------------------------------------------------------------------------------------------------ ranks

TWO_RANKS = """
import os, signal, sys, torch, faults, runtime
faults.SILENCE = 3.0
def main():
    world = runtime.setup("cpu")
    watch = faults.Watch(world)
    loss = torch.tensor(float("nan") if world.rank == 1 else 1.0)
    assert watch.bad(loss, [torch.ones(())]) == 1 and watch.bad(torch.ones(()), [torch.ones(())]) == 0
    assert watch.report() == (1.0, 1, 0)
    asked = []
    for step in range(4):
        if step == 1 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(watch.asked_to_stop())
    assert asked == [0, 0, 15, 15], asked
    print("agreed", file=sys.stderr, flush=True)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.barrier()
faults.run_script(main)
"""


def test_ranks_agree_and_a_dead_one_is_named():
    """A loss that is not finite on one rank skips the step on all; a signal to one stops all after the same step."""
    ranks = by_hand(TWO_RANKS, 2)
    assert ranks[1].wait(120) == -signal.SIGKILL
    start = time.monotonic()
    said = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 1 and time.monotonic() - start < 60
    assert "agreed" in said and "rank 1 has shown no sign of life" in said and "Traceback" not in said, said


APART = """
import os, sys, checkpoints, faults, runtime
def main():
    world = runtime.setup("cpu")
    state = checkpoints.newest(sys.argv[1] if world.rank == 0 else "nowhere.pt")
    runtime.agree(state["step"] if state else 0, "the step to resume at")
faults.run_script(main)
"""


def test_ranks_with_other_disks_are_told(toy):
    """One rank sees the training state, the other does not: a sentence, no waiting for each other."""
    ranks = by_hand(APART, 2, args=[f"{toy.run}/train-2.pt"])
    said = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1] and "the ranks disagree on the step to resume at" in said


def test_a_reader_who_has_gone():
    """`| head -1`: no traceback, and the exit code of SIGPIPE, as other programs have."""
    code = "import faults, runtime\nfaults.run_script(lambda: [runtime.print0('x' * 100) for _ in range(10**6)])"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait(60) == 128 + signal.SIGPIPE


def test_restarted_ranks_meet_without_traces_of_dead_ones():
    """Three starts on one store, as torchrun keeps it, the last after a rank died while it waited for an answer."""
    common, seen = dist.HashStore(), set()
    for start in range(3):
        with ThreadPoolExecutor(3) as ranks:
            names = list(ranks.map(lambda rank: faults.meet(common, rank, 3), range(3)))
        assert len(set(names)) == 1 and names[0] not in seen
        stores = [dist.PrefixStore(name, common) for name in names]
        assert not any(store.check(["address"]) for store in stores)
        stores[start].set("address", f"of start {start}")
        assert all(store.get("address") == f"of start {start}".encode() for store in stores)
        seen |= set(names)
        common.set("question of 1", "its last words")


def test_sharded_ranks_have_the_same_curve_and_files(toy, copy_run, works, two_ranks, undisturbed):
    """FSDP2 with accumulation, clipping and EMA; what it saves resumes on one rank."""
    run = copy_run(*STAGE_2)
    two_ranks(*command(toy, 2, run, 5, "--shard", "--accumulate", 2))
    two_ranks(*command(toy, 2, run, 6, "--shard"), ranks=1)
    works(*command(toy, 2, run, 8))
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-4)
    state, want = train_state(run), train_state(undisturbed)
    assert state.keys() == want.keys()
    for x in (state, want):
        x["moments"] = {f"{i} {k}": v for i, s in x["optimizer"]["state"].items() for k, v in s.items()}
    for name in ("raw", "ema", "moments"):
        assert state[name].keys() == want[name].keys() and mean_difference(state[name], want[name]) < 1e-5


# ------------------------------------------------------------------------------------------------------- full disks

def test_full_disk_while_training(toy, copy_run, works, script, undisturbed):
    run = copy_run(*STAGE_2)
    works(*command(toy, 2, run, 2))
    with largest_file(os.path.getsize(f"{run}/train-2.pt") // 2):
        result = script(*command(toy, 2, run, 4))
    assert result.code == 1 and re.search("cannot write .*train-2.pt: .*free some space", result.err), result.err
    assert train_state(run)["step"] == 2 and not litter(run)
    works(*command(toy, 2, run, 8))
    assert_same(train_state(run), train_state(undisturbed))


def test_full_disk_while_tokenising(toy, script, works, tmp_path):
    """A part that does not fit leaves nothing behind."""
    out = str(tmp_path / "cache")
    make = ("data", "--images", toy.images, "--run", toy.run, "--out", out)
    with largest_file(20_000):
        result = script(*make)
    assert result.code == 1 and re.search("cannot write .*part-000.npy: ", result.err), result.err
    assert os.listdir(out) == ["header.json"]
    works(*make)
    assert_same_cache(out, toy.cache)
    for p in Path(out).iterdir():  # no holes
        assert p.stat().st_blocks * 512 >= p.stat().st_size


# ------------------------------------------------------------------------------------------------------------- data

def test_too_large_image_is_left_out(toy, tmp_path, works):
    """A decompression bomb: 100 million pixels in 12 kB."""
    images, out = str(shutil.copytree(toy.images, tmp_path / "images")), str(tmp_path / "cache")
    bomb = data.find_images(images)[0][100]
    Image.new("1", (10_000, 10_000)).save(f"{images}/{bomb}")
    assert os.path.getsize(f"{images}/{bomb}") < 20_000
    assert "129 images, 1 unreadable" in works("data", "--images", images, "--run", toy.run, "--out", out)
    assert data.Cache(out).header["unreadable"] == [bomb]


def test_unreadable_image_gives_way_to_the_next_in_stage_0(toy, tmp_path, capsys):
    images = str(shutil.copytree(toy.images, tmp_path / "images"))
    path = data.Folder(images, 32).paths[7]
    Path(images, path).write_bytes(b"broken")
    folder = data.Folder(images, 32)
    (got,), (image, view) = folder.batch(range(130)), folder.order(range(130))
    n, m = list(image).index(7), list(image).index(8)
    assert torch.equal(got[n] if view[n] == view[m] else got[n].flip(-1), got[m])
    assert list(folder.unreadable) == [path] and path in capsys.readouterr().out


def everything(cache):
    """All entries of a cache in both views."""
    return [[np.array(x) for x in cache.entry(i, view).item()] for i in range(130) for view in (0, 1)]


def mutate(path, chance):
    """Flips a bit, cuts the end off, or puts something else in the file's place."""
    size, way = os.path.getsize(path), chance.random()
    if way < 0.6:
        flip(path, chance.randrange(size))
    elif way < 0.9:
        os.truncate(path, chance.randrange(size))
    else:
        Path(path).write_bytes(chance.choice([b"", b"{}", b"\x80\x04N.", chance.randbytes(3000)]))


def mutations(toy, folder, number, seed=0):
    """-> how many of `number` mutated files of a run and a cache were refused; the others must have been read right."""
    chance, refused = random.Random(seed), 0
    run, cache = (str(shutil.copytree(x, f"{folder}/{n}")) for x, n in ((toy.run, "run"), (toy.cache, "cache")))
    readers = {"run": lambda: {k: m.state_dict() for k in ("vq", "kl", "prior", "generator")
                               for m in [getattr(sample.load_run(run), k)]},
               "train": lambda: checkpoints.newest(f"{run}/train-2.pt"),
               "cache": lambda: everything(data.Cache(cache))}
    right = {name: read() for name, read in readers.items()}
    for i in range(number):
        name = ("run", "train", "cache")[i % 3]
        files = {"run": [f"{run}/{k}.pt" for k in ("vq", "kl", "prior", "generator")], "train": [f"{run}/train-2.pt"],
                 "cache": [str(p) for p in Path(cache).iterdir()]}[name]
        path = chance.choice(files)
        content = Path(path).read_bytes()
        mutate(path, chance)
        try:
            got = readers[name]()
            for a, b in zip(got, right[name]) if name == "cache" else [(got, right[name])]:
                assert_same(*([list(map(torch.from_numpy, x)) for x in (a, b)] if name == "cache" else (a, b)), path)
        except UserError:
            refused += 1
        Path(path).write_bytes(content)
    return refused


def test_mutated_files_are_refused_or_unharmed(toy, tmp_path):
    assert mutations(toy, tmp_path, 30) > 15


# ------------------------------------------------------------------------------------------------------ the long part

def main_in_child(said, *args):
    """For a process that may be killed at any moment; the last of what it prints goes to a file."""
    result = run_in_process(*args)
    Path(said).write_text(result.out + result.err)
    os._exit(result.code)


@pytest.fixture
def kill_often(tmp_path, monkeypatch):
    """kill_often(kills, longest, command): runs a command again and again, killing it at random moments, then to its
    end. Children are forked from a server that has imported all, so that their time goes into work."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(["train", "data", "sample", "conftest"])
    said, chance = tmp_path / "said", random.Random(0)

    def run(kills, longest, *args):
        done = 0
        while done < kills:
            child = context.Process(target=main_in_child, args=(str(said), *map(str, args)))
            child.start()
            child.join(chance.uniform(0, longest))
            assert child.exitcode in (None, 0), said.read_text()
            if child.exitcode == 0:
                return done, said.read_text()  # it was quicker than the kills
            child.kill(), child.join()
            done += 1
        child = context.Process(target=main_in_child, args=(str(said), *map(str, args)))
        child.start(), child.join(300)
        assert child.exitcode == 0, said.read_text()
        return done, said.read_text()
    return run


@pytest.mark.slow
def test_fifty_kills_of_training(toy, copy_run, kill_often):
    """No checkpoint is ever unreadable, no step is lost, and the last weights have the bits of an undisturbed run."""
    run = copy_run(*STAGE_2)
    train = lambda run: command(toy, 2, run, 700, "--save-every", 3, "--log-every", 100)
    kills, said = kill_often(50, 2.5, *train(run))
    assert kills == 50 and "damaged" not in said and not litter(run)
    killed = train_state(run)
    shutil.rmtree(run)
    kill_often(0, 0, *train(copy_run(*STAGE_2)))  # a child too, because another number of threads may give other bits
    assert_same(killed, train_state(run))


@pytest.mark.slow
def test_twenty_kills_of_tokenising(toy, tmp_path, works, kill_often):
    images, out = str(tmp_path / "images"), str(tmp_path / "cache")
    works("data", "--toy", 4000, "--out", images)
    make = lambda out: ("data", "--images", images, "--run", toy.run, "--out", out)
    kills, _ = kill_often(20, 1.2, *make(out))
    works(*make(whole := str(tmp_path / "whole")))
    assert kills == 20 and not litter(out)
    assert_same_cache(out, whole)


@pytest.mark.slow
def test_twenty_kills_of_sampling(toy, tmp_path, works, kill_often):
    out = tmp_path / "out"
    draw = lambda out: ("sample", "--run", toy.run, "--class", "all", "--num", 600, "--batch", 4, "--out", out)
    kills, _ = kill_often(20, 2.0, *draw(out))
    pictures = sorted(out.rglob("*.png"))
    assert kills == 20 and len(pictures) == 600 and not litter(out)
    for path in pictures:
        assert np.asarray(Image.open(path)).shape == (32, 32, 3)
    works(*draw(tmp_path / "whole"))
    for path in pictures:  # the batches may be cut elsewhere, and kernels round by batch
        a, b = (np.asarray(Image.open(p)).astype(int) for p in (path, tmp_path / "whole" / path.relative_to(out)))
        assert abs(a - b).max() <= 1


@pytest.mark.slow
def test_two_hundred_mutations(toy, tmp_path):
    assert mutations(toy, tmp_path, 200, seed=1) > 100


@pytest.mark.slow
def test_killed_rank_and_restart_by_torchrun(toy, copy_run, two_ranks):
    """One of two ranks is killed at step 7; torchrun starts both again, and they end with an undisturbed run's bits.

    --fresh holds for the first start only.
    """
    code = """
import os, signal, sys
import data, faults, train
batch = data.Cache.batch
def die(self, numbers):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and numbers.start >= 7 * 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, numbers)
data.Cache.batch = die
faults.run_script(train.main)
"""
    run, more = copy_run(*STAGE_2), ("--save-every", 2, "--fresh")
    train = lambda run: [str(x) for x in command(toy, 2, run, 12, *more)[1:]]
    (Path(run) / "dies.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    result = subprocess.run([*torchrun, "--", f"{run}/dies.py", *train(run)], capture_output=True, text=True,
                            timeout=300, env={**os.environ, **RANKS})
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
    killed = train_state(run)
    shutil.rmtree(run)
    two_ranks("train", *train(copy_run(*STAGE_2)))
    assert_same(killed, train_state(run))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_resume_and_one_goes_on(toy, copy_run, works, two_ranks, stage):
    """Two steps on two ranks, two more on two: the bits of four. Two more on one rank: the same curve as one rank."""
    curves, states = [], []
    for ranks in ("22", "2", "21", "1"):
        run = copy_run(*STAGE_2)
        for i, r in enumerate(ranks):
            steps = 4 if i == len(ranks) - 1 else 2
            (two_ranks if r == "2" else works)(*command(toy, stage, run, steps, "--batch", 4))
        curves.append(losses(run, stage)), states.append(train_state(run, stage))
        shutil.rmtree(run)
    assert curves[0] == curves[1] and curves[2] == pytest.approx(curves[3], abs=1e-4)
    assert curves[1] == pytest.approx(curves[3], abs=1e-4)
    assert_same(states[0], states[1])
    assert mean_difference(states[1]["raw"], states[3]["raw"]) < 1e-5


@pytest.mark.slow
def test_two_nodes_tokenise_together(toy, tmp_path, works):
    """Parts of 64 images: node 0 writes the first and the third, node 1 the second."""
    out, one = str(tmp_path / "two"), str(tmp_path / "one")
    code = f"""
import sys, data, faults
sys.argv = ["data.py", "--images", {toy.images!r}, "--run", {toy.run!r}, "--out", {out!r}]
faults.run_script(data.main)
"""
    nodes = by_hand(code, 2, LOCAL_WORLD_SIZE="1")
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    works("data", "--images", toy.images, "--run", toy.run, "--out", one)
    assert data.read_header(out) == data.read_header(one) and len(data.Cache(out).parts) == 3
    for path in Path(one).glob("*.npy"):
        assert path.read_bytes() == Path(out, path.name).read_bytes(), path
    for a, b in zip(data.Cache(out).batch(range(130)), data.Cache(toy.cache).batch(range(130))):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_disk_of_16_megabytes(toy, copy_run, works, script, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        run = shutil.copytree(copy_run(*STAGE_2), disk / "run")
        works(*command(toy, 2, run, 2))
        before = {p.name: p.read_bytes() for p in run.glob("*.pt")}
        free = shutil.disk_usage(disk).free
        (disk / "other").write_bytes(bytes(free - 100_000))
        result = script(*command(toy, 2, run, 4))
        assert result.code == 1 and "free some space" in result.err and not litter(run), result.err
        assert {p.name: p.read_bytes() for p in run.glob("*.pt")} == before
        result = script("data", "--images", toy.images, "--run", toy.run, "--out", disk / "cache")
        assert result.code == 1 and "free some space" in result.err and "Traceback" not in result.err, result.err
        (disk / "other").unlink()
        works(*command(toy, 2, run, 4))
        assert train_state(run)["step"] == 4
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sample"])
def test_memory_stays_flat(toy, copy_run, name):
    """Resident memory over the last three quarters of 2,000 steps and of 2,000 pictures grows by less than 5%."""
    watched = """
import sys, threading, importlib, faults
name, path, *sys.argv = sys.argv[1:]
page, samples, over = 4096 / 1e6, [], threading.Event()
def look():
    while not over.wait(0.2):
        samples.append(int(open("/proc/self/statm").read().split()[1]) * page)
threading.Thread(target=look, daemon=True).start()
try:
    faults.run_script(importlib.import_module(name).main)
finally:
    over.set()
    open(path, "w").write(repr(samples))
"""
    run = copy_run(*STAGE_2)
    args = {"train": command(toy, 2, run, 2000, "--save-every", 200)[1:],
            "sample": ("--run", toy.run, "--class", "all", "--num", 2000, "--out", f"{run}/out", "--iterations", 4,
                       "--steps", 10)}[name]
    code = [sys.executable, "-c", watched, name, f"{run}/memory", f"{name}.py", *map(str, args)]
    subprocess.run(code, check=True, capture_output=True, env={**os.environ, **RANKS}, timeout=1500)
    samples = json.loads(Path(run, "memory").read_text())
    middle, end = (float(np.median(samples[int(len(samples) * a):int(len(samples) * b)]))
                   for a, b in ((0.25, 0.5), (0.75, 1)))
    print(f"{name}: {middle:.0f} MB, then {end:.0f} MB")
    assert len(samples) > 20 and end < 1.05 * middle
