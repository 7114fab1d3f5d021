"""Handwritten digits, to be drawn: the label asks, and the answer is the picture, pixel by pixel.

    7      AAc3/gAAAA33/3AAAA...     8 x 8 pixels in 17 greys, each a letter (engine/pictures.py)

To a Transformer a picture is a text like any other: it learns which pixel comes next (image GPT,
Chen et al. 2020). The 1,797 digits of 43 people (archive.ics.uci.edu/dataset/80) ship with
scikit-learn. A digit is asked for in many rows, and each is another picture of it: so what is held
back are pictures, and not prompts.

    python prepare.py digits --tokenizer=bytes --test=0.2      a token for each pixel
"""

import random
from collections.abc import Iterator
from functools import lru_cache

from engine import pictures
from engine.index import uniform
from tasks import TEST, VAL, split_of

GREYS, WIDTH = 17, 8
NEAREST = 3  # digits that say what a drawing is


@lru_cache
def all_digits() -> tuple:
    """The pictures (N, 8, 8) with a brightness from 0 to 1, and their labels (N). ValueError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ValueError("the digits ship with scikit-learn: pip install scikit-learn") from e
    found = load_digits()
    return found.images / (GREYS - 1), found.target


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """A row for each picture, in an order that the seed decides; a hash of it says its split."""
    found = []
    for picture, label in zip(*all_digits(), strict=True):
        text = pictures.letters(picture, GREYS)
        if split_of(uniform(text.encode()), val, test) == split:
            found.append(pictures.row("digits", str(label), text))
    random.Random(f"{split} {seed}").shuffle(found)
    yield from found


def right(prompt: str, answer: str, reference: str = "") -> bool:
    """Whether most of the digits that look most like the drawing are what was asked for."""
    answer = answer.strip()
    if len(answer) != WIDTH**2 or set(answer) - set(pictures.LETTERS):
        return False
    known, labels = all_digits()
    away = ((known - pictures.pixels(answer, WIDTH, WIDTH)) ** 2).sum(axis=(1, 2))
    near = [str(label) for label in labels[away.argsort(kind="stable")[:NEAREST]]]
    return max(near, key=near.count) == prompt.strip()
