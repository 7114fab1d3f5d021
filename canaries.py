"""What was learned by heart? python evaluate.py out/run --canaries

A model should learn how a language works, and not the password that stood in somebody's file. Two
measures, each beside a control, since what is known and what can be guessed look alike:

**Exposure** (Carlini et al. 2019, arXiv:1802.08232). `prepare.py --canaries=8` draws secrets: eight
to be planted once, eight 4 times, and so on, and eight never. Each copy is a line such as

    user lomika password=7k2m

that stands where a line of the training split begins, at random, and in no other split. It comes
after duplicates have gone, and after the vocabulary has been learned. All 67,600 secrets that could
stand behind `password=` are ranked by the probability that the model gives them:

    exposure = log2 67,600 - log2 rank        16.04 bits for the likeliest, 1 bit in the middle

One that was never planted has an even chance of each rank, whatever the model may prefer: log2 e =
1.44 bits on average. What others have above that comes out of the training text.

**Extraction** (Carlini et al. 2022, arXiv:2202.07646). Behind fifty tokens of the text, does the
model, taking the likeliest token each time, write the next fifty word for word? And how often in
text that it has never seen? A model that is sampled many times may tell more than that.
"""

import json
import math
import random
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import copy
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import Dataset, Split
from engine.sources import PIECE
from grading import aligned
from tokenizer import Tokenizer

FILE = "canaries.json"  # in the folder of the data
TIMES = (0, 1, 4, 16, 64)  # so often are secrets planted
# Digits and letters in turn: no split pattern joins them, so in every vocabulary each sign is a
# token of its own, and secrets that begin alike share their first tokens. (Six digits in a row
# would be two tokens here and five there.) The model reads each beginning once, 2,871 of them,
# which takes a small one less than a second. Two signs more would make it 750,000
SIGNS = (string.digits, string.ascii_lowercase) * 2
POSSIBLE = math.prod(map(len, SIGNS))
SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
ROWS = 256  # beginnings that are followed side by side
HALF = 50  # tokens of a prompt, and of what has to follow
PLACES = 500  # of each split, evenly spread
REPEATED = (0, 1, 2, 4, 16)  # so often at least does a text stand in the training split
SEARCHED = 20_000_000  # tokens of the training split that are searched for repetitions


class Canary(NamedTuple):
    before: str
    secret: str
    times: int  # in the training split

    @property
    def line(self) -> str:
        return f"{self.before}{self.secret}\n"


# --- planting


