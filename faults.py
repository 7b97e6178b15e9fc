"""What may happen to a long run, and what the run then does.

    a mistake of the user, a signal   the program ends with one sentence (`run_script`)
    a signal during training          the step is finished and saved first (`Watch.asked_to_stop`)
    a loss that is not finite         the step changes no weights (`Watch.bad`, `step_unless`)
    a rank that dies                  the other ranks notice and end (`Pulse`)
    torchrun --max-restarts           the ranks of the new start find each other (`meet`)

Every script ends with `run_script(main)`; train.py uses `Watch`. docs/reliability.md lists what was tried."""
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from runtime import PATIENCE, UserError, World, all_mean, is_first

SILENCE = 20.0  # seconds without a sign of life after which a rank is dead; 15 times that before its first sign


# ------------------------------------------------------------------------------------------------ how a program ends

class Stopped(KeyboardInterrupt):
    """A signal ends the program: Stopped(number of the signal, sentence for the user)."""


def run_script(main):
    """Runs main() and ends the process: exit code 0; 1 after an error; 2 from argparse; 128 + number of a signal.

    A user's mistake (UserError) and a signal become one sentence. Any other error is a bug and shows its traceback, but
    for a closed pipe. If several ranks fail in main, only the first one prints; all end."""
    def stop(number, frame):
        raise Stopped(number, "stopped; run the same command again")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    pulse, code = None, 1
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            pulse = Pulse()
        main()
        code = 0
    except UserError as error:
        if pulse is None or pulse.end_all():  # all ranks tend to find the same mistake at the same time
            rank = f" (rank {pulse.rank})" if pulse else ""
            print(f"{os.path.basename(sys.argv[0])}: {error}{rank}", file=sys.stderr)
    except KeyboardInterrupt as stopped:
        number, sentence = stopped.args or (signal.SIGINT, "stopped")
        if is_first():
            print(f"{signal.Signals(number).name}: {sentence}", file=sys.stderr)
        code = 128 + number
    except BrokenPipeError:  # whoever read our output has gone, as in `| head -1`: nobody is there to be told
        pulse and pulse.end_all()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's last flush would fail too
        code = 128 + signal.SIGPIPE
    except SystemExit as end:  # argparse: --help, or a flag that does not exist
        code = end.code
    except Exception as error:
        if pulse is None:
            raise
        pulse.end_with(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pulse is not None:
        if code:  # no destroy_process_group: it could wait for ranks that wait for this one
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        pulse.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ----------------------------------------------------------------------------------------------- ranks that die

class Pulse:
    """A thread in each rank: writes a sign of life each second, reads the next rank's, ends all if that one is silent.

    Without it the living ranks would wait for the dead one, NCCL for hours. Signs of life are in torchrun's store."""

    def __init__(self):
        store, self.rank, self.size = next(dist.rendezvous("env://"))
        os.environ["START"] = start = meet(store, self.rank, self.size)  # runtime.setup joins the group of this start
        self.notes = dist.PrefixStore(f"{start}/pulse", store)           # no notes of an earlier start are read
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        other, last, heard = (self.rank + 1) % self.size, None, time.monotonic()
        try:
            for beat in count():
                self.notes.set(f"{self.rank}", f"{beat}")
                note = self.notes.get(f"{other}") if self.notes.check([f"{other}"]) else None
                if note != last:
                    last, heard = note, time.monotonic()
                limit = SILENCE if last else 15 * SILENCE
                if note != b"over" and time.monotonic() - heard > limit and self.end_all():
                    self.tell(f"rank {other} has shown no sign of life for {limit:.0f} seconds; all ranks end")
                if self.notes.check(["end"]) and not self.over.wait(1.0):  # a second for the main thread to end
                    os._exit(1)  # nothing less ends a main thread that waits inside a collective
                if self.over.wait(1.0):
                    return
        except RuntimeError:  # the store is gone; it lives on the first node
            if not self.over.is_set():
                self.tell(f"rank {self.rank}: the first node does not answer any more")
                os._exit(1)

    def tell(self, sentence):
        print(f"{sentence}. Run the same command again.", file=sys.stderr, flush=True)

    def end_with(self, error: Exception):
        """Reports an error on this rank: either this rank has a bug, or another rank has died."""
        signs = ("Dist", "gloo", "Gloo", "NCCL", "Connection")  # in the error of a collective whose partner is gone
        if isinstance(error, RuntimeError) and any(sign in repr(error) for sign in signs):
            # Waits: our thread will name the dead rank and end this process. Or torchrun notices first; then it names
            # the rank itself and sends SIGTERM.
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))
            self.thread.join(2 * SILENCE)
        if self.end_all():
            traceback.print_exception(error)
            print(f"rank {self.rank} ends with the error above, and all other ranks end with it", file=sys.stderr)

    def end_all(self) -> bool:
        """Ends all ranks within about two seconds. True for the rank that calls it first, which tells the user why."""
        return self.notes.add("end", 1) == 1

    def stop(self):
        """For a rank that ends properly: the others must not take its silence for death."""
        self.over.set()
        self.thread.join()
        self.notes.set(f"{self.rank}", "over")


