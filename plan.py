"""What a training run will need, before it begins: memory, time, cost, batch, perhaps its loss.

    python plan.py --params=1.5B --tokens=30B --gpus=8
    python plan.py --n_layer=12 --n_embd=768 --n_head=12 --vocab_size=50257 --gpu=rtx4090
    python plan.py --n_layer=4 --vocab_size=2048 --tokens=9M --tokens_per_second=12k --price=0
    python plan.py --params=10M --tokens=40M out/s1 out/s2 out/s3 out/s4 out/s5

All of it is arithmetic (engine/arithmetic.py); only the share of a card's peak that training
reaches (`mfu`) is experience, and yours may differ: `tokens_per_second`, which train.py prints, is
better, and all there is for a CPU. With runs of yours, each of another size or
with other tokens, a curve is fitted to their losses, and says what the planned run should reach:

    loss = E + A / N^a + B / D^b          (arXiv:2203.15556, section 3.3)

E is what no model can know of the text; the second term is what N parameters cannot express, the
third what D tokens have not taught.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from engine import settings
from engine.arithmetic import activations, products, state
from engine.checkpoint import saved_shape
from engine.settings import Bound, NotNegative, Positive
from shape import GPTConfig

# memory in GB; peak of dense products in 16 bits, TFLOP/s (bfloat16, but of V100 and T4): of their
# makers
CARDS = dict(
    h200=(141, 989), h100=(80, 989), a100=(80, 312), a100_40=(40, 312), l40s=(48, 362),
    l4=(24, 121), v100=(32, 125), t4=(16, 65), rtx5090=(32, 209), rtx4090=(24, 165),
    rtx3090=(24, 71),
)  # fmt: skip
UNITS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kMBT]?)")


def amount(text: str) -> float:
    """What 1.5B stands for; 0 for what is no number."""
    found = AMOUNT.fullmatch(text)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


Share = Annotated[float, Bound("above 0, at most 1", lambda x: 0 < x <= 1)]
KNOWN = "a number such as 124M, 1.5B or 30B"
Amount = Annotated[str, Bound(KNOWN, lambda text: text == "" or amount(text) > 0)]
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "mlp_dim")  # of a shape
NEAR = 0.03  # of the size that is asked for: a shape that is farther off is told
WIDTH = 0.1  # a tenth more width for each layer than usual is as bad as a hundredth of the size
RESERVED = 0.1  # of a card's memory: the framework's own, and what lies between blocks


@dataclass
class Settings:
    runs: tuple = ()  # finished runs of yours: predict the loss from theirs
    params: Amount = ""  # such as 1.5B: a shape of about that size, instead of n_layer and others
    tokens: Amount = ""  # to learn from, such as 30B; by default 20 for each parameter
    gpus: Positive = 1  # cards, of all machines
    gpu: Literal[tuple(CARDS)] = "h100"  # which card
    memory: NotNegative = 0.0  # GB of one, if not that card's
    tokens_per_second: Amount = ""  # of all together, as a run has measured: then no peak counts
    tflops: NotNegative = 0.0  # TFLOP/s of one at its peak, if not that card's
    mfu: Share = 0.4  # the share of it that training reaches: 0.3 to 0.55 as a rule
    price: NotNegative = 2.0  # of an hour of one card, in your money; 0: no cost is told
    shard: bool = True  # each card keeps its share of parameters, gradients and moments
    optimizer: Literal["muon", "adamw", "nadamw"] = "muon"  # as in train.py
    vocab_size: Positive = 50257  # tokens that there are; by default GPT-2's
    model: GPTConfig = field(default_factory=partial(GPTConfig, vocab_size=0, block_size=2048))


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Plan a training run.", "runs", nargs="*")
    c = replace(s.model, vocab_size=s.vocab_size)
    if s.params:
        own = [k for k in SIZES if getattr(s.model, k) != getattr(Settings().model, k)]
        settings.require(not own, s, "params", f"left out with --{own[0] if own else ''}")
        told = any(word.split("=")[0] == "--tied" for word in argv)
        c = shape_of(amount(s.params), c, may_tie=not told)
    N, T = c.parameters(), c.block_size
    D = amount(s.tokens) if s.tokens else 20.0 * N
    settings.require(D >= T, s, "tokens", f"at least one window of block_size={T}")
    per_token = products(c, T)
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    off = N / amount(s.params) - 1 if s.params else 0.0
    asked = f" ({s.params} asked for: {off:+.1%})" if s.params else ""
    shape = ", ".join(f"{k}={getattr(c, k)}" for k in names) + ", tied=true" * c.tied
    print(f"model    {words(N)} parameters{asked}: {shape}")
    if abs(off) > NEAR:
        print("         the nearest of about 64 channels a layer: --n_layer and --n_embd have more")
    enough = "20 make the most of the compute: arXiv:2203.15556"
    print(f"tokens   {words(D)}, {D / N:.3g} for each parameter ({enough})")
    multiplied = products(c, 0) / 6
    more = f"{words(per_token / 6 - multiplied)} for attention's scores"
    less = f" - {words(N - multiplied)} that are looked up" if multiplied < N else ""
    own = f"6 D (N{less} + {more})"
    print(f"compute  {per_token * D:.3g} operations, {words(per_token)} for each token")
    print(f"         = {own}; 6 N D would be {6 * N * D:.3g}")

    # the batch that is just not wasteful grows with the compute (arXiv:2401.02954, section 3.1)
    least = T * s.gpus
    windows = max(1, round(0.2920 * (per_token * D) ** 0.3271 / least))  # of each card
    windows = print_memory(s, c, windows)
    updates = math.ceil(D / (windows * least))
    rule = "a rule of thumb: arXiv:2401.02954"
    print(f"batch    --batch_tokens={windows * least} --steps={updates} ({rule})")

    peak = s.tflops or CARDS[s.gpu][1]
    speed = s.gpus * peak * 1e12 * s.mfu / per_token  # tokens a second
    by = f"at {s.mfu:.0%} of {peak:g} TFLOP/s: {words(speed)} tokens/s; by 6 N D"
    by += f" {duration(D / speed / 3600 * 6 * N / per_token)}"
    if s.tokens_per_second:
        speed = amount(s.tokens_per_second)
        by = f"at the {words(speed)} tokens/s that were measured"
    hours = D / speed / 3600
    print(f"time     {duration(hours)} {by}")
    if s.price:
        total = f"{words(s.gpus * hours)} card hours, {words(s.gpus * hours * s.price)}"
        print(f"cost     {total} at {s.price:g} an hour")
    if s.runs:
        predict(s, c, D)


def shape_of(params: float, c: GPTConfig, may_tie: bool = True) -> GPTConfig:
    """The shape that is nearest to the size `params` and to 64 channels of width for each layer, in
    heads of 128 (64 or 32 in small ones), as in karpathy/nanochat. Where both tables would be more
    than half of it, as in GPT-2's smallest, it `may_tie` the head to the embedding."""
    fits = []
    for n_layer in range(1, 200):
        step = 64 if n_layer >= 8 else 32
        usual = 64 * n_layer // step * step
        for C in range(max(step, usual - 256), min(usual + 256, 128 * n_layer) + 1, step):
            D = 128 if n_layer >= 8 and C % 128 == 0 else step
            derived = dict(head_dim=0, mlp_dim=0, n_kv_head=0)
            derived["tied"] = c.tied or (may_tie and 2 * c.vocab_size * C > params / 2)
            found = replace(c, n_layer=n_layer, n_embd=C, n_head=C // D, **derived)
            off = abs(math.log(found.parameters() / params))
            fits.append((off + WIDTH * abs(math.log(C / (64 * n_layer))), n_layer, found))
    return min(fits, key=lambda fit: fit[:2])[2]


def print_memory(s: Settings, c: GPTConfig, windows: int) -> int:
    """What a card has to hold, and how many of its `windows` of an update fit into one pass.

    Returns the nearest number of windows from there up that passes of one size make up.
    """
    memory, parts = s.memory or CARDS[s.gpu][0], s.gpus if s.shard else 1
    own = s.gpu == Settings.gpu and not s.memory
    here = s.tokens_per_second and own  # where it was measured: no card of the table
    weights, moments = (x / parts for x in state(c, s.optimizer))
    # in 16 bits, logits with their gradient and what the products beside them need: 6 bytes, by
    # the 18.8 and 19.9 GB that 32 windows took (docs/speed.md)
    window = c.block_size * (2 * c.n_layer * activations(c) + 6 * c.vocab_size)
    whole = 4 * c.parameters() / c.n_layer if parts > 1 else 0.0  # a block while it computes
    left = memory * 1e9 * (1 - RESERVED) - weights - moments - whole
    where = f"a share of {s.gpus}" if parts > 1 else "whole"
    held = f"{gigabytes(weights)} of parameters and gradients, {gigabytes(moments)} of moments"
    print(f"memory   {held} ({where}), {gigabytes(window)} a window", end="")
    print("; --memory=GB tells what fits" if here else f"; a card has {memory:g} GB")
    if here:
        return windows
    if left < window:
        more = "more --gpus" if s.shard else "--shard=true"
        print(f"         too little: {more}, a shorter --block_size, or a card of more memory")
        return windows
    passes = math.ceil(windows / int(left // window))
    rows = math.ceil(windows / passes)
    print(f"         --device_batch={rows}, passes to an update: {passes}")
    return rows * passes


def gigabytes(x: float) -> str:
    return f"{x / 1e9:.3g} GB"


def words(x: float) -> str:
    """A number as people write it: 1.49B."""
    unit = next((unit for unit, size in reversed(UNITS.items()) if x >= size), "")
    return f"{x / UNITS[unit]:.3g}{unit}"


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.3g} seconds"
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 72 else f"{hours / 24:.3g} days"


# --- the loss to be expected


def predict(s: Settings, c: GPTConfig, D: float) -> None:
    """Prints what the runs had, what the curve through them has there, and what comes next."""
    found = np.array([measured(Path(run)) for run in s.runs])
    enough = "at least five finished runs, of three sizes"
    settings.require(len(found) >= 5 and len({*found[:, 0]}) >= 3, s, "runs", enough)
    E, A, a, B, b = fit(*found.T)

    def row(name: str, n: float, d: float, loss: str) -> None:
        curve = E + A / n**a + B / d**b
        print(f"{name[-24:]:24} {words(n):>8} {words(d):>8} {loss:>8} {curve:8.4f}")

    print(f"\nloss = {E:.3f} + {A:.4g} / N^{a:.3g} + {B:.4g} / D^{b:.3g}")
    print(f"{'':24} {'N':>8} {'D':>8} {'loss':>8} {'curve':>8}     N: without the embedding")
    for run, (n, d, loss) in zip(s.runs, found, strict=True):
        row(run, n, d, f"{loss:.4f}")
    row("planned", products(c, 0) / 6, D, "?")


def measured(run: Path) -> tuple[float, float, float]:
    """Of a run: its parameters but for the embedding, the tokens that it has learned from, and its
    last validation loss. Raises ValueError."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        row = [r for r in map(json.loads, lines) if r.get("val_loss") is not None][-1]
        state = json.loads(max(run.glob("step-*/state.json")).read_text())
        return products(saved_shape(state["model"]), 0) / 6, row["tokens"], row["val_loss"]
    except (OSError, ValueError, IndexError, KeyError, TypeError) as e:
        raise ValueError(f"runs: {run} holds no finished run of train.py ({e})") from e


def fit(N, D, loss) -> tuple[float, float, float, float, float]:
    """E, A, a, B, b of the curve: the least squares of all exponents from 0.05 to 1."""
    best = (math.inf,)
    for a in np.arange(0.05, 1.001, 0.025):
        for b in np.arange(0.05, 1.001, 0.025):
            terms = np.stack([np.ones_like(N), N**-a, D**-b], axis=1)
            size = terms.max(axis=0)
            solved, *_ = np.linalg.lstsq(terms / size, loss, rcond=None)
            if (solved >= 0).all():
                error = float(np.square(terms / size @ solved - loss).sum())
                best = min(best, (error, a, b, *(solved / size)))
    if best[0] == math.inf:
        raise ValueError("runs: their losses do not fall with parameters and tokens")
    _, a, b, E, A, B = best
    return E, A, a, B, b


if __name__ == "__main__":
    settings.run(main)
