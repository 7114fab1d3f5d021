"""Several tokens in one pass: guess what comes next, and let the model check all guesses at once.

    text ── guess ──▶ g1 g2 g3 ── one pass of the model ──▶ p0 p1 p2 p3 ── accepted? ──▶ g1 g2 x
                                                                                         │
      ▲                                                                                  │
      └──────────────────────────────────────────────────────────────────────────────────┘

Who decodes one token reads all weights for it; a few tokens at once share that reading.
But token 2 can only be read once token 1 is known, or guessed. If the guess was g, drawn from the
distribution q, and the model's own distribution there is p, then

    g is accepted with probability min(1, p(g) / q(g)); otherwise another token is drawn from
    max(p - q, 0), normalised, and the guesses behind it, which followed a wrong one, are dropped

(arXiv:2211.17192, arXiv:2302.01318). What comes out is distributed as p, however bad the guesses
are: x comes as an accepted guess with q(x) min(1, p(x) / q(x)) = min(q(x), p(x)), and otherwise, as
both cases together must have probability 1, with the rest, max(p(x) - q(x), 0). Behind the last
guess, if all are accepted, the pass has told what comes next: one more token, for nothing.

Shapes: T positions of a pass, k guesses, V vocabulary.
"""

import math
import random
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cache import KVCache
from generate import NO_TOKEN, prefill
from model import GPT
from pick import invert, penalise, pick, probabilities

MOST = 15  # guesses in a pass, which has 16 positions then
FEWEST = 3  # tokens that match, to guess at all: code has many matches of two that say nothing
# what each position more adds to a pass, and all of them at most, in passes of one: docs/speed.md
ONE_MORE, ALL_MORE = 0.35, 2.0
PAUSE = 32  # tokens without guesses, which did not pay, before one is tried again


def lookup(text: array, most: int, *_) -> tuple[list[int], None]:
    """Guesses that the text repeats itself, as code, quotations and corrections do:

        for i in range(n):  ...  for i in range(          and now?  n):
        ──────────────           ──────────────

    What followed the longest match of its end follows again (apoorvumang/prompt-lookup-decoding).
    A match of m tokens, FEWEST or more, is trusted for m - 1: where a text does not repeat itself
    there are no guesses.
    """
    a, n, m = np.frombuffer(text, dtype=np.int64), len(text), 1
    last = np.flatnonzero(a[:-1] == a[-1:])  # where matches of m tokens end
    while m <= MOST and len(more := last[(last >= m) & (a[last - m] == a[n - 1 - m])]):
        last, m = more, m + 1
    if m < FEWEST:
        return [], None
    follows = a[last[-1] + 1 :].tolist()  # the latest match; behind the text's end it goes round
    return [follows[i % len(follows)] for i in range(min(most, m - 1))], None


