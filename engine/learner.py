"""What learns: a trunk, with the heads that its objective gives it, and how both are kept.

In a checkpoint the trunk is model.safetensors, with the names of model.py whatever the objective,
so that another run can begin with it; heads.safetensors has the rest.
"""

import zlib
from contextlib import nullcontext

from torch import Tensor, nn

import objectives
from dataset import Dataset
from engine import checkpoint, fast, inference, machine, resume, settings
from engine.arithmetic import EVAL_TOKENS
from model import GPT
from tokenizer import Tokenizer


class Learner(nn.Module):
    """The trunk `gpt` and its `heads`; called with the inputs of an exercise it gives the sums."""

    def __init__(self, gpt: GPT, objective: objectives.Base):
        super().__init__()
        self.gpt = gpt
        self.heads = nn.ModuleDict(objective.heads(gpt))
        self.objective = objective
        self.autocast = nullcontext  # set by preflight.make_ready; for objectives that write, too

    def forward(self, *inputs) -> list[Tensor]:
        return self.objective.loss(self.gpt, self.heads, *inputs)

    def sums(self, *inputs) -> list[float]:
        """The same as numbers, for an evaluation: without what torch.compile has made, whose shapes
        are those of training."""
        return [float(x) for x in self.forward(*inputs)]

    def by_name(self) -> dict[str, nn.Parameter]:
        """All parameters; those of the trunk have the names that they have without it."""
        return {name.removeprefix("gpt."): p for name, p in self.named_parameters()}


def keyed(batch, end_of_text: int):
    """A batch with keys for what is random in evaluation: a row is changed alike wherever it
    stands, and however much it is filled up."""
    rows = (row[(row != 0) & (row != end_of_text)] for row in batch.tokens)
    return batch._replace(keys=[(0, zlib.crc32(row.tobytes())) for row in rows])


def told(found: dict, unit: str) -> str:
    """What evaluation has found, in words."""
    parts = [f"loss {found['val_loss']:.4f} {unit}"]
    if found["val_bpb"]:
        parts.append(f"{found['val_bpb']:.4f} bits per byte")
    rest = {k: v for k, v in found.items() if k not in ("val_loss", "val_bpb")}
    return ", ".join(parts + [f"{k.removeprefix('val_')} {v:.4f}" for k, v in rest.items()])


class Opened:
    """A model of a run or checkpoint, with its tokenizer, to be looked at."""

    def __init__(self, out: str, which: str = "best"):
        self.name, self.path = out, checkpoint.find(out, which)
        self.model, self.tokenizer, self.state = checkpoint.load_weights(self.path)
        self.objective = objectives.name_of(self.state)

    def folder(self, s) -> tuple[str, str]:
        """The data of `s`, or else of the run, and the vocabulary of public shards."""
        trained_with = self.state["settings"]
        folder = s.data or trained_with.get("data")
        if not folder:
            raise ValueError(f"{self.path} was not trained here: name the data, --data=data/NAME")
        given = getattr(s, "tokenizer", "")
        return folder, given or ("" if s.data else trained_with.get("tokenizer", ""))

    def data(self, s) -> Dataset:
        """That data, as it was learned from. Raises ValueError if the model reads other tokens."""
        train_on = self.state["settings"].get("train_on", "answers")
        lines = objectives.find(self.objective).Objective.lines
        data = Dataset(*self.folder(s), self.model.config.mask, train_on, lines=lines)
        if data.kind != "text":
            self.require_markers()
        data.require_tokenizer(self.tokenizer, self.name)
        return data

    def learner(self) -> Learner:
        """The model under the objective that it has learned by. Raises ValueError."""
        from train import Settings

        cls = objectives.with_settings(Settings, self.objective)
        s = settings.make(cls, settings.known(cls, self.state["settings"]))
        s.model = self.model.config
        objective = objectives.find(self.objective).Objective(s, self.tokenizer)
        resume.require_facts(self.path, self.state, objective.facts())
        objective.kept(checkpoint.load_kept(self.path, self.state))  # heads may depend on it
        learner = Learner(self.model, objective)
        checkpoint.load_heads(self.path, learner)
        return learner

    def make_ready(self, s, here: machine.Machine, quantize: str = "") -> None:
        self.model.to(here.device)
        machine.use_threads(s.threads, here, self.model, EVAL_TOKENS)
        if quantize:
            inference.ready(self.model, quantize, parts=s.fast)
        else:
            fast.use(self.model, here, s.fast)

    def require_markers(self) -> None:
        if not self.tokenizer.markers:
            raise ValueError(
                f"{self.name} has learned from running text alone and knows no turns: let it learn"
                " from rows first, as in `python train.py --init_from=RUN --data=ROWS`"
            )


def opened_here(s, which: str = "best") -> tuple[Opened, machine.Machine]:
    """The run `s.out`, and the machine of the settings `s` of a command."""
    here = machine.pick(s.device, s.dtype, "false")
    machine.start(here, s.deterministic)
    return Opened(s.out, which), here


def opened(run: str, name: str) -> tuple[Learner, Tokenizer]:
    """The learner of a run or checkpoint, in eval mode, and its tokenizer: for the command of the
    objective `name`. Raises ValueError if it learned by another."""
    found = Opened(run)
    if found.objective != name:
        raise ValueError(f"{run} has learned by objective={found.objective}, and this needs {name}")
    return found.learner().eval(), found.tokenizer
