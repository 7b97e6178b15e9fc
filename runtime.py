"""Where the code runs: device, optional torch.distributed, seeds, log file, and one kind of error for users.

Every script calls `setup()` once. Under torchrun it joins the process group (NCCL on CUDA, gloo on CPU);
under plain `python` the same code runs as rank 0 of 1. Nothing here knows about models.
"""
import hashlib
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake in the input. The message is one sentence that says what to do; scripts print it, no traceback."""


@dataclass(frozen=True)
class World:
    """This process among `size` processes. `device` is where its models live."""
    device: torch.device
    rank: int = 0
    size: int = 1


def setup(device: str | None = None) -> World:
    """Chooses the device (CUDA, then Apple's MPS, then CPU, unless named) and joins torchrun's process group."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        mps = torch.backends.mps.is_available() and ranks == 1  # no distributed backend for MPS
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device must be cuda, mps or cpu, not {device}.")
    if device.startswith("cuda"):
        device = f"cuda:{local}" if ranks > 1 or device == "cuda" else device
        if not torch.cuda.is_available() or torch.device(device).index >= torch.cuda.device_count():
            raise UserError(f"there is no {device}: this PyTorch sees {torch.cuda.device_count()} CUDA GPUs.")
        torch.cuda.set_device(torch.device(device))
        torch.backends.cudnn.allow_tf32 = True  # convolutions of the tokenizers only; matrix products stay in full fp32
    if ranks > 1 and not dist.is_initialized():
        # a long timeout: rank 0 writes files and measures while the others wait
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return World(torch.device(device), dist.get_rank() if ranks > 1 else 0, ranks)


def is_first() -> bool:
    """Rank 0, which prints and writes the files that all ranks share."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(*words):
    """Prints on rank 0 only."""
    if is_first():
        print(*words, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, of a tensor of any shape."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def broadcast(values: torch.Tensor):
    """Overwrites a tensor with rank 0's."""
    if dist.is_initialized():
        dist.broadcast(values, 0)


def agree(value, what: str):
    """Raises on every rank unless all ranks have the same value."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if any(v != values[0] for v in values):
            raise UserError(f"the ranks disagree on {what}: {values}; do all nodes see the same disk?")


def rng(device, *key) -> torch.Generator:
    """A torch.Generator that depends on nothing but `key`, e.g. ("sample", seed, image index).

    All random numbers of training and sampling come from such keys. Runs can therefore stop and resume, or change the
    number of ranks, without any generator state to save: the step number is the state.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    return torch.Generator(device).manual_seed(seed)


def autocast(device: torch.device):
    """bf16 on GPUs that have it, fp32 everywhere else (bf16 products are slower than fp32 on most CPUs)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def log(path: str, **record):
    """Appends one JSON line to `path`."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


def run_script(main):
    """Runs main() and ends the process: a user's mistake becomes one sentence and exit code 1, Ctrl-C a clean stop."""
    code = 1
    try:
        main()
        code = 0
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        code = 130
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
    if dist.is_initialized():
        if code:  # at once: leaving the group in order could wait for ranks that wait for this one
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)
