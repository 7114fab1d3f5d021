"""Sampling: cached, seeded, streamed in whole characters, stopped where asked."""

import collections
import io
import sys

import pytest
import torch
from conftest import script

import sample
from engine.checkpoint import load_model
from model import GPT, GPTConfig
from sample import TextStream, generate, pick
from tokenizer import bytes_tokenizer


def make_model(block_size: int = 16, **more) -> GPT:
    model = GPT(GPTConfig(vocab_size=257, block_size=block_size, n_layer=2, n_embd=32, **more))
    model.init_weights(3, zero_init=False)
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model.eval()


def greedy_uncached(model: GPT, prompt: list[int], count: int) -> list[int]:
    """What generate should do at temperature 0, without a cache."""
    limit = model.config.block_size
    context, out = prompt[-limit:], []
    for _ in range(count):
        if len(context) > limit:  # full: its last half is read anew
            context = context[-(limit // 2) :]
        out.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(out[-1])
    return out


@pytest.mark.parametrize("prompt", [[256], list(range(5)), list(range(16)), list(range(40))])
def test_cached_text_equals_uncached_text_beyond_the_context(prompt):
    model = make_model()
    cached = [token for (token,) in generate(model, prompt, 60, temperature=0)]
    assert cached == greedy_uncached(model, prompt, 60)
    assert len(set(cached)) > 5


def test_same_seed_same_tokens_whatever_the_number_of_samples():
    model = make_model()

    def run(n, seed):
        return list(zip(*generate(model, [5, 6], 40, 1.0, num_samples=n, seed=seed), strict=True))

    three = run(3, seed=0)
    assert three == run(3, seed=0)
    assert run(1, seed=0)[0] == three[0]
    assert len({three[0], three[1], three[2], run(1, seed=1)[0]}) == 4


def test_pick_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    u = [(i + 0.5) / 4000 for i in range(4000)]

    def shares(**settings):
        args = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
        counts = collections.Counter(pick(logits, uniform=u, **args).tolist())
        return [round(counts[i] / 4000, 3) for i in range(4)]

    assert shares() == [0.5, 0.3, 0.15, 0.05]
    assert shares(top_k=2) == [0.625, 0.375, 0, 0]
    assert shares(top_k=99) == shares()
    assert shares(top_p=0.6) == [0.625, 0.375, 0, 0]  # the smallest set that reaches 0.6
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    assert shares(temperature=0) == shares(temperature=1e-30) == [1, 0, 0, 0]
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=1e-3)


def test_a_token_of_no_probability_is_never_picked():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 4)
    assert pick(logits, 1.0, 0, 1.0, [0.0, 0.5, 1 - 2**-53]).tolist() == [0, 2, 2]


def test_streaming_never_cuts_a_character():
    text = "naïve 文字 👩‍👩‍👧 ok"
    stream = TextStream(bytes_tokenizer())
    parts = [stream.feed(token) for token in text.encode()]
    assert "".join(parts) + stream.end() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    stream = TextStream(bytes_tokenizer())
    parts = [stream.feed(token) for token in "文".encode()[:2]]
    assert parts == ["", ""] and stream.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "text, stop, shown",
    [
        ("AAAB tail", ["AAB"], "A"),
        ("one two", ["two"], "one "),
        ("one tw", ["two"], "one tw"),
        ("ababac", ["abac"], "ab"),
        ("x END y STOP", ["STOP", "END"], "x "),
        ("aXY", ["XYZ", "Y"], "aX"),
        ("文字文", ["字"], "文"),
        ("plain", [], "plain"),
    ],
)
def test_stop_strings(text, stop, shown):
    stream = TextStream(bytes_tokenizer(), tuple(stop))
    parts = [stream.feed(token) for token in text.encode()]
    assert "".join(parts) + stream.end() == shown
    assert stream.feed(65) == ""


def test_end_of_text_ends_a_sample():
    stream = TextStream(bytes_tokenizer(), ("ZZ",))
    assert stream.feed(65) + stream.feed(90) + stream.feed(256) == "AZ"
    assert stream.done and stream.feed(65) == "" and stream.end() == ""


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    from conftest import TINY

    import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text("")
    argv = [str(folder / "tiny.py"), f"--data={data}", f"--out={folder / 'run'}", *TINY]
    assert train.main(argv) == 0
    return folder / "run"


def text_of(capsys, *argv) -> str:
    sample.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_same_seed_same_text(run, capsys):
    first = text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=0")
    assert first.startswith("the ") and len(first) > 10
    assert first == text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=0")
    assert first != text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=1")


def test_prompts_from_everywhere(run, capsys, monkeypatch, tmp_path):
    expected = text_of(capsys, run, "--prompt=a 文\n", "--max_tokens=9")
    (tmp_path / "prompt.txt").write_text("a 文\n", encoding="utf-8")
    assert (
        text_of(capsys, run, f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_tokens=9")
        == expected
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a 文\n".encode())))
    assert text_of(capsys, run, "--prompt_file=-", "--max_tokens=9") == expected
    assert text_of(capsys, run, "--max_tokens=0") == "\n"
    sample.main([str(run), "--prompt=" + "long " * 50, "--max_tokens=3"])
    assert "only its last 32 fit" in capsys.readouterr().err


def test_interactive_mode_answers_each_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    out = text_of(capsys, run, "--interactive", "--max_tokens=4")
    assert "one" in out and "two" in out and "three" not in out


def test_several_samples_are_told_apart(run, capsys):
    out = text_of(capsys, run, "--prompt=x", "--num_samples=3", "--max_tokens=12")
    assert [f"--- sample {i} of 3" in out for i in (1, 2, 3)] == [True] * 3


def test_a_run_opens_at_its_best_step_anywhere_without_its_data(run, tmp_path, monkeypatch):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    monkeypatch.chdir(tmp_path)
    rows = (
        (moved / "metrics.jsonl")
        .read_text()
        .replace('"step": 8, "val_loss": ', '"step": 8, "val_loss": 9')
    )
    (moved / "metrics.jsonl").write_text(rows)
    best, tokenizer = load_model("moved")
    fourth, _ = load_model("moved", "step-00000004")
    latest, _ = load_model("moved", "latest")
    assert torch.equal(best.wte.weight, fourth.wte.weight)
    assert not torch.equal(best.wte.weight, latest.wte.weight)
    assert not best.training and tokenizer.vocab_size == 257


def test_as_a_script_it_can_be_piped(run):
    out = script("sample.py", run, "--prompt_file=-", "--max_tokens=5", input="from a pipe")
    assert out.startswith("from a pipe")
