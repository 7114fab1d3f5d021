"""Operations by numpy in a recorded step: the numbers of torch, from what tensors hold now."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import blas, recording
from engine.again import by_numpy
from engine.recording import record

x, y = torch.randn(1, 3, 8), torch.randn(3, 1)
weight, bias, table = torch.randn(8), torch.randn(8), torch.randn(5, 8)
one, several = torch.tensor([[3]]), torch.tensor([[3, 0]])
row, number = torch.randn(1, 8), x[0, 0, 0]


@pytest.fixture(autouse=True)
def drawn():
    """All numbers anew, whatever the test before has left in them."""
    torch.manual_seed(0)
    for t in (x, y, weight, bias, table, row):
        t.normal_()
    one.fill_(3)
    several.copy_(torch.tensor([[3, 0]]))


def moments():
    return torch.native_layer_norm(x, (8,), None, None, 1e-5)[1:]


BY_NUMPY = {
    "sums": lambda: x + y - 0.5,
    "products, of parts": lambda: x[..., :4] * x[..., 4:].mT[..., :1].mT * 2,
    "angles": lambda: torch.cat((x.cos(), -x.sin()), dim=-1),
    "squares": lambda: x.relu().square() + x**2,
    "layer norm": lambda: F.layer_norm(x, (8,), weight, bias, 1e-5),
    "layer norm, plain": lambda: F.layer_norm(x, (8,)),
    "RMS norm": lambda: F.rms_norm(x, (8,), weight, 1e-5),
    "RMS norm, of the book": lambda: x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5),
    "means": lambda: x.mean(dim=(0, 2)),
    "rolled": lambda: x.roll(3, dims=-1) + x.roll(-1, dims=1) + x.roll(8, dims=-1) + x.roll(0, 0),
    "copied": lambda: x.expand(4, 1, 3, 8).reshape(-1),
    "a row of a table": lambda: F.embedding(one, table) * 2,
    "a product": lambda: F.linear(row, table),
    "a product, with a bias": lambda: F.linear(row, table, bias[:5]),
}
BY_TORCH = {
    "scaled": lambda: torch.add(x, y, alpha=2),
    "cubes": lambda: x**3,
    "rolled flat": lambda: x.roll(1),
    "rolled twice": lambda: x.roll((1, 2), dims=(1, 2)),
    "rows of a table": lambda: F.embedding(several, table),
    "a product of several": lambda: F.linear(x[0], table),
    "other numbers": lambda: x.double() * 2 + (x > 0) * 3,
    "another kind of table": lambda: F.embedding(one, table.bfloat16()),
    "means and spreads": lambda: torch.add(*moments(), alpha=2),
    "parts of two kinds": lambda: torch.cat([x, x.double()]),
    "nothing beside it": lambda: torch.cat([x[..., :0], x], dim=-1),
    "one number": lambda: number.mean(dim=0),
    "a conjugate's": lambda: torch._neg_view(x) * 2,
    "means of all": lambda: x.mean(dim=()),
    "a product, with another bias": lambda: torch.addmm(y[:1], row, table.T),
    "norms over two": lambda: F.layer_norm(x, (3, 8)),
}


@pytest.mark.parametrize("name", BY_NUMPY | BY_TORCH)
def test_what_is_replayed_is_what_torch_computes(name, monkeypatch):
    used = []

    def noted(operation, *arguments):
        used.append(by_numpy(operation, *arguments))
        return used[-1]

    monkeypatch.setattr(recording, "by_numpy", noted)
    function = (BY_NUMPY | BY_TORCH)[name]
    inputs = [x, y, table, one, several, row]
    with torch.inference_mode():
        result, replay = record(function, inputs)
        for t in inputs:
            t.random_(5) if t.dtype == torch.int64 else t.normal_()
        replay()
        torch.testing.assert_close(result, function())
        assert used and all(used) if name in BY_NUMPY else not all(used)


def test_small_products_stay_with_torch_where_numpy_may_wake_all_cores(monkeypatch):
    monkeypatch.setattr(blas, "keeps_to_one_thread", lambda: False)
    mm, addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    assert by_numpy(mm, (row, table.T), {}, torch.empty(1, 5)) is None
    assert by_numpy(addmm, (bias[:5], row, table.T), {}, torch.empty(1, 5)) is None


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_all_bounds_are_no_warning():
    with torch.inference_mode():
        result, replay = record(lambda: x * x, [x])
        x.fill_(1e30)
        replay()
    assert np.isinf(result.numpy()).all()


def test_a_token_that_is_none_is_refused():
    with torch.inference_mode():
        _, replay = record(lambda: F.embedding(one, table), [one])
        for unknown in (5, -1):
            one.fill_(unknown)
            with pytest.raises(IndexError):
                replay()
        one.fill_(0)


def test_what_nobody_reads_is_not_computed(monkeypatch):
    made = []
    monkeypatch.setattr(recording, "again", lambda op, *_: made.append(str(op)) or (op, (), {}))
    with torch.inference_mode():
        record(lambda: (x.exp()[:, :1].tanh(), x.sin())[1], [x])
    assert made == ["aten.sin.default"]


def test_what_is_changed_is_changed_though_nobody_reads_it_then():
    total = torch.zeros(1, 3, 8)
    with torch.inference_mode():
        _, replay = record(
            lambda: (total.add_(x), torch._foreach_add_([total], 1), x * 2)[2], [x, total]
        )
        before = total.clone()
        replay()
    torch.testing.assert_close(total, before + x + 1)


def test_another_shape_in_place_is_not_recorded():
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot be recorded"):
        record(lambda: (x * 2)[0].t_() + 1, [x])
