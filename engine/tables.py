"""Rows of tables (jsonl, csv, tsv, parquet), and what each is: a text, or a conversation.

A table is an iterator over pairs: where a row stands, in words, and the row by column, or what is
wrong with it.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from engine import encodings
from engine.settings import Bound, Fraction
from tokenizer import ROLES, check_task

PAIR = ("chosen", "rejected")  # the better and the worse answer to what is asked
OWN = ("messages", "task", "group", "probability", "open_ended", "prompt", *PAIR)  # with a meaning
Greys = Annotated[int, Bound("from 2 to 64, or 0", lambda n: n == 0 or 2 <= n <= 64)]
csv.field_size_limit(1 << 24)  # a quote that is never closed would take all of the memory


class Unreadable(ValueError):
    """A document that is no text or no row, or not in the encoding it should be in."""

    def __init__(self, where, why):
        super().__init__(f"{where}: {why}")
        self.where, self.why = where, str(why)


@dataclass
class Reading:
    """How a source is read."""

    pattern: str = "*.txt,*.md,*.py,*.jsonl,*.jsonl.gz,*.parquet"  # which files of a folder count
    field: str = "text"  # field or column that holds the text of a row
    encoding: str = "utf-8"  # of files that are not UTF-8, such as gb18030 or cp1252
    prompt: tuple = ()  # column of a table with what is asked; several are joined by a line end
    answer: str = ""  # column with what is answered. Without a header, columns are 1, 2, ...
    task: str = ""  # what the rows ask for, such as translate: a marker in front of each
    group: str = ""  # column: rows that are alike in it go to the same split
    lines: bool = False  # each line of a text file is a document of its own
    images: Greys = 0  # rows are the pictures of a folder, in so many greys, with its name as label
    above: Fraction = 0.0  # leave out rows whose "probability" is not above this

    def columns(self) -> list[str]:
        """Those that a table has to have."""
        named = [*self.prompt, self.answer] if self.answer else [self.field]
        return [*named, self.group] if self.group else named

    def require_kind(self, kind: str, source: str) -> None:
        """Raises ValueError if `source` holds text, and a setting says what to make of rows."""
        names = [n for n in ("answer", "task", "group", "above") if getattr(self, n)]
        if kind == "text" and names:
            raise ValueError(
                f"--{names[0]}={getattr(self, names[0])} is for rows, but {source} is read as text:"
                " leave it out, or give a file that is a table (.csv, .tsv, .jsonl, .parquet)"
            )


class Row(NamedTuple):
    """A conversation; the last two messages of a `pair` are two answers, the better one first."""

    messages: list[dict]  # each with role and content, and no more
    task: str
    group: str
    sure: bool  # its probability is above the bound, if it has one
    pair: bool = False
    open_ended: bool = False  # one prompt has many answers: it may stand in several splits

    def content(self) -> str:
        """All that is learned from it, in one form: what `Tokenizer.encode_row` takes."""
        return json.dumps(dict(messages=self.messages, task=self.task), ensure_ascii=False)

    def prompt(self) -> str:
        """All that stands before the last answer, or the two of a pair, likewise; of what is
        open-ended, all of it."""
        answers = 0 if self.open_ended else 2 if self.pair else 1
        return self._replace(messages=self.messages[: len(self.messages) - answers]).content()

    def empty(self) -> str:
        """Which of its messages says nothing, in words; a system's may."""
        for message in self.messages:
            if message["role"] != "system" and not message["content"].strip():
                return "answer" if message["role"] == "assistant" else "prompt"
        return ""

    def tells(self) -> bool:
        """Whether there is something to learn: of two answers that are the same, none is better."""
        return not (self.empty() or (self.pair and self.messages[-1] == self.messages[-2]))


# --- what a row is


