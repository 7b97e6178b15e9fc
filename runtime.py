"""Where the code runs: device, optional torch.distributed, seeds, log file, and one kind of error for users.

Every script calls `setup()` once. Under torchrun it joins the process group (NCCL on CUDA, gloo on CPU);
under plain `python` the same code runs as rank 0 of 1. Nothing here knows about models.
"""
import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake in the input. The message is one sentence that says what to do; scripts print it without a traceback."""


@dataclass(frozen=True)
class World:
    """This process among `size` processes. `device` is where its models live."""
    device: torch.device
    rank: int = 0
    size: int = 1


def setup(device: str | None = None) -> World:
    """Chooses the device (CUDA, then Apple's MPS, then CPU, unless named) and joins torchrun's process group if there is one."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        mps = torch.backends.mps.is_available() and ranks == 1  # no distributed backend for MPS
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda was asked for, but this PyTorch sees no CUDA GPU; leave --device away or use cpu.")
        if ranks > 1:
            device = f"cuda:{local}"
        torch.cuda.set_device(torch.device(device))
        torch.backends.cudnn.allow_tf32 = True  # convolutions of the tokenizers only; matrix products stay in full fp32
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(torch.device(device), dist.get_rank() if ranks > 1 else 0, ranks)


def print0(*words):
    """Prints on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
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


def rng(device, *key) -> torch.Generator:
    """A torch.Generator that depends on nothing but `key`, e.g. ("sample", seed, image index).

    Every random number of the project comes from such a key. Runs can therefore stop and resume, or change the number
    of ranks, without any generator state to save: the step number is the state.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    return torch.Generator(device).manual_seed(seed)


def autocast(device: torch.device):
    """bf16 on GPUs that have it, fp32 everywhere else (bf16 products are slower than fp32 on most CPUs)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def log(path: str, **record):
    """Appends one JSON line to `path`."""
    with open(path, "a") as f:
        f.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")


def run_script(main):
    """Runs main() and ends the process: a user's mistake becomes one sentence and exit code 1, Ctrl-C a clean stop."""
    try:
        main()
        code = 0
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        code = 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)
