"""Where text comes from: each kind of source as a stream of documents.

A document is one file or one row, given as an iterator over pieces of its text, so that a file of
any size passes through a memory of fixed size. Line ends arrive as a single newline. A document
that cannot be read raises Unreadable while it is iterated; the next ones can be read all the same.
"""

import codecs
import gzip
import hashlib
import http.client
import io
import re
import shlex
import sys
import sysconfig
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from engine import encodings, pictures, settings, tables
from engine.files import files_below
from engine.tables import Reading, Row, Unreadable

PIECE = 1 << 20  # bytes of text handled at a time
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}  # the user's; tests
LEFT_OUT |= {"encodings", "idlelib", "lib2to3", "pydoc_data"}  # tables; copies
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TABLES = "*.jsonl,*.jsonl.gz,*.csv,*.tsv,*.parquet"  # the files of a folder, if rows are wanted
NAMED = 10  # unreadable documents that are named; of the others, only the number is kept


class Complaints:
    """What could not be read, gathered so that one message tells all of it."""

    def __init__(self):
        self.count = 0
        self.places: dict[str, list[str]] = {}  # reason: where, NAMED at most in all

    @contextmanager
    def noted(self):
        """Within, a document that cannot be read is noted, and no more."""
        try:
            yield
        except Unreadable as e:
            self.count += 1
            if self.count <= NAMED:
                self.places.setdefault(e.why, []).append(str(e.where))

    def __str__(self) -> str:
        text = "; ".join(f"{', '.join(where)}: {why}" for why, where in self.places.items())
        return text + (f"; and {self.count - NAMED:,} more" if self.count > NAMED else "")


class Source(NamedTuple):
    """One of the things that are prepared."""

    name: str  # a file, a folder, - for standard input, or what is built in
    split: str  # train, val or test, where it was published as that
    reading: Reading


@dataclass
class Line:
    """A source with settings of its own: a line of a list, or a quoted word."""

    source: tuple = ()  # one
    reading: Reading = field(default_factory=dict)  # what is given, also if it is the default


def expand(words: Iterable[str]) -> list[str]:
    """The sources, with the lines of @LIST in its place. Raises ValueError."""
    found = []
    for word in words:
        if not word.startswith("@"):
            found.append(word)
            continue
        try:
            lines = Path(word[1:]).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"the list {word[1:]} is not UTF-8") from e
        split = []
        for number, line in enumerate(lines, start=1):
            line = re.sub(r"(^|\s)#.*", "", line)  # a comment; notes#1.txt has none
            split.append(words_of(line, f"the list {word[1:]}, line {number}"))
        found += [line[0] if len(line) == 1 else shlex.join(line) for line in split if line]
        if not any(split):
            raise ValueError(f"no source in the list {word[1:]}")
    return found


