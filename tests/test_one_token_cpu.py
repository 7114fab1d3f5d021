"""The compiled pass of one token computes what the model computes, and takes its place in time."""

import os
import time

import pytest
import torch
from test_inference import CHANGES, late, text
from test_model import SHAPES, make

from engine import blas, replay
from engine.inference import ready
from engine.linear import PackedLinear, StreamedLinear, packable
from engine.machine import fast_bfloat16
from generate import generate
from model import Attention, Block
from speculate import Draft, lookup, speculate

one_token_cpu = pytest.importorskip("engine.one_token_cpu", reason="numba is not installed")
FASTER = one_token_cpu.faster
FIT = [shape for shape in SHAPES if shape != "canon"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Whether it is faster is not asked."""
    monkeypatch.setattr(replay, "PATIENCE", 0)
    monkeypatch.setattr(replay, "WORTH_NUMBA", 0)
    monkeypatch.setattr(one_token_cpu, "faster", lambda *_: True)


def compiled(model) -> bool:
    """Whether the last text's step was."""
    last = model.last
    return bool(last) and isinstance(last.states[-1].get("replay"), one_token_cpu.OneToken)


@pytest.mark.parametrize("shape", FIT)
@pytest.mark.parametrize("threads", [1, 2])
def test_it_writes_the_same_text(shape, threads):
    with blas.using(threads):
        model, prompts = ready(make(shape)), ([1, 2, 3], [9], [7, 5, 8, 2])
        for prompt in prompts:
            assert text(model, *prompt) == text(make(shape), *prompt)
        assert compiled(model)


def logits(model, cache) -> list[torch.Tensor]:
    """Those of 24 tokens, one after another."""
    with torch.inference_mode():
        return [model(torch.tensor([[n * 7 % 61]]), cache=cache) for n in range(24)]


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_it_reads_blocks_of_columns(shape, kind):
    """Of bfloat16 it computes what float32 does with such weights, of eight bits what layers do."""
    if kind == "bfloat16" and fast_bfloat16():
        pytest.skip("layers have another form here")
    if kind == "int8":
        model, plain = (ready(make(shape), "int8") for _ in range(2))
    else:
        model, plain = ready(make(shape).bfloat16()), make(shape).bfloat16().float()
    with torch.inference_mode():
        cache = model.new_cache()
    for found, true in zip(
        logits(model, cache), logits(plain, replay.KVCache(model.config, 1)), strict=True
    ):
        torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)
    assert isinstance(cache.replay, one_token_cpu.OneToken)


@pytest.mark.parametrize("kind", ["canon", "packed", "a forward of its own"])
def test_models_of_another_kind_keep_what_was_recorded(kind):
    model = ready(make("canon" if kind == "canon" else "gpt2"))
    block, up = model.blocks[1], make("gpt2").blocks[1].mlp.up
    if kind == "packed":
        if not packable(torch.float32):
            pytest.skip("oneDNN has no float32 here")
        block.mlp.up = PackedLinear(up.weight, up.bias)
    elif kind == "a forward of its own":
        block.forward = late(block.forward, begin=99)
    assert len(text(model, 1, 2, 3)) == 20
    assert model.last.states[-1]["replay"] and not compiled(model)


def test_blocks_of_two_widths_are_not_read_as_one():
    model = ready(make("gpt2"), "int8")
    up = make("gpt2").blocks[1].mlp.up
    assert one_token_cpu.OneToken(model)
    model.blocks[1].mlp.up = StreamedLinear(up.weight, up.bias, "int8", width=32)
    with pytest.raises(ValueError, match="widths"):
        one_token_cpu.OneToken(model)


def test_a_forked_process_does_without(monkeypatch):
    """GNU's OpenMP would end it."""
    model = ready(make("gpt2"))
    before = text(model, 1, 2, 3)
    assert compiled(model)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert text(model, 1, 2, 3) == before
    assert not compiled(model)


def test_what_is_not_finite_stays_so():
    model = ready(make("modern"))
    text(model, 1, 2, 3)
    assert compiled(model)
    model.blocks[1].mlp.down.matrix[3, 5] = torch.nan
    with torch.inference_mode():
        cache = model.new_cache()
        assert model(torch.tensor([[1]]), cache=cache).isnan().all()
    with pytest.raises(ValueError, match="finite"):
        text(model, 1, 2, 3)


@pytest.mark.parametrize("guess", ["lookup", "draft"])
def test_it_takes_back_what_was_guessed(guess):
    plain, small = make("llama"), ready(make("gpt2", seed=3))
    model = ready(make("llama"), several=True)
    guesser = lookup if guess == "lookup" else Draft(small, model)
    wanted = [token for [token] in generate(plain, [1, 2, 1, 2, 1], 18, temperature=0)]
    found = speculate(model, [1, 2, 1, 2, 1], 18, guesser, temperature=0)
    assert [token for [token] in found] == wanted


@pytest.mark.parametrize("edit", ["attention", "block", "late"])
def test_whoever_edits_the_book_is_obeyed(edit, monkeypatch):
    """Also if only the last place of the context tells."""
    kind = Attention if edit == "attention" else Block
    forward = kind.forward

    def edited(self, x, *more):
        if edit == "late":
            return late(forward.__get__(self), begin=22)(x, *more)
        return forward(self, 1.1 * x, *more)

    monkeypatch.setattr(kind, "forward", edited)
    model = ready(make("gpt2"))
    assert text(model, 1, 2, 3) == text(make("gpt2"), 1, 2, 3)
    assert not compiled(model)


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_a_model_between_two_texts_is_obeyed(change, monkeypatch):
    models = ready(make("gpt2")), ready(make("gpt2"))
    before = [text(model, 1, 2, 3) for model in models]
    assert all(map(compiled, models))
    for model in models:
        CHANGES[change](model, monkeypatch)
    after = text(models[0], 1, 2, 3)
    monkeypatch.setattr(replay.RecordedCache, "ready", lambda self: False)
    assert after == text(models[1], 1, 2, 3)
    assert after != before[0]


def test_what_is_slower_is_not_taken(monkeypatch):
    quick, slow = (lambda: None), (lambda: time.sleep(0.002))
    assert FASTER(quick, slow) and not FASTER(slow, quick)
    monkeypatch.setattr(one_token_cpu, "faster", lambda *_: False)
    model = ready(make("gpt2"))
    assert text(model, 1, 2, 3) == text(make("gpt2"), 1, 2, 3)
    assert not compiled(model)


def test_it_comes_after_as_many_seconds_of_tokens_as_it_takes_to_load(monkeypatch):
    monkeypatch.setattr(replay, "WORTH_NUMBA", 2.0)
    monkeypatch.setattr(replay.RecordedCache, "spent", 0.0)
    model = ready(make("gpt2"))
    before = text(model, 1, 2, 3)
    assert 0 < replay.RecordedCache.spent < 2 and not compiled(model)
    monkeypatch.setattr(replay.RecordedCache, "spent", 2.0)
    assert text(model, 1, 2, 3) == before and compiled(model)