class Draft:
    """Guesses by a smaller model with the same tokenizer, which draws each from its own q.

    Its cache follows the text: of what it has read all counts but its guesses that were refused.
    """

    def __init__(self, model: GPT, large: GPT, seed: int = 0, markers=None):
        self.model, self.markers = model, markers
        self.random = random.Random(f"{seed} draft")
        self.cache = model.new_cache()
        self.begin = 0  # where in the text the cache begins
        small, large = model.config, large.config
        # in passes of the large model: in between their numbers of calls and of weights
        self.cost = small.n_layer * small.n_embd / (large.n_layer * large.n_embd)

    def __call__(self, text: array, most: int, chances: Callable) -> tuple[list[int], Tensor]:
        limit, n = self.model.config.block_size, len(text)
        k = min(most, limit // 2)
        if n - self.begin + k > limit:  # its context is full: see generate
            self.begin = n - max(1, limit // 2)
            self.cache.lengths.zero_()
        self.cache.lengths.clamp_(max=n - self.begin - 1)
        guesses, q = [], []
        new = text[self.begin + int(self.cache.lengths) :].tolist()
        for _ in range(k):
            if self.cache.lengths:
                logits = read(self.model, new, self.cache)[-1:]
            else:
                logits = prefill(self.model, [new], self.cache, self.markers)
            q.append(chances(logits, guesses))
            new = [drawn(q[-1][0], self.random.random())]
            guesses += new
        return guesses, torch.cat(q) if q else None


class Trust:
    """How many guesses pay, by how many of the last ones were right."""

    def __init__(self, cost: float, all_more: float = ALL_MORE):
        self.cost, self.all_more = cost, all_more  # of a guess, and of a pass that checks many
        self.right, self.tried = 3.0, 4.0  # lately; to begin with, guesses are trusted
        self.pause = 0  # until the text has so many tokens

    def number(self, length: int) -> int:
        """How many bring the most tokens in the time of a pass: 1 + a + ... + a^k of them are to be
        expected if one is right with probability a (arXiv:2211.17192, equation 1)."""
        a, tokens, gains = self.right / self.tried, 0.0, []
        for k in range(MOST + 1):
            tokens += a**k
            gains.append(tokens / (1 + k * self.cost + min(k * ONE_MORE, self.all_more)))
        return gains.index(max(gains)) or int(length >= self.pause)

    def saw(self, guesses: int, right: int, length: int) -> None:
        """So many of one pass were right: of those behind a wrong one nobody knows."""
        self.right = 0.9 * self.right + right
        self.tried = 0.9 * self.tried + min(guesses, right + 1)
        self.pause = length + PAUSE * (right < guesses)


@torch.inference_mode()
def read(model: GPT, tokens: list[int], cache: KVCache) -> Tensor:
    """Appends `tokens` (T) to the text of a cache in one pass: logits behind each (T, V)."""
    return model(torch.tensor([tokens], device=cache.k.device), cache=cache)[0]


def accept(guesses: list[int], q: Tensor, p: Tensor, draw: Callable[[], float]) -> list[int]:
    """The rule above, for q (k, V) and p (k + 1, V): the guesses accepted, and one token more."""
    for i, g in enumerate(guesses):
        if draw() * q[i, g] >= p[i, g]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*guesses[:i], drawn(rest if rest.any() else p[i], draw())]
    return [*guesses, drawn(p[-1], draw())]


def drawn(p: Tensor, uniform: float) -> int:
    """A token by its probability in p (V), whose sum need not be 1."""
    uniform = torch.tensor([uniform], dtype=torch.float64)
    return int(invert(p[None].cumsum(dim=-1), uniform))


def speculate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    guess: Callable = lookup,
    *,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    unused: Sequence[int] = (),
    markers=None,
    pick: Callable[..., Tensor] = pick,
    **options,
) -> Iterator[list[int]]:
    """As `generate` for one sample, faster where guesses are right: `lookup`, or by a `Draft`.

    `guess(text, most, chances)` gives up to `most` tokens, and the q (k, V) that they were drawn
    from, or None if they are certain: q(g) = 1. Then the rule comes to this: draw from p as ever,
    and see whether it was g. So with `lookup` the text is that of `generate` with the same seed,
    and with a draft that is greedy: but for rounding, since sums of T positions are made in another
    order, which can turn a tie. A draft that samples makes another text, of the same distribution;
    it follows `options` alone, and no `pick` of yours.
    """
    if not prompt:
        raise ValueError(NO_TOKEN)
    limit, device = model.config.block_size, model.wte.weight.device
    left_out = torch.tensor(unused, dtype=torch.long, device=device)
    draw = random.Random(f"{seed} 0").random  # as in `uniform_numbers`
    ahead: list[float] = []  # numbers for positions that may be refused: the next pass has them
    text = array("q", prompt)  # all of it, to guess from
    context = prompt[-limit:]  # what the model sees
    trust = Trust(getattr(guess, "cost", 0.0), getattr(model, "all_more", ALL_MORE))

    def adjusted(logits: Tensor, guesses: list[int]) -> Tensor:
        """Logits (T, V), the last behind all `guesses`, the others behind one less each."""
        logits = logits.index_fill(-1, left_out, -math.inf)
        if repetition_penalty == 1:
            return logits
        k = len(guesses)
        seen = [context + guesses[:i] + context[:1] * (k - i) for i in range(k + 1)]
        seen = torch.tensor(seen[-len(logits) :], device=device)  # (T, positions)
        return penalise(logits, seen, repetition_penalty)

    def chances(logits: Tensor, guesses: list[int]) -> Tensor:
        return probabilities(adjusted(logits, guesses), **options)

    cache = model.new_cache(size=min(limit, len(context) + max_tokens))
    logits, guesses, q = prefill(model, [context], cache, markers), [], None
    while max_tokens > 0:
        # 1. which guesses are accepted, and what comes behind them
        if q is None:
            ahead += [draw() for _ in range(len(logits) - len(ahead))]
            uniform = torch.tensor(ahead[: len(logits)], dtype=torch.float64)
            tokens = pick(adjusted(logits, guesses), uniform, **options).tolist()  # (T)
            right = [g == token for g, token in zip(guesses, tokens[:-1], strict=True)]
            new = tokens[: [*right, False].index(False) + 1]
            del ahead[: len(new)]
        else:
            new = accept(guesses, q, chances(logits, guesses), draw)

        # 2. the cache takes back what was refused
        cache.lengths -= len(guesses) + 1 - len(new)
        if guesses:
            trust.saw(len(guesses), len(new) - 1, len(text) + len(new))
        context += new
        text.extend(new)
        max_tokens -= len(new)
        for token in new:
            yield [token]
        if max_tokens == 0:
            return

        # 3. the next guesses, and what the model says to each: see `generate` for a full context
        if len(context) > limit:
            context = context[-max(1, limit // 2) :]
            logits, guesses, q = prefill(model, [context], cache, markers), [], None
        else:
            most = min(trust.number(len(text)), limit - len(context), max_tokens - 1)
            guesses, q = guess(text, most, chances) if most else ([], None)
            logits = read(model, [context[-1], *guesses], cache)  # (1 + k, V)
