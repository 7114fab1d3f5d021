"""Text to token ids and back: bytes, a published vocabulary, or byte-pair encoding (bpe.py).

Why bytes: 256 of them spell every text there is, so nothing is ever unknown, no character of any
script and no damaged file. Why not bytes alone: text is then four times as long as it need be, and
a model reads a limited number of tokens. So frequent strings of bytes become tokens of their own.

    "newest 文" ── SPLIT ──▶ "newest", " 文" ── merges ──▶ n e w est, " " 文 ──▶ [110, 101, ...]

A conversation is text with markers, tokens that no text ever gives: who speaks, where a turn ends,
and, first of all, which task it is. So one model that continues text can be asked for many things:

    <|translate|> <|user|> Good morning. <|end|> <|assistant|> Guten Morgen. <|end|> <|endoftext|>

Every kind ends as a tiktoken `Encoding`, which does the work in compiled code, and is stored in the
same two files: `encoding.json` (how to split, which tokens are special) and `vocab.tiktoken` (a
line a token: its bytes in base64, its rank).
"""

import base64
import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from engine import vocabulary

# Ends every document. Without it a model would take the end of one text and the beginning of the
# next for one text, and would never learn to stop.
END_OF_TEXT = "<|endoftext|>"

# How text is cut into words before pairs are merged; no token reaches across a cut. Without a cut
# the vocabulary fills up with "dog.", "dog!", "dog?" (GPT-2, section 2.2), and each is a row
# of the model. In order: letters with at most one other character before them, a space mostly;
# up to three digits; punctuation with at most one space before it, and the line ends and
# indentation behind it; line ends with the indentation behind them; spaces; other white space.
# Close to the pattern of cl100k_base (github.com/openai/tiktoken), but indentation sticks to the
# line end: 7% fewer tokens for source code.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|[\r\n]+[ \t]*|[ \t]+|\s"
)

# The same with each digit alone, for rows. In numbers of three digits a token, 1,000 of them would
# have to be learned one by one, and where a digit stands depends on how many follow it.
ROW_SPLIT = SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

ROLES = ("user", "assistant", "system")
TASK_NAME = re.compile(r"[\w.-]+")


class Markers(NamedTuple):
    """The ids that hold a conversation together."""

    user: int
    assistant: int
    system: int
    end: int  # of a turn
    end_of_text: int  # of a row


