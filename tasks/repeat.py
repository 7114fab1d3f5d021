"""A random string, and the same again behind a bar: fkzq|fkzq. Text, and no rows.

How well it can be predicted is known exactly. Nothing foretells a random letter: ln 26 = 3.26 nats
each. The length, one of nine, costs ln 9 in all. Behind the bar everything stands there already: a
model that looks back loses nothing, one that cannot loses as much once more. So it is the smallest
text that asks for attention, and the specimen, on which docs/learn shows what attention does, has
learned from it.

    python prepare.py repeat --tokenizer=bytes
    python train.py config/specimen.py
"""

import random
from collections.abc import Iterator
from itertools import islice
from string import ascii_lowercase as LETTERS

from tasks import TEST, VAL, distinct

ROWS = dict(train=60_000, val=1_000, test=1_000)
SHORTEST, LONGEST = 4, 12  # letters; of fewer there are too few strings for none to come twice
BAR = "|"


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """Documents of which no two are alike."""
    for text in islice(distinct(string, str, split, seed, val, test), ROWS[split]):
        yield dict(text=f"{text}{BAR}{text}")


def string(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))


def right(prompt: str, answer: str, reference: str = "") -> bool:
    return prompt.strip() == answer.strip() + BAR
