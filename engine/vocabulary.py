"""The two files of a tokenizer, read with suspicion: a few bytes may claim ids in the billions."""

import base64
import json
import unicodedata
from pathlib import Path

OPTIONAL = ("end_of_text", "literal", "begin", "ends")


def read(folder: Path) -> tuple[dict, dict[bytes, int]]:
    """What encoding.json says, and the rank of each token in vocab.tiktoken.

    Raises ValueError, in one sentence, for anything that no tokenizer has.
    """
    try:
        info = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.tiktoken").read_bytes().splitlines()
        pairs = [line.split() for line in lines]
        tokens = [(base64.b64decode(token, validate=True), int(rank)) for token, rank in pairs]
        check(info, tokens)
    except FileNotFoundError as e:
        raise ValueError(f"{folder} holds no tokenizer: {Path(e.filename).name} is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise damaged(folder, e) from e
    return info, dict(tokens)


def damaged(folder: Path, why: Exception) -> ValueError:
    reason = why if type(why) is ValueError else repr(why)
    return ValueError(f"the tokenizer files in {folder} are damaged: {str(reason)[:200]}")


def check(info: dict, tokens: list[tuple[bytes, int]]) -> None:
    def require(kept: bool, what: str) -> None:
        if not kept:
            raise ValueError(what)

    def is_id(i) -> bool:
        return type(i) is int and i >= 0  # true is an int for Python

    # 1. the tokens of text
    ranks = dict(tokens)
    require(len(ranks) == len(tokens), "a token stands there twice")
    require(len({*ranks.values()}) == len(tokens), "two tokens have the same id")
    require(all(map(is_id, ranks.values())), "an id is negative")
    require(all(bytes([i]) in ranks for i in range(256)), "a token for each byte is wanted")

    # 2. special tokens
    special = info["special_tokens"]
    require(all(text and is_id(i) for text, i in special.items()), "a special token without an id")
    require(len({*special.values()}) == len(special), "two special tokens have the same id")
    used = {*ranks.values(), *special.values()}
    # published vocabularies have gaps of a few ids; a model would have a row for each of them
    most = max(used)
    require(most < 2 * len(used), f"it has {len(used)} tokens, and the id {most}")

    # 3. how they are used
    require(info["kind"] in ("bytes", "bpe", "tiktoken"), "its kind is unknown")
    require(type(info["name"]) is type(info["pattern"]) is str, "name and pattern should be text")
    if info["normalizer"] is not None:
        unicodedata.normalize(info["normalizer"], "é")  # refuses forms that Unicode does not know
    end, literal, begin, ends = (info.get(key) for key in OPTIONAL)
    end = special.get("<|endoftext|>") if end is None else end
    ids = [end, *(begin or []), *(ends or [])]
    require(all(is_id(i) and i in used for i in ids), "the end of a text should be one of its ids")
    require(all(text in special for text in literal or []), "what may stand in text is not special")
