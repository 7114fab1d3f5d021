"""How many steps fit into the minutes that a run may take: by the speed of its first ones."""

MEASURED = 50  # steps that the speed is taken from
WARMING = 10  # steps before those, which also make things ready
EVALUATION = 3  # times as fast as learned, a token is evaluated: the backward pass costs two more
ENDING = 5.0  # seconds for what comes behind the last evaluation: the sample, the compressors


class Pace:
    """Sets `s.steps`, which is what was asked for, to as many as fit into `s.minutes`.

    `found` is what was found, and a checkpoint keeps: {} until then. A run that goes on has the
    number that it had; for other `minutes`, or other steps, one that follows from the same speed.
    """

    def __init__(self, s, step: int, found: dict | None, seconds: float, held_out: int):
        self.s, self.asked, self.held_out = s, s.steps, held_out
        self.found = found or {}
        self.due = 0  # the step behind which the number is chosen, if it is still to be
        self.since = None  # the time from which on steps are measured
        if not s.minutes:
            self.found = {}
        elif not self.found:
            self.first, self.due = step + WARMING, step + WARMING + MEASURED
        elif (self.found["minutes"], self.found["asked"]) == (s.minutes, s.steps):
            s.steps = self.found["steps"]
        else:
            self.choose(step, seconds, self.found["seconds_a_step"])

    def measure(self, step: int, now: float) -> float | None:
        """Behind each step; `now` is a clock. Seconds a step, when it is time to choose."""
        if self.due and step == self.first:
            self.since = now
        return (now - self.since) / MEASURED if self.due and step == self.due else None

    def choose(self, step: int, seconds: float, seconds_a_step: float) -> None:
        """As many steps as fit, behind `step`, which was reached after `seconds`."""
        s = self.s
        tokens = min(self.held_out, s.eval_tokens or self.held_out)
        evaluation = tokens / s.batch_tokens * seconds_a_step / EVALUATION
        left = 60 * s.minutes - seconds - evaluation - ENDING
        fitting = step + int(left / (seconds_a_step + evaluation / s.eval_every))
        s.steps = min(self.asked, max(step + MEASURED, fitting))
        self.found = dict(minutes=s.minutes, asked=self.asked, steps=s.steps)
        self.found |= dict(seconds_a_step=seconds_a_step)

    def __str__(self) -> str:
        speed = f"{1e3 * self.found['seconds_a_step']:.0f} ms a step"
        if self.s.steps == self.asked:
            return f"minutes={self.s.minutes:g}: all {self.asked} steps fit, at {speed}"
        some = f"{self.s.steps} of {self.asked} steps fit, at {speed}"
        return f"minutes={self.s.minutes:g}: {some}; 0 takes all"
