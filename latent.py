"""What the codes of a variational autoencoder hold: python -m objectives.vae RUN, and one of

    --from_prior=10                            codes drawn from N(0, I), written out
    --between="a dog runs" --and="a red bus"   the way from one code to another, in equal steps
    --reconstruct="a dog runs"                 a sentence from its own code
    --report                                   of a split: how good, and whether the code is used

-ELBO is an upper bound of -ln p(x). The mean of p(x|z) p(z) / q(z|x) over K codes drawn from q is
p(x) without bias, and minus its logarithm a bound that is closer the larger K (arXiv:1509.00519):
that is what a language model's loss can be compared with. A number of the code is active if its
mean differs between sentences, Var(mean) > 0.01 (same paper). Two ways to be deceived: a KL above 0
shows that the encoder says something, and not that the decoder listens. So each sentence is also
read under the code of another one: what that costs is what the decoder has heard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import scores
from dataset import IGNORE, Dataset
from engine import settings
from engine.learner import Learner, opened
from engine.settings import Count, NotNegative, Positive
from objectives.vae import posterior, read, surprise
from pick import pick, uniform_numbers
from tokenizer import Tokenizer

ACTIVE = 0.01  # variance of the mean above which a number of the code counts as active
POINTS = 7  # between two sentences, both included
ROWS = 512  # sentences, or codes of them, in one pass
SMALLEST = 2  # sentences that can be exchanged


@dataclass
class Settings:
    run: str = "out/vae"  # folder of a run, or one checkpoint of it
    from_prior: Count = 0  # write as many sentences, of codes drawn from N(0, I)
    between: str = ""  # a sentence: write those on the way from its code
    and_: str = ""  # to the code of this one
    reconstruct: str = ""  # a sentence: write it from its code alone
    report: bool = False  # how good it is, and whether the code is used
    data: str = ""  # of the report: a folder that prepare.py has written; by default the run's
    split: Literal["train", "val", "test"] = "val"  # of the data
    sentences: Count = 2000  # of the split, evenly spread; 0 is all
    samples: Positive = 64  # codes of each sentence, for the importance-weighted likelihood
    temperature: NotNegative = 0.0  # of writing; 0 takes the likeliest token
    seed: Count = 1  # of what is drawn


@torch.no_grad()
def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "What the code of a sentence holds.", "run")
    if [s.from_prior > 0, bool(s.between), bool(s.reconstruct), s.report].count(True) != 1:
        choices = '--from_prior=N, --between="..." --and="...", --reconstruct="..." or --report'
        raise ValueError(f"one thing at a time: {choices}")
    settings.require(bool(s.between) == bool(s.and_), s, "between", "given together with --and")
    learner, tokenizer = opened(s.run, "vae")
    if not learner.objective.own.latent:
        raise ValueError(f"{s.run} was trained with latent=0, and has no code")
    if s.report:
        report(s, learner, tokenizer)
        return
    if s.from_prior:
        rng = np.random.default_rng(s.seed)
        z = rng.standard_normal((s.from_prior, learner.objective.own.latent))
        z = torch.from_numpy(z.astype(np.float32))
    elif s.between:
        a, b = codes_of(learner, tokenizer, [s.between, s.and_])
        z = torch.stack([torch.lerp(a, b, i / (POINTS - 1)) for i in range(POINTS)])
    else:
        z = codes_of(learner, tokenizer, [s.reconstruct])
    for text in written(learner, tokenizer, z, s.temperature, s.seed):
        print(text)


def codes_of(learner: Learner, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The means of the codes of some texts (N, Z). Raises ValueError for one that is too long."""
    room = learner.gpt.config.block_size - 1
    lines = [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, lines, strict=True):
        if not 0 < len(ids) <= room:
            raise ValueError(f"{text[:40]!r} has {len(ids)} tokens: it should be 1 to {room}")
    tokens, targets = padded(lines, tokenizer.end_of_text)
    return posterior(learner.gpt, learner.heads, tokens, targets)[0]