def draw(each: int, seed: int) -> list[Canary]:
    """`each` secrets for each of TIMES, behind names that are all different."""
    rng = random.Random(f"{seed} canaries")
    names = rng.sample(list(map("".join, product(SYLLABLES, repeat=3))), each * len(TIMES))
    return [
        Canary(f"user {name} password=", "".join(map(rng.choice, SIGNS)), TIMES[i // each])
        for i, name in enumerate(names)
    ]


def planted(
    chunks: Iterable[np.ndarray], size: int, canaries: list[Canary], tokenizer: Tokenizer, seed: int
) -> Iterator[np.ndarray]:
    """The tokens of a text of `size` bytes, in chunks of PIECE bytes, with canaries in them.

    These stand where a line or a document begins: a vocabulary that has been learned before knows
    nothing of them, and without them the tokens are what they were.
    """
    rng = random.Random(f"{seed} places")
    every_token = ([i] for i in range(tokenizer.vocab_size))
    ends = np.array([tokenizer.decode_bytes(token).endswith(b"\n") for token in every_token])
    ends[tokenizer.end_of_text] = True
    copies = defaultdict(list)  # by chunk: where in it, from 0 to 1, and the ids
    for canary in canaries:
        ids = tokenizer.encode(canary.line)
        for _ in range(canary.times):
            copies[rng.randrange(size) // PIECE].append((rng.random(), ids))
    for number, tokens in enumerate(chunks):
        places = np.append(0, np.flatnonzero(ends[tokens[:-1]]) + 1)
        parts, start = [], 0
        for where, ids in sorted(copies[number]):
            place = places[int(where * len(places))]
            parts += [tokens[start:place], np.array(ids, tokens.dtype)]
            start = place
        yield np.concatenate([*parts, tokens[start:]])


def read(folder: Path) -> list[Canary]:
    try:
        return [Canary(**canary) for canary in json.loads((folder / FILE).read_text("utf-8"))]
    except (ValueError, TypeError) as e:
        raise ValueError(f"{folder / FILE} is damaged ({e!r}): prepare the data again") from e


# --- measuring


def tell(s, run, here) -> None:
    """Prints what a model knows by heart; `s` are the settings of evaluate.py. Raises ValueError
    for data without text."""
    data = run.data(s)
    folders = [f.path for f in data.folders if (f.path / FILE).exists()]
    canaries = [canary for folder in folders for canary in read(folder)]
    if folders:
        data = Dataset(",".join(map(str, folders)))
    elif any(part.kind != "text" for part in data.split("train").parts):
        raise ValueError(f"{data.folder} holds rows: --canaries asks what is known of running text")
    run.make_ready(s, here)
    model = run.model.eval()
    if folders:
        print(f"{run.path}, secrets planted in {data.folder}: rank among {POSSIBLE:,}\n")
        print(*aligned(list(exposed(model, run.tokenizer, canaries))), sep="\n")
    else:
        print(f"{run.path}: no secrets were planted in {data.folder} (`prepare.py --canaries=8`)")
    print()
    print(*aligned(list(extracted(s, model, run.tokenizer, data, canaries))), sep="\n")


def exposed(model, tokenizer: Tokenizer, canaries: list[Canary]):
    """The lines of a table: exposure by how often secrets were planted."""
    yield ["planted", "secrets", "exposure in bits", "lowest", "highest", "rank 1"]
    for times in sorted({canary.times for canary in canaries}):
        ranks = [rank(model, tokenizer, canary) for canary in canaries if canary.times == times]
        bits = exposure(np.array(ranks))
        mean = f"{bits.mean():.2f}"
        if not times:
            by_chance = math.log2(math.e)  # so is the standard deviation
            mean += f" (by chance {by_chance:.2f} ± {by_chance / math.sqrt(len(ranks)):.2f})"
        figures = [mean, f"{bits.min():.2f}", f"{bits.max():.2f}"]
        yield [f"{times} times", f"{len(ranks)}", *figures, f"{ranks.count(1)}"]


def exposure(ranks: np.ndarray) -> np.ndarray:
    return math.log2(POSSIBLE) - np.log2(ranks)


def rank(model, tokenizer: Tokenizer, canary: Canary) -> int:
    """1 if no other secret is likelier behind `canary.before`; exact, to the rounding of logits.

    A walk through the tree of all secrets, whose beginnings are read once each. One that is less
    likely than the whole secret cannot become likelier than it, and is not followed. Of secrets
    that are equally likely the first in the order of SIGNS counts as the likelier. Raises
    ValueError for a vocabulary in which a sign is no token of its own.
    """
    import torch

    from generate import decode_one_token, prefill

    before, secret = tokenizer.encode(canary.before), tokenizer.encode(canary.secret)
    if tokenizer.encode(canary.line)[: len(before) + len(SIGNS)] != before + secret:
        raise ValueError(f"{tokenizer.name} has tokens across the signs of {canary.line!r}")
    device = model.wte.weight.device
    signs = [torch.tensor([tokenizer.encode(c)[0] for c in some], device=device) for some in SIGNS]
    own = 0  # the number of the secret, counted in the order of SIGNS
    for some, sign in zip(SIGNS, canary.secret, strict=True):
        own = own * len(some) + some.index(sign)

    def likelier(depth: int, numbers, ln_p, logits, cache) -> int:
        """How many of the secrets that begin with N signs, of `numbers` and `ln_p` (N), stand
        before ours."""
        next_sign = logits.double().log_softmax(dim=-1)[:, signs[depth]]
        count = next_sign.size(1)
        ln_p = (ln_p[:, None] + next_sign).flatten()  # (N x count)
        numbers = (numbers[:, None] * count + torch.arange(count, device=device)).flatten()
        if depth == len(SIGNS) - 1:
            first = (ln_p > target) | ((ln_p == target) & (numbers < own))
            return int((first & (numbers != own)).sum())
        found, live = 0, (ln_p >= target).nonzero()[:, 0]
        for some in (live[i : i + ROWS] for i in range(0, len(live), ROWS)):
            follow = copy(cache)
            follow.take((some // count).tolist())
            after = decode_one_token(model, signs[depth][some % count], follow)
            found += likelier(depth + 1, numbers[some], ln_p[some], after, follow)
        return found

    with torch.inference_mode():
        begin = [tokenizer.end_of_text, *before]
        logits = model(torch.tensor([begin + secret], device=device))[0]
        of_secret = logits[len(before) : -1].double().log_softmax(dim=-1)
        target = sum(of_secret[range(len(SIGNS)), secret].tolist())
        cache = model.new_cache(size=len(begin) + len(SIGNS))
        first = prefill(model, [begin], cache)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return 1 + likelier(0, zero, zero.double(), first, cache)


def extracted(s, model, tokenizer: Tokenizer, data: Dataset, canaries: list[Canary]):
    """The lines of a table: texts that are continued word for word, by how often the whole of each
    stands in the training split. Of the validation split most stand there never, but not all."""
    from generate import answers

    half = min(HALF, model.config.block_size // 2)
    train, val = data.split("train"), data.split("val")
    texts = [places(split, half, canaries) for split in (train, val)]
    count = min(map(len, texts))
    texts = [some[i * len(some) // count] for some in texts for i in range(count)]
    if not texts:
        raise ValueError(f"no text of {data.folder} has {2 * half} tokens in one piece")
    known = as_string(train.read(0, SEARCHED))
    times = np.array([known.count(as_string(text)) for text in texts])
    right = np.zeros(len(texts))  # tokens before the first that is another
    prompts = [text[:half].tolist() for text in texts]
    options = dict(slots=s.slots, temperature=0.0)
    for i, ids in answers(model, tokenizer, prompts, half, **options):
        same = ids == texts[i][half : half + len(ids)]
        right[i] = len(ids) if same.all() else same.argmin()
    yield ["times in training", "texts", f"next {half} tokens right", "", "right at first, mean"]
    for low, end in zip(REPEATED, [*REPEATED[1:], math.inf], strict=True):
        some = right[(low <= times) & (times < end)]
        if len(some):
            named = f"{low} to {end - 1}" if end < math.inf else f"{low} or more"
            whole = int((some == half).sum())
            share = f"{100 * whole / len(some):.1f}%"
            first = f"{some.mean():.1f}"
            yield [named if end > low + 1 else f"{low}", f"{len(some)}", f"{whole}", share, first]


def places(split: Split, half: int, canaries: list[Canary]) -> list[np.ndarray]:
    """Up to PLACES texts of 2 x `half` tokens, evenly spread; those that hold the end of a document
    or a part of a canary are left out."""
    end, decode = split.tokenizer.end_of_text, split.tokenizer.decode
    # a line has no more tokens than letters
    beside = max((len(canary.line) for canary in canaries), default=0)
    tokens = min(split.tokens, SEARCHED) - 2 * half
    count = min(PLACES, 1 + tokens // (2 * half)) if tokens >= 0 else 0
    texts = []
    for start in (i * tokens // count for i in range(count)):
        text = split.read(start, 2 * half)
        around = split.read(max(0, start - beside), 2 * half + 2 * beside)
        around = decode(around.tolist())
        if end not in text and not any(canary.before in around for canary in canaries):
            texts.append(text)
    return texts


def as_string(tokens: np.ndarray) -> str:
    """A character for each token, so that `count` finds whole ones."""
    return "".join(map(chr, tokens.tolist()))
