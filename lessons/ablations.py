"""Every why, tried: leave one thing out, learn again with several seeds, and see what it did.

    python learn.py --ablations          measures all of them, and writes the tables of docs/learn

Each change is made from outside, by a setting or by giving model.py another function, and the same
update of train.py learns from the same windows. The task is that of the specimen, smaller, so that
one run takes a second or two: strings of three to five of eight letters. What is told is the loss
behind the bar on strings that were not learned from, in nats a letter: 0 is a perfect copy, ln 8 =
2.08 is guessing.
"""

import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from pathlib import Path
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
from lessons import ROOT, specimen
from optim import LossScale, learning_rate, make_optimizers, set_rates
from tasks.repeat import BAR
from tokenizer import bytes_tokenizer

LETTERS, LENGTHS = "abcdefgh", (3, 4, 5)
TEXTS, STRINGS = 4000, 40  # to learn from, and to be judged by
SEEDS = (1, 2, 3)
BEYOND = 3  # standard deviations of the seeds: what is less is not told as an effect
FILE = ROOT / "lessons" / "ablations.json"  # what was measured last

# the specimen's settings, with a shorter context and a shorter run
SHORT = dict(block_size=24, steps=150, batch_tokens=32 * 24)


@dataclass
class Ablation:
    """A change: settings, and what to put in the place of names of model.py or of its classes."""

    settings: dict = field(default_factory=dict)
    instead: dict = field(default_factory=dict)  # "Block.forward": a function
    base: dict = field(default_factory=dict)  # settings that both have
    net: Callable = lambda net: None  # done to the new model
    targets: Callable | None = None  # (tokens, targets) to other targets
    effect: int = 1  # 1: the loss gets worse, -1: better, 0: no difference shown
    measure: str = "behind"


def unscale(net) -> None:
    """Undoes the division by sqrt(D): queries are that much longer."""
    for block in net.blocks:
        block.attn.q_norm.register_forward_hook(lambda _, x, q: q * math.sqrt(q.size(-1)))


ABLATIONS = dict(
    no_mask=Ablation(instead={"causal_mask": lambda T, S, device=None: torch.ones(T, S).bool()}),
    no_shift=Ablation(targets=lambda tokens, targets: tokens),
    no_positions=Ablation(instead={"rotate": lambda x, rope: x}),
    no_residual=Ablation(
        instead={
            "Block.forward": lambda self, x, rope, mask, cache: self.mlp(
                self.mlp_norm(self.attn(self.attn_norm(x), rope, mask, cache))
            )
        },
    ),
    no_norm=Ablation(instead={"Norm.forward": lambda self, x: x}),
    no_scale=Ablation(net=unscale),
    no_scale_no_qk_norm=Ablation(net=unscale, base=dict(qk_norm=False)),
    no_qk_norm=Ablation(settings=dict(qk_norm=False)),
    one_head=Ablation(settings=dict(n_head=1)),
    one_layer=Ablation(settings=dict(n_layer=1)),
    no_zero_init=Ablation(settings=dict(zero_init=False)),
    no_bend=Ablation(instead={"relu2": lambda x: x}),
    no_mlp=Ablation(instead={"MLP.forward": lambda self, x: torch.zeros_like(x)}),
    no_decay=Ablation(settings=dict(decay=0.0)),
    warmup=Ablation(settings=dict(warmup=0.2)),
    no_momentum=Ablation(settings=dict(momentum=0.0)),
    adamw=Ablation(settings=dict(optimizer="adamw", lr=0.003)),
    no_clip=Ablation(settings=dict(grad_clip=0.0)),
    no_cap=Ablation(settings=dict(logit_cap=0.0)),
    learned_positions=Ablation(settings=dict(position="learned")),
)


def string(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.choice(LENGTHS)))


@lru_cache
def texts() -> Split:
    """The strings to learn from, as a split of a data set."""
    rng, tokenizer = random.Random(0), bytes_tokenizer()
    folder = tempfile.TemporaryDirectory()
    writer = ShardWriter(Path(folder.name), "train", tokenizer.vocab_size)
    for _ in range(TEXTS):
        text = string(rng)
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
        learner = Learner(net, objectives.find("next_token").Objective(s, texts().tokenizer))
        here = machine.pick("cpu", "float32", "false")
        here.gradients = machine.GradientSum([])
        optimizers = make_optimizers(learner, s, here.dtype)
        scale = LossScale(here.dtype)
        for step in range(s.steps):
            rates = (s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
            set_rates(optimizers, learning_rate(step, *rates))
            batch = texts().batch(step, B, T, seed)
            if change.targets:
                batch = batch._replace(targets=change.targets(batch.tokens, batch.targets))
            exercise = learner.objective.prepare(batch, [], learner)
            loss, _ = train.update(learner, optimizers, scale, exercise, step, s, here)
        return dict(learned=loss, behind=judged(net.eval()))


@torch.no_grad()
def judged(net) -> float:
    """Nats of a letter behind the bar, on new strings, each read as far as it has been written: so
    that no model can look at what is to come, whatever it could do while it learned."""
    rng, tokenizer, nats = random.Random(1), texts().tokenizer, []
    for _ in range(STRINGS):
        text = string(rng)
        tokens = specimen.read(tokenizer, f"{text}{BAR}{text}")[0]
        for i in range(len(text) + 2, len(tokens)):
            nats.append(-net(tokens[None, :i])[0, -1].log_softmax(-1)[tokens[i]].item())
    return statistics.mean(nats)
