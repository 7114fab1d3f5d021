"""Text to token shards: python prepare.py SOURCE... --out=data/name --tokenizer=bpe

1. read      the documents of every source                               engine/sources.py
2. clean     line ends, Unicode form, control characters, repetitions    engine/spool.py
3. split     into train, val and test, by a hash of the content          engine/spool.py
4. learn     byte-pair encoding from the training split                  tokenizer.py
5. encode    each split into shards, on all cores                        dataset.py
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import regex

from dataset import ShardWriter
from engine import settings
from engine.files import atomic_folder
from engine.sources import PIECE, require
from engine.spool import SPLITS, read_chunk, spool
from tokenizer import SPLIT, Tokenizer, bpe_tokenizer, find_tokenizer


@dataclass
class Settings:
    source: tuple = ()  # files, folders, - for standard input, or the names python and shakespeare
    out: str = ""  # folder to write; by default data/<name of the first source>
    tokenizer: str = "bpe"  # bpe (learned here), bytes, gpt2 and the like, a run, data or model
    vocab_size: int = 4096  # of a bpe vocabulary: 256 bytes, what is learned, end-of-text
    val: float = 0.05  # fraction of the documents for validation
    test: float = 0.05  # fraction of the documents for the test split
    pattern: str = "*.txt,*.md,*.py,*.jsonl,*.jsonl.gz,*.parquet"  # which files of a folder count
    field: str = "text"  # field or column that holds the text of a row
    bpe_bytes: int = 32_000_000  # bpe learns from at most this much text, spread over the split
    seed: int = 0  # of the hash that splits
    workers: int = 0  # processes; 0 means one for each core
    overwrite: bool = False  # replace a set that was made with other settings


FREE = ("out", "workers", "overwrite")  # settings that do not change the result


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleaning up on the way
    s = settings.load(Settings, argv, "Prepare text for training.", "source", nargs="*")
    if not s.source:
        raise ValueError("no source: name a text file, a folder, - for standard input, or python")
    prepare(s)


def prepare(s: Settings) -> None:
    """Writes the data set of settings `s`, or finds that it is there already."""
    settings.check(
        s,
        ("val", "a fraction, with test below 1", s.val >= 0 and s.val + s.test < 1),
        ("test", "a fraction, with val below 1", s.test >= 0),
        ("vocab_size", "at least 257: the bytes and end-of-text", s.vocab_size >= 257),
        ("bpe_bytes", f"at least {PIECE}", s.bpe_bytes >= PIECE),
        ("seed", "at least 0", s.seed >= 0),
        ("workers", "at least 0", s.workers >= 0),
    )
    tokenizer = None  # learned below; the others are known at once, and so are mistakes in them
    if s.tokenizer != "bpe":
        tokenizer = find_tokenizer(s.tokenizer)
    name = "stdin" if s.source[0] == "-" else Path(s.source[0]).absolute().name.split(".")[0]
    out = Path(s.out or f"data/{name}")
    wanted = {k: v for k, v in asdict(s).items() if k not in FREE}
    wanted = json.loads(json.dumps(wanted))  # as it will be read back: tuples are lists
    if already_prepared(out, wanted, s.overwrite):
        return
    for source in s.source:
        require(source)
    with atomic_folder(out, replace=s.overwrite) as partial:
        if already_prepared(out, wanted, s.overwrite):  # by another process, meanwhile
            return
        start, report, progress = time.monotonic(), Counter(), Progress("reading")
        spool(s, partial, report, progress)
        progress.end()
        if not report["train", "bytes"]:
            raise ValueError(f"no text left to train on in {', '.join(s.source)}")
        for split, fraction in (("val", s.val), ("test", s.test)):
            if fraction and not report[split, "bytes"]:
                count = report["documents read"]
                raise ValueError(
                    f"nothing of {'the document' if count == 1 else f'the {count} documents'} fell"
                    f" into the {split} split: use a larger --{split}, more text, or --{split}=0"
                )
        workers = s.workers or cores()
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
            tokenizer = tokenizer or learn_bpe(s, partial / "spool_train", pool, workers)
        tokenizer.save(partial)
        meta = dict(settings=wanted, vocab_size=tokenizer.vocab_size)
        meta |= dict(tokenizer_sha256=tokenizer.digest(), splits={})
        initial = dict(initializer=start_worker, initargs=(partial,))
        with ProcessPoolExecutor(workers, get_context("spawn"), **initial) as pool:
            for split in SPLITS:
                shards = encode_split(split, partial, tokenizer, pool, workers)
                facts = dict(shards=shards, tokens=sum(shard["tokens"] for shard in shards))
                facts |= {key: report[split, key] for key in ("bytes", "documents")}
                meta["splits"][split] = facts
        text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
        (partial / "meta.json").write_text(text, encoding="utf-8")
    print_table(out, meta, report, time.monotonic() - start)


def already_prepared(out: Path, settings: dict, overwrite: bool) -> bool:
    """True if `out` was made with `settings`. Raises ValueError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made_with = json.loads((out / "meta.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{out} exists and is no prepared data: choose another --out") from e
    if made_with == settings and not overwrite:
        print(f"{out} is already prepared with these settings")
        return True
    differing = [k for k in settings if made_with.get(k) != settings[k]]
    if not overwrite:
        raise ValueError(
            f"{out} was made with another {' and '.join(differing)}"
            f" ({', '.join(repr(made_with.get(k)) for k in differing)}):"
            " choose another --out, or replace it with --overwrite"
        )
    return False


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # those this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- 4. and 5. the work of the processes: a chunk of a spool file, given by its number


def in_order(pool, workers: int, function, path: Path, numbers) -> Iterator:
    """function(path, number) for all `numbers`, in order, never far ahead of the reader."""
    numbers, waiting = iter(numbers), deque()
    while True:
        some = islice(numbers, 2 * workers - len(waiting))
        waiting.extend(pool.submit(function, path, number) for number in some)
        if not waiting:
            return
        yield waiting.popleft().result()


def count_words(path: Path, number: int) -> Counter:
    words = Counter()
    for document in read_chunk(path, number).split("\0"):
        words.update(regex.findall(SPLIT, document))
    return words


def end_with_parent() -> None:
    """Ends a worker process when the one that started it has died, for whatever reason."""
    parent = parent_process()
    if parent:
        wait = threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True)
        wait.start()


