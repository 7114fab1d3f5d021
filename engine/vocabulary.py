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
    """Raises the first of the complaints that holds; what cannot even be asked raises, too."""
    ranks, special = dict(tokens), info["special_tokens"]
    end, literal, begin, ends = (info.get(key) for key in OPTIONAL)
    end = special.get("<|endoftext|>") if end is None else end
    ids = [*ranks.values(), *special.values()]
    named = {end, *(begin or []), *(ends or [])}
    if info["normalizer"] is not None:
        unicodedata.normalize(info["normalizer"], "é")  # refuses forms that Unicode does not know
    sound = {
        "an id is no number from 0 on": all(type(i) is int and i >= 0 for i in ids),  # no bool
        "a token stands there twice": len(ranks) == len(tokens),
        "two tokens have the same id": len({*ranks.values()}) == len(ranks),
        "two special tokens have the same id": len({*special.values()}) == len(special),
        "a token for each byte is wanted": all(bytes([i]) in ranks for i in range(256)),
        "a special token has no name": all(special),
        # published vocabularies have gaps of a few ids; a model would have a row for each of them
        f"it has {len(ids)} tokens, and the id {max(ids)}": max(ids) < 2 * len({*ids}),
        "its kind is unknown": info["kind"] in ("bytes", "bpe", "tiktoken"),
        "name and pattern should be text": type(info["name"]) is type(info["pattern"]) is str,
        "the end of a text should be one of its ids": named <= {*ids},
        "what may stand in text is not special": {*(literal or [])} <= {*special},
    }
    for complaint, kept in sound.items():
        if not kept:
            raise ValueError(complaint)
