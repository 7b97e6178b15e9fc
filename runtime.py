"""Where the code runs: device, ranks, random numbers, files, and the one kind of error that a user sees.

A program that trains or samples calls `setup()` first. It is rank 0 of 1, unless torchrun starts several: then it joins
their process group (NCCL on CUDA, gloo on CPU), and `spread` divides a training among them (DDP, FSDP2)."""
import glob
import hashlib
import json
import math
import os
import re
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=2)  # of a rank in a collective: rank 0 writes files and measures while the others wait


class UserError(ValueError):
    """A mistake in the input. The message is one sentence that says what to do; scripts print it, no traceback."""


def refuse(problems):
    """problems: pairs (is this wrong?, sentence without its full stop). Raises the sentence of the first wrong one."""
    for wrong, sentence in problems:
        if wrong:
            raise UserError(f"{sentence}.")


@dataclass(frozen=True)
class World:
    """This process among `size` processes. `device` is where its models live."""
    device: torch.device
    rank: int = 0
    size: int = 1


def setup(device: str | None = None) -> World:
    """Chooses the device (CUDA, then Apple's MPS, then CPU, unless named) and joins torchrun's process group."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, ranks, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = True  # the tokenizers' convolutions; for matrix products see diffloss.tf32
    if ranks == 1:
        return World(device)
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("START", "start"), store)  # START: see faults.meet, which names starts
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=ranks,
                            timeout=PATIENCE)
    return World(device, rank, ranks)


def choose_device(name: str | None, ranks: int, local: int) -> torch.device:
    """name: cuda, cuda:N, mps, cpu or None. With several ranks, the rank `local` of its machine takes GPU `local`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available() and ranks == 1  # PyTorch has no process group for MPS
    name = name or ("cuda" if gpus else "mps" if mps else "cpu")
    refuse([(not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name), f"--device must be cuda, cuda:N, mps or cpu, not {name}"),
            (name == "mps" and not mps, "there is no mps: it needs an Apple GPU that PyTorch sees, and one process")])
    if name.startswith("cuda"):
        name = f"cuda:{local}" if ranks > 1 or name == "cuda" else name
        refuse([(int(name[5:]) >= gpus, f"there is no {name}: this PyTorch sees {gpus} CUDA GPUs")])
    return torch.device(name)


# ----------------------------------------------------------------------------------------------------------- ranks

def is_first() -> bool:
    """Rank 0, which prints and writes the files that all ranks share."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(*words):
    """Prints on rank 0 only."""
    if is_first():
        print(*(str(w).encode(errors="backslashreplace").decode() for w in words), flush=True)  # names may be no UTF-8


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over ranks of a tensor of any shape, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def broadcast(values: torch.Tensor):
    """Overwrites a tensor with rank 0's."""
    if dist.is_initialized():
        dist.broadcast(values, 0)


def agree(value, what: str):
    """Raises a UserError on every rank unless all ranks have the same value; `what` names it in the message."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        other = any(v != values[0] for v in values)
        refuse([(other, f"the ranks disagree on {what}: {values}; give all nodes the same flags and disk")])


def gather(value):
    """-> the values of all ranks in their order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


# ------------------------------------------------------------------------------------------------ numbers on a device

def rng(device, *key) -> torch.Generator:
    """A torch.Generator that depends on nothing but `key`, e.g. ("sample", seed, image index).

    It seeds every draw of training and sampling: a resumed run needs no saved one. A CPU uses 32 bits of a seed."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")  # int64 holds it
    return torch.Generator(device).manual_seed(seed)


def autocast(device: torch.device):
    """bf16 on GPUs that have it, fp32 everywhere else (bf16 products are slower than fp32 on most CPUs)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


# ----------------------------------------------------------------------------------------------------------- files

def make_folder(path: str):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another.") from None


