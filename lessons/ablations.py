"""Every why, tried: leave one thing out, learn again with several seeds, and see what it did.

    python learn.py --ablations          measures all of them, and writes the tables of docs/learn

Each change is made from outside, by a setting or by giving model.py another function, and the same
update of train.py learns from the same windows. The task is that of the specimen, smaller, so that
one run takes a second or two: strings of four of eight letters. What is told is the loss behind the
bar on strings that were not learned from, in nats a letter: 0 is a perfect copy, ln 8 = 2.08 is
guessing.
"""

import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

import model
import objectives
import train
from dataset import Split
from engine import machine, settings
from engine.learner import Learner
from engine.shards import ShardWriter, Strip
from optim import LossScale, learning_rate, make_optimizers, set_rates
from tasks.repeat import BAR
from tokenizer import bytes_tokenizer

LETTERS, LENGTH = "abcdefgh", 4
TEXTS, FEW, STRINGS = 4000, 50, 100  # to learn from, and to be judged by
SEEDS = (1, 2, 3)
BEYOND = 3  # standard deviations of the seeds: what is less is not told as an effect

# the specimen's settings, with a shorter context and a shorter run
SHORT = dict(block_size=20, steps=200, batch_tokens=16 * 20, lr=0.03)


@dataclass
class Ablation:
    """A change: settings, and what to put in the place of names of model.py or of its classes."""

    settings: dict = field(default_factory=dict)
    instead: dict = field(default_factory=dict)  # "Block.forward": a function
    base: dict = field(default_factory=dict)  # settings that both have
    net: Callable = lambda net: None  # done to the new model
    batch: Callable = lambda batch: batch  # to another batch
    measure: str = "behind"  # or "before" the bar, where ln 8 is the least that is possible
    few: bool = False  # learn from FEW strings, many times
    leak: bool = False  # and be judged by the same ones
    effect: int = 0  # 1: it gets worse, -1: better; 0: at this size no difference is shown


def unscale(net) -> None:
    """Undoes the division by sqrt(D): queries are that much longer."""
    for block in net.blocks:
        block.attn.q_norm.register_forward_hook(lambda _, x, q: q * math.sqrt(q.size(-1)))


def in_turn(self, x, rope, mask, cache):
    """A block whose two halves replace x instead of adding to it."""
    return self.mlp(self.mlp_norm(self.attn(self.attn_norm(x), rope, mask, cache)))


def alike(batch):
    """What four processes learn from that draw with one seed."""
    first = batch.windows(0, len(batch.tokens) // 4)
    return first._replace(
        tokens=np.tile(first.tokens, (4, 1)), targets=np.tile(first.targets, (4, 1))
    )


def everyone(T, S, device=None):
    return torch.ones(T, S, dtype=torch.bool, device=device)


DEEP = dict(n_layer=4, zero_init=False)

ABLATIONS = dict(
    # docs/learn/02.md
    no_shift=Ablation(batch=lambda batch: batch._replace(targets=batch.tokens), effect=1),
    duplicates=Ablation(few=True, leak=True, measure="before", effect=-1),
    # 03.md. Blocks that begin at zero and do not add would hand on nothing at all
    no_residual=Ablation(instead={"Block.forward": in_turn}, base=DEEP, effect=1),
    no_norm=Ablation(instead={"Norm.forward": lambda self, x: x}, effect=1),
    no_zero_init=Ablation(settings=dict(zero_init=False)),
    # 04.md
    no_mask=Ablation(instead={"causal_mask": everyone}, effect=1),
    one_head=Ablation(settings=dict(n_head=1), effect=1),
    no_scale=Ablation(net=unscale),
    no_scale_no_qk_norm=Ablation(net=unscale, base=dict(qk_norm=False)),
    no_qk_norm=Ablation(settings=dict(qk_norm=False)),
    # 05.md
    no_positions=Ablation(instead={"rotate": lambda x, rope: x}, effect=1),
    learned_positions=Ablation(settings=dict(position="learned")),
    # 06.md
    no_bend=Ablation(instead={"relu2": lambda x: x}),
    no_mlp=Ablation(instead={"MLP.forward": lambda self, x: torch.zeros_like(x)}),
    no_cap=Ablation(settings=dict(logit_cap=0.0)),
    # 07.md; of AdamW's rates 0.001, 0.003, 0.01 and 0.03 the best
    adamw=Ablation(settings=dict(optimizer="adamw", lr=0.03)),
    warmup=Ablation(settings=dict(warmup=0.2)),
    no_decay=Ablation(settings=dict(decay=0.0)),
    one_layer=Ablation(settings=dict(n_layer=1)),
    # 12.md
    not_zeroed=Ablation(instead={"nn.Module.zero_grad": lambda self, set_to_none=True: None}),
    one_seed=Ablation(batch=alike),
)


@lru_cache
def strings(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=LENGTH)) for _ in range(count)]


