"""The folder of a training run. All processes hold a `Run`; only the first one touches the files.

out/<run>/  lock  config.json  metrics.jsonl  metrics.sha256  step-00000400/  step-00000800/
            base.safetensors: the frozen weights of a run of lora.py
            objective.safetensors: what an objective has computed once, before the first step
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import lora
import objectives
from engine import checkpoint, fast, resume, settings
from engine.files import write_durably
from engine.learner import Learner, told
from engine.machine import Machine
from engine.metrics import since_best
from engine.pace import Pace
from engine.stop import Stop
from model import GPT

# the state of a run at step 0
NEW = dict(metrics=None, seconds=0.0, loss_scale=None, machine=None, pace=None)


class Run:
    """Settings `s` at work in the folder `s.out`, since `start` (of time.monotonic).

    `step` updates are done in its newest sound checkpoint, the folder `path`. After `begin`,

        with run:
            for step in run.steps():
                ...                 # an update
                run.count(step)     # the time it took; `stopping`, if a signal has come
                run.log(step, ...)  # this, and run.save and run.evaluate, where they are due

    takes the steps that are left, and ends them early for a request to stop, for want of patience,
    or by FloatingPointError, which leaves the `with` quietly. `status` is then that of the process,
    and `completed` tells whether the last step was reached. Raises ValueError if another process
    works in the folder.
    """

    def __init__(self, s, here: Machine, stop: Stop, start: float):
        self.s, self.here, self.stop, self.start = s, here, stop, start
        here.say(f"machine: {here.why}")
        # until the first step one process may end at once; several stop together, after a step
        stop.at_once = here.world == 1 or here.compile
        self.folder, self.lock, self.files = Path(s.out), None, 0
        # what torchrun restarts must not begin anew once more
        self.fresh = s.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.step = int(here.from_first(here.first_does(partial(resume.open_folder, self)) or 0))
        self.path = self.folder / checkpoint.name(self.step)
        self.state = NEW
        self.shown = self.saved = self.step
        self.busy = 0.0
        self.stopping = self.completed = False
        self.status = 0

    def load_model(self) -> GPT:
        """The model of the checkpoint that the run goes on from."""
        model, _, self.state = checkpoint.load_weights(self.path, merge=False, sound=True)
        learned, now = objectives.name_of(self.state), self.s.objective
        # before its heads are looked for
        resume.require_same(self.path, dict(objective=learned), dict(objective=now))
        return model

    def begin(self, data, learner: Learner, optimizers: list, scale, validate: Callable) -> None:
        """Takes up the state of the optimizers, and opens the log where the run stands.

        `validate()` is what evaluation finds on text that is not learned from, by name, or None if
        it was stopped. Makes up an evaluation that an interruption has left undone.
        Raises ValueError if data are damaged, or the checkpoint belongs to other settings or other
        data, OSError if the disk has no room for the next one.
        """
        here, s = self.here, self.s
        self.digest = resume.same_data(data, here)
        self.learner, self.optimizers, self.scale = learner, optimizers, scale
        model = learner.gpt
        self.validate, self.tokenizer = validate, data.tokenizer
        learned, held_out = (f"{data.split(name).tokens:,} tokens" for name in ("train", "val"))
        known = f"vocabulary {data.tokenizer.vocab_size:,}"
        found, seconds = self.state.get("pace"), here.from_first(self.elapsed())
        self.pace = Pace(s, self.step, found, data.split("val").tokens, seconds)
        here.say(f"data: {s.data}, {learned} to train on, {held_out} to validate, {known}")
        if packed := data.split("train").describe(s.model.block_size, s.seed):
            here.say(packed)
        number = torch.get_num_threads()
        # what equal bits depend on, beside settings and data
        on = dict(processes=here.world, threads=number, torch=torch.__version__)
        on |= dict(device=here.device.type, dtype=str(here.dtype), compile=here.compile)
        on |= dict(fast=fast.installed(model), deterministic=s.deterministic)
        self.circumstances = on | dict(shard=s.shard, device_batch=s.device_batch)
        if s.shard:
            from engine import sharding

            sharding.share_work(optimizers)
            here.say(sharding.describe(learner))
        if self.step:
            checkpoint.load_optimizers(self.path, learner.by_name(), optimizers)
        here.first_does(partial(resume.take_up, self))  # the first that changes anything
        if self.pace.due:  # at once
            here.say(str(self.pace))
        threads = f"{number} thread{'s' if number > 1 else ''}"
        count = f"{sum(p.numel() for p in learner.parameters()):,} parameters"
        here.say(f"model: {count}, {s.batch_tokens:,} tokens a step, {threads}")
        if lora.facts(model):
            here.say(lora.describe(model))
        if s.fresh:  # would begin anew once more
            self.stop.advice = "the same command without --fresh continues"
        self.keep(data)
        missing = here.rank == 0 and self.step and not self.log_file.evaluated
        if self.evaluates(self.step) and here.any(missing):
            here.say(f"the evaluation of step {self.step} is made again")
            self.evaluate(self.step)
        self.prune()

    def keep(self, data) -> None:
        """What the objective computes once for a whole run: now, or as it was at the first step."""
        if self.step:
            self.digest_of_kept = self.state.get("kept")
            self.learner.objective.kept(checkpoint.load_kept(self.path, self.state))
            return
        tensors = self.learner.objective.begin(self.learner, data, self.here)
        kept = self.here.first_does(lambda: checkpoint.save_kept(self.folder, tensors))
        self.digest_of_kept = kept
        self.learner.objective.kept(tensors)

    # --- the steps

    def due(self, step: int, every: int) -> bool:
        """Every so many steps, and after the last."""
        return step % every == 0 or step == self.s.steps

    def evaluates(self, step: int) -> bool:
        return self.due(step, self.s.eval_every)

    def urgent(self, step: int) -> bool:
        """Whether a checkpoint is due whatever the settings say: a signal asks to stop, or the
        number of steps was chosen."""
        return self.stopping or step == self.pace.due

    def steps(self) -> Iterator[int]:
        """Yields the number of each update that is left: what it is called when it is made."""
        step = self.step
        while step < self.s.steps:  # which `fit` may change
            step += 1
            self.current = step
            self.began = time.monotonic()
            yield step
            if self.stopping:
                return self.tell_stopped(step)
            if self.evaluates(step) and self.out_of_patience():
                break
        self.completed = True

    def __enter__(self):
        self.stop.at_once = False  # from here on a request to stop waits for the end of a step
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        not_finite = isinstance(error, FloatingPointError)
        if not_finite:  # what can be read of an update that was not made
            step, rows = self.current, self.s.batch_tokens // self.s.model.block_size
            self.here.say(
                f"stopped at step {step}: {error}, so this update was not made. Its batch is"
                f" windows {(step - 1) * rows} to {step * rows - 1} (--show_batch={step} prints"
                f" it); the last saved step is {self.saved or 'none'}"
            )
            self.status = 3
        if not error or not_finite:
            self.close()
        return not_finite

    def close(self) -> None:
        if self.here.rank == 0:
            self.log_file.close()

    def count(self, step: int) -> None:
        """Takes the time of the update that made `step`, and asks whether it is to be the last."""
        taken = time.monotonic() - self.began  # of updates alone
        self.busy += taken
        self.fit(step, taken)
        self.stopping = self.here.any(self.stop.asked)

    def log(self, step: int, *, loss: float, lr: float, grad_norm: float, **more: float) -> None:
        """Records numbers of the update that made `step`, and says how fast things go. `more` are
        of the first process, under names that the row does not have yet."""
        tokens = step * self.s.batch_tokens
        speed = (step - self.shown) * self.s.batch_tokens / max(self.busy, 1e-9)
        self.shown, self.busy = step, 0.0
        more |= self.means_told()
        row = finite(dict(loss=loss, lr=lr, grad_norm=grad_norm)) | dict(tokens=tokens)
        self.record(step=step, **row, **finite(more), tokens_per_second=round(speed, 1))
        also = "".join(f"  {name} {value:.4f}" for name, value in more.items())
        left = int((self.s.steps - step) * self.s.batch_tokens / speed)
        if self.pace.open:  # fewer steps, if they take longer
            left = min(left, max(0, int(60 * self.s.minutes - self.elapsed())))
        self.here.say(
            f"step {step} of {self.s.steps}  loss {loss:.4f}{also}  lr {lr:.2e}"
            f"  gradient {grad_norm:.3f}  {speed:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )

    def fit(self, step: int, taken: float) -> None:
        """Chooses the number of steps by `s.minutes`, when it is time. It is kept by the checkpoint
        that is saved then, before any update depends on it."""
        if not self.pace.open:
            return
        first = self.here.rank == 0  # whose clock is that of all
        if not self.pace.choose(step, *self.here.sum([first * taken, first * self.elapsed()])):
            return
        self.here.say(str(self.pace))
        now = resume.as_file(settings.flat(self.s))
        self.here.first_does(partial(write_durably, self.folder / "config.json", now))

    def means_told(self) -> dict[str, float]:
        """What the objective has to tell of the last step besides its loss, of all processes."""
        told = self.learner.objective.told
        found = self.here.sum([float(x) for pair in told.values() for x in pair])
        pairs = zip(found[::2], found[1::2], strict=True)
        return {name: a / max(n, 1) for name, (a, n) in zip(told, pairs, strict=True)}

    def record(self, **row) -> None:
        """Writes a row of metrics; `seconds` are wall-clock time, added up over interruptions."""
        if self.here.rank == 0:
            self.log_file.write(row | dict(seconds=round(self.elapsed(), 3)))

    def evaluate(self, step: int) -> None:
        """Says and records how good the weights after `step` updates are. They are saved before:
        the best must be a checkpoint, and an evaluation that fails costs nothing else.

        Without text that is not learned from, nobody could tell learning from learning by heart.
        """
        if self.saved != step:
            self.save(step)
        with self.stop.honoured(at_once=self.here.world == 1):
            result = self.validate()
        if result is None:
            self.stopping = True
            return
        self.here.say(f"step {step}: validation {told(result, self.learner.objective.unit)}")
        self.record(step=step, **finite(result), tokens=step * self.s.batch_tokens)
        if self.here.rank == 0:
            self.log_file.mark()
        self.prune()

    def elapsed(self) -> float:
        return self.state["seconds"] + time.monotonic() - self.start

    def save(self, step: int) -> None:
        """Writes the checkpoint after `step` updates, whole or not at all."""

        def describe() -> dict:
            learner, settings_now = self.learner, settings.flat(self.s)
            state = dict(step=step, settings=settings_now, model=asdict(learner.gpt.config))
            state |= dict(objective=dict(name=self.s.objective, **learner.objective.facts()))
            state |= dict(kept=self.digest_of_kept, pace=self.pace.found)
            state |= dict(data_digest=self.digest, metrics=self.log_file.mark())
            state |= dict(loss_scale=self.scale.state(), seconds=self.elapsed())
            return state | dict(machine=self.circumstances)

        def write():
            checkpoint.save(self.folder, step, self.learner, self.optimizers, state, self.tokenizer)

        state = self.here.first_does(describe)  # may fail, before anything is handed over
        hand_over = partial(checkpoint.hand_over, self.learner, self.optimizers)
        self.here.first_does(write, meanwhile=hand_over)
        self.saved = step
        if not self.evaluates(step):
            self.prune()

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
        done = self.stopping or self.step >= self.s.steps or self.out_of_patience()
        if self.stopping:  # while the missing evaluation was made
            self.tell_stopped(self.step)
        elif done:
            done = f"{self.s.out} has reached step {self.step}"
            self.here.say(f"nothing to do: {done}; --fresh begins anew")
        if done:
            self.close()
        return done

    def tell_stopped(self, step: int) -> None:
        saved = f"stopped by a signal after step {step}, which is saved"
        self.here.say(f"{saved}; {self.stop.advice}")


def finite(numbers: dict) -> dict:
    """As JSON has them. It has no infinity, and what is not finite is never the best: None."""
    known = {name: None if value is None else float(value) for name, value in numbers.items()}
    return {name: x if x is not None and math.isfinite(x) else None for name, x in known.items()}
