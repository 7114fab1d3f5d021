"""Text to token ids and back: bytes, a published vocabulary, or byte-pair encoding learned here.

Every kind ends as a tiktoken `Encoding`, which does the work in compiled code, and is stored in the
same two files: `encoding.json` (how to split, which tokens are special) and `vocab.tiktoken` (a
line a token: its bytes in base64, its rank).
"""

import base64
import hashlib
import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"

# How text is cut into words before pairs are merged; no token reaches across a cut. In order:
# letters with at most one other character before them, a space mostly; up to three digits;
# punctuation with at most one space before it, and the line ends and indentation behind it; line
# ends with the indentation behind them; spaces; other white space. Close to the pattern of
# cl100k_base (github.com/openai/tiktoken), but indentation sticks to the line end: 7% fewer tokens
# for source code.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|[\r\n]+[ \t]*|[ \t]+|\s"
)


class Tokenizer:
    """A tiktoken `Encoding` that treats all text as text and can be saved beside a model.

    `kind` is "bytes", "bpe" or "tiktoken"; `normalizer` is None or a Unicode form such as "NFC";
    `vocab_size` counts everything; `end_of_text` is the id that ends every document, by default
    that of <|endoftext|>, and `ends` are all ids that end a sample. `begin` are the ids that every
    prompt begins with, as Llama's do. Special tokens in `literal` are the exception: they may stand
    in text.
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
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        if self.kind == "bytes":
            return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint32)
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode(self, text: str) -> list[int]:
        return self.encode_to_array(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids with which a model continues `text`: never none."""
        return self.begin + self.encode(text) or [self.end_of_text]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The exact bytes of `ids`; they may begin or end inside a character."""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        """Name and content of the two files that hold the tokenizer."""
        e = self.encoding
        info = dict(kind=self.kind, name=self.name, pattern=e._pat_str)
        info |= dict(normalizer=self.normalizer, special_tokens=self.special)
        if self.end_of_text != self.special.get(END_OF_TEXT):
            info["end_of_text"] = self.end_of_text
        if self.literal:
            info["literal"] = self.literal
        if self.begin:
            info["begin"] = self.begin
        if self.ends != [self.end_of_text]:
            info["ends"] = self.ends
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
        folder = Path(folder)
        try:
            info = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
            lines = (folder / "vocab.tiktoken").read_bytes().splitlines()
            pairs = [line.split() for line in lines]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            encoding = tiktoken.Encoding(
                info["name"],
                pat_str=info["pattern"],
                mergeable_ranks=ranks,
                special_tokens=info["special_tokens"],
            )
            optional = ("end_of_text", "literal", "begin", "ends")
            more = {key: info.get(key) for key in optional}
            return Tokenizer(info["kind"], encoding, info["normalizer"], **more)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"the tokenizer files in {folder} are damaged: {e!r}") from e


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token; end-of-text is 256."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {END_OF_TEXT: 256}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer("bytes", encoding)


def published_tokenizer(name: str) -> Tokenizer:
    """A vocabulary that tiktoken knows by name, downloaded to its cache at first use.

    Raises ValueError for an unknown name or if the vocabulary can't be downloaded.
    """
    if name not in tiktoken.list_encoding_names():
        choices = ", ".join(["bpe", "bytes", *tiktoken.list_encoding_names()])
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {choices}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:  # requests has many; every one of them means that there is no file
        raise ValueError(
            f"the vocabulary of {name!r} cannot be downloaded here ({type(e).__name__}): use"
            " --tokenizer=bpe or --tokenizer=bytes, which need no network, or set"
            " TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from e
    return Tokenizer("tiktoken", encoding)


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `name` means. Raises ValueError."""
    if Path(name).is_dir():
        return Tokenizer.load(Path(name))
    return bytes_tokenizer() if name == "bytes" else published_tokenizer(name)


def bpe_tokenizer(words: Counter, vocab_size: int, progress=lambda done: None) -> Tokenizer:
    """Byte-pair encoding learned from `words`, a count of the words that SPLIT cuts text into.

    The most frequent pair of neighbouring tokens becomes a new token, until there are `vocab_size`
    with end-of-text, the last id. Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2.
    Raises ValueError if the text has too few pairs that occur twice.
    """
    ranks = {bytes([i]): i for i in range(256)}
    texts = [bytes([i]) for i in range(256)]  # id -> bytes
    # sorted, so that the result depends on the counts alone and never on the order of counting
    items = sorted(words.items())
    tokens = [list(word.encode()) for word, _ in items]  # each word as token ids
    counts = [count for _, count in items]

    # 1. count every pair, and remember which words it occurs in
    pair_count: Counter = Counter()
    pair_words: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, ids in enumerate(tokens):
        for pair in pairwise(ids):
            pair_count[pair] += counts[w]
            pair_words[pair].add(w)
    # a heap with the most frequent pair on top, ties by the smaller ids; its counts may be stale
    heap = [(-count, pair) for pair, count in pair_count.items() if count > 1]
    heapq.heapify(heap)

    while len(ranks) < vocab_size - 1:
        # 2. take the most frequent pair; a stale entry goes back with its true count
        while heap:
            count, pair = heapq.heappop(heap)
            if -count == pair_count[pair]:
                break
            if pair_count[pair] > 1:
                heapq.heappush(heap, (-pair_count[pair], pair))
        else:
            raise ValueError(
                f"the training text yields only {len(ranks) + 1} tokens, fewer than"
                f" vocab_size={vocab_size}: use --vocab_size={len(ranks) + 1} or more text"
            )
        # 3. the pair becomes a token (if two pairs spell the same bytes, one token serves both)
        merged = texts[pair[0]] + texts[pair[1]]
        if merged not in ranks:
            ranks[merged] = len(texts)
            texts.append(merged)
            progress(len(ranks))
        new = ranks[merged]
        # 4. merge it in the words that have it; only the pairs around it change
        changed = set()
        for w in pair_words.pop(pair):
            ids, count, i = tokens[w], counts[w], 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) != pair:
                    i += 1
                    continue
                if i > 0:
                    pair_count[ids[i - 1], ids[i]] -= count
                    pair_count[ids[i - 1], new] += count
                    pair_words[ids[i - 1], new].add(w)
                    changed.add((ids[i - 1], new))
                if i + 2 < len(ids):
                    pair_count[ids[i + 1], ids[i + 2]] -= count
                    pair_count[new, ids[i + 2]] += count
                    pair_words[new, ids[i + 2]].add(w)
                    changed.add((new, ids[i + 2]))
                ids[i : i + 2] = [new]
                i += 1
        pair_count[pair] = 0
        for p in changed:
            if pair_count[p] > 1:
                heapq.heappush(heap, (-pair_count[p], p))

    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding(
        "bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer("bpe", encoding)
