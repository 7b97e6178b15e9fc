"""Where the code runs: device, optional torch.distributed, seeds, files, and one kind of error for users.

What computes calls `setup()` first. Under torchrun it joins the process group (NCCL on CUDA, gloo on CPU); under plain
`python` the same code runs as rank 0 of 1. `spread` divides a training among the ranks (DDP, FSDP2).

What may happen to a long run is met here: signals and numbers that are not finite (`Watch`), and ranks that die
(`Pulse`).
"""
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


SILENCE = 20.0  # seconds without a sign of life after which a rank counts as dead
PATIENCE = timedelta(hours=2)  # of a rank in a collective: rank 0 writes files and measures while the others wait
PULSE = None  # this process's `Pulse`, when there are several


class UserError(ValueError):
    """A mistake in the input. The message is one sentence that says what to do; scripts print it, no traceback."""


class Stopped(KeyboardInterrupt):
    """A signal ends the script: Stopped(number, sentence)."""


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
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", device):
        raise UserError(f"--device must be cuda, cuda:N, mps or cpu, not {device}.")
    if device == "mps" and (ranks > 1 or not torch.backends.mps.is_available()):
        raise UserError("there is no mps here: it takes an Apple GPU that PyTorch sees, and a single process.")
    if device.startswith("cuda"):
        device = f"cuda:{local}" if ranks > 1 or device == "cuda" else device
        if not torch.cuda.is_available() or torch.device(device).index >= torch.cuda.device_count():
            raise UserError(f"there is no {device}: this PyTorch sees {torch.cuda.device_count()} CUDA GPUs.")
        torch.cuda.set_device(torch.device(device))
        torch.backends.cudnn.allow_tf32 = True  # tokenizers' convolutions; products: see diffloss.tf32
    rank = 0
    if ranks > 1:
        rank, start, store = meet()
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                                world_size=ranks, timeout=PATIENCE)
        global PULSE
        PULSE = Pulse(rank, ranks, start)
    return World(torch.device(device), rank, ranks)


def meet():
    """-> this process's rank, the name of this start, and the store by which its ranks find each other, empty.

    torchrun keeps one store for all restarts (PyTorch 2.13), and a rank that reads the address of a dead one there
    waits for it. So rank 0 draws a name for the keys of this start, and the others ask for it, each with a word of its
    own, to which no dead rank can have written the answer.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"question of {rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} is known to {rank}", "")
    known = set()
    while rank == 0 and len(known) < ranks - 1:
        for r in set(range(1, ranks)) - known:
            question = store.get(f"question of {r}").decode()  # by this start's rank r, or still by one that is dead
            store.set(f"answer to {question}", name)
            try:
                store.wait([f"{name} is known to {r}"], timedelta(seconds=1))
                known.add(r)
            except dist.DistStoreError:  # not yet; then look whether a new question has come
                pass
    return rank, name, dist.PrefixStore(name, store)


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
    """Raises on every rank unless all ranks have the same value."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if any(v != values[0] for v in values):
            raise UserError(f"the ranks disagree on {what}: {values}; do all nodes see the same disk?")


def gather(value):
    """-> the values of all ranks in their order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


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


# ---------------------------------------------------------------------------------------------------------------- files

def write_file(path: str, fill, kept: str | None = None):
    """fill(file) writes a binary file, which becomes `path` once it is whole: temporary file, fsync, rename.

    kept: the new name of the file that was there. A kill at any moment leaves a whole file under one of the
    two names, and a temporary one at most, which `sweep` removes.
    """
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
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another folder.") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def sweep(folder: str):
    """Removes what writers that were killed have left in a folder and in those in it. For one rank."""
    for inside in ("*", os.path.join("*", "*")):
        for path in glob.glob(os.path.join(glob.escape(folder), f"{inside}.tmp*")):
            pid = path.rpartition(".tmp")[2]
            if pid.isdigit() and os.path.isfile(path) and not is_alive(int(pid)):
                os.unlink(path)


def is_alive(pid: int) -> bool:
    """Does a process of this number run on this machine?"""
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def log(path: str, **record):
    """Appends one JSON line to `path`; numbers that are not finite, which JSON does not know, become null."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    try:
        with open(path, "a") as f:
            f.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


# ------------------------------------------------------------------------------------------------------------ many GPUs

