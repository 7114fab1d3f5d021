"""A model made ready to generate computes what it did before."""

import copy
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import SHAPES, make, tokens
from torch import nn

from engine import blas, fast, inference, linear, machine, recording, replay, twin
from engine.blas import NumpyLinear
from engine.inference import ready
from engine.linear import (
    FEW,
    EightBitLinear,
    Fastest,
    HalfLinear,
    PackedLinear,
    PlainLinear,
    StreamedLinear,
    forms,
    packable,
)
from engine.recording import record
from engine.replay import RecordedCache
from generate import answers, beam, generate
from model import MLP, Attention, Head


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(replay, "PATIENCE", 0)


@pytest.fixture
def two_threads():
    with blas.using(2):
        yield


KINDS = {
    "plain": PlainLinear,
    "numpy": NumpyLinear,
    "streamed": StreamedLinear,
    "wide blocks": lambda weight, bias: StreamedLinear(weight, bias, width=256),
    "packed": PackedLinear,
    "half": HalfLinear,
    "int8": EightBitLinear,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "outputs, inputs, bias", [(300, 70, True), (128, 256, False), (1, 8, True)]
)
def test_every_layer_equals_a_plain_one(kind, dtype, outputs, inputs, bias):
    if kind == "packed" and not packable(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    if kind == "numpy" and dtype != torch.float32:
        pytest.skip("BLAS has no bfloat16")
    if kind == "half" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no FBGEMM here")
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.inference_mode():
        layer = KINDS[kind](plain.weight, plain.bias)
        for rows in (1, 2, FEW, FEW + 1):
            x = torch.randn(1, inputs, rows, dtype=dtype).mT  # not contiguous
            y, expected = layer(x), plain(x)
            assert y.dtype == dtype and y.shape == (1, rows, outputs)
            error = (y - expected).float().norm() / expected.float().norm()
            rounding = 1e-5 if dtype == torch.float32 and kind != "half" else 0.01
            assert error < (0.01 if kind == "int8" else rounding)


def test_all_large_layers_have_the_form_that_is_fastest_in_a_chain(two_threads, monkeypatch):
    small, large = torch.randn(8, 4), torch.randn(1024, 513)
    tried, turns = [], []
    kinds = {"plain": PlainLinear, "numpy": NumpyLinear, "streamed": StreamedLinear}
    monkeypatch.setattr(linear, "forms", lambda *_: kinds)
    assert Fastest(torch.float32, [large]).chosen in kinds  # by the clock

    def once(self, chain, inputs, other):
        kind = type(chain[0])
        tried.append([x.shape[-1] for x in inputs])
        turns.append((kind, torch.get_num_threads()))
        slow = len(tried) in (2, 3)  # one that is slow for a moment
        return {PlainLinear: 4.0, NumpyLinear: 1.0, StreamedLinear: 3.0}[kind] + 9 * slow

    monkeypatch.setattr(Fastest, "once", once)
    choose = Fastest(torch.float32, [large, small, large.T])
    assert tried[0] == [513, 1024] and choose.chosen == "numpy"
    assert [kind for kind, _ in turns[:3]] == [*kinds.values()]  # in turn
    assert {threads for _, threads in turns} == {1, 2}
    number = len(tried)
    assert type(choose(small, None)) is PlainLinear
    assert type(choose(large, None)) is type(choose(large.T, None)) is NumpyLinear
    assert Fastest(torch.float32, [small]).chosen == "plain" and len(tried) == number
    model = ready(make("gpt2"))
    assert model.form == "plain" and ready(make("gpt2"), rows=2).form == ""
    monkeypatch.setattr(linear, "WORTH_IT", 1)
    ready(make("gpt2"))  # width 32: q, k and v as one; the others; the head
    assert tried[number] == [32, 32, 32, 128, 32]
    number = len(tried)
    ready(make("gpt2"), parts=False)
    assert len(tried) == number


@pytest.mark.parametrize("numba", [None, "a spec"])
@pytest.mark.parametrize("able", [{}, {"avx2": True}, {"avx2": True, "avx512_f": True}])
@pytest.mark.parametrize("emulated", [True, False])
def test_with_numba_layers_have_a_form_that_its_loops_read(emulated, able, numba, monkeypatch):
    """On a processor where they are faster; also where many passes have several rows: the others
    would otherwise take two or three times as long."""
    monkeypatch.setattr(linear, "find_spec", lambda name: numba)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(linear, "fast_bfloat16", lambda: not emulated)
    for dtype in (torch.float32, torch.bfloat16):
        every, found = {*forms(dtype)}, {*Fastest(dtype, []).forms}
        if numba and "avx2" in able and dtype == torch.float32:
            assert found == every & {"plain", "numpy"}
        elif numba and "avx2" in able and linear.have_fbgemm():
            assert found == {"half"}
        else:
            assert found == every
        assert {*linear.OneOrSeveral(dtype, []).forms} == found


def test_many_rows_of_bfloat16_are_multiplied_as_such_where_that_is_fast(monkeypatch):
    """Of layers whose one row has activations in float32, for loops or of eight bits."""
    seen, product = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *a: seen.append(x.dtype) or product(x, *a))
    kinds = dict(half=partial(HalfLinear, for_loops=True), int8=EightBitLinear)
    for fast_bfloat16 in (True, False):
        monkeypatch.setattr(linear, "fast_bfloat16", lambda fast=fast_bfloat16: fast)
        for name in kinds if linear.have_fbgemm() else ["int8"]:
            plain = nn.Linear(32, 64).bfloat16()
            layer, x = kinds[name](plain.weight, plain.bias), torch.randn(1, FEW + 1, 32)
            seen.clear()
            y = layer(x)
            wide = [] if name == "half" else [torch.float32]
            assert seen == ([torch.bfloat16] if fast_bfloat16 else wide)
            expected = product(x, plain.weight.float(), plain.bias.float())
            assert y.dtype == torch.float32 and (y - expected).norm() < 0.01 * expected.norm()
            assert (layer(x[:, :1]) - expected[:, :1]).norm() < 0.01 * expected[:, :1].norm()
            assert layer(x.bfloat16()).dtype == layer(x[:, :1].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("numba", [None, "a spec"])
def test_weights_beyond_float16_are_not_read_as_such(numba, monkeypatch):
    """Of small layers and of large ones, which have the form that is chosen."""
    monkeypatch.setattr(linear, "find_spec", lambda name: numba)
    monkeypatch.setattr(linear, "avx2_alone", lambda: True)
    monkeypatch.setattr(linear, "fast_bfloat16", lambda: False)
    kinds = Fastest(torch.bfloat16, [])
    if "half" not in kinds.forms:
        pytest.skip("no FBGEMM here")
    kinds.chosen = "half"
    for size in (64, 1024):
        weight = torch.ones(size, size, dtype=torch.bfloat16)
        assert isinstance(kinds(weight, None), HalfLinear) == (size == 1024 or bool(numba))
        weight[3, 5] = 1e6
        x = torch.ones(1, 1, size)
        torch.testing.assert_close(
            kinds(weight, None)(x), F.linear(x, weight.float()), rtol=0.01, atol=1.0
        )


def test_numpy_has_as_many_threads_as_torch():
    before = torch.get_num_threads()
    if not blas.openblas():
        pytest.skip("numpy has another BLAS here")
    small = SimpleNamespace(device=torch.device("cpu"))
    for number in (1, 2):
        machine.use_threads(str(number), small, None, 1)
        assert blas.threads() == number
        with twin.using(3 - number):
            assert blas.threads() == 3 - number
        assert blas.threads() == number
    machine.use_threads(str(before), small, None, 1)


def test_a_product_by_numpy_is_recorded():
    torch.manual_seed(0)
    layer, x = NumpyLinear(torch.randn(5, 7), torch.randn(5)), torch.randn(1, 1, 7)
    with torch.inference_mode():
        _, replay = record(lambda: layer(layer(x)[..., :1].expand(1, 1, 7)), [x])
        x.copy_(torch.randn(1, 1, 7))
        wanted = F.linear(x, layer.matrix, layer.bias)[..., :1].expand(1, 1, 7)
        assert torch.allclose(replay(), F.linear(wanted, layer.matrix, layer.bias), atol=1e-5)


def test_eight_bits_keep_the_weights_to_a_254th_of_the_largest_of_a_row():
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, 300)[:, None]
    weight[7] = 0
    layer = EightBitLinear(weight, None)
    assert layer.weight.shape == weight.shape
    bound = weight.abs().amax(1) / 254
    assert (layer.weight - weight)[0].abs().max() > 0
    assert ((layer.weight - weight).abs().amax(1) <= bound * 1.01).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("parts", [True, False])
