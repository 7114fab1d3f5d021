"""Text to token shards: python prepare.py SOURCE... --out=data/name --tokenizer=bpe

1. read      the documents of every source: files, or rows of a table     engine/sources.py
2. clean     one form for one text; nothing empty, nothing twice          engine/spool.py
3. split     into train, val and test, by document
4. learn     byte-pair encoding from the training split                   tokenizer.py
5. encode    each split into shards, on all cores                         dataset.py
"""

import hashlib
import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex

from dataset import ShardWriter
from engine import encodings, settings
from engine.files import atomic_folder
from engine.pipeline import Progress, clean_up_when_told_to_end, processes
from engine.prepared import AlreadyPrepared, made_like, print_table
from engine.settings import BelowOne, Count
from engine.sources import PIECE, Complaints, documents, require
from engine.spool import SPLITS, Document, Spool, chunks, read_chunk
from tokenizer import SPLIT, Tokenizer, bpe_tokenizer, find_tokenizer

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and newline
PAGE = 1000  # bytes; shorter documents stay whole, unless there is only one


@dataclass
class Settings:
    source: tuple = ()  # files, folders, - for standard input, or the names python and shakespeare
    out: str = ""  # folder to write; by default data/<name of the first source>
    tokenizer: str = "bpe"  # bpe (learned here), bytes, a name in tiktoken, a run or data folder
    vocab_size: int = 4096  # of a bpe vocabulary: 256 bytes, what is learned, end-of-text
    val: BelowOne = 0.05  # fraction of the text for validation
    test: BelowOne = 0.05  # fraction of the text for the test split
    pattern: str = "*.txt,*.md,*.py,*.jsonl,*.jsonl.gz,*.parquet"  # which files of a folder count
    field: str = "text"  # field or column that holds the text of a row
    encoding: str = "utf-8"  # of files that are not UTF-8, such as gb18030 or cp1252
    skip_bad: bool = False  # leave out documents that cannot be read
    bpe_bytes: int = 32_000_000  # bpe learns from at most this much text, spread over the split
    seed: Count = 0  # of the hash that splits
    workers: Count = 0  # processes; 0 means one for each core
    overwrite: bool = False  # replace a set that was made from another text or with other settings


def main(argv: list[str]) -> None:
    clean_up_when_told_to_end()
    s = settings.load(Settings, argv, "Prepare text for training.", "source", nargs="*")
    if not s.source:
        raise ValueError("no source: name a text file, a folder, - for standard input, or python")
    prepare(s)


def prepare(s: Settings) -> None:
    """Writes the data set of settings `s`, or finds that it is there already. Raises ValueError."""
    settings.require(s.val + s.test < 1, s, "val", "a fraction, with test below 1")
    least = "at least 257: the bytes and end-of-text"
    settings.require(s.vocab_size >= 257, s, "vocab_size", least)
    settings.require(s.bpe_bytes >= PIECE, s, "bpe_bytes", f"at least {PIECE}")
    s.encoding = encodings.find(s.encoding)
    # known at once, and so are mistakes in it; bpe is learned below
    tokenizer = None if s.tokenizer == "bpe" else find_tokenizer(s.tokenizer)
    name = "stdin" if s.source[0] == "-" else Path(s.source[0]).absolute().name
    out = Path(s.out or f"data/{name.strip('.').split('.')[0] or 'text'}")
    free = ("out", "workers", "overwrite")  # settings that do not change the result
    wanted = {k: v for k, v in asdict(s).items() if k not in free}
    meta = dict(settings=json.loads(json.dumps(wanted)))  # as read back: tuples are lists
    began, report = time.monotonic(), Counter()
    try:
        found = made_like(out, meta, asdict(Settings()), s.overwrite)
        fixed = set(s.source) == {"shakespeare"} and s.tokenizer in ("bytes", "gpt2", "bpe")
        if found and fixed:  # a text and a tokenizer that never change: no second download
            raise AlreadyPrepared
        for source in s.source:
            require(source)
        with atomic_folder(out, replace=s.overwrite) as folder:
            with Spool(folder) as spool:
                read(s, spool, report)
                meta["text"] = spool.describe()
                if tokenizer:  # the run of that name may have been trained anew
                    meta["tokenizer_sha256"] = tokenizer.digest()
                if made_like(out, meta, asdict(Settings()), s.overwrite):
                    raise AlreadyPrepared
                split(s, spool)
            tokenizer = tokenizer or learn(s, folder / "spool_train")
            tokenizer.save(folder)
            meta |= dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.digest())
            meta["splits"] = encode(s, spool, tokenizer)
            text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
            (folder / "meta.json").write_text(text, encoding="utf-8")
        print_table(out, meta, report, time.monotonic() - began)
    except AlreadyPrepared:
        print(f"{out} is already prepared with these settings")


# --- 1. read


def read(s: Settings, spool: Spool, report: Counter) -> None:
    """Puts the cleaned documents of all sources into the spool, and what happened into `report`."""
    bad = Complaints()
    with Progress("reading") as progress:
        for source in s.source:
            for document in documents(source, s.pattern, s.field, s.encoding):
                with bad.noted():
                    report[spool.add(clean(document, report, progress))] += 1
    if bad.count and not s.skip_bad:
        raise ValueError(f"{bad}; --skip_bad leaves out what cannot be read")
    if not spool.size:
        raise ValueError(f"no text left to train on in {', '.join(s.source)}")
    report["unreadable documents"] = bad.count


# --- 2. clean


