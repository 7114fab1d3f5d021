"""Text or rows to token shards: python prepare.py SOURCE... --out=data/name --tokenizer=bpe

1. read      the documents of every source: files, or rows of a table     engine/sources.py
2. clean     one form for one text; nothing empty, nothing twice          engine/spool.py
3. split     into train, val and test, by document
4. learn     byte-pair encoding from the training split                   bpe.py
5. encode    each split into shards, on all cores                         engine/shards.py

A document is a text, or a row: a conversation, of which a model learns the answers. Such are lines
of a .jsonl with {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, and
a "task" if there are several, or a .csv, .tsv, .jsonl or .parquet with --prompt and --answer:

    python prepare.py questions.csv --prompt=question --answer=answer --out=data/questions
    python prepare.py train=a.jsonl val=b.jsonl test=c.jsonl --prompt=en --answer=de --task=german
    python prepare.py "a.csv --prompt=en --answer=de --task=german" chat.jsonl sums @more.txt
    python prepare.py pictures --images=16 --tokenizer=bytes

The second takes splits as they were published. The third prepares several tasks; each line of the
list more.txt is a source with settings of its own, as that in quotes is. Lines of a .jsonl with
"chosen" and "rejected", behind a "prompt" or such messages, are pairs: objectives/preference.py.
The last makes a row of each picture of a folder, in 16 greys (engine/pictures.py).

A large source is prepared in parts, by anyone in any order, and train.py --data=data/x1,data/x2
joins them. The first one learns the vocabulary of all:

    python prepare.py SOURCE --part=1/16 --out=data/x1
    python prepare.py SOURCE --part=2/16 --out=data/x2 --tokenizer=data/x1
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex

import canaries
import tasks
from bpe import bpe_tokenizer
from engine import encodings, settings, tables
from engine.files import atomic_folder, write_json
from engine.index import places
from engine.pipeline import Progress, clean_up_when_told_to_end, processes
from engine.prepared import SPLITS, AlreadyPrepared, made_like, print_table, recorded
from engine.settings import BelowOne, Bound, Count, Part
from engine.shards import ShardWriter
from engine.sources import PIECE, Complaints, Source, documents, expand, name_of, parse, require
from engine.spool import Listed, Spool, chunks, clean, read_chunk, without
from engine.tables import Reading, Row
from engine.wordfilter import WordFilter
from robust import mistyped_prompt
from tokenizer import ROLES, ROW_SPLIT, SPLIT, Tokenizer, find_tokenizer

Secrets = Annotated[int, Bound("from 0 to 1000", range(1001).__contains__)]
Near = Annotated[float, Bound("0 (off), or from 0.1 to below 1", lambda x: x == 0 or 0.1 <= x < 1)]


@dataclass
class Settings:
    source: tuple = ()  # files, folders, - for standard input, @LIST, python, shakespeare, tasks
    out: str = ""  # folder to write; by default data/<name of the first source>
    tokenizer: str = "bpe"  # bpe (learned here), bytes, a name in tiktoken, a run or data folder
    vocab_size: int = 4096  # of a bpe vocabulary: 256 bytes, what is learned, special tokens
    val: BelowOne = 0.05  # fraction of the text for validation
    test: BelowOne = 0.05  # fraction of the text for the test split
    reading: Reading = field(default_factory=Reading)
    skip_bad: bool = False  # leave out documents that cannot be read
    part: Part = ""  # such as 3/16: only these documents, which are the same whatever the rest is
    near: Near = 0.0  # leave out texts that are so alike an earlier one, such as 0.8; 0 is off
    filter: str = ""  # a list of words, one a line: documents that have one are left out
    filtered: Literal["drop", "mask"] = "drop"  # or are kept, with asterisks in its place
    noise: BelowOne = 0.0  # rows to learn from come twice, once with this share of letters mistyped
    canaries: Secrets = 0  # secrets to plant 0, 1, 4, 16 and 64 times in train: see canaries.py
    bpe_bytes: int = 32_000_000  # bpe learns from at most this much text, spread over the split
    seed: Count = 0  # of the hash that splits
    workers: Count = 0  # processes; 0 means one for each core
    overwrite: bool = False  # replace a set that was made from another text or with other settings


def main(argv: list[str]) -> None:
    clean_up_when_told_to_end()
    about = "Prepare text or rows for training. Published splits: train=FILE val=FILE test=FILE."
    s = settings.load(Settings, argv, about, "source", nargs="*")
    if not s.source:
        raise ValueError("no source: name a text file, a folder, - for standard input, or python")
    prepare(s)


def prepare(s: Settings) -> None:
    """Writes the data set of settings `s`, or finds that it is there already. Raises ValueError."""
    settings.require(s.val + s.test < 1, s, "val", "a fraction, with test below 1")
    settings.require(s.vocab_size >= 257, s, "vocab_size", "at least 257: bytes and end-of-text")
    settings.require(s.bpe_bytes >= PIECE, s, "bpe_bytes", f"at least {PIECE}")
    settings.require(s.filter or s.filtered == "drop", s, "filtered", "given with --filter")
    settings.require(not (s.part and s.canaries), s, "canaries", "0 with --part: each has them")
    number, _, parts = s.part.partition("/")
    of_first = f"FOLDER, made by --part=1/{parts} --out=FOLDER, which learns it for all parts"
    settings.require(s.tokenizer != "bpe" or number in ("", "1"), s, "tokenizer", of_first)
    words = WordFilter(s.filter) if s.filter else None
    s.reading.encoding = encodings.find(s.reading.encoding)
    # known at once, and so are mistakes in it; bpe is learned below
    tokenizer = None if s.tokenizer == "bpe" else find_tokenizer(s.tokenizer)
    part = s.part and f"-{s.part.replace('/', '-of-')}"
    out = Path(s.out or "data/" + name_of(s.source[0], s.reading) + part)
    s.source = tuple(expand(s.source))
    sources = [parse(word, s.reading) for word in s.source]
    meta = dict(settings=recorded(s, words.sha256 if words else ""))
    defaults = recorded(Settings())
    began, report = time.monotonic(), Counter()
    try:
        found = made_like(out, meta, defaults, s.overwrite)
        fixed = set(s.source) == {"shakespeare"} and s.tokenizer in ("bytes", "gpt2", "bpe")
        if found and fixed:  # a text and a tokenizer that never change: no second download
            raise AlreadyPrepared
        for word, source in zip(s.source, sources, strict=True):
            require(word, source.name, tasks.NAMES)
        with atomic_folder(out, replace=s.overwrite) as folder:
            with Spool(folder, s.part, s.near) as spool:
                read(s, sources, words, spool, report)
                meta["text"] = spool.describe()
                if words:
                    counted = ("filtered", "masked", "words masked")
                    meta["filter"] = {what: report[what] for what in counted}
                if tokenizer and spool.kind != "text":
                    tokenizer = tokenizer.extended(spool.tasks)
                if tokenizer:  # the run of that name may have been trained anew
                    meta["tokenizer_sha256"] = tokenizer.digest()
                if made_like(out, meta, defaults, s.overwrite):
                    raise AlreadyPrepared
                split(s, spool, report)
            tokenizer = tokenizer or learn(s, spool)
            tokenizer.save(folder)
            meta |= dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.digest())
            if spool.kind != "text":
                meta["kind"] = spool.kind
            meta["splits"] = encode(s, spool, tokenizer)
            write_json(folder / "meta.json", meta)
        print_table(out, meta, report, time.monotonic() - began)
    except AlreadyPrepared:
        print(f"{out} is already prepared with these settings")


# --- 1. read


def read(s: Settings, sources: list[Source], words, spool: Spool, report: Counter) -> None:
    """Puts the cleaned documents of all sources into the spool, and what happened into `report`."""
    bad = Complaints()
    with Progress("reading") as progress:

        def tidy(pieces: Iterable[str]) -> Iterator[str]:
            cleaned = clean(pieces, report, progress)
            return without(words, s.filtered, cleaned, report) if words else cleaned

        for source in sources:
            for part, document in documents_of(source, s):
                with bad.noted():
                    before = report["words masked"]
                    report[take(document, part, spool, tidy)] += 1
                    report["masked"] += report["words masked"] > before
                    source.reading.require_kind(spool.kind, source.name)
                    if spool.index.read == 1:
                        spool.require_kind(s)
    if bad.count and not s.skip_bad:
        raise ValueError(f"{bad}; --skip_bad leaves out what cannot be read")
    if not spool.index.read:
        raise ValueError(f"no text left to train on in {', '.join(s.source)}")
    report["unreadable"] = bad.count
    report.update(spool.index.settle(spool.kind, s.near))


def documents_of(source: Source, s: Settings) -> Iterator[tuple[str, Iterable[str] | Row]]:
    """The documents of a source, and the split that each was published in, or nothing."""
    if source.name in tasks.NAMES and not Path(source.name).exists():
        for part in SPLITS:
            for row in tasks.find(source.name).rows(part, s.seed, s.val, s.test):
                yield part, tables.document(row, Reading())
    else:
        for document in documents(source.name, source.reading):
            yield source.split, document


# --- 2. clean


def take(document: Iterable[str] | Row, part: str, spool: Spool, tidy: Callable) -> str:
    """Puts a document into the spool, each of its texts cleaned by `tidy`; returns its fate.

    An é is one character or an e with an accent behind it. In Unicode's form NFC (Annex 15) it is
    the former always: else one word would be two, with different tokens and half the examples each.
    """
    try:
        if not isinstance(document, Row):
            return spool.add(tidy(document), part)
        for message in document.messages:
            message["content"] = "".join(tidy([message["content"]]))
    except Listed:
        return "filtered"
    if not document.sure or not document.tells():
        return "empty" if document.sure else "unsure"
    return spool.add([document.content()], part, document)


# --- 3. split


def split(s: Settings, spool: Spool, report: Counter) -> None:
    """Shares the documents out to train, val and test, before anything is learned from them.

    A model that has read a text predicts it better than it will predict any other. Were windows or
    lines drawn, validation would ask for sentences whose neighbours it knows; were duplicates left
    in, for texts that it knows by heart (Lee et al. 2021, arXiv:2107.06499). So each document goes
    to one split whole, and `places` says to which. Of rows, those that ask the same go to the same
    one: a prompt that stands in two splits, as they were published, leaves train, and never test.
    """
    asked_for = dict(val=s.val, test=s.test)
    # where train was published, too, nothing of it is drawn for what came beside it
    rest = {name: 0.0 if name in spool.index.published else f for name, f in asked_for.items()}
    fractions = {"": asked_for, "train": rest}
    place = places(spool.index, spool.kind, fractions, s.seed)
    prompts: dict[str, set[bytes]] = {"val": set(), "test": set()}
    if spool.index.crossing:
        for document in spool:
            prompts.get(place(document), set()).add(document.prompt)
    asked: set[bytes] = set()  # what is asked in two
    with Progress("splitting", spool.end) as progress:
        for document in spool:
            progress(document.start)
            name = place(document)
            if not name:
                spool.put_in_order(document, **fractions[document.split])
                continue
            later = [n for n in SPLITS[SPLITS.index(name) + 1 :] if document.prompt in prompts[n]]
            if later:
                report[name, later[-1]] += 1
                asked.add(document.prompt)
            else:
                end = document.start + document.size
                spool.put(name, document.start, end, document.text)
    if asked:
        report["asked in test"] = sum(d.prompt in asked for d in spool if d.split == "test")
    spool.require_splits(asked_for)
    report["crossing"] = sum(place(a) != place(b) for a, b in spool.index.nearly_alike())


# --- 4. learn


def learn(s: Settings, spool: Spool) -> Tokenizer:
    """A byte-pair encoding of the training text alone, evenly spread over it.

    A vocabulary that has seen the validation text, too, has tokens for its rare words, and makes it
    look easier than a new text is.
    """
    path, rows = spool.folder / "spool_train", spool.kind != "text"
    markers = len(ROLES) + 1 + len(spool.tasks) if rows else 0  # <|end|>
    least = f"at least {257 + markers}: the bytes, end-of-text and {markers} markers"
    settings.require(s.vocab_size >= 257 + markers, s, "vocab_size", least)
    total = chunks(path)
    keep = min(total, s.bpe_bytes // PIECE)
    evenly = [i * total // keep for i in range(keep)]
    words: Counter = Counter()
    with processes(s.workers) as each_chunk:
        count = partial(count_words, rows=rows)
        for counted in each_chunk("counting words", count, path, evenly):
            words.update(counted)
    with Progress("learning tokens", s.vocab_size, unit=1, name="") as progress:
        pattern = ROW_SPLIT if rows else SPLIT
        tokenizer = bpe_tokenizer(words, s.vocab_size - markers, progress, pattern)
    if rows:
        tokenizer = tokenizer.extended(spool.tasks)
    found = tokenizer.vocab_size
    if found < s.vocab_size:
        print(f"the text yields only {found} tokens, fewer than --vocab_size={s.vocab_size}")
    return tokenizer


def count_words(path: Path, number: int, rows: bool) -> Counter:
    pattern = ROW_SPLIT if rows else SPLIT
    words, texts = Counter(), read_chunk(path, number, rows).split("\0")
    if rows:
        rows = map(json.loads, texts[:-1])
        texts = (message["content"] for row in rows for message in row["messages"])
    for text in texts:
        words.update(regex.findall(pattern, text))
    return words


# --- 5. encode


def encode(s: Settings, spool: Spool, tokenizer: Tokenizer) -> dict:
    """Writes the shards of every split, in order; returns what meta.json tells of them."""
    splits, markers = {}, {i: name for name, i in tokenizer.tasks().items()}
    with processes(s.workers, use_tokenizer, spool.folder) as each_chunk:
        for name in SPLITS:
            path = spool.folder / f"spool_{name}"
            writer = ShardWriter(spool.folder, name, tokenizer.vocab_size)
            of_rows = partial(encode_rows, noise=s.noise if name == "train" else 0.0)
            of_kind = encode_chunk if spool.kind == "text" else of_rows
            parts = each_chunk(f"encoding {name}", of_kind, path)
            if s.canaries and name == "train":
                secrets = canaries.draw(s.canaries, s.seed)
                parts = canaries.planted(parts, path.stat().st_size, secrets, tokenizer, s.seed)
                write_json(spool.folder / canaries.FILE, [c._asdict() for c in secrets])
                spool.written[name]["bytes"] += sum(c.times * len(c.line) for c in secrets)
            firsts: Counter = Counter()  # tokens of rows: the markers of their tasks
            for tokens in parts:
                writer.write(tokens)
                if spool.kind != "text":
                    ends = np.flatnonzero(tokens[:-1] == tokenizer.end_of_text)
                    firsts.update(tokens[:1].tolist() + tokens[ends + 1].tolist())
            writer.close()
            path.unlink()
            tokens = sum(shard["tokens"] for shard in writer.shards)
            splits[name] = dict(shards=writer.shards, tokens=tokens) | spool.written[name]
            if firsts:
                splits[name]["tasks"] = {n: firsts[i] for i, n in markers.items() if firsts[i]}
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


def encode_rows(path: Path, number: int, noise: float) -> np.ndarray:
    """The tokens of a chunk of rows, with their markers: see `Tokenizer.encode_row`. With `noise`,
    behind each row the same answer to a prompt that is mistyped."""
    ids = []
    for text in read_chunk(path, number, rows=True).split("\0")[:-1]:
        row = json.loads(text)
        ids += tokenizer.encode_row(**row)
        wrong = mistyped_prompt(row["messages"], noise) if noise else row["messages"]
        if wrong != row["messages"]:
            ids += tokenizer.encode_row(wrong, row["task"])
    return np.array(ids, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


if __name__ == "__main__":
    settings.run(main)
