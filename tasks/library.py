"""The files of Python's standard library, shared out as `prepare.py python` shares them out.

So what a model has read while it was pretrained on data/python is never asked in a test. Whoever
holds back other fractions (--test=0.2) prepares both with them, and data/python with seed 0, the
default: by it files are split here, whatever the seed of the rows.
"""

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from engine.index import draw
from engine.sources import Complaints, file_documents, library
from engine.spool import clean
from engine.tables import Reading
from tasks import split_of


class File(NamedTuple):
    path: Path  # below the library's root
    text: str
    size: int  # bytes
    u: float  # uniform in [0, 1): decides about its split


def files(split: str, val: float, test: float) -> Iterator[tuple[Path, str]]:
    """Path below the library's root, and cleaned text, of each file of a split."""
    found = all_files()
    share = sum(file.size for file in found) * min((f for f in (val, test) if f), default=1)
    for file in found:
        is_cut = file.size > share  # train | val | test, and so mostly in training
        if split == ("train" if is_cut else split_of(file.u, val, test)):
            yield file.path, file.text


@lru_cache(maxsize=1)
def all_files() -> list[File]:
    """All that are text, each text once."""
    root, found, seen = Path(sysconfig.get_path("stdlib")), [], set()
    for path in library():
        for pieces in file_documents(path, Reading()):
            text = ""
            with Complaints().noted():
                text = "".join(clean(pieces, Counter(), lambda position: None))
            data = text.encode(errors="replace")
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                found.append(File(path.relative_to(root), text, len(data), draw(digest, seed=0)))
    return found