def words_of(line: str, where: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as e:
        raise ValueError(f"{where}: a quote is not closed in {line.strip()!r}") from e


def parse(word: str, common: Reading) -> Source:
    """A source as it is named, [train=|val=|test=]NAME [--setting=value ...]. Raises ValueError."""
    split, name, reading = "", word, common
    if " --" in word:
        line = settings.load(Line, words_of(word, "a source"), "", "source", nargs="*")
        if len(line.source) != 1:
            raise ValueError(f"{word!r} should name one source, then its settings")
        name = line.source[0]
        reading = replace(common, **line.reading)
    for wanted in ("train", "val", "test"):
        if name.startswith(f"{wanted}="):
            split, name = wanted, name.removeprefix(f"{wanted}=")
    if bool(reading.prompt) != bool(reading.answer):
        raise ValueError(f"{word!r} wants both --prompt and --answer, the columns of its rows")
    reading.encoding = encodings.find(reading.encoding)
    return Source(name, split, reading)


def name_of(word: str, common: Reading) -> str:
    """What to call the data that are prepared of a source. Raises ValueError."""
    name = parse(word.removeprefix("@"), common).name
    name = "stdin" if name == "-" else Path(name).absolute().name
    return name.strip(".").split(".")[0] or "text"


def require(word: str, name: str, tasks: Iterable[str] = ()) -> None:
    """Raises ValueError if there is no source `name`, or if `word`, which names it, says more than
    a built-in task can obey."""
    built_in = ("python", "shakespeare", *tasks)
    if name == "-" or Path(name).exists():
        return
    if name not in built_in:
        raise ValueError(f"no such file or folder: {name!r} (built-in: {', '.join(built_in)})")
    if name in tasks and word != name:
        raise ValueError(f"{word!r}: a built-in task has its own splits and form: say {name!r}")


def documents(source: str, reading: Reading | None = None) -> Iterator[Iterable[str] | Row]:
    """The documents of one source, in a fixed order.

    A source is a file, a folder (its files that match one of the comma-separated patterns), "-"
    for standard input, or a built-in name. Raises ValueError.
    """
    path, reading = Path(source), reading or Reading()
    if source == "-":
        text = pieces(sys.stdin.buffer, "standard input", reading.encoding)
        yield from lines_of(text) if reading.lines else [text]
    elif path.exists() and not path.is_dir():  # a file, or a pipe with a name
        yield from file_documents(path, reading)
    elif path.is_dir() and reading.images:
        yield from each(pictures.folder(path, reading.images), reading)
    elif path.is_dir():
        pattern = reading.pattern
        if reading.answer and pattern == Reading.pattern:
            pattern = TABLES
        found = False
        for p in files_below(path):
            if matches(p.relative_to(path), pattern):
                found = True
                yield from file_documents(p, reading)
        if not found:
            raise ValueError(f"no file in {path} matches --pattern={pattern}")
    elif source == "python":
        for p in library():
            yield from file_documents(p, Reading())
    elif source == "shakespeare":
        yield [shakespeare()]


def library() -> list[Path]:
    """The files of Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return [path for path in files if not set(path.relative_to(root).parts) & LEFT_OUT]


def matches(path: Path, patterns: str) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(fnmatch(path.name, p.strip()) for p in patterns.split(","))


def shakespeare() -> str:
    """Tiny Shakespeare, downloaded and checked. Raises ValueError."""
    remedy = "get it elsewhere and give the file, as in `python prepare.py tinyshakespeare.txt`"
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=20) as f:
            content = f.read()
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"tiny Shakespeare cannot be downloaded here ({e}): {remedy}") from e
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"what was downloaded is not tiny Shakespeare (sha256): {remedy}")
    return content.decode()


def file_documents(path: Path, reading: Reading) -> Iterator[Iterable[str] | Row]:
    """One document for a text file, one for each row of a table; .gz is unpacked."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from each(tables.parquet(path, reading), reading)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            if name.endswith(".jsonl"):
                yield from each(tables.jsonl(f, path, reading.encoding), reading)
            elif reading.answer and name.endswith(".json"):
                raise Unreadable(path, "rows are read from .jsonl: each of its objects on a line")
            elif reading.answer:
                text = pieces(f, path, reading.encoding)
                yield from each(tables.separated(text, path, reading), reading)
            elif reading.lines:
                yield from lines_of(pieces(f, path, reading.encoding))
            else:
                yield pieces(f, path, reading.encoding)  # reads on while the receiver iterates
    except Unreadable as e:
        yield unreadable(e)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        yield unreadable(Unreadable(path, f"no whole gzip file ({e})"))
    except OSError as e:
        yield unreadable(Unreadable(path, e.strerror or str(e)))


def lines_of(text: Iterator[str]) -> Iterator[list[str]]:
    """Each line that is not empty, as a document. (One longer than a piece is several.)"""
    for piece in text:
        yield from ([line] for line in piece.split("\n") if line.strip())


def each(table: Iterator[tuple], reading: Reading) -> Iterator[Iterable[str] | Row]:
    """The documents of a table."""
    for where, row in table:
        try:
            if isinstance(row, ValueError):
                raise row
            yield tables.document(row, reading)
        except ValueError as e:
            yield unreadable(Unreadable(where, e))


def unreadable(error: Unreadable) -> Iterator[str]:
    """A document that raises `error` as soon as it is read."""
    raise error
    yield


def pieces(f: io.BufferedIOBase, name, encoding: str) -> Iterator[str]:
    """The text of a stream in pieces of about PIECE bytes that end at a line end or space."""
    block = read(f, name)
    given = encoding != "utf-8"
    mark = encodings.of_mark(block)
    chosen = mark or "utf-8"
    if given and not mark and not (Path(name).is_file() and is_utf8(f, block, name)):
        chosen = encoding
        if told := encodings.contradiction(block, chosen):
            raise Unreadable(name, f"seems to be {told.upper()}, not {chosen}")
    decoder = codecs.getincrementaldecoder("utf-8-sig" if chosen == "utf-8" else chosen)()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)  # \r\n and \r become \n
    text = ""
    while block:
        if chosen == "utf-8" and encodings.looks_binary(block):
            raise Unreadable(name, encodings.advice(block, given))
        try:
            text += decoder.decode(block)
        except UnicodeDecodeError as e:
            raise Unreadable(name, encodings.complaint(e, chosen, given)) from e
        except UnicodeError as e:  # UTF-16 or UTF-32 that wants a mark
            raise Unreadable(name, f"not {chosen}: {e}") from e
        # a piece hardly ever parts a letter from its accent, which NFC may join
        cut = text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)
        yield text[:cut]
        text = text[cut:]
        block = read(f, name)
    try:
        yield text + decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise Unreadable(name, f"not {chosen.upper()}: it ends inside a character") from e


def is_utf8(f: io.BufferedIOBase, block: bytes, name) -> bool:
    """Whether a file, of which `block` has been read, is UTF-8 to its end; winds it back there."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), f.tell()
    try:
        while block:
            if encodings.looks_binary(block):
                return False
            decoder.decode(block)
            block = read(f, name)
        decoder.decode(b"", final=True)
        return True
    except UnicodeDecodeError:
        return False
    finally:
        f.seek(position)


def read(f: io.BufferedIOBase, name) -> bytes:
    try:
        return f.read(PIECE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise Unreadable(name, f"no whole gzip file ({e})") from e
