"""The compiled pass of one token computes what the model computes, and takes its place in time."""

import time

import pytest
import torch
from test_inference import CHANGES, late, text
from test_model import SHAPES, make

from engine import blas, replay
from engine.inference import ready
from engine.linear import PackedLinear
from engine.machine import fast_bfloat16
from model import Attention, Block

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


def test_models_of_another_kind_keep_what_was_recorded():
    packed, canon = ready(make("gpt2")), ready(make("canon"))
    packed.blocks[1].mlp.up = PackedLinear(make("gpt2").blocks[1].mlp.up.weight, None)
    edited = ready(make("gpt2"))
    edited.blocks[1].forward = late(edited.blocks[1].forward, begin=99)
    for model in (packed, canon, edited):
        assert text(model, 1, 2, 3)
        assert model.last.states[-1]["replay"] and not compiled(model)


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
    monkeypatch.setattr(one_token_cpu, "faster", FASTER)
    quick, slow = (lambda: None), (lambda: time.sleep(0.002))
    assert FASTER(quick, slow) and not FASTER(slow, quick)