def start_worker(folder: Path) -> None:
    global tokenizer
    end_with_parent()
    tokenizer = Tokenizer.load(folder)


def encode_chunk(path: Path, number: int) -> np.ndarray:
    *ended, rest = map(tokenizer.encode_to_array, read_chunk(path, number).split("\0"))
    end = np.array([tokenizer.end_of_text], np.uint32)
    tokens = np.concatenate([*chain.from_iterable((ids, end) for ids in ended), rest])
    return tokens.astype(np.uint16) if tokenizer.vocab_size <= 2**16 else tokens


def learn_bpe(s: Settings, path: Path, pool, workers: int) -> Tokenizer:
    chunks = -(-path.stat().st_size // PIECE)
    keep = min(chunks, s.bpe_bytes // PIECE)
    numbers = [i * chunks // keep for i in range(keep)]  # evenly spread
    words: Counter = Counter()
    progress = Progress("counting words", keep * PIECE)
    found = in_order(pool, workers, count_words, path, numbers)
    for i, counted in enumerate(found, start=1):
        words.update(counted)
        progress(i * PIECE)
    progress.end()
    progress = Progress("learning tokens", s.vocab_size, unit=1, name="")
    tokenizer = bpe_tokenizer(words, s.vocab_size, progress)
    progress.end()
    if tokenizer.vocab_size < s.vocab_size:
        print(f"the text yields {tokenizer.vocab_size} tokens, fewer than {s.vocab_size}")
    return tokenizer


def encode_split(split: str, folder: Path, tokenizer: Tokenizer, pool, workers: int) -> list[dict]:
    """Writes the shards of one split, in order, and returns their names, tokens and sha256."""
    path = folder / f"spool_{split}"
    size = path.stat().st_size
    chunks = range(-(-size // PIECE))
    writer = ShardWriter(folder, split, tokenizer.vocab_size)
    progress = Progress(f"encoding {split}", size)
    encoded = in_order(pool, workers, encode_chunk, path, chunks)
    for i, tokens in enumerate(encoded, start=1):
        writer.write(tokens)
        progress(min(size, i * PIECE))
    progress.end()
    writer.close()
    path.unlink()
    return writer.shards


# --- what the user sees


class Progress:
    """A line on stderr that says how far a stage is: rewritten on a terminal, else rare."""

    def __init__(self, what: str, total: int = 0, unit: float = 1e6, name: str = " MB"):
        self.what, self.total, self.unit, self.name = what, total, unit, name
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < (0.2 if self.terminal else 10):
            return
        self.last, done = now, done / self.unit
        of = f" of {self.total / self.unit:,.0f}" if self.total else ""
        line = f"{self.what}: {done:,.0f}{of}{self.name}, {done / (now - self.start):,.1f} a second"
        line = f"\r\033[K{line}" if self.terminal else line + "\n"
        print(line, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def print_table(out: Path, meta: dict, report: Counter, seconds: float) -> None:
    removed = [f"{report[k]:,} {k}" for k in ("empty documents", "repeated documents") if report[k]]
    print(f"read     {report['documents read']:,} documents, {report['bytes read']:,} bytes")
    print(f"removed  {', '.join(removed) or 'no documents'}")
    cleaned = [k for k in ("control characters removed", "pieces brought to NFC") if report[k]]
    print(f"cleaned  {', '.join(f'{report[k]:,} {k}' for k in cleaned) or 'nothing'}")
    print(f"\n{'split':8} {'documents':>10} {'bytes':>14} {'tokens':>14} {'bytes/token':>12}")
    for split, facts in meta["splits"].items():
        if facts["tokens"]:
            ratio = facts["bytes"] / facts["tokens"]
            print(
                f"{split:8} {facts['documents']:>10,} {facts['bytes']:>14,}"
                f" {facts['tokens']:>14,} {ratio:>12.2f}"
            )
    print(f"\nwrote {out} in {seconds:.1f} s: {meta['vocab_size']:,} tokens in the vocabulary")


if __name__ == "__main__":
    settings.run(main)