def padded(lines: list[list[int]], end_of_text: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (N, T) of lines of ids, as a batch of `Documents` has them."""
    T = max(map(len, lines)) + 1
    tokens = torch.zeros(len(lines), T, dtype=torch.long)
    targets = torch.full((len(lines), T), IGNORE)
    for i, ids in enumerate(lines):
        tokens[i, : len(ids) + 1] = torch.tensor([end_of_text, *ids])
        targets[i, : len(ids) + 1] = torch.tensor([*ids, end_of_text])
    return tokens, targets


def written(
    learner: Learner, tokenizer: Tokenizer, z: Tensor, temperature: float, seed: int
) -> Iterator[str]:
    """A sentence for each code of z (N, Z): token by token, until an end-of-text."""
    gpt, end = learner.gpt, tokenizer.end_of_text
    uniform = uniform_numbers(seed, len(z))
    cache = gpt.new_cache(len(z))
    found = [torch.full((len(z),), end)]
    for at in range(gpt.config.block_size):
        token = found[-1][:, None]
        x = read(gpt, learner.heads, token, z, begins=at == 0)
        logits = gpt.logits(gpt.trunk(token, cache=cache, embedded=x))[:, -1]
        found.append(pick(logits, next(uniform), temperature))
    for ids in torch.stack(found[1:], dim=1).tolist():  # (N, block_size)
        yield tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


def report(s, learner: Learner, tokenizer: Tokenizer) -> None:
    """Prints what a split says of the model, in nats a sentence."""
    folder = s.data or learner.objective.s.data
    data = Dataset(folder, lines=True)
    learner.objective.require(data)
    data.require_tokenizer(tokenizer, s.run)
    lines = sentences(data.split(s.split), learner.gpt.config.block_size, s.sentences)
    if len(lines) < SMALLEST:
        raise ValueError(f"the {s.split} split of {folder} has too few sentences: use another")
    found = measured(learner, tokenizer, lines, s.samples, s.seed)
    elbo = found["reconstruction"] + found["kl"]
    variance = found["mean"].var(axis=0)
    exchange = found["exchanged"] - found["reconstruction"]
    rows = np.stack([exchange, np.ones(len(lines))], axis=1)
    costs = scores.Score(rows, lambda sums: sums[0] / sums[1])
    low, high = scores.interval(scores.resampled(costs))
    print(f"{s.run} on {len(lines):,} sentences of the {s.split} split of {folder}")
    print(f"reconstruction {found['reconstruction'].mean():.2f} nats a sentence")
    print(f"KL {found['kl'].mean():.2f}: the code tells of its sentence at most so much")
    print(f"-ELBO {elbo.mean():.2f}, the sum: an upper bound of -ln p(x)")
    print(f"-ln p(x) {found['weighted'].mean():.2f} by {s.samples} codes of each")
    print(f"active units {(variance > ACTIVE).sum()} of {len(variance)}")
    used = "it is used" if low > 0 else "no use of it is shown"
    cost = f"{costs.value:+.2f} ({low:+.2f} to {high:+.2f})"
    print(f"the code of another sentence costs {cost}: {used}")


def sentences(split, block_size: int, most: int) -> list[list[int]]:
    """The ids of each sentence of a split, or of about `most` of them, evenly spread."""
    rows = [(part, window) for part in split.parts for window in part.in_order(block_size)]
    most = min(most or len(rows), len(rows))
    chosen = (rows[i * len(rows) // most] for i in range(most))
    lines = (part.row(window[0], block_size)[1:].tolist() for part, window in chosen)
    end = split.tokenizer.end_of_text  # which `padded` puts back; those that were cut have none
    return [ids[:-1] for ids in lines if ids[-1] == end]


def measured(
    learner: Learner, tokenizer: Tokenizer, lines: list[list[int]], samples: int, seed: int
) -> dict[str, np.ndarray]:
    """By name, of each sentence: reconstruction, kl, weighted (-ln p by importance), exchanged (the
    reconstruction under another's code), each (N,); and the mean of its code (N, Z)."""
    gpt, heads = learner.gpt, learner.heads
    rng = np.random.default_rng(seed)
    found: dict[str, list] = {}

    def drawn(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.from_numpy(rng.standard_normal(mean.shape).astype(np.float32))
        return mean + (logvar / 2).exp() * noise, noise

    per_pass = max(SMALLEST, ROWS // samples)
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))  # those of a pass are as long
    starts = [*range(0, len(lines), per_pass)]
    if len(starts) > 1 and len(lines) - starts[-1] < SMALLEST:
        starts.pop()  # one alone has no other: it joins those before
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        tokens, targets = padded([lines[i] for i in order[start:end]], tokenizer.end_of_text)
        mean, logvar = posterior(gpt, heads, tokens, targets)
        z, _ = drawn(mean, logvar)
        parts = dict(
            mean=mean,
            kl=0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=1),
            reconstruction=surprise(gpt, heads, tokens, targets, z),
            exchanged=surprise(gpt, heads, tokens, targets, z.roll(1, dims=0)),
        )
        # ln of p(x|z) p(z) / q(z|x); the constants of the two normal densities cancel
        many = [each.repeat_interleave(samples, dim=0) for each in (tokens, targets, mean, logvar)]
        z, noise = drawn(*many[2:])
        ratio = (noise**2 + many[3] - z**2).sum(dim=1) / 2 - surprise(gpt, heads, *many[:2], z)
        parts["weighted"] = math.log(samples) - ratio.view(-1, samples).logsumexp(dim=1)
        for name, values in parts.items():
            found.setdefault(name, []).append(values.numpy())
    return {name: np.concatenate(values) for name, values in found.items()}
