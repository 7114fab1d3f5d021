"""Sums of up to three digits, the answer written from its lowest digit: 57+68= gives 521.

Why reversed: a carry runs from the low digits to the high ones. In 125, the first digit depends on
all digits of both numbers, so the whole sum must be done before anything is written, in one pass
through the layers. From the low end, a digit takes the two digits above it and a carry, which is
known from the column before, whose digits and result stand there: a small rule, the same one each
time (arXiv:2307.03381). tasks/sums_plain.py asks for the same sums written plainly.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice

from tasks import TEST, VAL, distinct, row

ROWS = dict(train=20_000, val=1_000, test=1_000)
LENGTHS = (1, 2, 3, 3, 3, 3)  # in digits; drawn evenly, 9 of 10 numbers below 1,000 have three
PROMPT = re.compile(r"(\d{1,3})\+(\d{1,3})=")


def rows(
    split: str, seed: int, val: float = VAL, test: float = TEST, task: str = "sums"
) -> Iterator[dict]:
    """Rows of which no two are alike. If 57+68 is a test, neither it nor 68+57 is in training."""
    for a, b in islice(distinct(pair, sorted, split, seed, val, test), ROWS[split]):
        yield row(task, f"{a}+{b}=", written(a + b, task))


def pair(rng: random.Random) -> tuple[int, int]:
    a, b = (rng.randrange(10 ** rng.choice(LENGTHS)) for _ in range(2))
    return a, b


def written(total: int, task: str) -> str:
    return str(total) if task == "sums_plain" else str(total)[::-1]


def right(prompt: str, answer: str, reference: str = "", task: str = "sums") -> bool:
    asked = PROMPT.fullmatch(prompt.strip())
    return bool(asked) and answer.strip() == written(int(asked[1]) + int(asked[2]), task)