@lru_cache
def texts(count: int = TEXTS) -> Split:
    """Strings to learn from, as a split of a data set."""
    tokenizer = bytes_tokenizer()
    folder = tempfile.TemporaryDirectory()
    writer = ShardWriter(Path(folder.name), "train", tokenizer.vocab_size)
    for text in strings(count, seed=0):
        writer.write(np.array([*tokenizer.encode(f"{text}{BAR}{text}"), tokenizer.end_of_text]))
    writer.close()
    split = Split([Strip(sorted(Path(folder.name).glob("*.bin")))], tokenizer)
    split.folder = folder  # lives as long
    return split


@contextmanager
def changed(change: Ablation):
    """Within, model.py has what stands in `instead`."""
    with ExitStack() as stack:
        for name, new in change.instead.items():
            *owners, last = name.split(".")
            owner = reduce(getattr, owners, model)
            stack.enter_context(mock.patch.object(owner, last, new))
        yield


def learn(seed: int, change: Ablation) -> dict[str, float]:
    """Trains a model with a change, and says how well it has learned."""
    cls = objectives.with_settings(train.Settings, "next_token")
    values = settings.read_file("config/specimen.py", settings.settings_of(cls))
    values |= SHORT | dict(seed=seed) | change.base | change.settings
    s = settings.make(cls, values)
    s.model = replace(s.model, vocab_size=texts().tokenizer.vocab_size)
    B, T = s.batch_tokens // s.model.block_size, s.model.block_size
    with changed(change):
        net = model.GPT(s.model)
        net.init_weights(seed)
        change.net(net)
        split = texts(FEW if change.few else TEXTS)
        learner = Learner(net, objectives.find("next_token").Objective(s, texts().tokenizer))
        here = machine.pick("cpu", "float32", "false")
        here.gradients = machine.GradientSum([])
        optimizers = make_optimizers(learner, s, here.dtype)
        scale = LossScale(here.dtype)
        for step in range(s.steps):
            rates = (s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
            set_rates(optimizers, learning_rate(step, *rates))
            batch = change.batch(split.batch(step, B, T, seed))
            inputs, counts = learner.objective.prepare(batch, learner)
            loss, _ = train.update(learner, optimizers, scale, inputs, counts, step, s, here)
        by = strings(FEW, seed=0) if change.leak else strings(STRINGS, seed=1)
        return dict(learned=loss) | judged(net.eval(), by)


@torch.no_grad()
def judged(net, texts: list[str]) -> dict[str, float]:
    """Nats of a letter before and behind the bar, each text read as far as it has been written: so
    that no model can look at what is to come, whatever it could do while it learned."""
    encode = bytes_tokenizer().encode
    halves = torch.tensor([encode(text) for text in texts])
    end = torch.full((len(texts), 1), bytes_tokenizer().end_of_text)
    bar = torch.full((len(texts), 1), ord(BAR))
    tokens = torch.cat((end, halves, bar, halves), dim=1)
    nats = []
    for i in range(1, tokens.size(1)):
        ln_p = net(tokens[:, :i])[:, -1].log_softmax(-1)
        nats.append(-ln_p.gather(-1, tokens[:, i, None]).mean().item())
    means = (statistics.mean(nats[:LENGTH]), statistics.mean(nats[LENGTH + 1 :]))
    return dict(zip(("before", "behind"), means, strict=True))


# --- tables


class Found(NamedTuple):
    """What the seeds have found: the loss with the settings as they are, and with the change."""

    base: list[float]
    changed: list[float]

    def apart(self) -> float:
        """How far the means are from each other, in standard deviations of the seeds; above 0 if
        the change does harm."""
        spread = math.hypot(statistics.stdev(self.base), statistics.stdev(self.changed))
        return (statistics.mean(self.changed) - statistics.mean(self.base)) / max(spread, 1e-9)

    def row(self, name: str) -> str:
        shown = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in self]
        return f"| `{name}` | {shown[0]} | {shown[1]} | {self.apart():.1f} |"


def measure(names: Iterable[str], seeds=SEEDS, tell=lambda text: None) -> dict[str, Found]:
    """Both losses of each ablation; what several have as their base is trained once."""
    bases: dict[str, list[dict]] = {}
    found = {}
    for name in names:
        change = ABLATIONS[name]
        key = json.dumps([change.base, change.few], sort_keys=True)
        if key not in bases:
            plain = Ablation(base=change.base, few=change.few)
            bases[key] = [learn(seed, plain) for seed in seeds]
        pairs = (bases[key], [learn(seed, change) for seed in seeds])
        found[name] = Found(*([run[change.measure] for run in runs] for runs in pairs))
        tell(found[name].row(name))
    return found


def written(text: str, found: dict[str, Found]) -> str:
    """A page with the rows of these ablations as they were found."""

    def row(line: re.Match) -> str:
        return found[line[1]].row(line[1]) if line[1] in found else line[0]

    return re.sub(r"^\| `(\w+)` \|.*\|$", row, text, flags=re.MULTILINE)
