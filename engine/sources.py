"""Where text comes from: each kind of source as a stream of documents.

A document is one file or one row, given as an iterator over pieces of its text, so that a file of
any size passes through a memory of fixed size. Line ends arrive as a single newline.
"""

import codecs
import gzip
import io
import json
import sys
import sysconfig
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

PIECE = 1 << 20  # bytes of text handled at a time
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}  # the user's; tests
LEFT_OUT |= {"encodings", "idlelib", "lib2to3", "pydoc_data"}  # tables; copies
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def require(source: str) -> None:
    """Raises ValueError if there is no such source."""
    if source not in ("-", "python", "shakespeare") and not Path(source).exists():
        raise ValueError(f"no such file or folder: {source!r} (built-in: python, shakespeare)")


def documents(source: str, pattern: str, field: str) -> Iterator[Iterable[str]]:
    """The documents of one source, in a fixed order.

    A source is a file, a folder (its files that match one of the comma-separated `pattern`s), "-"
    for standard input, or a built-in name. `field` holds the text of a row. Raises ValueError.
    """
    path = Path(source)
    if source == "-":
        yield pieces(sys.stdin.buffer, "standard input")
    elif path.exists() and not path.is_dir():  # a file, or a pipe with a name
        yield from file_documents(path, field)
    elif path.is_dir():
        files = [
            p for p in path.rglob("*") if p.is_file() and matches(p.relative_to(path), pattern)
        ]
        if not files:
            raise ValueError(f"no file in {path} matches --pattern={pattern}")
        for p in sorted(files):
            yield from file_documents(p, field)
    elif source == "python":
        root = Path(sysconfig.get_path("stdlib"))
        for p in sorted(root.rglob("*.py")):
            if not set(p.relative_to(root).parts) & LEFT_OUT:
                yield from file_documents(p, field)
    elif source == "shakespeare":
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=20) as f:
                yield [f.read().decode()]
        except OSError as e:
            raise ValueError(
                f"tiny Shakespeare cannot be downloaded here ({e}): get it elsewhere and give the"
                " file, as in `python prepare.py tinyshakespeare.txt --out=data/shakespeare`"
            ) from e


def matches(path: Path, patterns: str) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(fnmatch(path.name, p.strip()) for p in patterns.split(","))


def file_documents(path: Path, field: str) -> Iterator[Iterable[str]]:
    """One document for a text file, one for each row of .jsonl and .parquet; .gz is unpacked."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from ([row] for row in parquet_rows(path, field))
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        try:
            if name.endswith(".jsonl"):
                for number, line in enumerate(f, start=1):
                    yield [jsonl_row(line, field, f"{path}, line {number}")]
            else:
                yield pieces(f, path)  # reads on while the receiver of the document iterates
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path} is no whole gzip file: {e}") from e


def pieces(f: io.BufferedIOBase, name) -> Iterator[str]:
    """The text of a UTF-8 stream in pieces of about PIECE bytes that end at a line end or space."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)  # \r\n and \r become \n
    text, done = "", 0
    while block := read(f, name):
        try:
            text += decoder.decode(block)
        except UnicodeDecodeError as e:
            wide = done == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            raise ValueError(
                f"{name} is not UTF-8 (near byte {done + e.start}): convert it, as in"
                f" `iconv -f {'utf-16' if wide else 'latin1'} -t utf-8 OLD > NEW`"
            ) from e
        done += len(block)
        # a piece never parts a letter from its accent, which NFC may join
        cut = text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)
        yield text[:cut]
        text = text[cut:]
    try:
        yield text + decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8: it ends inside a character") from e


def read(f: io.BufferedIOBase, name) -> bytes:
    try:
        return f.read(PIECE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{name} is no whole gzip file: {e}") from e


def jsonl_row(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line) if line.strip() else {field: ""}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON ({e})") from e
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else "no fields"
        raise ValueError(f"{where}: no field {field!r} (it has {fields}): name it with --field")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field {field!r} is no text but {row[field]!r:.60}")
    return row[field].replace("\r\n", "\n").replace("\r", "\n")


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
            raise ValueError(
                f"{path}: no text column {field!r} (it has {have}): name it with --field"
            )
        for batch in file.iter_batches(batch_size=1000, columns=[field]):
            for row in batch.column(0).to_pylist():
                yield (row or "").replace("\r\n", "\n").replace("\r", "\n")
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path} is no whole parquet file: {e}") from e
