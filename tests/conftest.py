"""What several test files share: scripts run in this process, scripts run on two ranks, and one small trained run."""
import importlib
import io
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; only with -m slow")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; run by -m cuda, skipped otherwise")
    config.option.markexpr = config.option.markexpr or "not slow"
    if config.option.markexpr != "cuda":  # all other tests are written for the CPU and must not find a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_in_process(name, *args):
    """`python NAME.py ARGS` without a new process -> code, out, err. What escapes is the traceback a user would see."""
    import faults
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = [f"{name}.py", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            faults.run_script(importlib.import_module(name).main)
    except SystemExit as end:
        code = end.code
    except Exception:
        code = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def script():
    """script("train", "--stage", 2, ...) -> code, out, err of train.py."""
    return run_in_process


@pytest.fixture(scope="session")
def works():
    """The same for commands that must succeed; returns what they print."""
    def run(*args):
        result = run_in_process(*args)
        assert result.code == 0, result.err
        return result.out
    return run


@pytest.fixture(scope="session")
def two_ranks():
    """two_ranks("train", ...): torchrun with two processes on this CPU (gloo), or `ranks`; must succeed."""
    def run(name, *args, ranks=2):
        # `--`: without it torchrun takes our --run for an abbreviation of its own --run-path
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
        command = [*torchrun, str(ROOT / f"{name}.py"), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr
    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory, works):
    """A run of preset toy through all stages: paths `images`, `cache`, `run`. Only read; to write, `copy_run`."""
    root = tmp_path_factory.mktemp("toy")
    images, cache, run = str(root / "images"), str(root / "cache"), str(root / "run")
    train = lambda stage, data, *more: works("train", "--stage", stage, "--preset", "toy", "--data", data,
                                             "--run", run, "--device", "cpu", *more)
    works("data", "--toy", 130, "--out", images)  # 130: three chunks of the cache
    train(0, images, "--steps", 16, "--batch", 8, "--grid-every", 0)
    works("data", "--images", images, "--run", run, "--out", cache, "--device", "cpu")
    train(1, cache, "--steps", 40, "--grid-every", 0)
    train(2, cache, "--steps", 40, "--log-every", 10, "--grid-every", 40)
    return SimpleNamespace(images=images, cache=cache, run=run)


@pytest.fixture
def copy_run(toy, tmp_path):
    """copy_run("vq", "kl") -> path of a run directory with these files of the toy run; by default all four."""
    def copy(*kinds):
        target = tmp_path / "run"
        target.mkdir(exist_ok=True)
        for kind in kinds or ("vq", "kl", "prior", "generator"):
            shutil.copy(os.path.join(toy.run, f"{kind}.pt"), target)
        return str(target)
    return copy
