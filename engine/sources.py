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
import json
import sys
import sysconfig
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from engine import encodings

PIECE = 1 << 20  # bytes of text handled at a time
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}  # the user's; tests
LEFT_OUT |= {"encodings", "idlelib", "lib2to3", "pydoc_data"}  # tables; copies
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMED = 10  # unreadable documents that are named; of the others, only the number is kept


class Unreadable(ValueError):
    """A document that is no text, or not in the encoding it should be in."""

    def __init__(self, where, why: str):
        super().__init__(f"{where}: {why}")
        self.where, self.why = where, why


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


def require(source: str) -> None:
    """Raises ValueError if there is no such source."""
    if source not in ("-", "python", "shakespeare") and not Path(source).exists():
        raise ValueError(f"no such file or folder: {source!r} (built-in: python, shakespeare)")


def documents(
    source: str, pattern: str, field: str, encoding: str = "utf-8"
) -> Iterator[Iterable[str]]:
    """The documents of one source, in a fixed order.

    A source is a file, a folder (its files that match one of the comma-separated `pattern`s), "-"
    for standard input, or a built-in name. `field` holds the text of a row; `encoding` is that of
    files that are not UTF-8. Raises ValueError.
    """
    path = Path(source)
    if source == "-":
        yield pieces(sys.stdin.buffer, "standard input", encoding)
    elif path.exists() and not path.is_dir():  # a file, or a pipe with a name
        yield from file_documents(path, field, encoding)
    elif path.is_dir():
        files = [
            p for p in path.rglob("*") if p.is_file() and matches(p.relative_to(path), pattern)
        ]
        if not files:
            raise ValueError(f"no file in {path} matches --pattern={pattern}")
        for p in sorted(files):
            yield from file_documents(p, field, encoding)
    elif source == "python":
        for p in library():
            yield from file_documents(p, field, encoding)
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


def file_documents(path: Path, field: str, encoding: str) -> Iterator[Iterable[str]]:
    """One document for a text file, one for each row of .jsonl and .parquet; .gz is unpacked."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from ([row] for row in parquet_rows(path, field))
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            if name.endswith(".jsonl"):
                mark = encodings.of_mark(f.peek(4))
                lines = map(str.encode, io.TextIOWrapper(f, mark)) if mark else f
                for number, line in enumerate(lines, start=1):
                    yield jsonl_row(line, field, f"{path}, line {number}", encoding)
            else:
                yield pieces(f, path, encoding)  # reads on while the receiver iterates
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        yield unreadable(Unreadable(path, f"no whole gzip file ({e})"))
    except Unreadable as e:
        yield unreadable(e)
    except UnicodeError as e:
        yield unreadable(Unreadable(path, f"not {mark}, as its mark says ({e})"))
    except OSError as e:
        yield unreadable(Unreadable(path, e.strerror or str(e)))


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
            raise Unreadable(name, complaint(e, chosen, given)) from e
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


def complaint(e: UnicodeDecodeError, chosen: str, given: bool) -> str:
    if chosen != "utf-8":
        return f"neither UTF-8 nor {chosen}" if given else f"not {chosen}, as its mark says"
    if e.reason == "unexpected end of data":
        return "not UTF-8: it ends inside a character"
    line = e.object.rfind(b"\n", 0, e.start) + 1  # a character begins here, in any encoding
    return encodings.advice(e.object, given, line)


def read(f: io.BufferedIOBase, name) -> bytes:
    try:
        return f.read(PIECE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise Unreadable(name, f"no whole gzip file ({e})") from e


def jsonl_row(line: bytes, field: str, where: str, encoding: str) -> Iterator[str]:
    try:
        line = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        try:
            if encoding == "utf-8":
                raise Unreadable(where, complaint(e, "utf-8", given=False)) from e
            line = line.decode(encoding)
        except UnicodeDecodeError:
            raise Unreadable(where, complaint(e, encoding, given=True)) from e
    try:
        row = json.loads(line) if line.strip() else {field: ""}
    except (ValueError, RecursionError) as e:
        raise Unreadable(where, f"not JSON ({e})") from e
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else "no fields"
        raise Unreadable(where, f"no field {field!r} (it has {fields}): name it with --field")
    if not isinstance(row[field], str):
        raise Unreadable(where, f"field {field!r} is no text but {row[field]!r:.60}")
    yield row[field].replace("\r\n", "\n").replace("\r", "\n")


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from e
    try:
        file = pyarrow.parquet.ParquetFile(path)
        types = {column.name: str(column.type) for column in file.schema_arrow}
        if types.get(field) not in ("string", "large_string"):
            have = ", ".join(f"{name}: {kind}" for name, kind in types.items())
            why = f"no text column {field!r} (it has {have}): name it with --field"
            raise Unreadable(path, why)
        for batch in file.iter_batches(batch_size=1000, columns=[field]):
            for row in batch.column(0).to_pylist():
                yield (row or "").replace("\r\n", "\n").replace("\r", "\n")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise Unreadable(path, f"no whole parquet file ({e})") from e