def meet(store, rank: int, ranks: int) -> str:
    """-> a name of this start of the program, the same on all its ranks and different for every start.

    `torchrun --max-restarts` starts all ranks again when one has died, but keeps the same key-value store, which still
    holds addresses of dead ranks. Each start therefore puts a name, chosen by rank 0, before its keys. To get the name,
    each rank asks with a word that it has just invented, and rank 0 answers to this word, so no answer is left over
    from an earlier start. A question may be left over: rank 0 answers all questions until the living rank confirms."""
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"question of {rank}", word)
        name = store.get(f"answer to {word}").decode()       # waits until rank 0 has written it
        store.set(f"{rank} knows {name}", "")
        return name
    name = f"start {store.add('starts', 1)}"
    waiting = set(range(1, ranks))
    while waiting:
        for r in sorted(waiting):
            word = store.get(f"question of {r}").decode()    # asked by rank r of this start, or of an earlier one
            store.set(f"answer to {word}", name)
            try:
                store.wait([f"{r} knows {name}"], timedelta(seconds=1))
                waiting.remove(r)
            except dist.DistStoreError:                      # not yet: look whether a new question has come
                pass
    return name


def is_restart() -> bool:
    """Has this torchrun started the command before? Then it obeyed --fresh. Rank 0 alone asks, once: asking counts."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    store = next(dist.rendezvous("env://"))[0]  # torchrun's variable above counts for each node on its own
    return store.add("asked whether this is a restart", 1) > 1


# ------------------------------------------------------------------------------------------------ steps of a training

class Watch:
    """Answers two questions after each step, on all ranks alike: was it finite, and has one been asked to stop?

    Neither makes the host wait for the GPU. The first answer is a tensor on the device (see `step_unless`). Signals
    arrive at the hosts, which exchange them in a gloo group during the next step: that answer comes one step late."""
    patience = 10  # this many steps in a row that are not finite end a training, at the next report

    def __init__(self, world: World, skipped=0):
        """skipped: the number of steps that were not finite before this start, from the training state."""
        zero = lambda: torch.zeros((), device=world.device)
        self.loss_sum, self.finite = zero(), zero()         # sum and number of finite losses since the last report
        self.skipped = zero() + skipped                     # number of steps that were not finite
        self.in_row, self.longest = zero(), zero()          # in a row: at present, and the longest so far
        self.signal = torch.zeros((), dtype=torch.long)     # the number of the signal that this rank has received
        self.answer, self.work = self.signal.clone(), None  # the largest number of any rank, and its exchange
        self.hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        """After the last step: gives signals back to `run_script`, and raises one that came too late to be obeyed."""
        number = max(self.asked_to_stop(), self.asked_to_stop())  # the second call waits for what the first has sent
        for each, handler in self.handlers.items():
            signal.signal(each, handler)
        if number:
            raise Stopped(number, "stopped after the last step; the same command goes on")

    def note(self, number, frame):
        """Remembers a signal until the step is done. A second Ctrl-C ends a single process (torchrun sends two)."""
        if self.signal and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ and not self.hosts:
            raise KeyboardInterrupt
        self.signal.fill_(number)

    def bad(self, loss, norms) -> torch.Tensor:
        """Counts a step. -> 1.0, on the device, if the loss or a gradient norm of any rank is not finite, else 0.0."""
        norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]  # of sharded gradients
        self.norm = sum(norms)  # one norm per model; for the log
        bad = (~torch.isfinite(torch.stack([loss, *norms])).all()).float()
        if self.hosts:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.loss_sum += torch.where(bad > 0, 0.0, loss)
        self.finite += 1 - bad
        self.skipped += bad
        self.in_row = (self.in_row + bad) * bad
        self.longest = torch.maximum(self.longest, self.in_row)
        return bad

    def report(self):
        """-> mean loss of the finite steps since the last report, steps skipped in all, and now in a row.

        All ranks call it; the host waits. Raises a UserError after `patience` steps in a row that were not finite."""
        if self.longest >= self.patience:
            raise UserError(f"the loss or its gradient was not finite for {self.patience} steps in a row; go on with "
                            "a lower --lr (of --stage all: this stage alone, with --steps of plan.json), or --fresh.")
        mean = float(all_mean(self.loss_sum) / self.finite)  # 0 / 0 is nan
        self.loss_sum, self.finite = torch.zeros_like(self.loss_sum), torch.zeros_like(self.finite)
        return mean, int(self.skipped), int(self.in_row)

    def asked_to_stop(self) -> int:
        """The number of the signal that some rank had received one step ago, or 0. A single process answers at once."""
        if not self.hosts:
            return int(self.signal)
        if self.work is not None:
            self.work.wait()
        number = int(self.answer)
        self.answer = self.signal.clone()
        self.work = dist.all_reduce(self.answer, dist.ReduceOp.MAX, group=self.hosts, async_op=True)
        return number


def step_unless(bad: torch.Tensor, optimizer):
    """optimizer.step(), which leaves weights and moments as they are if `bad` is 1.

    `if bad:` would make the host wait for the GPU in every step. A fused AdamW reads its attribute `found_inf` on the
    device instead and skips the step where it is 1. PyTorch's GradScaler sets it in the same way."""
    if bad.device.type != "mps":
        optimizer.found_inf = bad
        optimizer.step()
    elif not bad:  # MPS has no fused AdamW, so the host waits there
        optimizer.step()
