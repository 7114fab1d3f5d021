"""The folder of a training run, as seen by the one process that writes there.

out/<run>/  lock  config.json  metrics.jsonl  metrics.sha256  step-00000400/  step-00000800/
"""

import json
import os
import shutil
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from torch import nn

from engine import checkpoint
from engine.files import require_space, write_durably
from engine.machine import Machine
from engine.metrics import MetricsLog, start_trackers
from tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

# What may differ when a run is resumed; anything else would make it another run.
FREE = {"config", "data", "out", "init_from", "steps", "log_every", "eval_every", "save_every"}
FREE |= {"sample_tokens", "sample_prompt", "tensorboard", "wandb", "device", "fresh"}
FREE |= {"patience", "eval_only", "split", "show_batch"}


class Run:
    """Settings `s` at work in the folder `s.out`, since `start` (of time.monotonic).

    `step` updates are done in its newest sound checkpoint, of which `files` files were verified.
    Raises ValueError if another process works in the folder.
    """

    def __init__(self, s, start: float, here: Machine):
        self.s, self.start, self.folder = s, start, Path(s.out)
        self.step, self.files, self.lock = 0, 0, None
        self.circumstances = dict(  # what equal bits depend on, beside settings and data
            processes=here.world,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            device=here.device.type,
            dtype=str(here.dtype),
            compile=here.compile,
        )
        # what torchrun restarts must not begin anew once more
        self.fresh = s.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if not self.folder.exists():
            return  # made in `begin`, when no mistake has been found
        self.lock = lock(self.folder)
        if self.fresh:
            return  # moved aside in `begin`, likewise
        for pattern in ("step-*.partial", "step-*.old"):  # an interrupted save or deletion
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        (self.folder / "config.json.partial").unlink(missing_ok=True)
        self.step, self.files = checkpoint.newest(self.folder)

    def begin(self, state: dict, digest: str, model: nn.Module) -> None:
        """Opens the log where `state` ends; `digest` is that of the data.

        Raises ValueError if the checkpoint belongs to other settings or other data, OSError if the
        disk has no room for the next one.
        """
        self.digest, self.seconds_before = digest, state["seconds"]
        if self.step:
            self.check(state)
        need = 3 * sum(p.nbytes for p in model.parameters())  # weights, at most two moments of each
        free = require_space(self.folder, need)
        if self.fresh and self.lock:
            move_aside(self.folder)
            self.lock = None
        self.lock = self.lock or lock(self.folder)
        self.log = MetricsLog(self.folder, self.step, state["metrics"])
        path = self.folder / "config.json"
        settings = (json.dumps(asdict(self.s), indent=2) + "\n").encode()
        if self.step:
            before = (json.dumps(state["settings"], indent=2) + "\n").encode()
            if not path.exists() or path.read_bytes() not in (settings, before):
                print(f"{path} is not that of the checkpoint: written anew")
        write_durably(path, settings)
        print(f"a checkpoint takes up to {need / 1e6:,.1f} MB; {free / 1e6:,.0f} MB are free")
        self.trackers = start_trackers(self.s, self.folder)

    def check(self, state: dict) -> None:
        """Says where the run goes on. Raises ValueError if that would make it another run."""
        path = self.folder / checkpoint.name(self.step)
        before, now = state["settings"], asdict(self.s)
        differ = [k for k in now if k not in FREE and before.get(k) != now[k]]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in differ)
            raise ValueError(
                f"{path} belongs to a run with other settings ({changes}): choose another --out, or"
                " begin anew with --fresh"
            )
        if state["data_digest"] != self.digest:
            raise ValueError(
                f"the data in {self.s.data} (digest {self.digest[:8]}) is not what {path} was"
                f" trained on ({state['data_digest'][:8]}): bring it back, or begin anew with"
                " --fresh"
            )
        verified = f"{self.files} files verified, data digest {self.digest[:8]}"
        print(f"resumed from step {self.step} of {self.folder} ({verified})")
        if before["steps"] != now["steps"]:
            print(f"steps was {before['steps']}, is {now['steps']}: the learning rate follows")
        for name, value in self.circumstances.items():
            was = state["machine"].get(name)
            if was != value:
                print(f"{name} was {was}, is {value}: the same data, but not the same bits")

    def elapsed(self) -> float:
        """Seconds of wall-clock time, added up over interruptions."""
        return self.seconds_before + time.monotonic() - self.start

    def record(self, **row) -> None:
        """Writes a row of metrics."""
        row["seconds"] = round(self.elapsed(), 3)
        self.log.write(row)
        for track in self.trackers:
            track(row)

    def save(
        self, step: int, model: nn.Module, optimizers: list, scale: list, tokenizer: Tokenizer
    ) -> None:
        """Writes the checkpoint after `step` updates."""
        state = dict(step=step, settings=asdict(self.s), model=asdict(model.config))
        state |= dict(data_digest=self.digest, metrics=self.log.mark(), loss_scale=scale)
        state |= dict(seconds=self.elapsed(), machine=self.circumstances)
        tensors = checkpoint.optimizer_tensors(model, optimizers)
        checkpoint.save(self.folder, step, model.state_dict(), tensors, state, tokenizer)

    def close(self) -> None:
        for track in self.trackers:
            track(None)


def lock(folder: Path):
    """Makes `folder` this process's own until the returned handle is closed. Raises ValueError."""
    parts = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if parts and "lock" not in parts:
        raise ValueError(f"{folder} holds something else than a run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / "lock", "w")
    if fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"another process works in {folder}: choose another --out") from e
    return handle


def move_aside(folder: Path) -> None:
    """Renames the folder of a run that has something in it to the next free <name>.1, .2, ..."""
    if not any(path.name != "lock" for path in folder.iterdir()):
        return
    aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(aside)
    print(f"the old run is now {aside}")
