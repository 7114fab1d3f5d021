"""The folder of a training run. All processes hold a `Run`; only the first one touches the files.

out/<run>/  lock  config.json  metrics.jsonl  metrics.sha256  step-00000400/  step-00000800/
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from torch import nn

from engine import checkpoint, fast, settings
from engine.files import WINDOWS, lock_file, require_space, write_durably
from engine.machine import Machine
from engine.metrics import MetricsLog, best_row, since_best, start_trackers
from engine.stop import Stop

# What may differ when a run is resumed; anything else would make it another run. First where things
# are and what is shown, then where and how it is computed: the data and the mathematics stay.
FREE = {"config", "data", "tokenizer", "out", "init_from", "fresh", "steps", "patience"}
FREE |= {"eval_tokens", "log_every", "eval_every", "save_every"}
FREE |= {"sample_tokens", "sample_prompt"}
FREE |= {"tensorboard", "wandb", "eval_only", "split", "show_batch"}
FREE |= {"device", "dtype", "compile", "threads", "fast", "deterministic", "device_batch"}
NEW = dict(metrics=None, seconds=0.0, loss_scale=None, machine=None)  # the state of a run at step 0
ALOUD = {"steps": "the learning rate follows", "eval_tokens": "losses compare less exactly"}


class Run:
    """Settings `s` at work in the folder `s.out`, since `start` (of time.monotonic).

    `step` updates are done in its newest sound checkpoint, the folder `path`. Raises ValueError if
    another process works there.
    """

    def __init__(self, s, here: Machine, stop: Stop, start: float):
        self.s, self.here, self.stop, self.start = s, here, stop, start
        self.folder, self.lock, self.files = Path(s.out), None, 0
        # what torchrun restarts must not begin anew once more
        self.fresh = s.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.step = int(here.from_first(here.first_does(self.open) or 0))
        self.path = self.folder / checkpoint.name(self.step)
        self.shown = self.saved = self.step
        self.busy = 0.0

    def open(self) -> int:
        """Locks the folder and clears what was interrupted there; returns the newest step."""
        if not self.folder.exists():
            return 0  # made in `begin`, when no mistake has been found
        self.lock = lock(self.folder)
        if self.fresh:
            return 0  # moved aside in `begin`, likewise
        for pattern in ("step-*.partial", "step-*.old"):  # an interrupted save or deletion
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        (self.folder / "config.json.partial").unlink(missing_ok=True)
        step, self.files = checkpoint.newest(self.folder)
        return step

    def begin(self, state: dict, digest: str | None, model: nn.Module) -> None:
        """Opens the log where `state` ends; `digest` is that of the data.

        Raises ValueError if the checkpoint belongs to other settings or other data, OSError if the
        disk has no room for the next one.
        """
        self.digest, self.seconds_before = digest, state["seconds"]
        self.circumstances = dict(  # what equal bits depend on, beside settings and data
            processes=self.here.world,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            device=self.here.device.type,
            dtype=str(self.here.dtype),
            compile=self.here.compile,
            fast=fast.installed(model),
            deterministic=self.s.deterministic,
            device_batch=self.s.device_batch,
        )
        self.here.first_does(lambda: self.open_log(state, model))
        count, number = sum(p.numel() for p in model.parameters()), torch.get_num_threads()
        threads = f"{number} thread{'s' if number > 1 else ''}"
        batch = f"{self.s.batch_tokens:,} tokens a step"
        self.here.say(f"model: {count:,} parameters, {batch}, {threads}")
        if self.s.fresh:  # would begin anew once more
            self.stop.advice = "the same command without --fresh continues"

    def open_log(self, state: dict, model: nn.Module) -> None:
        now = settings.flat(self.s)
        before = settings.known(type(self.s), state["settings"]) if self.step else now
        if self.step:
            self.check(state, before, now)
        need = 3 * sum(p.nbytes for p in model.parameters())  # weights, at most two moments of each
        free = require_space(self.folder, need)
        if self.fresh and self.lock:
            if WINDOWS:  # where nothing in a folder may be open when it is renamed
                self.lock.close()
            move_aside(self.folder)
            self.lock = None
        self.lock = self.lock or lock(self.folder)
        self.log = MetricsLog(self.folder, self.step, state["metrics"])
        path = self.folder / "config.json"
        sound = (as_file(state["settings"]), as_file(now)) if self.step else ()
        if self.step and (not path.exists() or path.read_bytes() not in sound):
            print(f"{path} is not that of the checkpoint: written anew")
        write_durably(path, as_file(now))
        print(f"a checkpoint takes up to {need / 1e6:,.1f} MB; {free / 1e6:,.0f} MB are free")
        self.trackers = start_trackers(self.s, self.folder, self.step)

    def check(self, state: dict, before: dict, now: dict) -> None:
        """Says where the run goes on. Raises ValueError if that would make it another run."""
        differ = [k for k in now if k not in FREE and before[k] != now[k]]
        if differ:
            changes = ", ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in differ)
            raise ValueError(
                f"{self.path} belongs to a run with other settings ({changes}): choose another"
                " --out, or begin anew with --fresh"
            )
        if state["data_digest"] != self.digest:
            raise ValueError(
                f"the data in {self.s.data} (digest {self.digest[:8]}) is not what {self.path} was"
                f" trained on ({state['data_digest'][:8]}): bring it back, or begin anew with"
                " --fresh"
            )
        verified = f"{self.files} files verified, data digest {self.digest[:8]}"
        print(f"resumed from step {self.step} of {self.folder} ({verified})")
        if self.s.init_from:
            print(f"init_from={self.s.init_from!r} is not read again: the run has its own weights")
        for name, meaning in ALOUD.items():
            if before[name] != now[name]:
                print(f"{name} was {before[name]}, is {now[name]}: {meaning}")
        for name, value in self.circumstances.items():
            was = state["machine"].get(name, value)
            if was != value:
                print(f"{name} was {was}, is {value}: the same data, but not the same bits")

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.s.steps

    def logs(self, step: int) -> bool:
        return self.due(step, self.s.log_every)

    def evaluates(self, step: int) -> bool:
        return self.due(step, self.s.eval_every)

    def saves(self, step: int) -> bool:
        """What is evaluated is saved before: an evaluation that fails costs nothing else."""
        return self.due(step, self.s.save_every) or self.evaluates(step)

    def evaluation_missing(self) -> bool:
        """Whether the newest checkpoint was to be evaluated, and no row tells how good it is."""
        missing = self.here.rank == 0 and self.step and not self.log.evaluated
        missing = self.evaluates(self.step) and self.here.from_first(bool(missing)) > 0
        if missing:
            self.here.say(f"the evaluation of step {self.step} is made again")
        return missing

    @contextmanager
    def timed(self):
        """The time spent within is that of the updates: speed does not count evaluations."""
        began = time.monotonic()
        yield
        self.busy += time.monotonic() - began

    def report(self, step: int, loss: float, lr: float, norm: float) -> None:
        """Records the update that made `step`, and says how fast things go."""
        known = norm if math.isfinite(norm) else None  # JSON has no infinity
        tokens = step * self.s.batch_tokens
        speed = (step - self.shown) * self.s.batch_tokens / max(self.busy, 1e-9)
        self.shown, self.busy = step, 0.0
        row = dict(step=step, loss=loss, lr=lr, grad_norm=known, tokens=tokens)
        self.record(**row, tokens_per_second=round(speed, 1))
        left = int((self.s.steps - step) * self.s.batch_tokens / speed)
        self.here.say(
            f"step {step} of {self.s.steps}  loss {loss:.4f}  lr {lr:.2e}"
            f"  gradient {norm:.3f}  {speed:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )

    def record(self, **row) -> None:
        """Writes a row of metrics; `seconds` are wall-clock time, added up over interruptions."""
        if self.here.rank == 0:
            row = row | dict(seconds=round(self.elapsed(), 3))
            self.log.write(row)
            for track in self.trackers:
                track(row)

    def evaluated(self, step: int, loss: float, bpb: float | None) -> None:
        """Says and records how good the weights after `step` updates are."""
        bits = f", {bpb:.4f} bits per byte" if bpb else ""
        self.here.say(f"step {step}: validation loss {loss:.4f}{bits}")
        if not math.isfinite(loss):
            loss = bpb = None  # JSON has no such number, and it is never the best
        self.record(step=step, val_loss=loss, val_bpb=bpb, tokens=step * self.s.batch_tokens)
        if self.here.rank == 0:
            self.log.mark()

    def tell_best(self, compressors) -> None:
        """Prints the best evaluation, beside what `compressors()` has to say of the same text."""
        best = best_row(self.folder)
        if best:
            loss = f"{best['val_loss']:.4f} nats a token"
            print(f"\nbest validation loss: {loss}, at step {best['step']}")
        if best and best["val_bpb"]:
            others = compressors()
            others = f" ({others})" if others else ""
            print(f"bits per byte of that text: {best['val_bpb']:.3f}{others}")

    def elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def save(self, step: int, model: nn.Module, optimizers: list, scale: list, tokenizer) -> None:
        """Writes the checkpoint after `step` updates, whole or not at all."""

        def write():
            state = dict(step=step, settings=settings.flat(self.s), model=asdict(model.config))
            state |= dict(data_digest=self.digest, metrics=self.log.mark(), loss_scale=scale)
            state |= dict(seconds=self.elapsed(), machine=self.circumstances)
            tensors = checkpoint.optimizer_tensors(model, optimizers)
            checkpoint.save(self.folder, step, model.state_dict(), tensors, state, tokenizer)

        self.here.first_does(write)
        self.saved = step

    def prune(self) -> None:
        """Deletes all checkpoints but the newest two and the best."""
        if self.here.rank == 0:
            checkpoint.prune(self.folder)

    def out_of_patience(self) -> bool:
        waited = since_best(self.folder) if self.here.rank == 0 else 0
        out = 0 < self.s.patience <= self.here.from_first(waited)
        if out:
            self.here.say(f"stopped early: no better evaluation in the last {self.s.patience}")
        return out

    def finished(self) -> bool:
        """Whether there is nothing to do, which it says."""
        done = self.step >= self.s.steps or self.out_of_patience()
        if done:
            self.here.say(f"nothing to do: {self.s.out} has reached step {self.step}")
        return done

    def stopped(self, step: int) -> int:
        self.close()
        self.here.say(f"stopped by a signal after step {step}, which is saved; {self.stop.advice}")
        return 0

    def not_finite(self, step: int, what: Exception) -> int:
        """Tells what can be read of an update that was not made; returns the exit status."""
        self.close()
        rows = self.s.batch_tokens // self.s.model.block_size
        self.here.say(
            f"stopped at step {step}: {what}, so no update was made. Its batch is windows"
            f" {(step - 1) * rows} to {step * rows - 1} (--show_batch={step} prints it); the last"
            f" saved step is {self.saved or 'none'}"
        )
        return 3

    def close(self) -> None:
        for track in self.trackers if self.here.rank == 0 else ():
            track(None)


def as_file(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def lock(folder: Path):
    """Makes `folder` this process's own until the returned handle is closed. Raises ValueError."""
    parts = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if parts and "lock" not in parts:
        raise ValueError(f"{folder} holds something else than a run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock_file(folder / "lock", wait=False)
    except BlockingIOError as e:
        raise ValueError(f"another process works in {folder}: choose another --out") from e


def move_aside(folder: Path) -> None:
    """Renames the folder of a run that has something in it to the next free <name>.1, .2, ..."""
    if not any(path.name != "lock" for path in folder.iterdir()):
        return
    aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(aside)
    print(f"the old run is now {aside}")