def test_a_ready_model_writes_the_same_text(shape, rows, parts):
    model = make(shape)
    plain = list(generate(model, [1, 2, 3], 36, temperature=0, num_samples=rows))
    model = ready(model, rows=rows, parts=parts)
    kind = next(iter(Fastest(torch.float32, []).forms.values())) if rows == 1 else PlainLinear
    kind = PackedLinear if rows > 1 and packable(torch.float32) else kind
    kind = getattr(kind, "func", kind)
    if parts:
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        assert isinstance(model.head.layer, kind)
        assert isinstance(model.blocks[0].attn.wqkv, kind)
    if not parts:
        assert not any(isinstance(m, fast.FastAttention) for m in model.modules())
    assert list(generate(model, [1, 2, 3], 36, temperature=0, num_samples=rows)) == plain
    assert len({row[0] for row in plain}) > 2


def test_a_ready_model_obeys_an_edited_book(monkeypatch):
    """Attention that only halves its values: the fast form is off, and the text the book's."""
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *more: forward(self, *more) / 2)
    model = make("modern")
    plain = list(generate(model, [1, 2, 3], 20, temperature=0))
    model = ready(model)
    assert not any(isinstance(m, fast.FastAttention) for m in model.modules())
    assert not isinstance(model.blocks[0].attn.wq, nn.Linear)
    assert list(generate(model, [1, 2, 3], 20, temperature=0)) == plain


