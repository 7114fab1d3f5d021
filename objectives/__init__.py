"""What a network is asked to learn: one file each, on the same trunk, in the same loop.

An objective turns a batch of tokens into exercises, and says how far the network is from right:

    inputs, counts = objective.prepare(batch, learner)  # what is shown, what is asked
    sums = learner(*inputs)                             # of each term, over all that is asked
    loss = objective.total(sums, counts)                # weight * sum / count, of all terms

A file of this folder has a class `Objective` that changes what it must of the one below, and a
dataclass `Settings` of what can be set besides. Put one more here, and `--objective` knows it: the
name is the file's, and tests/test_objectives.py takes it up. What all promise is in
tests/promises.py: copy tests/test_distil.py, which calls them, and write your own formula into it.
What only one of them can do is its own command: `python -m objectives.masked`.
"""

import difflib
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import lru_cache
from pathlib import Path

from engine.packing import IGNORE


class Base:
    """An objective, as far as the loop, checkpoints and evaluation need to know it.

    `s` are the settings of training, `s.own` those of the objective.
    """

    # the weight of each sum. All are told, as val_<name>, and one of weight 0 is told, not learned
    # from; val_bpb is made of the first alone
    terms: dict[str, float] = {"loss": 1.0}
    masks: tuple[str, ...] = ("causal", "prefix")  # policies it can learn under; the first is usual
    kinds: tuple[str, ...] = ("text", "rows")  # kinds of data it can learn from
    lines = False  # whether each line of a batch is one document (padded), instead of full windows
    generates = True  # whether the trunk can then write: if not, sample.py refuses it
    unit = "nats a token"  # of the loss
    bits = False  # whether the loss is that of text, token by token, and can be told in bits a byte
    mixes = False  # whether it can learn from text and rows at once
    compiles = False  # whether torch.compile can make kernels for `loss`
    shards = True  # whether all that it does with the trunk is in `loss`, and by whole blocks
    instead = ""  # what to run instead of sample.py

    def __init__(self, s, tokenizer):
        self.s, self.own, self.tokenizer = s, s.own, tokenizer
        # name: (sum, count) of this process in the last step, for its row of metrics.jsonl
        self.told: dict[str, tuple[float, int]] = {}

    def require(self, data) -> None:
        """Raises ValueError for a Dataset that there is nothing to learn from."""
        if data.kind not in self.kinds:
            raise ValueError(
                f"objective={self.s.objective!r} learns from {' or '.join(self.kinds)}, and"
                f" {data.folder} holds {data.kind}"
            )
        if len({folder.kind for folder in data.folders}) > 1 and not self.mixes:
            raise ValueError(
                f"objective={self.s.objective!r} learns from text or from rows, and {data.folder}"
                " are both: leave one out"
            )

    @staticmethod
    def check(s) -> None:
        """Raises ValueError for settings that do not go together, before anything is loaded."""

    def heads(self, gpt) -> dict:
        """Modules that learn beside the trunk `gpt`, by name; they are saved in heads.safetensors.
        Draws their weights as a function of `s.seed`."""
        return {}

    def begin(self, learner, data, here) -> dict:
        """Called once, before the first step of a run, with the weights it begins with; returns
        tensors that the run keeps as they are, such as log-probabilities under these weights: in
        objective.safetensors. `kept` hands them over, then and whenever the run goes on."""
        return {}

    def kept(self, tensors: dict) -> None:
        """Takes what `begin` returned."""

    def facts(self) -> dict:
        """What must not change while a run is interrupted, such as the digest of a teacher."""
        return {}

    def prepare(self, batch, learner) -> tuple[tuple, list]:
        """(inputs, counts): arrays with a row for each of the batch, or None, for `loss`; and of
        how many things each term is a sum.

        All that is random is drawn here, that of row i from batch.keys[i] alone: then it does not
        depend on how rows are shared out to processes and passes. Here each term is one of all
        targets.
        """
        inputs = (batch.tokens, batch.targets, batch.positions, batch.mask)
        return inputs, [int((batch.targets != IGNORE).sum())] * len(self.terms)

    def exercises(self, batch, learner) -> Iterator[tuple[tuple, list]]:
        """What one step learns from, an update each: where the model's own answers are the data,
        several updates learn from one set of them."""
        yield self.prepare(batch, learner)

    def shown(self, inputs: tuple, i: int) -> str:
        """Row i of an exercise in words, for `--show_batch`."""
        return self.tokenizer.decode(inputs[0][i].tolist())

    def loss(self, gpt, heads, *inputs) -> list:
        """The sum of each term over these rows, float32 scalars. `inputs` are tensors."""
        raise NotImplementedError

    def total(self, sums: list, counts: list):
        """The loss that is learned from: the mean of each term, times its weight. What nothing was
        asked of adds nothing."""
        weighted = zip(self.terms.values(), sums, counts, strict=True)
        return sum(weight * s / max(n, 1) for weight, s, n in weighted if weight)


def names() -> list[str]:
    """The objectives there are: the files of this folder, and nothing that a checkpoint says."""
    return sorted(path.stem for folder in __path__ for path in Path(folder).glob("[a-z]*.py"))


def find(name: str):
    """The module of an objective. Raises ValueError."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"objective={name!r} is unknown: {hint}")
    return importlib.import_module(f"objectives.{name}")


def owner(setting: str) -> str:
    """Whose setting this is, as in "objective=masked"; nothing if it is nobody's. It
    reads the files, since to load them takes seconds."""
    line = re.compile(rf"^    {re.escape(setting)}: .*  # ", re.MULTILINE)
    files = sorted(path for folder in __path__ for path in Path(folder).glob("[a-z]*.py"))
    found = [path.stem for path in files if line.search(path.read_text(encoding="utf-8"))]
    return f"objective={' or '.join(found)}" if found else ""


def name_of(state: dict) -> str:
    """The objective of a checkpoint; those that are older than objectives have the first."""
    return state["settings"].get("objective", "next_token")


def require_writer(state: dict, run: str) -> None:
    """Raises ValueError if a checkpoint of this state has not learned to write."""
    name = name_of(state)
    learned = find(name).Objective
    if not learned.generates:
        instead = learned.instead.replace("RUN", run)
        raise ValueError(f"{run} has learned by objective={name}, which writes no text: {instead}")


@dataclass
class NoSettings:
    """Of an objective that has none."""


@lru_cache
def with_settings(cls, name: str):
    """The dataclass `cls` of settings, and inside it, as `own`, the settings of an objective."""
    own = getattr(find(name), "Settings", NoSettings)
    return make_dataclass(cls.__name__, [("own", own, field(default_factory=own))], bases=(cls,))
