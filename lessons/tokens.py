"""Chapter 1: bytes, merges by hand, why a vocabulary looks garbled, what its size costs."""

from collections import Counter
from itertools import pairwise

import bpe
from engine.tokenizer_json import spell
from lessons import require
from shape import GPTConfig
from tokenizer import bytes_tokenizer

BOOK = "bpe"
POEM = "白日依山尽"  # the sun sinks behind the hills: the first line of a poem by Wang Zhihuan
WORDS = Counter(
    {"天天": 2, "天上": 1, "天下": 1, "白天": 1}
)  # daily, in the sky, the world, by day
HAND = Counter(low=5, lower=2, newest=6, widest=3)  # the example at the top of bpe.py


def hexed(token: bytes) -> str:
    return token.hex()


def bytes_of_a_poem() -> int:
    ids = bytes_tokenizer().encode(POEM)
    for character in POEM:
        print(character, bytes_tokenizer().encode(character), character.encode().hex(" "))
    return len(ids)


def learned(words: Counter, merges: int) -> list[bytes]:
    """The tokens that the first merges make, in their order."""
    return bpe.slow_bpe(words, 257 + merges)[256:]


def first_merge() -> int:
    pairs: Counter = Counter()
    for word, count in WORDS.items():
        for pair in pairwise(word.encode()):
            pairs[bytes(pair).hex()] += count
    print("pairs ", dict(pairs.most_common(4)))
    for i, token in enumerate(learned(WORDS, 4), start=1):
        print(f"merge {i}  {hexed(token):12} {token.decode(errors='replace')}")
    return max(pairs.values())


def garbled() -> int:
    tokenizer = bpe.bpe_tokenizer(WORDS, 261)
    ids = tokenizer.encode("天天")
    for i in ids:
        token = tokenizer.decode_bytes([i])
        seen = spell(token)
        print(f"id {i}  bytes {hexed(token)}  as vocab.json shows it {seen!r}")
    print("decode", tokenizer.decode(ids), "  encode ", ids)
    return len(spell("天".encode()))


def share() -> float:
    """Of the default shape's parameters, the part that stands in embedding and head, in percent."""
    for size in (257, 2048, 50257):
        c = GPTConfig(vocab_size=size)
        tables = 2 * size * c.n_embd
        print(f"V = {size:6,}  tables {tables:10,}  of {c.parameters():10,}")
    c = GPTConfig(vocab_size=2048)
    return 100 * 2 * 2048 * c.n_embd / c.parameters()


def unseen() -> int:
    tokenizer = bpe.bpe_tokenizer(HAND, 261)
    for word in ("lowest", "newer", "天"):
        ids = tokenizer.encode(word)
        parts = [tokenizer.decode_bytes([i]).decode(errors="replace") for i in ids]
        print(word, ids, parts, "->", tokenizer.decode(ids))
    return len(tokenizer.encode("lowest"))


QUESTIONS = (bytes_of_a_poem, first_merge, garbled, unseen, share)


# --- checks


def slow_and_fast_agree():
    """The loop of the paper and the fast form learn the same tokens."""
    merge(bpe.merge)  # with a wrong one the loop might never end
    for words in (WORDS, HAND):
        fast = bpe.bpe_tokenizer(words, 262).encoding._mergeable_ranks
        slow = bpe.slow_bpe(words, 262)
        require(slow == sorted(fast, key=fast.get), "slow_bpe and bpe_tokenizer learn other tokens")


def merge(function):
    """Exercise 1.a: merge(ids, pair, new), on cases where it is easy to be wrong."""
    cases = (
        ([1, 2, 3], [9, 3]),
        ([1, 1, 2], [1, 9]),
        ([1, 2, 1, 2], [9, 9]),
        ([], []),
        ([2, 1], [2, 1]),
    )
    for ids, wanted in cases:
        found = list(function(list(ids), (1, 2), 9))
        require(found == wanted, f"merge({ids}, (1, 2), 9) gives {found}, and should give {wanted}")
    found = list(function([1, 1, 1], (1, 1), 9))
    require(found == [9, 1], f"from left to right [1, 1, 1] becomes [9, 1], and not {found}")


def encode(function):
    """Exercise 1.b: encode(word, tokens), the ids of a word, given all tokens by id."""
    tokenizer = bpe.bpe_tokenizer(HAND, 266)
    ranks = tokenizer.encoding._mergeable_ranks
    tokens = sorted(ranks, key=ranks.get)
    for word in ("low", "lowest", "newest", "widen", "天", "wwest"):
        found, wanted = list(function(word, tokens)), tokenizer.encode(word)
        require(found == wanted, f"{word} becomes {found}, and should become {wanted}")


CHECKS = (slow_and_fast_agree, merge, encode)
