"""Tokenizers: exact on any text, learned as published, stored whole."""

import random
from collections import Counter

import pytest
import regex
from conftest import make_text

from tokenizer import END_OF_TEXT, SPLIT, Tokenizer, bpe_tokenizer, bytes_tokenizer

HARD = [
    "",
    " ",
    "\n\n  \t x\n",
    "def f(x):\n        return x**2  # naïve\n",
    "黛玉笑道：「這話怎麼說？」",
    "👩‍👩‍👧 flags 🇯🇵 and e\u0301 \u200b zero width",
    "literal <|endoftext|> in the text",
    "".join(map(chr, range(1, 1000))),
    "\U0010ffff\ue000",
    "3.14159 1,000,000 0x1F",
    "'ll I'LL don't",
    "a" * 5000,
]


def learn(text: str, vocab_size: int) -> Tokenizer:
    return bpe_tokenizer(Counter(regex.findall(SPLIT, text)), vocab_size)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else learn(make_text(), 360)


@pytest.mark.parametrize("text", HARD)
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_is_exact_on_random_unicode(tokenizer):
    rng = random.Random(0)
    planes = [(0, 0xD7FF), (0xE000, 0x10FFFF), (0x4E00, 0x9FFF), (9, 127)]
    for _ in range(300):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_is_never_a_special_token(tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.end_of_text not in tokenizer.encode(f"a {END_OF_TEXT} b")


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest() == tokenizer.digest()
    assert [loaded.encode(t) for t in HARD] == [tokenizer.encode(t) for t in HARD]


def test_bpe_learns_the_textbook_example():
    """Sennrich et al. 2016: low x5, lower x2, newest x6, widest x3 begins with es, est, lo, low."""
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    tokenizer = bpe_tokenizer(words, 257 + 4)
    learned = [tokenizer.decode([i]) for i in range(256, 260)]
    assert learned == ["es", "est", "lo", "low"]


def plain_bpe(text: str, vocab_size: int) -> list[str]:
    """The algorithm as the paper prints it: count all pairs anew for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(SPLIT, text)]
    learned = []
    ids = {bytes([i]): i for i in range(256)}
    while len(ids) < vocab_size - 1:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        pair = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]))
        ids[pair[0] + pair[1]] = len(ids)
        learned.append(pair[0] + pair[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1]]
                i += 1
    return learned


def test_fast_bpe_learns_what_plain_bpe_learns():
    text = make_text(120, seed=3)
    tokenizer = learn(text, 320)
    assert [tokenizer.decode_bytes([i]) for i in range(256, 319)] == plain_bpe(text, 320)


def test_bpe_shortens_what_it_has_seen():
    text = make_text()
    assert len(learn(text, 360).encode(text)) < len(text.encode()) / 3


def test_too_little_text_for_the_vocabulary_is_said():
    with pytest.raises(ValueError, match="vocab_size=5000"):
        learn("a few words only", 5000)


def test_damaged_files_are_noticed(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "vocab.tiktoken").write_text("!!! not base64")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_vocabulary_that_cannot_be_downloaded_names_the_offline_choices(monkeypatch):
    import tiktoken

    import tokenizer

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="--tokenizer=bpe or --tokenizer=bytes"):
        tokenizer.published_tokenizer("gpt2")
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt5x'"):
        tokenizer.published_tokenizer("gpt5x")
