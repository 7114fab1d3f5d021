"""The loss behind the head, and the pass of one token, in kernels of our own: on a GPU (`pytest
--device=cuda`), and elsewhere by Triton's interpreter, where Triton is: in a process of its own,
since it looks once whether to interpret."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_gpu
from test_model import make
from torch import nn

from cache import KVCache
from engine import fast, gradients

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
V = 4999  # odd, and two blocks


@pytest.mark.slow
def test_all_of_this_by_the_interpreter():
    if on_gpu() or INTERPRETED:
        pytest.skip("the others run here")
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__]
    environment = os.environ | dict(TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def device(monkeypatch):
    if on_gpu():
        assert gradients.TRITON
        return torch.device("cuda", 0)
    if not INTERPRETED:
        pytest.skip("for --device=cuda, or the interpreter")
    for module in (fast, gradients):
        monkeypatch.setattr(module, "has_kernels", lambda x: True)
    return torch.device("cpu")


def given(device, dtype=torch.float32, N: int = 70, C: int = 32):
    """States (N, C), weight (V, C) and targets (N), some of which do not count."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    targets[:2] = torch.tensor([V - 1, 0])
    targets[5:9] = gradients.IGNORE
    return [x.to(device, dtype).requires_grad_(), w.to(device).requires_grad_(), targets.to(device)]


def exact(z, targets, cap: float, smoothing: float):
    z = z.double()[:, :V]
    z = cap * torch.tanh(z / cap) if cap else z
    options = dict(ignore_index=gradients.IGNORE, label_smoothing=smoothing, reduction="none")
    return F.cross_entropy(z, targets, **options)


@pytest.mark.parametrize("cap, smoothing", [(0.0, 0.0), (15.0, 0.0), (15.0, 0.1), (0.0, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_loss_and_each_gradient_are_those_of_torch(dtype, cap, smoothing, device):
    from engine.kernels import token_losses

    x, w, targets = given(device, N=12)
    w = 3 * w.detach()  # some logits are far beyond the cap
    z = F.linear(x.detach(), gradients.padded(w, torch.float32)).to(dtype).requires_grad_()
    assert z.size(1) == 5056
    direction = torch.arange(len(targets), device=device).cos()
    expected = exact(z, targets, cap, smoothing)
    found, _ = token_losses(z, targets, V, cap, smoothing)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)
    a, b = (torch.autograd.grad((y * direction).sum(), z)[0] for y in (found, expected))
    assert a.dtype == dtype and not a[5:9].any() and not a[:, V:].any()
    rounding = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.02, atol=1e-5)
    torch.testing.assert_close(a, b, **rounding)


def test_what_is_no_token_makes_the_loss_no_number(device):
    from engine.kernels import token_losses

    z = torch.randn(3, 64, device=device)
    nats, _ = token_losses(z, torch.tensor([60, -1, 59], device=device), 60, 0.0, 0.0)
    assert nats.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "dtype, reduction, smoothing", [(torch.float32, "sum", 0.1), (torch.bfloat16, "mean", 0.0)]
)
def test_the_head_is_that_of_the_book(dtype, reduction, smoothing, compiled, device, monkeypatch):
    monkeypatch.setattr(gradients, "GPU_PIECE", 1)  # not compiled 35 rows, and 35
    x, w, targets = given(device, dtype)
    book, quick = (make("modern", vocab_size=V).head.to(device) for _ in range(2))
    assert book.cap
    quick.__class__ = fast.FastHead
    results = []
    for head in (book, quick):
        head.weight = torch.nn.Parameter(w.detach() / 3)

        def loss(x, head=head):
            return head.cross_entropy(x, targets, w, reduction, smoothing)

        if compiled and head is quick:
            torch._dynamo.reset()
            loss = torch.compile(
                loss, fullgraph=True, backend="inductor" if x.is_cuda else "aot_eager"
            )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = loss(x)
            with torch.no_grad():
                torch.testing.assert_close(loss(x), y, rtol=1e-4, atol=0)
        for _ in range(1 if compiled else 2):  # a graph that is retained
            grads = torch.autograd.grad(3 * y, (x, head.weight), retain_graph=not compiled)
        assert [g.dtype for g in grads] == [dtype, torch.float32]
        results.append((y.detach().float(), *(g.float() for g in grads)))
    error = 1e-4 if dtype == torch.float32 else 0.02
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= error * a.norm()


@pytest.mark.parametrize("shape, rows", [("modern", 1), ("grouped", 3), ("gpt2", 3), ("qwen2", 3)])
def test_one_token_in_few_kernels_has_the_logits_of_the_book(shape, rows, device, monkeypatch):
    from engine import one_token

    monkeypatch.setattr(one_token, "SPLIT", 8)  # so that two programs look at the last place
    monkeypatch.setattr(one_token, "tiles", lambda N, across: (16, 4))
    for kind in (torch.float32, torch.bfloat16)[: 1 + (shape == "qwen2")]:
        monkeypatch.setattr(one_token, "KNOWN", {})
        cache = KVCache(make(shape).config, rows, device, kind)
        assert one_token.agrees(make(shape).config, cache)


@pytest.mark.parametrize("what", ["activation", "layer", "block", "stored"])
def test_whoever_changes_the_book_is_obeyed_where_there_are_kernels(what, device, monkeypatch):
    import model as book
    from engine import one_token

    monkeypatch.setattr(one_token, "SPLIT", 8)
    monkeypatch.setattr(one_token, "tiles", lambda N, across: (16, 4))
    monkeypatch.setattr(one_token, "KNOWN", {})
    forward, config = book.Attention.forward, make("modern").config
    if what == "activation":
        monkeypatch.setitem(one_token.ACTIVATIONS, book.relu2, "gelu")
    elif what == "layer":
        unturned = lambda self, x, rope, *more: forward(  # noqa: E731
            self, x, None if self.layer == 2 else rope, *more
        )
        monkeypatch.setattr(book.Attention, "forward", unturned)
    elif what == "block":
        beside = lambda b, x, *more: (  # noqa: E731
            x + b.attn(b.attn_norm(x), *more) + b.mlp(b.mlp_norm(x))
        )
        monkeypatch.setattr(book.Block, "forward", beside)
    else:  # the cache is not what the kernels have left: as if they had stored nothing
        attend = one_token.OneToken.attend

        def forgetful(self, attn, new, cache):
            before = cache.k.clone()
            attend(self, attn, new, cache)
            cache.k.copy_(before)

        monkeypatch.setattr(one_token.OneToken, "attend", forgetful)
    assert not one_token.agrees(config, KVCache(config, 1, device))


def test_a_model_of_another_kind_has_no_such_kernels(device):
    from engine.one_token import OneToken

    class Mine(nn.Linear):
        pass

    cache = KVCache(make("modern").config, 1, device)
    OneToken(make("modern"), cache)  # raises nothing
    changed = [make("canon"), make("modern"), make("modern")]
    changed[1].blocks[1].mlp.up = Mine(32, 128)
    changed[2].blocks[1].mlp.forward = lambda x: x
    for model in changed:
        with pytest.raises(ValueError, match="a model of"):
            OneToken(model, cache)
    with pytest.raises(ValueError, match="no kernels for that shape"):
        OneToken(make("modern"), KVCache(make("modern").config, 9, device))
