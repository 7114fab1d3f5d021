"""Ten-way classification: some lines of Python's own library, and the package they come from.

Ten packages that every Python has on every system; files are split as in data/python, so the lines
of a test come from files of which a model has seen nothing. Files are few and large: of 5% some
packages have none in the test. So prepare both with --test=0.2, where most of the ten have some.
"""

import random
from collections.abc import Iterator

from tasks import TEST, VAL, library, row

PACKAGES = ("asyncio", "email", "html", "http", "importlib")
PACKAGES += ("logging", "multiprocessing", "unittest", "urllib", "xml")
LINES = 10  # that are not empty, in a snippet
LONGEST = 500  # characters


def rows(split: str, seed: int, val: float = VAL, test: float = TEST) -> Iterator[dict]:
    """Snippets that do not overlap, in an order that the seed decides."""
    found = []
    for path, text in library.files(split, val, test):
        if path.parts[0] not in PACKAGES:
            continue
        lines = [line for line in text.split("\n") if line.strip()]
        for i in range(0, len(lines) - LINES + 1, LINES):
            snippet = "\n".join(lines[i : i + LINES])[:LONGEST]
            found.append(row("modules", snippet, path.parts[0], group=str(path)))
    random.Random(f"{split} {seed}").shuffle(found)
    yield from found


def right(prompt: str, answer: str, reference: str = "") -> bool:
    return bool(reference) and answer.strip() == reference
