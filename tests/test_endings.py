"""Where samples end, each on its own, and which checkpoint they come from."""

import re
from dataclasses import replace

import pytest
import tiktoken
import torch
from conftest import TINY

import sample
from model import GPT, GPTConfig
from sample import generate
from tokenizer import Tokenizer

try:  # wherever the stream of text lives
    from generate import TextStream
except ImportError:
    from sample import TextStream


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run whose newest checkpoint is its best, and the one before another model."""
    import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text("")
    argv = [str(folder / "tiny.py"), f"--data={data}", f"--out={folder / 'run'}", *TINY]
    assert train.main([*argv, "--steps=60", "--save_every=30", "--eval_every=30"]) == 0
    return folder / "run"


def text_of(capsys, *argv) -> str:
    capsys.readouterr()
    sample.main([str(a) for a in argv])
    return capsys.readouterr().out


def samples(capsys, *argv) -> list[str]:
    parts = re.split(r"--- sample \d+ of \d+\n", text_of(capsys, *argv))
    assert parts[0] == ""
    return [part.removesuffix("\n") for part in parts[1:]]


# --- where a sample ends


def test_every_sample_ends_at_its_own_stop_text(run, capsys):
    """The sample of a row is what it is without a stop, up to the stop: the others go on."""
    asked = [run, "--prompt=t", "--num_samples=5", "--max_tokens=50", "--temperature=1"]
    whole = samples(capsys, *asked)
    bodies = [text[1:] for text in whole]
    ends = {
        c: [body.find(c) for body in bodies] for c in sorted(set("".join(bodies))) if c.isascii()
    }
    # a character that ends some early, some late, and some not at all
    stop = max(ends, key=lambda c: (-1 in ends[c], len(set(ends[c]))))
    assert len(set(ends[stop])) >= 4 and -1 in ends[stop], "this test needs other samples"
    expected = ["t" + body.split(stop)[0] for body in bodies]
    assert samples(capsys, *asked, f"--stop={stop}") == expected


def word_tokenizer(*words: str) -> Tokenizer:
    """Bytes, and tokens of several characters, with end-of-text behind them."""
    ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i, w in enumerate(words)}
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding(
        "words", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer("bpe", encoding)


@pytest.mark.parametrize("stops", [("STOP", "END"), ("END", "STOP")])
def test_a_token_with_two_stop_texts_is_cut_at_the_earliest(stops):
    """Whichever of them is listed first."""
    tokenizer = word_tokenizer("one END two STOP three", "one STOP two END three")
    for token, shown in ((256, "one "), (257, "one ")):
        stream = TextStream(tokenizer, stops)
        assert stream.feed(token) + stream.end() == shown
        assert stream.done


@pytest.mark.parametrize("stops", [("b", "abc"), ("abc", "b")])
def test_a_stop_text_inside_the_beginning_of_another_counts(stops):
    stream = TextStream(word_tokenizer(), stops)
    assert "".join(stream.feed(c) for c in b"xabc") + stream.end() == "xa"


# --- which checkpoint speaks


def test_the_checkpoint_that_is_asked_for_is_the_one_that_speaks(run, capsys):
    asked = ["--prompt=the ", "--max_tokens=40", "--temperature=1"]
    older, newer = (text_of(capsys, run / f"step-000000{n}", *asked) for n in (30, 60))
    assert older != newer
    assert text_of(capsys, run, "--checkpoint=step-00000030", *asked) == older
    assert text_of(capsys, run, "--checkpoint=step-00000060", *asked) == newer
    assert text_of(capsys, run, "--checkpoint=latest", *asked) == newer
    assert text_of(capsys, run, "--checkpoint=best", *asked) == newer
    assert text_of(capsys, run, *asked) == newer


# --- where the context ends


def test_a_full_context_keeps_its_last_half():
    """A model that says nothing but the position it stands at shows how far it was set back."""
    config = GPTConfig(vocab_size=16, block_size=16, n_layer=1, n_head=1, n_embd=16)
    config = replace(config, position="learned", embed_norm=False, logit_cap=0.0)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.eye(16) if name in ("wpe.weight", "head.weight") else torch.zeros(1))
    said = [token for (token,) in generate(model, [0, 0, 0], 30, temperature=0)]
    again = list(range(7, 16))  # the last 8 of 17 tokens stand at positions 0 to 7
    assert said == (list(range(2, 16)) + again + again)[:30]