def clean(document: Iterable[str], report: Counter, progress: Progress) -> Iterator[str]:
    """The pieces of a document, in the one form that equal text is to have.

    An é is one character or an e with an accent behind it. In Unicode's form NFC (Annex 15) it is
    the former always: else one word would be two, with different tokens and half the examples each.
    """
    for piece in document:
        if not piece.isascii() and not unicodedata.is_normalized("NFC", piece):
            piece = unicodedata.normalize("NFC", piece)
            report["pieces brought to NFC"] += 1
        piece, removed = CONTROL.subn("", piece)
        report["control characters removed"] += removed
        report["bytes read"] += len(piece.encode(errors="replace"))
        progress(report["bytes read"])
        yield piece


# --- 3. split


def split(s: Settings, spool: Spool) -> None:
    """Shares the documents out to train, val and test, before anything is learned from them.

    A model that has read a text predicts it better than it will predict any other. Were windows or
    lines drawn, validation would ask for sentences whose neighbours it knows; were duplicates left
    in, for texts that it knows by heart (Lee et al. 2021, arXiv:2107.06499). So each document goes
    to one split whole, and a hash of its content decides: the same one whatever else is there.

    But among a few novels chance would leave a split empty, or make it one novel. So a document
    larger than a split's share of the text is cut in order at line ends, train | val | test; so is
    a single document of any size. Shorter ones than a page stay whole; where nothing is drawn for a
    split, it gets the document that came nearest.
    """
    share = spool.size * min((f for f in (s.val, s.test) if f), default=1)

    def is_cut(document: Document) -> bool:
        return spool.count == 1 or document.size > max(share, PAGE)

    def draws() -> Iterator[float]:
        return (draw(document, s.seed) for document in spool if not is_cut(document))

    val_end, test_end = s.val, s.val + s.test
    if len(list(islice(draws(), 3))) == 3:  # with fewer, nothing would be left to train on
        val_end = max(val_end, min(draws())) if s.val else 0.0
        nearest = min((u for u in draws() if u > val_end), default=1.0)
        test_end = max(test_end, nearest) if s.test else val_end
    with Progress("splitting", spool.size) as progress:
        for document in spool:
            progress(document.start)
            if is_cut(document):
                spool.put_in_order(document, s.val, s.test)
                continue
            u = draw(document, s.seed)
            name = "val" if s.val and u <= val_end else "test" if u <= test_end else "train"
            spool.put(name, document.start, document.start + document.size)
    if not spool.bytes["train"]:
        raise ValueError("nothing is left to train on: use more text, or smaller --val and --test")
    for name, fraction in (("val", s.val), ("test", s.test)):
        if fraction and not spool.bytes[name]:
            raise ValueError(
                f"nothing fell into the {name} split ({spool.count} documents, {spool.size} bytes):"
                f" use a larger --{name}, more text, or --{name}=0"
            )


def draw(document: Document, seed: int) -> float:
    """Uniform in [0, 1), and the same for equal documents."""
    hashed = hashlib.blake2b(b"%d " % seed + document.digest, digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


# --- 4. learn


def learn(s: Settings, path: Path) -> Tokenizer:
    """A byte-pair encoding of the training text alone, evenly spread over it.

    A vocabulary that has seen the validation text, too, has tokens for its rare words, and makes it
    look easier than a new text is.
    """
    total = chunks(path)
    keep = min(total, s.bpe_bytes // PIECE)
    evenly = [i * total // keep for i in range(keep)]
    words: Counter = Counter()
    with processes(s.workers) as each_chunk:
        for counted in each_chunk("counting words", count_words, path, evenly):
            words.update(counted)
    with Progress("learning tokens", s.vocab_size, unit=1, name="") as progress:
        tokenizer = bpe_tokenizer(words, s.vocab_size, progress)
    found = tokenizer.vocab_size
    if found < s.vocab_size:
        print(f"the text yields only {found} tokens, fewer than --vocab_size={s.vocab_size}")
    return tokenizer


def count_words(path: Path, number: int) -> Counter:
    words = Counter()
    for document in read_chunk(path, number).split("\0"):
        words.update(regex.findall(SPLIT, document))
    return words


# --- 5. encode


def encode(s: Settings, spool: Spool, tokenizer: Tokenizer) -> dict:
    """Writes the shards of every split, in order; returns what meta.json tells of them."""
    splits = {}
    with processes(s.workers, use_tokenizer, spool.folder) as each_chunk:
        for name in SPLITS:
            path = spool.folder / f"spool_{name}"
            writer = ShardWriter(spool.folder, name, tokenizer.vocab_size)
            for tokens in each_chunk(f"encoding {name}", encode_chunk, path):
                writer.write(tokens)
            writer.close()
            path.unlink()
            tokens = sum(shard["tokens"] for shard in writer.shards)
            splits[name] = dict(shards=writer.shards, tokens=tokens) | spool.written(name)
    return splits


def use_tokenizer(folder: Path) -> None:
    global tokenizer  # of this process
    tokenizer = Tokenizer.load(folder)


def encode_chunk(path: Path, number: int) -> np.ndarray:
    """The tokens of a chunk. Behind each document stands end-of-text: there the model learns that
    what follows has nothing to do with what came before, and how a text ends."""
    *ended, rest = map(tokenizer.encode_to_array, read_chunk(path, number).split("\0"))
    end = np.array([tokenizer.end_of_text], np.uint32)
    tokens = np.concatenate([*chain.from_iterable((ids, end) for ids in ended), rest])
    return tokens.astype(np.uint16) if tokenizer.vocab_size <= 2**16 else tokens


if __name__ == "__main__":
    settings.run(main)
