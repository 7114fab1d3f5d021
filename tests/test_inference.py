"""A model made ready to generate computes what it did before."""

import copy

import pytest
import torch
from conftest import script
from test_model import SHAPES, make, tokens
from torch import nn

from inference import FEW, PackedLinear, RecordedStep, StreamedLinear, ready
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
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.inference_mode():
        layer = KINDS[kind](plain.weight, plain.bias)
        for rows in (1, 2, FEW, FEW + 1):
            x = torch.randn(rows, 1, inputs, dtype=dtype)
            y, expected = layer(x), plain(x)
            assert y.dtype == dtype and y.shape == (rows, 1, outputs)
            error = (y - expected).float().norm() / expected.float().norm()
            rounding = 1e-5 if dtype == torch.float32 else 6e-3
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
    assert list(generate(model, [1, 2, 3], 60, temperature=0, num_samples=rows)) == plain
    assert len({row[0] for row in plain}) > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_change_the_logits_a_little(shape):
    model, x = make(shape), tokens(2)
    before = model(x)
    change = (ready(model, "int8")(x) - before).norm() / before.norm()
    assert 0 < change < 0.05


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


def test_int8_on_the_command_line(train):
    argv = ("--prompt=the ", "--max_tokens=5", "--quantize=int8")
    out = script("sample.py", train("run"), *argv)
    assert out.startswith("the ")


def test_int8_is_refused_on_other_devices():
    model = copy.deepcopy(make("modern")).to("meta")
    with pytest.raises(ValueError, match="quantize='int8' works with device=cpu only"):
        ready(model, "int8")