def spread(module, ema, world: World, shard: bool, parts: tuple):
    """-> what the loop calls for the loss of `module` on several ranks, whose gradients are averaged in backward.

    Without `shard` every rank holds everything (DDP). With it a rank holds its share of each parameter, and so of
    its gradient, moments and EMA (FSDP2): a module of one of the types `parts` is gathered only while it computes, all
    else once a pass. ema: the averages, sharded alike.
    """
    if not shard:
        if world.size == 1:
            return module
        ids = [world.device.index] if world.device.type == "cuda" else None
        # no buffers: VQ's usage counts differ by rank, and are meant to; torch >= 2.13 warns about this flag
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh  # a second of importing, which only --shard shall cost
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for m in [m for m in reversed(list(module.modules())) if isinstance(m, parts)] + [module, *ema.values()]:
        fully_shard(m, mesh=mesh)
    return module


def passes(module, last: bool):
    """The context of a forward under `spread`: ranks average gradients in the last accumulated pass of a step only."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(last)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def whole(value):
    """A nested dict or list with its shards put together, on the CPU of rank 0 and None elsewhere; the rest as it is.

    For all ranks to call.
    """
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    if not hasattr(value, "full_tensor"):  # no shard (a DTensor)
        return value
    full = value.full_tensor()
    return full.cpu() if is_first() else None


def shard_moments(optimizer):
    """Of moments that came whole from a file, keeps the share that belongs to this rank's parameters."""
    from torch.distributed.tensor import distribute_tensor

    for p, state in optimizer.state.items():
        for name, value in state.items():
            if hasattr(p, "full_tensor") and value.shape == p.shape:
                state[name] = distribute_tensor(value, p.device_mesh, p.placements)


# ---------------------------------------------------------------------------------------------------- what may go wrong

class Pulse:
    """A thread of each rank that shows that it lives, looks at the next rank, and ends the process when one has died.

    NCCL would wait for a dead rank until its timeout, for hours; gloo would end with a traceback that names nobody.
    The store is the one through which the ranks met; torchrun keeps it on the first node.
    """

    def __init__(self, rank, size, start):
        self.rank, self.size, self.over = rank, size, threading.Event()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.job = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self.store = dist.PrefixStore(f"{start}/pulse", self.job)  # a restart must not read the notes of those before
        self.store.set(f"{rank}", "0")
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        beats, other, last, changed = 0, (self.rank + 1) % self.size, None, time.monotonic()
        try:
            while not self.over.wait(1.0):
                beats += 1
                self.store.set(f"{self.rank}", str(beats))
                now = self.store.get(f"{other}")
                if now != last:
                    last, changed = now, time.monotonic()
                if now != b"over" and time.monotonic() - changed > SILENCE and self.end_all():
                    print(f"rank {other} has shown no sign of life for {SILENCE:.0f} seconds; all ranks end. The same "
                          f"command goes on from the last checkpoint.", file=sys.stderr, flush=True)
                if self.store.check(["told"]):
                    os._exit(1)
        except RuntimeError:  # the store is gone, and with it the node that had it
            if not self.over.is_set():
                print(f"rank {self.rank}: the first node does not answer any more; the same command goes on from the "
                      f"last checkpoint.", file=sys.stderr, flush=True)
                os._exit(1)

    def end_all(self) -> bool:
        """Ends all ranks within a second. True for the first one that calls it, which is to tell the user why."""
        return self.store.add("told", 1) == 1

    def stop(self):
        """For a rank that ends in order, and may do so before the others."""
        self.over.set()
        self.thread.join()
        self.store.set(f"{self.rank}", "over")


def is_restart() -> bool:
    """For rank 0, once a process: has torchrun started the same command before?"""
    if PULSE is None:
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return PULSE.job.add("starts", 1) > 1  # that variable counts per node


