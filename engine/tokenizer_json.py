"""Byte-level BPE as Hugging Face's `tokenizers` library writes it: tokenizer.json in and out.

That library merges pairs in the order of a list, tiktoken by the rank of what comes out; it knows
patterns in Oniguruma's dialect, tiktoken in Rust's. Where the two agree on every text, and in most
published vocabularies they do, one becomes the other; the rest is refused.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from tiktoken_ext.openai_public import r50k_pat_str as GPT2_SPLIT

from engine import chat_template
from engine.tensors import read_json
from tokenizer import END_OF_TEXT, Tokenizer, encoding_of, published_tokenizer

# tokenizer.json spells bytes as printable characters: Latin-1 where that is printable, the other
# bytes in order from U+0100 on. As in encoder.py of github.com/openai/gpt-2.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
BYTE = {character: b for b, character in SPELLING.items()}

# GPT-2's pattern when digits have been cut out before, one by one or in runs, as SmolLM does: to
# the white space before it, a digit is then the end of the text.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LARGEST = 2**20  # ids: four times the largest vocabulary that is published


def spell(token: bytes) -> str:
    return "".join(SPELLING[b] for b in token)


def unspell(text: str) -> bytes:
    return bytes(BYTE[c] for c in text) if set(text) <= BYTE.keys() else text.encode()


def last_merge(token: bytes, rank: Callable) -> tuple[bytes, bytes] | None:
    """The pair whose merge completes `token` if its bytes alone are encoded; None if none does.

    `rank((left, right))` is the place of a merge in the order of merges, or None.
    """
    parts, pair = [token[i : i + 1] for i in range(len(token))], None
    while len(parts) > 1:
        ranked = [(r, i) for i, p in enumerate(pairwise(parts)) if (r := rank(p)) is not None]
        if not ranked:
            return None
        _, i = min(ranked)
        pair = parts[i], parts[i + 1]
        parts[i : i + 2] = [pair[0] + pair[1]]
    return pair


def read_folder(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a model in `folder`, with an id for each row of its embedding.

    Raises ValueError, with the `name` of the model, if it has none that could be ours.
    """

    def read(file: str) -> dict:  # what need not be there
        return read_json(folder / file) if (folder / file).exists() else {}

    # 1. the vocabulary
    config, info = read_json(folder / "config.json"), read("tokenizer.json")
    vocab_size = config.get("vocab_size")
    if (folder / "encoding.json").exists():
        ours = Tokenizer.load(folder)  # it was exported here; unless it was changed since,
        if ours.vocab_size == vocab_size and to_json(ours) == info:
            return ours
    if not info:
        vocab = read("vocab.json")  # of GPT-2, as in 2019
        if vocab and config.get("model_type") == "gpt2":
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            model = dict(vocab=vocab, merges=merges)
            info = dict(model=model, pre_tokenizer=dict(type="ByteLevel"))
        elif any(folder.glob("*.model")):
            raise ValueError(f"the tokenizer of {name} needs SentencePiece, which this one lacks")
        elif vocab_size == 50257:
            return published_tokenizer("gpt2")
        else:
            raise ValueError(f"{name} has no tokenizer.json")

    # 2. what ends a sample, in the order in which transformers looks for it; else what it is named
    ends = read("generation_config.json").get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id")
    named = read("tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    choices = [ends if isinstance(ends, list) else [ends], [named]]
    try:
        return from_json(info, name, vocab_size, choices)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(
            f"{folder / 'tokenizer.json'} is damaged, or of an unknown kind ({e!r})"
        ) from e


def from_json(info: dict, name: str, vocab_size: int, ends: Sequence[list] = ()) -> Tokenizer:
    """The tokenizer that a tokenizer.json, read as `info`, describes.

    Its ids are those of the `tokenizers` library where special tokens in a text are text, too
    (`encode_special_tokens`), but for combining marks that its Unicode tables are too old for. Ids
    below `vocab_size` without a token get one that no text has. What ends a sample are the special
    tokens in the first of `ends`, lists of ids and names, that has any; else <|endoftext|>; else
    the byte 0. Raises ValueError, with the name of what is needed, for other tokenizers.
    """

    def require(kept, needs: str) -> None:
        if not kept:
            raise ValueError(f"the tokenizer of {name} needs {needs}, which this one lacks")

    pattern = read_pattern(info, require)
    forms = [
        step["type"]
        for step in steps(info, "normalizer", "normalizers")
        if chat_template.GUARD not in step.get("pattern", {}).get("Regex", "")  # written by us
    ]
    require(forms in ([], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"]), f"the normaliser {forms}")
    ranks, special = read_tokens(info, require)
    literal = [token for token in info.get("added_tokens") or [] if not token.get("special")]
    for token in literal:
        exact = not any(map(token.get, ("single_word", "lstrip", "rstrip")))
        exact = exact and not (forms and token.get("normalized"))
        require(exact, f"more than exactly {token['content']!r} in a text to match that token")

    # ids without a token, and those that end and begin
    used = {*ranks.values(), *special.values()}
    if max(used) >= vocab_size:
        raise ValueError(f"the tokenizer of {name} has id {max(used)}, its model only {vocab_size}")
    require(vocab_size <= LARGEST, f"{vocab_size} ids")
    special |= {f"<|unused_{i}|>": i for i in range(vocab_size) if i not in used}
    known = special | {i: i for i in special.values()}
    found = ([known[end] for end in choice if end in known] for choice in [*ends, [END_OF_TEXT]])
    stops = next(filter(None, found), [ranks[b"\0"]])
    begin = [known[i] for i in read_begin(info, require)]
    if pattern == GPT2_SPLIT and vocab_size == 50257:
        name = "gpt2"  # whichever model has it: its data are prepared with --tokenizer=gpt2
    try:
        encoding = encoding_of(name, pattern, ranks, special)
    except ValueError as e:
        raise ValueError(f"the tokenizer of {name} cuts words by {pattern!r}: {e}") from e
    form = forms[0] if forms else None
    names = [token["content"] for token in literal]
    return Tokenizer("tiktoken", encoding, form, stops[0], names, begin=begin, ends=stops)


def steps(info: dict, key: str, inner: str) -> list[dict]:
    """The steps of which one part of a tokenizer.json consists: none, one, or a Sequence."""
    step = info.get(key)
    return step.get(inner, [step]) if step else []


def read_pattern(info: dict, require: Callable) -> str:
    """How text becomes words."""
    *before, last = steps(info, "pre_tokenizer", "pretokenizers") or [{"type": "none"}]
    kinds, own = [step["type"] for step in (*before, last)], last.get("use_regex", True)
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    byte_level = "merges" in info["model"] and kinds[-1] == "ByteLevel"
    byte_level = byte_level and not any(map(info["model"].get, options))
    require(byte_level, "SentencePiece or the like")
    require(not last.get("add_prefix_space"), "a space before the text (add_prefix_space)")
    if own and kinds == ["ByteLevel"]:
        return GPT2_SPLIT
    if own and kinds == ["Digits", "ByteLevel"]:
        return DIGITS_SPLIT.replace("@", "" if before[0]["individual_digits"] else "+")
    require(not own and kinds == ["Split", "ByteLevel"], f"words cut by {', '.join(kinds)}")
    cut = before[0]
    isolated = cut["behavior"] == "Isolated" and not cut["invert"] and "Regex" in cut["pattern"]
    require(isolated, "words cut by something else than a pattern of words")
    # there, a plus behind an interval repeats it; here it would make it possessive
    interval = r"(\\p\{\w+\}|\[[^\]]*\]|\\?\w)(\{\d+(?:,\d*)?\})\+"
    return re.sub(interval, r"(?:\1\2)+", cut["pattern"]["Regex"])


def read_tokens(info: dict, require: Callable) -> tuple[dict[bytes, int], dict[str, int]]:
    """The ids of ordinary and of special tokens.

    A token that its own bytes do not lead to is in no text, and so is special.
    """
    model, order = info["model"], {}  # (left, right), as bytes: its place in the order of merges
    for i, pair in enumerate(model["merges"]):
        left, right = pair if isinstance(pair, list) else pair.partition(" ")[::2]
        order[unspell(left), unspell(right)] = i
    ranks, special, made = {}, {}, {}
    for text, i in model["vocab"].items():
        token = unspell(text)
        pair = last_merge(token, order.get)
        if pair:
            made[order[pair]] = i
        if pair or len(token) == 1 or model.get("ignore_merges"):  # then a whole word is looked up
            ranks[token] = i
        else:
            special[text] = i
    special |= {token["content"]: token["id"] for token in info.get("added_tokens") or []}
    single = sum(len(token) == 1 for token in ranks)
    require(single == 256, f"no more than {single} of the 256 bytes")
    ids = [*ranks.values()]
    require(len({*ids}) == len(ids) and min(ids) >= 0, "the same id for two tokens")
    in_order = [made[k] for k in sorted(made)]
    require(in_order == sorted(in_order), "ids in another order than its merges")
    for token in ranks.keys() - {left + right for left, right in order}:  # never merged: here
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]  # neither may they be
        require(not any(c in ranks and d in ranks for c, d in cuts), f"no merge for {spell(token)}")
    return ranks, special


def read_begin(info: dict, require: Callable) -> list[int]:
    """The ids that stand before every text, such as Llama's <|begin_of_text|>."""
    begin = []
    for step in steps(info, "post_processor", "processors"):
        if step["type"] != "ByteLevel":  # that one only moves offsets
            require(step["type"] == "TemplateProcessing", f"the post-processor {step['type']}")
            require("Sequence" in step["single"][-1], "a token behind each text")
            for piece in step["single"][:-1]:
                begin += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return begin


def text_of(tokenizer: Tokenizer, i: int) -> str:
    """How a tokenizer.json spells the token `i`."""
    names = {i: text for text, i in tokenizer.special.items()}
    return names.get(i) or spell(tokenizer.decode_bytes([i]))


def to_json(tokenizer: Tokenizer) -> dict:
    """The content of a tokenizer.json that gives the same ids."""
    ranks, special = tokenizer.encoding._mergeable_ranks, tokenizer.special
    tokens = sorted(ranks, key=ranks.get)
    pairs = [last_merge(t, lambda pair: ranks.get(pair[0] + pair[1])) for t in tokens if len(t) > 1]
    # there, a plus behind an interval would repeat it; at the end of a choice it changes nothing
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=\||$)", r"\1", tokenizer.encoding._pat_str)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    # what no merge makes is a word looked up whole; special tokens keep their ids only in here
    model = dict(type="BPE", ignore_merges=None in pairs)
    model |= dict(vocab={spell(token): ranks[token] for token in tokens} | special)
    model |= dict(merges=[[spell(left), spell(right)] for left, right in filter(None, pairs)])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        dict(id=i, content=text, special=text not in tokenizer.literal, **flags)
        for text, i in sorted(special.items(), key=lambda item: item[1])
    ]
    normalizers = [chat_template.normalizer(tokenizer)] if tokenizer.markers else []
    if tokenizer.normalizer:
        normalizers.append(dict(type=tokenizer.normalizer))
    return dict(
        version="1.0",
        added_tokens=added,
        normalizer=dict(type="Sequence", normalizers=normalizers) if normalizers else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=template(tokenizer) if tokenizer.begin else None,
        decoder=byte_level,
        model=model,
    )


def template(tokenizer: Tokenizer) -> dict:
    """What puts `begin` before every text; of a pair of texts, before the first."""
    names = {text_of(tokenizer, i): i for i in tokenizer.begin}
    tokens = {name: dict(id=name, ids=[i], tokens=[name]) for name, i in names.items()}
    single = [{"SpecialToken": dict(id=name, type_id=0)} for name in names]
    single.append({"Sequence": dict(id="A", type_id=0)})
    pair = [*single, {"Sequence": dict(id="B", type_id=0)}]
    return dict(type="TemplateProcessing", single=single, pair=pair, special_tokens=tokens)
