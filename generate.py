"""From a model to text: prefill, pick a token, decode it, pick the next.

    prompt ── encode ──▶ tokens ── prefill ──▶ logits ── pick ──▶ token ── TextStream ──▶ text
                                                 ▲                  │
                                                 └─ decode_one_token ┘

A GPT tells how likely each token of its vocabulary is to come next. To generate is to draw one,
to append it, and to ask again. At its plainest that is

    for _ in range(max_tokens):
        logits = model(tokens[:, -block_size:])[:, -1]                 # of the last position
        token = torch.multinomial(logits.softmax(dim=-1), 1)           # (B, 1)
        tokens = torch.cat((tokens, token), dim=1)

and what follows adds a cache, choices, and text. Shapes: B samples, T time, V vocabulary.
"""

import codecs
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

import dataset
from cache import KVCache
from model import GPT
from pick import penalise, pick, require_finite, uniform_numbers

PASS = 512  # tokens of prompts in one pass: of fewer, each takes longer
NO_TOKEN = "the prompt has no token: a new document begins with end-of-text"


@torch.inference_mode()
def prefill(model: GPT, texts: list[list[int]], cache: KVCache, markers=None) -> Tensor:
    """Reads a text for each row in one pass, which fills the cache; logits of the next: (B, V).

    Short texts are padded at their end: no position of theirs looks there, and the cache will not
    know of it. A model whose prompts see themselves whole (config.mask) needs the
    tokenizer's `markers`, to know where they end.
    """
    device = cache.k.device
    lengths = torch.tensor([len(text) for text in texts])  # (B)
    tokens = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)  # (B, T)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = visible(model, tokens, markers)
    cache.lengths.zero_()
    x = model.trunk(tokens.to(device), mask, cache=cache)  # (B, T, C)
    cache.lengths.copy_(lengths)
    last = x[torch.arange(len(texts), device=device), (lengths - 1).to(device)]  # (B, C)
    return model.logits(last)


def visible(model: GPT, tokens: Tensor, markers) -> Tensor | None:
    """Who may look where while texts `tokens` (B, T) are read: (B, 1, T, T), or None for causal."""
    policy = model.config.mask
    if policy == "full":
        raise ValueError("mask='full' makes an encoder, which sees what follows: it cannot write")
    if policy == "causal" or markers is None or not (tokens == markers.assistant).any():
        return None  # under prefix, too, running text is causal: it has no prompt
    _, mask = dataset.layout(tokens.numpy(), markers, policy)
    return torch.from_numpy(mask).to(model.wte.weight.device)


@torch.inference_mode()
def decode_one_token(model: GPT, token: Tensor, cache: KVCache) -> Tensor:
    """Appends one token to each sample, token (B,); logits of the one after it: (B, V).

    Why a cache: attention looks back at the keys and values of all positions, and since none sees
    what is read later, those never change. Without a cache each new token means reading the whole
    text again, T^2 / 2 positions for T tokens; with it only the token itself, T positions. For 200
    tokens after a prompt of 56 that is 31,100 positions against 255.
    """
    return model(token[:, None], cache=cache)[:, -1]