class Watch:
    """What all ranks must answer alike after a step: was it finite, and has one of them been asked to stop?

    The first answer stays on the device, where the optimizer reads it. The second is the host's, goes through a gloo
    group of its own while the next step runs, and so comes a step late. Neither lets the host wait for the device.
    """
    patience = 10  # steps in a row that are not finite

    def __init__(self, world: World, skipped=0):
        scalar = lambda value=0: torch.tensor(float(value), device=world.device)
        self.total, self.steps = scalar(), 0                      # sum of the finite losses and steps, since the report
        self.skipped, self.reported = scalar(skipped), skipped    # steps that were not finite: now; at the last report
        self.in_row, self.longest = scalar(), scalar()            # of those, the last ones in a row; most in a row
        self.norm = scalar()                                      # of the last step's gradient
        self.hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
        self.signal, self.answer = torch.zeros((), dtype=torch.long), None  # received here; by any rank, a step ago
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """The first signal stops after the step, a second Ctrl-C at once, but not under torchrun, which repeats it."""
        if self.signal and number == signal.SIGINT and not self.hosts:
            raise KeyboardInterrupt
        self.signal.fill_(number)

    def bad(self, loss, norms) -> torch.Tensor:
        """Counts a step: 1.0 on the device if on any rank its loss or a gradient norm is not finite, else 0.0."""
        norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        self.norm = sum(norms)
        bad = (~torch.isfinite(torch.stack([loss, *norms])).all()).float()
        if self.hosts:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.total += torch.where(bad > 0, 0.0, loss)
        self.steps += 1
        self.skipped += bad
        self.in_row = (self.in_row + bad) * bad
        self.longest = torch.maximum(self.longest, self.in_row)
        return bad

    def report(self):
        """-> mean loss of the finite steps since the last report, steps skipped in all, and now in a row; waits."""
        if self.longest >= self.patience:
            raise UserError(f"the loss or its gradient was not finite for {self.patience} steps in a row. The last "
                            "checkpoint is from before; go on from it with a lower --lr.")
        skipped = int(self.skipped)
        finite = self.steps - (skipped - self.reported)
        mean = float(all_mean(self.total)) / finite if finite else math.nan
        self.total, self.steps, self.reported = torch.zeros_like(self.total), 0, skipped
        return mean, skipped, int(self.in_row)

    def asked_to_stop(self) -> int:
        """The number of the signal that any rank had received one step ago (one process: by now), or 0."""
        if not self.hosts:
            return int(self.signal)
        number = 0
        if self.answer is not None:
            self.work.wait()
            number = int(self.answer)
        self.answer = self.signal.clone()
        self.work = dist.all_reduce(self.answer, dist.ReduceOp.MAX, group=self.hosts, async_op=True)
        return number


def step_unless(bad: torch.Tensor, optimizer):
    """A step of a fused AdamW, which leaves weights and moments alone where `bad` is 1: decided on the device."""
    if bad.device.type != "mps":
        optimizer.found_inf = bad  # a loss scaler's way to say so
        optimizer.step()
    elif not bad:  # no fused AdamW there: the host asks, and waits
        optimizer.step()


def run_script(main):
    """Runs main() and ends the process: a user's mistake becomes a sentence and exit code 1, a signal a clean stop."""
    sentence = "stopped; run the same command again to go on"

    def stop(number, frame):
        raise Stopped(number, sentence)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}  # the old handlers
    code = 1
    try:
        main()
        code = 0
    except UserError as error:
        if not PULSE or PULSE.end_all():  # ranks tend to have the same mistake at the same time
            print(f"{os.path.basename(sys.argv[0])}: {error}" + (f" (rank {PULSE.rank})" if PULSE else ""),
                  file=sys.stderr)
    except KeyboardInterrupt as stopped:
        number, sentence = stopped.args or (signal.SIGINT, sentence)
        if is_first():
            print(sentence, file=sys.stderr)
        code = 128 + number
    except BaseException as error:
        if PULSE is None:
            raise
        if lost_connection(error):  # another rank has ended; the thread finds out which, says so, ends this process
            # torchrun may be quicker: it names the rank too, and sends a signal
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))
            PULSE.thread.join(2 * SILENCE)
        if PULSE.end_all():
            traceback.print_exc()
            print(f"rank {PULSE.rank} ends with the error above, and with it all others", file=sys.stderr)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        if code:  # at once: leaving the group in order could wait for ranks that wait for this one
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        if PULSE:  # none in a group of one rank, which --shard makes
            PULSE.stop()
        dist.destroy_process_group()
    sys.exit(code)


def lost_connection(error) -> bool:
    """Is this what a collective raises when another rank is gone?"""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection"))