@pytest.mark.parametrize("quantize", ["", "int8"])
@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("edited", [Attention, Head])
@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "modern"])
def test_an_edited_book_is_obeyed_in_bfloat16(shape, edited, emulated, quantize, monkeypatch):
    """With prompts of few tokens and of many."""
    forward = edited.forward
    monkeypatch.setattr(edited, "forward", lambda self, *more: forward(self, *more) / 2)
    for module in (inference, linear):
        monkeypatch.setattr(module, "fast_bfloat16", lambda: not emulated)
    plain, model = make(shape).bfloat16().float(), ready(make(shape).bfloat16(), quantize)
    for length in (3, FEW + 4):
        x = tokens(1, length)
        expected = plain(x)
        assert (model(x).float() - expected).norm() < 0.05 * expected.norm()
        assert len(text(model, *x[0].tolist())) == 20


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_change_the_logits_a_little(shape):
    model, x = make(shape), tokens(2, 6)  # 12 rows, which are few
    before = model(x)
    model = ready(model, "int8")
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    after = model(x)
    assert 0 < (after - before).norm() / before.norm() < 0.05
    unpacked = model(x.repeat(2, 1))[:2]  # 24 rows
    torch.testing.assert_close(after, unpacked, atol=1e-4, rtol=1e-4)


def same_steps(plain, growing, model, fixed, x):
    """Of x (B, 24) nine tokens are read at once, the others one by one, with each model's cache."""
    plain(x[:, :9], cache=growing)
    model(x[:, :9], cache=fixed)
    for i in range(9, 24):
        expected = plain(x[:, i : i + 1], cache=growing)
        step = model(x[:, i : i + 1], cache=fixed)
        torch.testing.assert_close(step, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])  # one looks back by an operation of its own
@pytest.mark.parametrize("shape", SHAPES)
def test_a_recorded_step_equals_a_growing_one(shape, rows, monkeypatch):
    monkeypatch.setattr(replay, "records", lambda *_: True)
    plain, model, x = make(shape), ready(make(shape)), tokens(rows)
    growing, fixed = plain.new_cache(rows), model.new_cache(rows)
    assert isinstance(fixed, RecordedCache)
    with torch.inference_mode():
        same_steps(plain, growing, model, fixed, x)
        assert fixed.replay
        assert fixed.lengths.tolist() == growing.lengths.tolist() == [24] * rows
        with pytest.raises(ValueError, match="25"):
            model(x[:, :1], cache=fixed)