def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    num_samples: int = 1,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    unused: Sequence[int] = (),
    markers=None,
    pick: Callable[..., Tensor] = pick,
    **options,
) -> Iterator[list[int]]:
    """Yields `max_tokens` times the next token of each of `num_samples` continuations.

    The model is in eval mode. `options` go to `pick`: temperature, top_k and top_p of pick.py's, or
    those of a function of your own that you bring as `pick`. Ids in `unused` are never picked;
    `markers` as in `prefill`. Of the prompt, which must have a token, the last `block_size` count.
    Goes on after an end-of-text: to stop there is for the caller, see `TextStream`. Raises
    ValueError for an empty prompt, at the first `next`.
    """
    if not prompt:
        raise ValueError(NO_TOKEN)
    limit = model.config.block_size
    device = model.wte.weight.device
    left_out = torch.tensor(unused, dtype=torch.long, device=device)
    uniform = uniform_numbers(seed, num_samples)

    # the prompt is read once, however many samples continue it
    prompt = prompt[-limit:]
    cache = model.new_cache(size=min(limit, len(prompt) + max_tokens))
    logits = prefill(model, [prompt], cache, markers)  # (1, V)
    cache.take([0] * num_samples)  # its one row, copied for each sample
    logits = logits.expand(num_samples, -1)  # (B, V)
    context = [list(prompt) for _ in range(num_samples)]  # B times T tokens

    for n in range(1, max_tokens + 1):
        if left_out.numel():
            logits = logits.index_fill(-1, left_out, -math.inf)
        if repetition_penalty != 1:
            logits = penalise(logits, torch.tensor(context, device=device), repetition_penalty)
        token = pick(logits, next(uniform), **options)  # (B,)
        new = token.tolist()
        for text, last in zip(context, new, strict=True):
            text.append(last)
        yield new
        if n == max_tokens:
            return
        if len(context[0]) <= limit:
            logits = decode_one_token(model, token, cache)
        else:
            # the context is full. To drop its first token alone would leave keys and values in the
            # cache that were computed while looking at it (and learned positions would all move):
            # everything would have to be read anew, T positions for each token. Dropping half makes
            # that rare: T / 2 positions every T / 2 tokens, so one more for each token
            context = [text[-max(1, limit // 2) :] for text in context]
            logits = prefill(model, context, cache, markers)


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


# --- many prompts at once, and beam search: skip them on a first reading


@dataclass
class Answer:
    """One that is being written: to prompt `number`, with random numbers of its own."""

    number: int
    prompt: list[int]
    most: int  # tokens that it may have
    draw: random.Random
    tokens: list[int] = field(default_factory=list)


class Slots:
    """Answers that are written side by side, each in a row of one KV cache, its slot.

    `writing` are the answers in the first rows; `logits` (rows, V) those of their next token. Only
    rows that are taken are computed, but if `exact`: then always all, so that nothing depends on
    who stands beside.
    """

    def __init__(self, model: GPT, count: int, markers, exact: bool):
        self.model, self.markers, self.count, self.exact = model, markers, count, exact
        self.cache = model.new_cache(count, whole=exact)
        self.logits = torch.zeros(count, model.config.vocab_size, device=self.cache.k.device)
        self.writing: list[Answer] = []

    def free(self) -> int:
        return self.count - len(self.writing)

    def admit(self, answers: list[Answer]) -> None:
        """Reads prompts into free slots, each once, however many answers it is to have: those of
        about one length together, up to PASS tokens."""
        alike: dict[tuple, list[Answer]] = {}
        for answer in answers:
            alike.setdefault((*answer.prompt,), []).append(answer)
        prompts = sorted(alike, key=len)
        while prompts:
            longest = len(prompts[-1])
            count = 1 if self.exact else max(1, PASS // longest)
            some = prompts[-count:]
            del prompts[-count:]
            fresh = self.model.new_cache(len(some), longest)
            new = prefill(self.model, [*map(list, some)], fresh, self.markers)
            rows = [row for row, prompt in enumerate(some) for _ in alike[prompt]]
            if len(rows) > len(some):
                fresh.take(rows)
            self.place([answer for prompt in some for answer in alike[prompt]], fresh, new[rows])

    def place(self, answers: list[Answer], read: KVCache, logits: Tensor) -> None:
        """Puts prompts that have been `read`, one for each of `answers` or one for all, into free
        slots, with the `logits` (B, V) after them."""
        rows = [len(self.writing) + i for i in range(len(answers))]
        self.cache.put(rows, read)
        self.logits[rows] = logits
        self.writing += answers

    def remove(self, row: int) -> None:
        """Frees a slot: the answer in the last one that is taken moves into it."""
        last = len(self.writing) - 1
        if row != last:
            self.cache.move(last, row)
            self.logits[row] = self.logits[last]
            self.writing[row] = self.writing[last]
        self.cache.lengths[last] = 0
        del self.writing[last]

    def decode(self) -> None:
        """The last token of each answer goes into the cache, for the logits after it."""
        taken = len(self.writing)
        rows = self.count if self.exact or self.cache.fixed else taken
        last = [answer.tokens[-1] for answer in self.writing] + [0] * (rows - taken)
        token = torch.tensor(last, device=self.logits.device)  # (rows)
        self.logits[:rows] = decode_one_token(self.model, token, self.cache.first(rows))
        self.cache.lengths[taken:] = 0  # what a free slot was given will be written over


def to_answer(
    prompts: Iterable[list[int]], limit: int, max_tokens: int, seed: int, keys=None
) -> Iterator[Answer]:
    """An empty answer to each prompt, of which the last `limit` tokens count."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(NO_TOKEN)
        prompt = prompt[-limit:]
        most = min(max(1, max_tokens), limit + 1 - len(prompt))
        key = number if keys is None else keys[number]
        yield Answer(number, prompt, most, random.Random(f"{seed} {key}"))


def answers(
    model: GPT,
    tokenizer,
    prompts: Iterable[list[int]],
    max_tokens: int,
    *,
    slots: int = 32,
    seed: int = 0,
    keys: Sequence | None = None,
    with_end: bool = False,
    exact: bool = False,
    pick: Callable[..., Tensor] = pick,
    **options,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (number of a prompt, the tokens of its answer, `with_end` or not) as each answer ends.

    It ends at one of `tokenizer.ends`, after `max_tokens`, or where the context is full; of a
    prompt the last `block_size` tokens count. `slots` answers are written side by side, which
    bounds the memory, however many prompts there are. Number i draws from (seed, i), or from (seed,
    keys[i]), wherever its prompt stands. What stands beside it changes the last digits of its
    logits, since sums are cut into other parts; not so if `exact`: then prompts are read one by
    one, and attention always spans the whole cache. `pick` and `options` are as in `generate`.
    Raises ValueError for an empty prompt.
    """
    left_out = torch.tensor(tokenizer.unused, device=model.wte.weight.device, dtype=torch.long)
    waiting = to_answer(prompts, model.config.block_size, max_tokens, seed, keys)
    beside = Slots(model, slots, tokenizer.markers, exact)
    while True:
        # 1. the next prompts move in when a quarter of the slots is free, since together they are
        #    read faster
        if 4 * beside.free() >= slots:
            beside.admit(list(islice(waiting, beside.free())))
            if not beside.writing:
                return

        # 2. each gets a token
        uniform = [answer.draw.random() for answer in beside.writing]
        uniform = torch.tensor(uniform, dtype=torch.float64)
        logits = beside.logits[: len(uniform)].index_fill(-1, left_out, -math.inf)
        token = pick(logits, uniform, **options)  # (B,)

        # 3. those that have ended move out, the others go on
        for row, new in reversed([*enumerate(token.tolist())]):
            answer = beside.writing[row]
            ended = new in tokenizer.ends
            if with_end or not ended:
                answer.tokens.append(new)
            if ended or len(answer.tokens) >= answer.most:
                beside.remove(row)
                yield answer.number, answer.tokens
        if beside.writing:
            beside.decode()


def beam(
    model: GPT,
    tokenizer,
    prompt: list[int],
    max_tokens: int,
    width: int = 4,
    length_penalty: float = 0.6,
) -> list[int]:
    """The answer with the highest score that beam search finds, without its end.

    Greedy takes the likeliest token each time, and may so miss a likelier sentence. Beam search
    keeps the `width` likeliest beginnings. The probability of a text falls with each token, so the
    shortest would win: its logarithm is divided by ((5 + n) / 6)^length_penalty for n tokens
    (arXiv:1609.08144, equation 14). For free text that is no good: the likeliest is dull, and
    repeats itself (arXiv:1904.09751); where little can be right, as in translation, it helps.
    """
    [answer] = to_answer([prompt], model.config.block_size, max_tokens, seed=0)
    device = model.wte.weight.device
    left_out = torch.tensor(tokenizer.unused, device=device, dtype=torch.long)
    cache = model.new_cache(size=len(answer.prompt) + answer.most - 1)
    logits = prefill(model, [answer.prompt], cache, tokenizer.markers)  # (1, V)
    texts: list[list[int]] = [[]]  # of each beam, a row of the cache
    scores = torch.zeros(1)  # ln p of each
    found = []  # (score, text) of those that have ended
    for n in range(1, answer.most + 1):
        # 1. each beam with each token after it, the likeliest first: so many that `width` of them
        #    go on even if each beam comes with all ends there are
        require_finite(logits.amax(dim=-1))
        logits = logits.index_fill(-1, left_out, -math.inf)
        ln_p = scores[:, None] + logits.cpu().log_softmax(dim=-1)  # (beams, V)
        count = min(width * (1 + len(tokenizer.ends)), ln_p.numel())
        best, index = ln_p.flatten().topk(count)

        # 2. of the best `width`, those that end are found; the best `width` others go on
        going = []
        for rank, (score, i) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            row, token = divmod(i, ln_p.size(1))
            ended = token in tokenizer.ends
            if (ended or n == answer.most) and rank < width:
                text = texts[row] + [token] * (not ended)
                found.append((score / ((5 + n) / 6) ** length_penalty, text))
            elif not ended and len(going) < width:
                going.append((score, row, token))
        if len(found) >= width or n == answer.most:
            break

        # 3. the cache follows them
        rows = [row for _, row, _ in going]
        texts = [texts[row] + [token] for _, row, token in going]
        scores = torch.tensor([score for score, _, _ in going])
        cache.take(rows)
        token = torch.tensor([token for _, _, token in going], device=device)
        logits = decode_one_token(model, token, cache)
    return max(found)[1]
