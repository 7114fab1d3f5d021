"""Tokenizers: exact on any text, learned as published, stored whole."""

import base64
import json
import random
from collections import Counter

import pytest
import regex
import tiktoken
from conftest import make_text

from bpe import bpe_tokenizer, slow_bpe
from tokenizer import (
    END_OF_TEXT,
    SPLIT,
    Tokenizer,
    bytes_tokenizer,
    find_tokenizer,
)

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


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - 1)]


@pytest.mark.parametrize("vocab_size", [257, 258, 320, 5000])
def test_fast_bpe_learns_what_slow_bpe_learns(vocab_size):
    text = make_text(120, seed=3) + "aaa aaaa aaaaa aaaaaaa abcabc bcabca " * 3
    words = Counter(regex.findall(SPLIT, text))
    assert tokens_of(bpe_tokenizer(words, vocab_size)) == slow_bpe(words, vocab_size)


def test_slow_bpe_learns_the_textbook_example():
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    assert slow_bpe(words, 257 + 4)[256:] == [b"es", b"est", b"lo", b"low"]


def test_bpe_reads_a_very_long_word_in_pieces():
    """Three megabytes of one letter took 74 s; a piece is merged once, however often it occurs."""
    tokenizer = bpe_tokenizer(Counter(["a" * 3_000_000]), 4096)
    assert tokens_of(tokenizer)[256:259] == [b"aa", b"aaaa", b"aaaaaaaa"]
    assert max(map(len, tokens_of(tokenizer))) <= 256


def test_bpe_shortens_what_it_has_seen():
    text = make_text()
    assert len(learn(text, 360).encode(text)) < len(text.encode()) / 3


def test_too_little_text_gives_a_smaller_vocabulary():
    tokenizer = learn("few words, few words", 5000)
    assert 257 < tokenizer.vocab_size < 5000
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("few words")) == "few words"


def test_what_occurs_once_is_no_token():
    learned = bpe_tokenizer(Counter({"once": 1, "ho": 2}), 300)
    assert learned.vocab_size == 256 + 2 and learned.encode("ho once") == [256, *b" once"]


SINGLE = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
HOSTILE_VOCABULARIES = {
    "a huge id": [*SINGLE, "YWE= 4294967290"],
    "an id beyond all integers of a machine": [*SINGLE, "YWE= " + "9" * 30],
    "a million unused ids": [*SINGLE, "YWE= 1000000"],
    "a token twice": [*SINGLE, "YWE= 257", "YWE= 258"],
    "an id twice": [*SINGLE, "YWE= 255"],
    "a negative id": [*SINGLE, "YWE= -1"],
    "a byte is missing": SINGLE[:-1],
    "nothing": [],
    "no number": [*SINGLE, "YWE= two"],
    "no base64": [*SINGLE, "?! 257"],
    "three columns": [*SINGLE, "YWE= 257 258"],
}
HOSTILE_ENCODINGS = {
    "a list": [],
    "special tokens in a list": dict(special_tokens=["a"]),
    "a special token that is a number": dict(special_tokens={"<|endoftext|>": "256"}),
    "a special token without a name": dict(special_tokens={"<|endoftext|>": 256, "": 257}),
    "a huge special id": dict(special_tokens={"<|endoftext|>": 2**40}),
    "a negative special id": dict(special_tokens={"<|endoftext|>": -1}),
    "two special tokens with one id": dict(special_tokens={"<|endoftext|>": 256, "b": 256}),
    "no end of text": dict(special_tokens={}),
    "an end of text that is no id": dict(end_of_text=5000),
    "a beginning that is no id": dict(begin=["a"]),
    "an unknown kind": dict(kind="magic"),
    "a name that is a number": dict(name=5),
    "a pattern that is a list": dict(pattern=["a"]),
    "a pattern that is none": dict(pattern="(("),
    "an unknown normaliser": dict(normalizer="NFX"),
    "a literal that is not special": dict(literal=["hello"]),
}


@pytest.mark.parametrize("what", HOSTILE_VOCABULARIES)
def test_a_hostile_vocabulary_is_refused_in_one_sentence(tmp_path, what):
    bytes_tokenizer().save(tmp_path)
    (tmp_path / "vocab.tiktoken").write_text("\n".join(HOSTILE_VOCABULARIES[what]))
    with pytest.raises(ValueError, match="damaged") as e:
        Tokenizer.load(tmp_path)
    assert len(str(e.value)) < 500 + len(str(tmp_path)) and "\n" not in str(e.value)


@pytest.mark.parametrize("what", HOSTILE_ENCODINGS)
def test_a_hostile_encoding_is_refused_in_one_sentence(tmp_path, what):
    bytes_tokenizer().save(tmp_path)
    path, change = tmp_path / "encoding.json", HOSTILE_ENCODINGS[what]
    info = json.loads(path.read_text()) | change if change else change
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="damaged") as e:
        Tokenizer.load(tmp_path)
    assert len(str(e.value)) < 500 + len(str(tmp_path)) and "\n" not in str(e.value)


def test_ids_that_no_token_has_are_known_and_decode():
    """As in cl100k_base, which has no 100256 and other gaps between its special tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {END_OF_TEXT: 258, "<|unused_259|>": 259, "<|end|>": 262}
    encoding = tiktoken.Encoding(
        "gaps", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
    )
    tokenizer = Tokenizer("tiktoken", encoding)
    assert tokenizer.vocab_size == 263
    assert tokenizer.unused == [256, 257, 259, 260, 261]
    assert tokenizer.decode([104, 257, 105]) == "h\N{REPLACEMENT CHARACTER}i"
    assert all(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    assert bytes_tokenizer().unused == []


def test_a_tokenizer_is_found_wherever_there_is_one(data, train, tmp_path):
    run = train("run")
    expected = bytes_tokenizer().digest()
    places = ["bytes", data, run, next(run.glob("step-*"))]
    assert [find_tokenizer(str(place)).digest() for place in places] == [expected] * 4


def test_a_tokenizer_is_found_in_the_layout_of_hugging_face(tmp_path):
    from engine.tokenizer_json import to_json

    ours = learn(make_text(), 360)
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_json(ours)))
    config = dict(model_type="llama", vocab_size=370, eos_token_id=359)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find_tokenizer(str(tmp_path))
    assert [found.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]
    assert found.end_of_text == ours.end_of_text
    assert found.unused == list(range(360, 370))  # rows of its model that no token has


@pytest.mark.parametrize("name", ["gpt5x", "no/such/folder"])
def test_an_unknown_tokenizer_is_told_the_choices(name):
    with pytest.raises(ValueError, match=f"{name}.*bpe, bytes.*gpt2.*folder of a run"):
        find_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        find_tokenizer(str(tmp_path))


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