def write_file(path: str, fill, kept: str | None = None):
    """Writes a binary file that is never seen half written: fill(file) fills a temporary file, which is then renamed.

    kept: a new name for the file that was at `path` before. A kill at any moment leaves a whole file under one of the
    two names, and at most one temporary file, which `sweep` removes."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        if kept and os.path.exists(path):
            os.replace(path, kept)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        if "CUDA" in str(error):  # of the device, not of the disk
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another folder.") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def sweep(folder: str):
    """Removes the temporary files of killed writers from a folder and the folders in it. Call it while none writes."""
    for inside in ("*", os.path.join("*", "*")):
        for path in glob.glob(os.path.join(glob.escape(folder), f"{inside}.tmp*")):
            ours = re.search(r"\.(pt|npy|npz|json|png|gif|html|svg|tsv)\.tmp(\d+)$", path)
            if ours and os.path.isfile(path) and not is_alive(int(ours[2])):
                os.unlink(path)


def is_alive(pid: int) -> bool:
    """Does a process with this number run on this machine?"""
    try:
        os.kill(pid, 0)  # signal 0 is never sent; the call only checks
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # it belongs to another user
    return True


def log(path: str, **record):
    """Appends one JSON line to `path`, on the first rank. JSON has no NaN and no infinity: such numbers become null."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    try:
        with open(path if is_first() else os.devnull, "a") as f:
            f.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


def read_json(path: str):
    """What a JSON file holds; None if there is no file."""
    try:
        with open(path) as f:
            return json.load(f)
    except (FileNotFoundError, NotADirectoryError):  # or a file stands where the folder should be
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {path}: {error}; remove it or choose another folder.") from None


def write_json(path: str, value):
    """Writes a JSON file. Ranks may all call it: the first one writes."""
    if is_first():
        write_file(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


# -------------------------------------------------------------------------------------------------------- many GPUs

def divide(batch: int, world: World, passes: int | None, most: int) -> tuple:
    """Divides a global batch among ranks and passes. -> (images of a rank in each pass, number of passes).

    passes None: as few as possible with at most `most` images per rank and pass."""
    share = batch // world.size
    passes = passes or next((n for n in range(1, share + 1) if share % n == 0 and share // n <= most), 1)
    images, rest = divmod(batch, world.size * passes)
    refuse([(rest, f"a batch of {batch} does not divide into {world.size} ranks x {passes} passes; change --batch")])
    return images, passes


def spread(module, ema, world: World, shard: bool, parts: tuple):
    """-> `module`, wrapped for several ranks: call it for the loss, and backward passes will average gradients.

    Without `shard` every rank holds everything (DDP). With it a rank holds its share of each parameter, gradient,
    moment and average in `ema` (FSDP2). Modules of the types `parts` are whole only while they compute."""
    if not shard and world.size == 1:
        return module
    if not shard:
        ids = [world.device.index] if world.device.type == "cuda" else None
        # Buffers stay apart: each rank counts in VQ.usage which codes it chose. torch >= 2.13 warns about this flag.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh  # importing takes a second, so only --shard does it
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for m in [m for m in reversed(list(module.modules())) if isinstance(m, parts)] + [module, *ema.values()]:
        fully_shard(m, mesh=mesh)
    return module


def passes(module, last: bool):
    """The context of a forward pass under `spread`: only a step's last pass averages over ranks."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(last)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def whole(value):
    """Nested dicts and lists with sharded tensors whole: on rank 0, on the CPU; elsewhere None. All ranks call it."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    if not hasattr(value, "full_tensor"):  # FSDP2's shards are DTensors, which have this method
        return value
    full = value.full_tensor()
    return full.cpu() if is_first() else None


def unsharded(models, types: dict):
    """A sharded ModuleDict -> whole models in eval mode on rank 0, None elsewhere. Others come back unchanged.

    All ranks must call it. types: kind -> the class of a model."""
    if not any(hasattr(p, "full_tensor") for p in models.parameters()):
        return models
    weights, device = whole(models.state_dict()), next(models.parameters()).device
    if not is_first():
        return None
    models = torch.nn.ModuleDict({kind: types[kind](model.config) for kind, model in models.items()})
    models.load_state_dict(weights)
    return models.to(device).eval()


def shard_moments(optimizer):
    """Under FSDP2, keeps this rank's share of the moments, which were loaded whole."""
    if any(hasattr(p, "full_tensor") for p in optimizer.state):
        from torch.distributed.tensor import distribute_tensor  # a slow import, as in spread
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if value.shape == p.shape:
                    state[name] = distribute_tensor(value, p.device_mesh, p.placements)