def document(row, reading: Reading) -> Iterable[str] | Row:
    """The text of a row of a table, or its conversation. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"it should be an object with the field {reading.field!r} or 'messages'")
    own = "" if "task" in (*reading.prompt, reading.answer) else row.get("task")
    pair = not reading.answer and is_pair(row, reading)
    if pair:
        messages = pair_of(row)
    elif "messages" in row and reading.answer not in row:
        messages = turns(row["messages"])
    elif reading.answer:
        asked = [text_of(row, column, "prompt") for column in reading.prompt]
        asked = "\n".join(text for text in asked if text.strip())
        answer = text_of(row, reading.answer, "answer")
        messages = [dict(role="user", content=asked), dict(role="assistant", content=answer)]
    elif isinstance(row.get(reading.field, ""), str):
        return [text_of(row, reading.field, "field")]
    else:
        raise ValueError(f"field {reading.field!r} is no text but {row[reading.field]!r:.60}")
    task = own or reading.task
    if task:
        check_task(task)
    grouped = reading.group or "group" in row
    group = text_of(row, reading.group or "group", "group") if grouped else ""
    probability = row.get("probability", 1.0)
    try:
        sure = not reading.above or float(probability) > reading.above
    except (ValueError, TypeError) as e:
        raise ValueError(f"its probability is no number but {probability!r:.60}") from e
    found = Row(messages, task, group, sure, pair, row.get("open_ended") is True)
    if what := found.empty():
        raise ValueError(f"the {what} is empty")
    if not found.tells():
        raise ValueError("chosen and rejected are the same: leave it out, as neither is better")
    return found


def is_pair(row: dict, reading: Reading) -> bool:
    """Whether a row has a better and a worse answer. Raises ValueError if it should and has one."""
    there = [name for name in PAIR if name in row]
    is_row = reading.field in row or last_role(row.get("messages")) == "assistant"
    if len(there) == 1 and not is_row:
        raise ValueError(
            f"no field {PAIR[there == ['chosen']]!r} beside {there[0]!r}: a pair has both, the"
            " better and the worse answer"
        )
    return len(there) == 2 and ("prompt" in row or not is_row)


def last_role(messages) -> str:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last.get("role", "") if isinstance(last, dict) else ""


def pair_of(row: dict) -> list[dict]:
    """The turns of a pair: what is asked, in `prompt` or `messages`, and both answers, each as text
    or as messages of which it is the last. Raises ValueError."""
    if "prompt" not in row and "messages" not in row:
        raise ValueError("a pair wants what is asked, too: in the field 'prompt', or in 'messages'")
    name = "prompt" if "prompt" in row else "messages"
    asked = row[name]
    if isinstance(asked, list):
        asked = checked(asked)
    else:
        asked = [dict(role="user", content=text_of(row, name, name))]
    if last_role(asked) != "user":
        raise ValueError(
            f"the {name} of a pair should end with a user's turn, to which chosen and rejected are"
            " answers: cut it there"
        )
    for n in PAIR:
        if isinstance(row[n], list) and last_role(row[n]) != "assistant":
            raise ValueError(f"{n} should be a text, or messages that end with an assistant's")
    texts = {n: row[n][-1].get("content") if isinstance(row[n], list) else row[n] for n in PAIR}
    return [*asked, *(dict(role="assistant", content=text_of(texts, n, n)) for n in PAIR)]


def text_of(row: dict, column: str, option: str) -> str:
    require_columns(row, [column], option)
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str | int | float):
        raise ValueError(f"field {column!r} is no text but {value!r:.60}")
    return one_newline(str(value))


def one_newline(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def turns(messages) -> list[dict]:
    """A conversation that ends with an answer. Raises ValueError."""
    found = checked(messages)
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise ValueError(
            "its messages should end with an assistant's that answers something: cut it behind its"
            " last answer"
        )
    return found


def checked(messages) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages should be a list of objects with role and content")
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"unknown role {message.get('role')!r}: {', '.join(ROLES)} are known")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"a message's content is no text but {message.get('content')!r:.60}")
    return [dict(role=m["role"], content=one_newline(m["content"])) for m in messages]


def require_columns(there: Iterable[str], wanted: list[str], option: str) -> None:
    """Raises ValueError for the first that is `wanted` and not there."""
    for name in wanted:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"name it with --{option}"
            raise ValueError(f"no field {name!r} (it has {', '.join(there) or 'none'}): {remedy}")


# --- where rows come from


def check_header(header: list[str], path: Path, reading: Reading) -> None:
    option = "prompt and --answer" if reading.answer else "field"
    try:
        require_columns(header, reading.columns(), option)
    except ValueError as e:
        raise Unreadable(path, e) from e


def jsonl(f: io.BufferedReader, path: Path, encoding: str) -> Iterator[tuple]:
    """One JSON object a line; empty lines are none."""
    mark = encodings.of_mark(f.peek(4))
    try:
        for number, line in enumerate(io.TextIOWrapper(f, mark) if mark else f, start=1):
            if line.strip():
                yield f"{path}, line {number}", json_row(line, encoding)
    except UnicodeError as e:
        raise Unreadable(path, f"not {mark}, as its mark says ({e})") from e


def json_row(line: bytes | str, encoding: str):
    try:
        if isinstance(line, bytes):
            line = encodings.decoded(line, encoding)
        return json.loads(line)
    except RecursionError as e:
        return ValueError(f"not JSON ({e})")
    except ValueError as e:
        return e if type(e) is ValueError else ValueError(f"not JSON ({e})")


def separated(pieces: Iterable[str], path: Path, reading: Reading) -> Iterator[tuple]:
    """The rows of a csv, or of a table with tabs between its columns, where quotes are text.

    A first line names the columns, unless they are asked for by number, from 1.
    """
    comma = path.name.removesuffix(".gz").endswith(".csv")
    form = dict(strict=True) if comma else dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    reader = csv.reader(lines(pieces), **form)
    header = None
    if all(column.isdigit() for column in reading.columns()):
        header = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield where, ValueError(f"no csv ({e})")
            continue
        if header is None:
            header = row
            check_header(header, path, reading)
        elif header and row and len(row) != len(header):
            yield where, ValueError(f"{len(row)} columns, and its first line has {len(header)}")
        elif row:
            names = header or map(str, range(1, len(row) + 1))
            yield where, dict(zip(names, row, strict=True))


def lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest


def parquet(path: Path, reading: Reading) -> Iterator[tuple]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from e
    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        own = "messages" in there or {*PAIR} <= {*there}
        if not own or reading.answer in there:
            check_header(there, path, reading)
        wanted = [name for name in there if name in (*reading.columns(), *OWN)]
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", {k: "" if v is None else v for k, v in row.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise Unreadable(path, f"no whole parquet file ({e})") from e