def test_a_recorded_step_obeys_a_mask_of_somebody_else(monkeypatch):
    """As if a block let a token see the last four positions alone."""
    plain, model, x = make("gpt2"), ready(make("gpt2")), tokens(1)
    forward, called = type(plain.blocks[0]).forward, []

    def near(self, x, rope, mask, cache):
        where, now = torch.arange(cache.end), torch.arange(cache.end - x.size(1), cache.end)
        now = now[:, None] if mask is None else mask.sum(dim=-1, keepdim=True) - 1
        window = (where > now - 4) & (where <= now)
        return forward(self, x, rope, window.view(1, 1, x.size(1), -1), cache)

    for block in (*plain.blocks, *model.blocks):
        block.forward = near.__get__(block)
    look = blas.attention
    monkeypatch.setitem(
        blas.AGAIN, torch.ops.nutshell.attend_one.default, lambda *a: called.append(1) or look(*a)
    )
    growing, fixed = plain.new_cache(1), model.new_cache(1)
    with torch.inference_mode():
        same_steps(plain, growing, model, fixed, x)
        assert fixed.replay and not called
        model = ready(make("gpt2"))
        list(generate(model, [1, 2, 3], 9))
    assert len(called) == len(model.blocks)


@pytest.mark.parametrize(
    "length, rows, dtype",
    [
        (1, 3, torch.float32),
        (1, 3, torch.bfloat16),
        (3, 1, torch.float32),  # another form of the layers
        (3, 1, torch.bfloat16),
        (40, 3, torch.float32),  # beyond the context, in whatever type
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_generating_with_recorded_steps_changes_nothing(shape, length, rows, dtype, monkeypatch):
    prompt = list(range(length))
    monkeypatch.setattr(replay, "records", lambda *_: False)
    plain = list(generate(ready(make(shape).to(dtype), rows=rows), prompt, 36, num_samples=rows))
    calls = []
    monkeypatch.setattr(replay, "records", lambda *_: True)
    step = RecordedCache.step
    monkeypatch.setattr(RecordedCache, "step", lambda *a: calls.append(1) or step(*a))
    model = ready(make(shape).to(dtype), rows=rows)
    assert list(generate(model, prompt, 36, num_samples=rows)) == plain
    assert len(calls) > 24  # all but the prompt and the times when the context is full


@pytest.mark.parametrize("shape", SHAPES)
def test_recorded_steps_serve_rows_of_different_lengths(shape, monkeypatch):
    """Answers that move in and out, and beams that change places, with and without recording."""
    tokenizer = SimpleNamespace(ends=list(range(52, 61)), unused=[], markers=None)
    prompts = [list(range(i, 2 * i + 1)) for i in range(9)]

    def run():
        model = ready(make(shape), rows=4)
        found = dict(answers(model, tokenizer, prompts, 12, slots=4))
        return found, [beam(model, tokenizer, prompt, 12) for prompt in prompts[:3]]

    monkeypatch.setattr(replay, "records", lambda *_: False)
    plain, places = run(), []
    monkeypatch.setattr(replay, "records", lambda *_: True)
    step = RecordedCache.step
    monkeypatch.setattr(
        RecordedCache, "step", lambda *a: places.append(a[0].lengths.tolist()) or step(*a)
    )
    assert run() == plain
    assert any(len(set(lengths)) > 2 for lengths in places)


def test_a_recorded_cache_stays_where_it_is_when_beams_change_places(monkeypatch):
    monkeypatch.setattr(replay, "records", lambda *_: True)
    cache = ready(make("modern")).new_cache(3)
    known = cache.k
    cache.take([2, 2, 0])
    assert cache.k is known
    cache.take([0])
    assert cache.k is not known


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("heads, shared, place", [(4, 4, 0), (4, 2, 5), (6, 1, 19)])
def test_a_token_looks_back_at_what_is_filled_and_at_nothing_else(
    heads, shared, place, long, two_threads, monkeypatch
):
    monkeypatch.setattr(blas, "LONG", 0 if long else 1 << 21)
    monkeypatch.setattr(blas, "THREADED", 0)
    used, matmul = [], np.matmul
    monkeypatch.setattr(
        np, "matmul", lambda *a, **k: used.append(blas.threads()) or matmul(*a, **k)
    )
    q, k, v = torch.randn(1, heads, 1, 8), *torch.randn(2, 1, shared, 1, 8)
    keys, values = torch.full((2, 1, shared, 20, 8), torch.nan)
    keys[:, :, :place], values[:, :, :place] = torch.randn(2, 1, shared, place, 8)
    at = torch.tensor([[place]])
    found = torch.ops.nutshell.attend_one(q, k, v, at, keys, values)[0]
    assert torch.get_num_threads() == 2
    if blas.openblas():
        assert blas.threads() == 2 and used == [1, 1] * (not long)
    assert torch.equal(keys[:, :, place : place + 1], k) and keys[:, :, place + 1 :].isnan().all()
    assert torch.equal(values[:, :, place : place + 1], v)
    there = [z[:, :, : place + 1] for z in (keys, values)]
    expected = F.scaled_dot_product_attention(q, *there, enable_gqa=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [NumpyLinear, PlainLinear])
def test_a_recording_beside_a_busy_process_uses_one_thread(kind, two_threads, monkeypatch):
    weight = torch.randn(1024, 513)  # worth two
    layer, x, used = kind(weight, None), torch.randn(1, 513), []
    monkeypatch.setattr(recording.AllOrOne, "together", lambda self: len(used) % 2 == 0)

    def noted(plain, threads):
        return lambda *a, **k: used.append(threads()) or plain(*a, **k)

    monkeypatch.setattr(np, "dot", noted(np.dot, blas.threads))
    mm, names = recording.into(torch.ops.aten.mm.default)
    monkeypatch.setattr(recording, "into", lambda _: (noted(mm, torch.get_num_threads), names))
    with torch.inference_mode():
        result, replay = record(lambda: layer(x), [x])
        used.clear()
        for _ in range(4):
            x.normal_()
            replay()
            torch.testing.assert_close(result, x @ weight.mT, atol=1e-4, rtol=1e-4)
    assert torch.get_num_threads() == 2
    if kind is PlainLinear or blas.openblas():
        assert used == [2, 1, 2, 1] and blas.threads() in (0, 2)


def test_int8_is_refused_on_other_devices():
    with pytest.raises(ValueError, match="quantize='int8' works with device=cpu only"):
        ready(make("modern").to("meta"), "int8")


def test_a_recording_follows_what_it_was_told_changes():
    """Also what is changed in place, from a constant made anew, and what two layers share."""
    x, total = torch.randn(1, 8), torch.zeros(8)
    weight = torch.randn(8, 8)

    def step():
        kept = torch.zeros(1, 8)
        kept.add_(F.linear(x, weight)).mul_(2)
        again = F.linear(x, weight)  # the same
        listed, row = torch.zeros(8), x[0]
        total.add_(row)
        torch._foreach_add_([listed], [row])  # gives nothing back
        return F.softmax(kept + again + torch.zeros(1, 8), dim=-1) + total + listed

    with torch.inference_mode():
        result, replay = record(step, [x, total])
        for _ in range(3):
            x.normal_()
            before = total.clone()
            expected = step().clone()
            total.copy_(before)
            assert replay() is result
            torch.testing.assert_close(result, expected)
            assert not torch.equal(total, before)
        for unfit in (lambda: x * float(x[0, 0]), lambda: x[x > 0], lambda: F.dropout(x)):
            with pytest.raises(ValueError, match="cannot be recorded"):
                record(unfit, [x])
        with pytest.raises(ValueError, match="others read"):  # it would add up over replays
            record(lambda: torch.tensor([1.0]).add_(x.sum()), [x])
        assert record(lambda: torch.tensor([1.0]) + x, [x])[1]() is not None


@pytest.mark.parametrize("kind", ["a hook", "a decision"])
def test_a_step_that_python_has_a_part_in_is_not_recorded(kind, monkeypatch):
    seen, model = [], ready(make("gpt2"))
    if kind == "a hook":
        model.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    else:
        plain = model.norm.forward
        model.norm.forward = lambda x: seen.append(1) or plain(x if x.sum() > 0 else -x)
    text = list(generate(model, [1, 2, 3], 20, temperature=0))
    assert len(seen) >= 20
    monkeypatch.setattr(replay, "records", lambda *_: False)
    assert list(generate(model, [1, 2, 3], 20, temperature=0)) == text


@pytest.fixture
def recordings(monkeypatch):
    """The tokens of which a step was recorded."""
    made = []

    def noted(self, forward, tokens):
        made.append(tokens.item())
        RECORD(self, forward, tokens)

    monkeypatch.setattr(RecordedCache, "record", noted)
    return made


RECORD = RecordedCache.record


def goes_at_once(models: list) -> bool:
    """Whether a model, of which the list has the last reference, goes without the collector."""
    gone = weakref.ref(models[0])
    gc.disable()
    try:
        models.clear()
        return gone() is None
    finally:
        gc.enable()


def text(model, *prompt, length=20):
    return [token for [token] in generate(model, list(prompt), length, temperature=0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_recorded_for_the_first_text_and_serves_the_next(shape, recordings):
    model, prompts = ready(make(shape)), ([1, 2, 3], [9], [7, 5, 8, 2])
    alone = [text(ready(make(shape)), *prompt) for prompt in prompts]
    recordings.clear()
    assert [text(model, *prompt) for prompt in prompts] == alone
    assert len(recordings) == 1


def test_texts_side_by_side_have_memory_of_their_own(recordings):
    model = ready(make("gpt2"))
    one, other = text(model, 1, 2, 3), text(model, 9)
    both = generate(model, [1, 2, 3], 20, temperature=0), generate(model, [9], 20, temperature=0)
    assert [*zip(*both, strict=True)] == [([a], [b]) for a, b in zip(one, other, strict=True)]
    cache = model.new_cache()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        part = cache.rows(0, 1)
        kept = cache.k.clone()
    del cache
    text(model, 9)
    assert torch.equal(part.k, kept)  # a part keeps the memory of the whole


def test_what_a_step_gave_stays_when_the_next_text_begins(recordings):
    model, given = ready(make("gpt2")), []
    with torch.inference_mode():
        for prompt in ([1, 2], [3, 4], [5, 6]):
            cache = model.new_cache(size=9)
            model(torch.tensor([prompt]), cache=cache)
            given.append(model(torch.tensor([[7]]), cache=cache))
            del cache
        wanted = [model(torch.tensor([[*p, 7]]))[:, -1:] for p in ([1, 2], [3, 4], [5, 6])]
    assert len(recordings) == 1
    assert torch.allclose(torch.cat(given), torch.cat(wanted), atol=1e-5)


def late(forward, begin=8):
    """A forward that does something else from a position on; Python decides nothing in it."""

    def changed(x, rope, mask, cache):
        at = cache.at
        if at is None:
            at = torch.arange(cache.end - x.size(1), cache.end, device=x.device)[None]
        return forward(x, rope, mask, cache) * torch.where(at > begin, -1.0, 1.0)[..., None]

    return changed


def window(self, q, k, v, mask, cache):
    """Attention to the last two positions."""
    where = torch.arange(cache.end, device=q.device)
    now = where[-q.size(2) :]
    now = now[:, None] if mask is None else mask.sum(dim=-1, keepdim=True) - 1
    mask = ((where > now - 2) & (where <= now)).view(1, 1, q.size(2), -1)
    return fast.FastAttention.attend(self, q, k, v, mask, cache)


CHANGES = {
    "weights": lambda m, patch: m.norm.weight.data[:9].neg_(),
    "weights elsewhere": lambda m, patch: setattr(m.norm.weight, "data", -m.norm.weight.data),
    "other weights": lambda m, patch: setattr(m, "norm", nn.LayerNorm(32).requires_grad_(False)),
    "a row that comes late": lambda m, patch: setattr(
        m.wte.weight, "data", m.wte.weight.data.roll(1, 0)
    ),
    "a setting": lambda m, patch: setattr(m.blocks[0].attn_norm, "eps", 3.0),
    "a hook": lambda m, patch: m.blocks[0].mlp.register_forward_hook(
        lambda _, x, y: torch.ones_like(y)
    ),
    "a hook of all": lambda m, patch: patch.setitem(
        nn.modules.module._global_forward_hooks,
        -1,
        lambda part, _, y: -y if isinstance(part, MLP) else y,
    ),
    "a part": lambda m, patch: setattr(m.blocks[0], "mlp", nn.Identity()),
    "its forward": lambda m, patch: setattr(m.blocks[0].mlp, "forward", lambda x: -x),
    "another forward": lambda m, patch: setattr(m.blocks[0], "forward", late(m.blocks[0].forward)),
    "its class": lambda m, patch: patch.setattr(
        type(m.blocks[0]), "forward", lambda self, x, *_: 0.5 * x
    ),
    "attention": lambda m, patch: patch.setattr(type(m.blocks[0].attn), "attend", window),
    "a decision": lambda m, patch: patch.setattr(
        type(m.blocks[0]), "forward", lambda self, x, *_: x if float(x.sum()) > 0 else -x
    ),
    "a function": lambda m, patch: patch.setattr("model.F.gelu", lambda x, approximate="": x.abs()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_a_model_between_two_texts_is_obeyed(change, monkeypatch, recordings):
    """By the next, of which the first text's step knows nothing. As if nothing were recorded."""
    models = ready(make("gpt2")), ready(make("gpt2"))
    for model in models:
        model.blocks[0].forward = late(model.blocks[0].forward, begin=99)  # to be exchanged
    before = [text(model, 1, 2, 3) for model in models]
    assert all(model.last.states[0]["replay"] for model in models) and len(recordings) == 2
    for model in models:
        CHANGES[change](model, monkeypatch)
    after = text(models[0], 1, 2, 3)
    monkeypatch.setattr(RecordedCache, "ready", lambda self, T: False)
    assert after == text(models[1], 1, 2, 3)
    assert after != before[0] == before[1]


def test_a_hook_that_comes_behind_the_prompt_is_called():
    model, seen = ready(make("gpt2")), []
    text(model, 1, 2, 3)
    steps = generate(model, [1, 2, 3], 20, temperature=0)
    next(steps)
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    list(steps)
    assert len(seen) >= 19


def test_after_an_interrupted_recording_the_next_text_is_recorded(monkeypatch, recordings):
    model = ready(make("gpt2"))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recording, "record", interrupted)
        text(model, 1)
    recordings.clear()
    text(model, 1)
    text(model, 2)
    assert len(recordings) == 1


def test_a_longer_text_gets_more_memory_and_a_copy_of_a_model_its_own(recordings, monkeypatch):
    monkeypatch.setattr(inference, "LONGER", 8)
    model = ready(make("gpt2"))
    for length, recorded in ((4, 1), (7, 1), (12, 2), (3, 2), (12, 2)):
        text(model, 1, length=length)
        assert len(recordings) == recorded
    copied, alone = copy.deepcopy(model), text(model, 1)
    both = (generate(m, [1], 20, temperature=0) for m in (model, copied))
    assert [*zip(*both, strict=True)] == [([token], [token]) for token in alone]


def test_a_text_that_failed_leaves_nothing_behind(monkeypatch):
    """Nor does attention that looks at the whole memory meet its numbers."""
    monkeypatch.setattr(blas, "keeps_to_one_thread", lambda: False)
    model = ready(make("gpt2"))
    wanted, table = text(model, 1), model.wte.weight.data
    right = table[5].clone()
    table[5] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        text(model, 1, 2, 3, 5)
    table[5] = right
    assert text(model, 1) == wanted


def test_bfloat16_is_widened_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(inference, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "fast_bfloat16", lambda: False)
    for shape in ("gpt2", "qwen2", "canon"):
        plain, model, x = make(shape), make(shape).bfloat16(), tokens(1, 8)
        rounded = make(shape).bfloat16().float()(x)  # the same weights
        model = ready(model)
        assert model.blocks[0].attn_norm(torch.ones(1, 32)).dtype == torch.float32
        biases = [m.bias for m in model.modules() if isinstance(m, StreamedLinear)]
        assert all(b is None or b.dtype == torch.float32 for b in biases)
        assert (model(x) - rounded).norm() < 0.02 * plain(x).norm()
