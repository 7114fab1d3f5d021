"""From a model to text: prefill, pick a token, decode it, pick the next.

    prompt ── encode ──▶ tokens ── prefill ──▶ logits ── pick ──▶ token ── TextStream ──▶ text
                                                 ▲                  │
                                                 └─ decode_one_token ┘

A GPT tells how likely each token of its vocabulary is to come next. To generate is to draw one,
to append it, and to ask again. At its plainest that is

    for _ in range(max_tokens):
        logits = model(tokens)[:, -1]                                  # of the last position
        token = torch.multinomial(logits.softmax(dim=-1), 1)           # (B, 1)
        tokens = torch.cat((tokens, token), dim=1)

and what follows adds a cache, choices, and text. Shapes: B samples, T time, V vocabulary.
"""

import codecs
import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model import GPT, KVCache

COLDEST = 1e-6  # a temperature below this counts as 0, which nothing can be divided by


@torch.inference_mode()
def prefill(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Reads tokens (B, T) in one pass, which fills the empty cache; logits of the next: (B, V)."""
    cache.length = 0
    return model(tokens, cache=cache)[:, -1]


@torch.inference_mode()
def decode_one_token(model: GPT, token: Tensor, cache: KVCache) -> Tensor:
    """Appends one token to each sample, token (B,); logits of the one after it: (B, V).

    Why a cache: attention looks back at the keys and values of all positions, and since no position
    sees a later one, those never change. Without a cache each new token means reading the whole
    text again, T^2 / 2 positions for T tokens; with it only the token itself, T positions. For 200
    tokens behind a prompt of 56 that is 31,100 positions against 255.
    """
    return model(token[:, None], cache=cache)[:, -1]


def pick(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Chooses a token for each row of logits (B, V) by a number in [0, 1), uniform (B,): (B,).

    Raises ValueError if the logits are not finite. To sample in another way, write a function like
    this one and hand it to `generate`.
    """
    if not logits.amax(dim=-1).cpu().isfinite().all():
        raise ValueError("the logits are not finite: try --dtype=float32")

    # 1. greedy: the likeliest token. It soon repeats itself, since nothing is likelier behind a
    #    sentence that stands there twice than to stand there again (arXiv:1904.09751, figure 4)
    if temperature < COLDEST:
        return logits.argmax(dim=-1)

    # 2. top-k: only the k likeliest, likeliest first (top-p needs that order too)
    ids = None
    if top_k or top_p < 1:
        k = min(top_k or logits.size(-1), logits.size(-1))
        logits, ids = logits.topk(k)  # (B, k) both

    # 3. temperature: probabilities of 0.50 0.30 0.15 0.05 become 0.68 0.25 0.06 0.01 at 0.5, which
    #    is safer and duller, and 0.38 0.29 0.21 0.12 at 2, bolder and less coherent. (The maximum
    #    goes first, which changes nothing: a small divisor makes numbers too large for e^x)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = (logits / temperature).softmax(dim=-1)  # (B, k or V)
    # their sums, in float64 since there may be 200,000 small ones, and on the CPU, since not every
    # device has that type
    cumulative = probabilities.cpu().double().cumsum(dim=-1)
    end = cumulative[:, -1:]  # 1, but for rounding

    # 4. top-p, the nucleus: of what is left, the fewest tokens that together reach probability
    #    top_p; at 0.9 the first three of 0.50 0.30 0.15 0.05. Where the model is sure that is one
    #    or two, where it is not hundreds; any fixed k is wrong for one of them. At 0.95 thousands
    #    of tokens with almost nothing each are left out, which would otherwise come up in every
    #    twentieth place and spoil the text (arXiv:1904.09751)
    if top_p < 1:
        most = cumulative.size(-1) - 1
        last = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=most)
        end = cumulative.gather(-1, last)

    # 5. inversion: for 0.50 0.30 0.15 0.05 the sums are 0.50 0.80 0.95 1; the number 0.87 lies
    #    between the second and the third, so the third token it is. A uniform number falls into an
    #    interval as often as the interval is long, and that is the token's probability
    index = torch.searchsorted(cumulative, uniform[:, None] * end, right=True)  # (B, 1)
    index = index.to(logits.device)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def penalise(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) in which the tokens of context (B, T) are less likely: CTRL, arXiv:1909.05858.

    Positive ones are divided by the penalty as in the paper, and negative ones multiplied.
    """
    seen = logits.gather(-1, context)  # (B, T)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    num_samples: int = 1,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    unused: Sequence[int] = (),
    pick: Callable[..., Tensor] = pick,
    **options,
) -> Iterator[list[int]]:
    """Yields `max_tokens` times the next token of each of `num_samples` continuations.

    `options` go to `pick`: temperature, top_k and top_p, unless you bring a `pick` of your own. Ids
    in `unused` are never picked. Of the prompt, which must have a token, the last `block_size`
    count. Goes on behind an end-of-text: to stop there is for the caller, see `TextStream`. Raises
    ValueError for an empty prompt, at the first `next`.
    """
    if not prompt:
        raise ValueError("the prompt has no token: a new document begins with end-of-text")
    limit = model.config.block_size
    device = next(model.parameters()).device
    left_out = torch.tensor(unused, dtype=torch.long, device=device)
    # keyed by (seed, i) and not drawn from the device's one stream of random numbers: those of
    # sample i are the same on every device and however many others are made beside it, and so is
    # its text, unless a rounding moves a boundary between two tokens
    draws = [random.Random(f"{seed} {i}") for i in range(num_samples)]

    # the prompt is read once, however many samples continue it
    context = torch.tensor([prompt[-limit:]], device=device)  # (1, T)
    cache = model.new_cache(size=min(limit, context.size(1) + max_tokens))
    logits = prefill(model, context, cache)  # (1, V)
    cache.expand(num_samples)
    context = context.expand(num_samples, -1)  # (B, T)
    logits = logits.expand(num_samples, -1)  # (B, V)

    for left in range(max_tokens, 0, -1):
        if len(left_out):
            logits = logits.index_fill(-1, left_out, -math.inf)
        if repetition_penalty != 1:
            logits = penalise(logits, context, repetition_penalty)
        uniform = torch.tensor([draw.random() for draw in draws], dtype=torch.float64)
        token = pick(logits, uniform, **options)  # (B,)
        context = torch.cat((context, token[:, None]), dim=1)  # (B, T + 1)
        yield token.tolist()
        if left == 1:
            return
        if cache.length < limit:
            logits = decode_one_token(model, token, cache)
        else:
            # the context is full. To drop its first token alone would leave keys and values in the
            # cache that were computed while looking at it (and learned positions would all move):
            # everything would have to be read anew, T positions for each token. Dropping half makes
            # that rare: T / 2 positions every T / 2 tokens, one more for each
            context = context[:, -max(1, limit // 2) :]
            logits = prefill(model, context, cache)


class TextStream:
    """Tokens in, text out, as soon as it is certain. `done` after an end-of-text or a stop string.

    A token is a piece of bytes and not of characters: the three bytes of 文 may come in two tokens.
    Until the last is there nothing can be shown. Held back is also what may be the beginning of one
    of the `stop` strings; the one that was met is `stopped_by`.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.ends = tokenizer.ends
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.done = False
        self.stopped_by = ""

    def feed(self, token: int) -> str:
        """The text that `token` makes certain."""
        if self.done:
            return ""
        if token in self.ends:
            return self.end()
        text = self.held + self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = {text.find(stop): stop for stop in self.stop if stop in text}
        if found:
            first = min(found)
            self.stopped_by = found[first]
            self.held = ""
            self.done = True
            return text[:first]
        # the longest ending of the text that begins a stop string
        begun = [n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])]
        certain = len(text) - max(begun, default=0)
        self.held = text[certain:]
        return text[:certain]

    def end(self) -> str:
        """What is still held back, when no more tokens come."""
        text = "" if self.done else self.held + self.decoder.decode(b"", final=True)
        self.held = ""
        self.done = True
        return text