class Tokenizer:
    """A tiktoken `Encoding` that treats all text as text and can be saved beside a model.

    `kind` is "bytes", "bpe" or "tiktoken"; `normalizer` is None or a Unicode form such as "NFC";
    `vocab_size` counts everything, also the ids in `unused`, which no text leads to and which must
    not be sampled; `end_of_text` is the id that ends every document, by default that of
    <|endoftext|>, and `ends` are all ids that end a sample. `begin` are the ids that every prompt
    begins with, as Llama's do. Special tokens in `literal` are the exception: they may stand in
    text. `markers` are those of conversations, or None.
    """

    def __init__(
        self,
        kind: str,
        encoding: tiktoken.Encoding,
        normalizer: str | None = None,
        end_of_text: int | None = None,
        literal: list[str] | None = None,
        begin: list[int] | None = None,
        ends: list[int] | None = None,
    ):
        self.kind, self.encoding, self.normalizer = kind, encoding, normalizer
        self.name, self.vocab_size = encoding.name, encoding.n_vocab
        self.special, self.literal = encoding._special_tokens, literal or []
        self.end_of_text = self.special[END_OF_TEXT] if end_of_text is None else end_of_text
        self.begin = begin or []
        self.ends = ends or [self.end_of_text]
        self.markers = None
        turns = [self.special.get(f"<|{name}|>") for name in (*ROLES, "end")]
        if None not in turns:
            self.markers = Markers(*turns, self.end_of_text)
            self.ends = list(dict.fromkeys([*self.ends, self.markers.end]))  # none twice
        used = {i for text, i in self.special.items() if text != f"<|unused_{i}|>"}
        used.update(encoding._mergeable_ranks.values())
        self.unused = [i for i in range(self.vocab_size) if i not in used]
        longest_first = sorted(map(re.escape, self.literal), key=len, reverse=True)
        self.literals = re.compile(f"({'|'.join(longest_first)})") if literal else None

    def encode_to_array(self, text: str) -> np.ndarray:
        """Token ids as uint32. Text is text: a literal <|endoftext|> is thirteen characters."""
        if self.literals is None:
            return self.encode_plain(text)
        parts = self.literals.split(text)  # text, literal, text, ...
        ids = [
            np.array([self.special[part]], np.uint32) if i % 2 else self.encode_plain(part)
            for i, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def encode_plain(self, text: str) -> np.ndarray:
        text = text.encode(errors="replace").decode()  # half a surrogate pair is no text
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text: str) -> list[int]:
        return self.encode_to_array(text).tolist()

    def encode_row(self, messages: list[dict], task: str = "", open: bool = False) -> list[int]:
        """The ids of a conversation, [{"role": ..., "content": ...}, ...]: `<|task|>` if there is
        one, each turn between its role's marker and `<|end|>`, end-of-text.

        `open` ends it with `<|assistant|>` instead, for a model to go on. What is said is text:
        a literal <|end|> in it is seven characters. Raises ValueError.
        """
        if not self.markers:
            raise ValueError(
                f"the vocabulary {self.name} has no markers for conversations: train on rows,"
                " which `python prepare.py ROWS.jsonl` prepares"
            )
        ids = [self.task_id(task)] if task else []
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"unknown role {message['role']!r}: {', '.join(ROLES)} are known")
            ids.append(getattr(self.markers, message["role"]))
            ids += self.encode(message["content"])
            ids.append(self.markers.end)
        return [*ids, self.markers.assistant if open else self.end_of_text]

    def task_id(self, task: str) -> int:
        """The id of `<|task|>`. Raises ValueError, with the nearest there is, if it is none."""
        tasks = self.tasks()
        if task not in tasks:
            near = difflib.get_close_matches(task, tasks, n=1)
            there = f"it has {', '.join(tasks)}" if tasks else "its rows had none: leave --task out"
            hint = f"did you mean {near[0]}?" if near else there
            raise ValueError(f"the vocabulary has no task {task!r}: {hint}")
        return tasks[task]

    def tasks(self) -> dict[str, int]:
        """The id of each task by name: of every special token but those that each row has."""
        own = {*(self.markers or ()), self.end_of_text, *self.begin, *self.unused}
        names = {text.removeprefix("<|").removesuffix("|>"): i for text, i in self.special.items()}
        return {name: i for name, i in names.items() if i not in own}

    def decode_row(self, ids: list[int]) -> tuple[str, list[dict]]:
        """Task and messages of a row: what encode_row was given, where text is sound UTF-8."""
        task, messages, said = "", [], []
        names = {i: name for name, i in self.tasks().items()}
        roles = {getattr(self.markers, role): role for role in ROLES}
        for i in ids:
            if i in roles:
                said = []
                messages.append(dict(role=roles[i], content=said))
            elif not messages:
                task = names.get(i, task)
            elif i not in (self.markers.end, self.end_of_text):
                said.append(i)
        return task, [m | {"content": self.decode(m["content"])} for m in messages]

    def extended(self, names: Iterable[str]) -> "Tokenizer":
        """This vocabulary with the markers of conversations, and of tasks of these names, behind
        its last id: no id moves, and markers that it has already stay. Raises ValueError."""
        tasks = sorted({*names})
        for name in tasks:
            check_task(name)
        wanted = [f"<|{name}|>" for name in (*ROLES, "end", *tasks)]
        new = [text for text in wanted if text not in self.special]
        special = self.special | {text: self.vocab_size + i for i, text in enumerate(new)}
        e = self.encoding
        encoding = encoding_of(e.name, e._pat_str, e._mergeable_ranks, special)
        literal = [text for text in self.literal if text not in wanted]  # a marker is no text
        kept = dict(end_of_text=self.end_of_text, begin=self.begin, ends=self.ends)
        return Tokenizer(self.kind, encoding, self.normalizer, literal=literal, **kept)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether whatever `other` writes reads the same here: ids that exist in both are equal."""
        ours, theirs = self.encoding, other.encoding
        return (
            ours._mergeable_ranks == theirs._mergeable_ranks
            and ours._pat_str == theirs._pat_str
            and self.normalizer == other.normalizer
            and self.special.items() >= other.special.items()
        )

    def encode_prompt(self, text: str) -> list[int]:
        """The ids with which a model continues `text`: never none."""
        return self.begin + self.encode(text) or [self.end_of_text]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The exact bytes of `ids`, which may begin or end inside a character. An unused id is
        U+FFFD."""
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError:  # tiktoken knows nothing of an id without a token
            unused = set(self.unused)
            decode = self.encoding.decode_bytes
            parts = [b"\xef\xbf\xbd" if i in unused else decode([i]) for i in ids]
            return b"".join(parts)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        """Name and content of the two files that hold the tokenizer."""
        e = self.encoding
        info = dict(kind=self.kind, name=self.name, pattern=e._pat_str)
        info |= dict(normalizer=self.normalizer, special_tokens=self.special)
        usual = dict(end_of_text=self.special.get(END_OF_TEXT), literal=[], begin=[])
        usual["ends"] = [self.end_of_text]
        unusual = {key: getattr(self, key) for key in usual}
        info |= {key: value for key, value in unusual.items() if value != usual[key]}
        text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        ranks = sorted(e._mergeable_ranks.items(), key=lambda item: item[1])
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
        return {"encoding.json": text.encode(), "vocab.tiktoken": lines}

    def save(self, folder: Path) -> None:
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def digest(self) -> str:
        """Equal digests mean equal tokenizers."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """The tokenizer stored in `folder`. Raises ValueError if its files are damaged."""
        info, ranks = vocabulary.read(Path(folder))
        try:
            encoding = encoding_of(info["name"], info["pattern"], ranks, info["special_tokens"])
        except ValueError as e:  # of the pattern
            raise vocabulary.damaged(folder, e) from e
        optional = {key: info.get(key) for key in vocabulary.OPTIONAL}
        return Tokenizer(info["kind"], encoding, info["normalizer"], **optional)


def check_task(name: str) -> None:
    """Raises ValueError for what cannot be the name of a task."""
    reserved = {*ROLES, "end", END_OF_TEXT[2:-2], "text", "rows", "temperature"}  # the last: in mix
    if not isinstance(name, str) or not TASK_NAME.fullmatch(name) or name in reserved:
        raise ValueError(
            f"a task cannot be called {name!r:.60}: letters, digits, '.', - and _ make its name,"
            f" and it is none of {', '.join(sorted(reserved))}"
        )


def find_tokenizer(name: str) -> Tokenizer:
    """bytes, a vocabulary that tiktoken knows by name, or that of a folder: a run, a checkpoint,
    prepared data, or a model in the layout of Hugging Face.

    Raises ValueError if there is none, or if it has to be downloaded and can't be.
    """
    folder = Path(name)
    if name == "bytes":
        return bytes_tokenizer()
    if name in tiktoken.list_encoding_names() or not folder.is_dir():
        return published_tokenizer(name)
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        from engine import tokenizer_json

        return tokenizer_json.read_folder(folder, name)
    if any(folder.glob("step-*/encoding.json")):
        from engine.checkpoint import find

        folder = find(name)
    return Tokenizer.load(folder)


def published_tokenizer(name: str) -> Tokenizer:
    """A vocabulary that tiktoken knows by name, downloaded to its cache at first use."""
    if name not in tiktoken.list_encoding_names():
        choices = ", ".join(["bpe", "bytes", *tiktoken.list_encoding_names()])
        raise ValueError(
            f"unknown tokenizer {name!r}: choose one of {choices}, or the folder of a run, a"
            " checkpoint, prepared data or a Hugging Face model"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:  # requests has many; every one of them means that there is no file
        raise ValueError(
            f"the vocabulary of {name!r} cannot be downloaded here ({type(e).__name__}): use"
            " --tokenizer=bpe or --tokenizer=bytes, which need no network, or set"
            " TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from e
    return Tokenizer("tiktoken", encoding)


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token; end-of-text is 256."""
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer("bytes", encoding_of("bytes", r"[\s\S]", ranks, {END_OF_TEXT: 256}))


def encoding_of(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
