"""How many steps fit into the minutes that a run may take: by the speed of those before."""

from collections import deque
from statistics import fmean, median

from optim import learning_rate

WARMING = 10  # steps that also make things ready, and tell nothing of the speed
FEWEST, MOST = 50, 500  # of the last steps that tell it
EVERY = 10  # steps from one reckoning to the next: half a millisecond, much beside a GPU's step
STALL = 2  # times the median: more a step does not count, for what happens once is not the speed
FALL = 0.1  # of the steps made, which are left to the fall of the rate if the time is over by then
EVALUATION = 2  # times as fast as learned, a token is evaluated, by measurement
ENDING = 5.0  # seconds for what comes behind the last evaluation: the sample, the compressors


class Pace:
    """Sets `s.steps`, which is what was asked for, to as many as fit into `s.minutes`.

    As late as can be, when most is known: before the first update whose learning rate depends on
    the number, which is when the rate begins to fall, or would have risen to another height. What
    was found, a checkpoint keeps as `found`: until then the speed, once it is known. A run that
    goes on has the number that it had, and else chooses when it would have. For other minutes, or
    of other steps, a number is chosen anew, if it is time at once: `seconds` are those of the run.
    """

    def __init__(self, s, step: int, found: dict | None, held_out: int, seconds: float = 0.0):
        self.s, self.asked, self.held_out = s, s.steps, held_out
        self.found = found or {}
        self.seconds_a_step = self.found.get("seconds_a_step", 0.0)
        known = [self.seconds_a_step] * FEWEST if found else []
        self.taken = deque(known, MOST)  # seconds of each of the last steps
        self.warm = step + WARMING
        self.open = bool(s.minutes)  # whether a number is to be chosen
        self.due = 0  # the step whose checkpoint keeps it
        asked = dict(minutes=s.minutes, asked=s.steps)
        if self.found | asked == self.found:
            self.open, s.steps = False, self.found["steps"]
        elif self.open and known and self.choose(step, 0.0, seconds):
            self.due = step + 1

    def choose(self, step: int, taken: float, seconds: float) -> bool:
        """Behind each step, the last `taken` of the run's `seconds`: whether the number is chosen,
        as the next update would depend on it, or as no time is left."""
        if step > self.warm:
            self.taken.append(taken)
        if len(self.taken) < FEWEST:
            return False
        if step % EVERY == 0 or not self.seconds_a_step:
            most = STALL * median(self.taken)
            self.seconds_a_step = fmean(min(taken, most) for taken in self.taken)
        s, seconds_a_step = self.s, self.seconds_a_step
        late = 0.0 if "steps" in self.found else FALL  # a number that was chosen let the rate fall
        self.found = dict(seconds_a_step=seconds_a_step)
        tokens = min(self.held_out, s.eval_tokens or self.held_out)
        evaluation = tokens / s.batch_tokens * seconds_a_step / EVALUATION
        left = 60 * s.minutes - seconds - evaluation - ENDING
        fitting = max(0, int(left / (seconds_a_step + evaluation / s.eval_every)))
        fall = int(step * min(late, s.decay * (1 - s.final_lr)))
        steps = min(self.asked, step + max(fitting, fall))
        # twice as many as asked: the rate that is due as long as it depends on no number
        if step + fall < steps and self.rate(step, steps) == self.rate(step, 2 * self.asked):
            return False
        self.open, self.due, s.steps = False, step, steps
        self.found |= dict(minutes=s.minutes, asked=self.asked, steps=steps)
        return True

    def rate(self, step: int, steps: int) -> float:
        s = self.s
        return learning_rate(step, steps, s.warmup, s.decay, s.final_lr, s.schedule)

    def __str__(self) -> str:
        speed = f"{1e3 * self.found['seconds_a_step']:.0f} ms a step"
        if self.s.steps == self.asked:
            return f"minutes={self.s.minutes:g}: all {self.asked} steps fit, at {speed}"
        some = f"{self.s.steps} of {self.asked} steps fit, at {speed}"
        return f"minutes={self.s.minutes:g}: {some}; 0 takes all"
