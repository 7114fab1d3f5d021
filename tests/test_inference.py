"""A model made ready to generate computes what it did before."""

import copy

import pytest
import torch
from test_model import SHAPES, make, tokens
from torch import nn

import sample
from engine import inference
from engine.inference import FEW, PackedLinear, RecordedStep, StreamedLinear, packable, ready
from model import KVCache
from sample import generate

KINDS = {
    "streamed": StreamedLinear,
    "packed": PackedLinear,
    "int8": lambda weight, bias: StreamedLinear(weight, bias, "int8"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "outputs, inputs, bias", [(300, 70, True), (128, 256, False), (1, 8, True)]
)
def test_every_layer_equals_a_plain_one(kind, dtype, outputs, inputs, bias):
    if kind == "packed" and not packable(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.inference_mode():
        layer = KINDS[kind](plain.weight, plain.bias)
        for rows in (1, 2, FEW, FEW + 1):
            x = torch.randn(1, inputs, rows, dtype=dtype).mT  # not contiguous
            y, expected = layer(x), plain(x)
            assert y.dtype == dtype and y.shape == (1, rows, outputs)
            error = (y - expected).float().norm() / expected.float().norm()
            rounding = 1e-5 if dtype == torch.float32 else 0.01
            assert error < (0.01 if kind == "int8" else rounding)


def test_eight_bits_keep_the_weights_to_a_255th_of_their_range():
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    layer = StreamedLinear(weight, None, "int8")
    assert layer.weight.shape == weight.shape
    bound = (weight.max() - weight.min()) / 255 / 2
    assert 0 < (layer.weight - weight).abs().max() <= bound * 1.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_ready_model_writes_the_same_text(shape, rows):
    model = make(shape)
    plain = list(generate(model, [1, 2, 3], 60, temperature=0, num_samples=rows))
    model = ready(model, rows=rows)
    kind = StreamedLinear if rows == 1 else PackedLinear
    if rows == 1 or packable(torch.float32):
        assert {type(m) for m in model.blocks.modules() if hasattr(m, "bias")} >= {kind}
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        assert isinstance(model.ready_head, kind)
    assert list(generate(model, [1, 2, 3], 60, temperature=0, num_samples=rows)) == plain
    assert len({row[0] for row in plain}) > 2


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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_fixed_shape_equals_a_growing_one(shape):
    model, x = make(shape), tokens()
    plain, fixed = (KVCache(model.config, batch=3) for _ in range(2))
    for cache in (plain, fixed):
        model(x[:, :9], cache=cache)
    recorded = RecordedStep(model, fixed)
    for i in range(9, 24):
        expected = model(x[:, i : i + 1], cache=plain)[:, -1]
        torch.testing.assert_close(recorded(x[:, i : i + 1]), expected, atol=1e-4, rtol=1e-4)
    assert fixed.length == plain.length == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length, rows", [(3, 1), (3, 3), (40, 1), (40, 3)])
def test_generating_with_recorded_steps_changes_nothing(shape, length, rows, dtype, monkeypatch):
    model, prompt = make(shape).to(dtype), list(range(length))
    plain = list(generate(model, prompt, 60, 1.0, num_samples=rows))
    calls = []
    monkeypatch.setattr(inference, "records", lambda device: True)
    step = RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", lambda *a: calls.append(1) or step(*a))
    assert list(generate(model, prompt, 60, 1.0, num_samples=rows)) == plain
    assert len(calls) > 40  # all but the prompt and the times when the context is full


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_sample_makes_the_model_ready_as_asked(train, quantize, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(inference, "ready", lambda m, *more: seen.append(more) or ready(m, *more))
    argv = ["--prompt=the ", "--max_tokens=5", "--num_samples=2", f"--quantize={quantize}"]
    sample.main([str(train("run")), *argv])
    assert seen == [(quantize, 2)] and "--- sample 2 of 2\nthe " in capsys.readouterr().out


def test_int8_is_refused_on_other_devices():
    model = copy.deepcopy(make("modern")).to("meta")
    with pytest.raises(ValueError, match="quantize='int8' works with device=cpu only"):
        ready(model, "int8")
