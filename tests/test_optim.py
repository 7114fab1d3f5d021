"""Optimizers against their papers in plain arithmetic: AdamW, NAdam, Muon; who gets which rate."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from model import GPT, GPTConfig
from optim import LossScale, Muon, make_optimizers, orthogonalise
from train import Settings

# every kind of parameter: embeddings of tokens and positions, head, matrices, biases, norm weights,
# shares of canon layers
SHAPE = dict(vocab_size=23, block_size=8, n_layer=2, n_head=2, n_embd=8, mlp_dim=24)
SHAPE |= dict(position="learned", norm="layer", norm_weight=True, bias=True, mlp="gelu", canon=3)
OPTIMIZERS = get_args(get_type_hints(Settings)["optimizer"])  # a new name is taken up
RATES = dict(lr=0.01, embed_lr=0.3, head_lr=0.004)  # all different: none can stand in for another


def normal(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_with_gradients(seed: int = 0) -> tuple[GPT, dict[str, torch.nn.Parameter]]:
    """A model whose parameters and gradients are all drawn, so that none is zero."""
    model = GPT(GPTConfig(**SHAPE))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for i, p in enumerate(parameters.values()):
            p.copy_(normal(p.shape, 100 * seed + i))
    give_gradients(parameters, seed=50)
    return model, parameters


def give_gradients(parameters: dict, seed: int) -> None:
    for i, p in enumerate(parameters.values()):
        p.grad = normal(p.shape, 100 * seed + i) + 0.1


def kind_of(name: str, p: torch.Tensor) -> str:
    if p.ndim < 2 or name.endswith("canon.weight"):
        return "vector"
    if name.startswith(("wte", "wpe")):
        return "embedding"
    return "head" if name.startswith("head") else "matrix"


def copies(parameters: dict) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in parameters.items()}


def updated(steps: int = 1, gradients: bool = True, **settings):
    """Parameters before and after `steps` updates, and the gradients of each update."""
    model, parameters = model_with_gradients()
    before, used = copies(parameters), []
    optimizers = make_optimizers(model, Settings(**(RATES | settings)), torch.float32)
    for step in range(steps):
        give_gradients(parameters, seed=50 + step)
        if not gradients:
            for p in parameters.values():
                p.grad = torch.zeros_like(p)
        used.append({name: p.grad.double().clone() for name, p in parameters.items()})
        for optimizer in optimizers:
            optimizer.step()
    return before, copies(parameters), used


# --- AdamW and NAdam


def adamw(w, gradients, lr, beta1, beta2, decay):
    """Algorithm 2 of arXiv:1711.05101, line by line (its epsilon is too small to matter here)."""
    m = v = torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        w = w - lr * m_hat / v_hat.sqrt() - lr * decay * w
    return w


def nadamw(w, gradients, lr, beta1, beta2, decay):
    """Dozat 2016 (openreview OM0jvwB8jIp57ZJjtNEZ) with its schedule of momentum."""
    m = v = torch.zeros_like(w)
    so_far = 1.0
    for t, g in enumerate(gradients, start=1):
        mu = beta1 * (1 - 0.5 * 0.96 ** (0.004 * t))
        following = beta1 * (1 - 0.5 * 0.96 ** (0.004 * (t + 1)))
        so_far *= mu
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = following * m / (1 - so_far * following) + (1 - mu) * g / (1 - so_far)
        w = (1 - lr * decay) * w - lr * m_hat / (v / (1 - beta2**t)).sqrt()
    return w


@pytest.mark.parametrize("optimizer, paper", [("adamw", adamw), ("nadamw", nadamw)])
def test_an_update_is_that_of_the_paper(optimizer, paper):
    betas = dict(beta1=0.7, beta2=0.96)
    settings = dict(optimizer=optimizer, weight_decay=0.5, **betas)
    before, after, gradients = updated(steps=4, **settings)
    for name, w in before.items():
        decay = 0.0 if kind_of(name, w) == "vector" else 0.5
        expected = paper(w, [g[name] for g in gradients], RATES["lr"], decay=decay, **betas)
        torch.testing.assert_close(after[name], expected, atol=2e-6, rtol=1e-5, msg=name)


def test_beside_muon_embeddings_head_and_vectors_follow_adamw_each_at_its_rate():
    betas = dict(beta1=0.7, beta2=0.96)
    before, after, gradients = updated(steps=4, optimizer="muon", weight_decay=0.5, **betas)
    rates = dict(embedding=RATES["embed_lr"], head=RATES["head_lr"], vector=RATES["head_lr"])
    for name, w in before.items():
        if kind_of(name, w) != "matrix":
            lr = rates[kind_of(name, w)]
            expected = adamw(w, [g[name] for g in gradients], lr, decay=0.0, **betas)
            torch.testing.assert_close(after[name], expected, atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_shrinks_matrices_and_nothing_else(optimizer):
    """Without gradients only the decay moves anything: w becomes (1 - lr * decay) w."""
    before, after, _ = updated(gradients=False, optimizer=optimizer, weight_decay=0.5)
    decays = {"matrix"} if optimizer == "muon" else {"matrix", "embedding", "head"}
    for name, w in before.items():
        factor = 1 - RATES["lr"] * 0.5 if kind_of(name, w) in decays else 1.0
        torch.testing.assert_close(after[name], factor * w, atol=1e-7, rtol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_updated_by_exactly_one_optimizer(optimizer):
    model, parameters = model_with_gradients()
    optimizers = make_optimizers(model, Settings(optimizer=optimizer), torch.float32)
    found = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, found)) == sorted(map(id, parameters.values()))


def test_no_two_optimizers_do_the_same():
    moved = [torch.cat([w.flatten() for w in updated(optimizer=o)[1].values()]) for o in OPTIMIZERS]
    for i, one in enumerate(moved):
        assert all((one - other).abs().max() > 1e-6 for other in moved[:i])


# --- Muon (kellerjordan.github.io/posts/muon)


@pytest.mark.parametrize("rows, columns", [(5, 5), (5, 20), (20, 5)])
def test_an_orthogonalised_matrix_keeps_directions_and_loses_lengths(rows, columns):
    u = torch.linalg.qr(normal((rows, 5), seed=1).double())[0]
    v = torch.linalg.qr(normal((columns, 5), seed=2).double())[0]
    lengths = torch.tensor([100.0, 60.0, 30.0, 10.0, 3.0])
    g = (u * lengths) @ v.T
    seen = u.T @ orthogonalise(g[None])[0] @ v  # diagonal if the singular vectors are g's
    assert (seen - seen.diag().diag()).abs().max() < 1e-6
    assert seen.diag().min() > 0.65 and seen.diag().max() < 1.25


def test_matrices_of_equal_shape_do_not_mix():
    stack = normal((3, 6, 4), seed=3)
    alone = torch.cat([orthogonalise(g[None]) for g in stack])
    torch.testing.assert_close(orthogonalise(stack), alone, atol=1e-5, rtol=1e-5)


def one_muon_step(g: torch.Tensor, w: torch.Tensor | None = None, **settings) -> torch.Tensor:
    """The change that one update makes to `w`, zeros by default."""
    p = torch.nn.Parameter(torch.zeros_like(g) if w is None else w.clone())
    p.grad = g
    Muon([p], **settings).step()
    return p.detach() - (0 if w is None else w)


def test_muons_update_has_the_published_scale():
    """Singular values of about -lr * sqrt(max(1, rows / columns))."""
    g = normal((4, 16), seed=4)
    wide, tall = one_muon_step(g, lr=0.1), one_muon_step(g.T.clone(), lr=0.1)
    lengths = torch.linalg.svdvals(wide) / 0.1
    assert lengths.min() > 0.65 and lengths.max() < 1.25
    torch.testing.assert_close(tall, 2 * wide.T, atol=1e-6, rtol=1e-5)
    assert (wide * g).sum() < 0 and (tall * g.T).sum() < 0  # downhill


def test_muons_decay_is_decoupled_and_shrinks():
    g, w = normal((6, 6), seed=5), normal((6, 6), seed=6)
    without, decayed = (one_muon_step(g, w, lr=0.1, weight_decay=d) for d in (0.0, 0.4))
    torch.testing.assert_close(decayed - without, -0.1 * 0.4 * w, atol=1e-6, rtol=1e-5)


def test_muons_momentum_is_nesterovs_and_rises_from_085_in_300_steps():
    """The update's singular vectors are those of (1 - beta) g + beta m, at each step's own beta."""
    p = torch.nn.Parameter(torch.zeros(5, 5))
    optimizer = Muon([p], lr=1.0, momentum=0.95)
    m = torch.zeros(5, 5).double()
    for t in range(320):
        g, before = normal((5, 5), seed=1000 + t), p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        beta = 0.85 + 0.10 * min(1.0, t / 300)
        m = beta * m + (1 - beta) * g.double()
        u, _, vt = torch.linalg.svd((1 - beta) * g.double() + beta * m)
        seen = u.T @ (before - p.detach()).double() @ vt.T
        assert (seen - seen.diag().diag()).abs().max() < 1e-3, f"update {t + 1}"
        assert seen.diag().min() > 0, f"update {t + 1}"


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_the_setting_momentum_reaches_muon(momentum):
    model, _ = model_with_gradients()
    optimizers = make_optimizers(model, Settings(momentum=momentum), torch.float32)
    (muon,) = [o for o in optimizers if isinstance(o, Muon)]
    assert [group["momentum"] for group in muon.param_groups] == [momentum]


def test_under_muon_the_matrices_of_the_blocks_move_orthogonally_at_lr():
    before, after, _ = updated(optimizer="muon")
    matrices = [name for name, w in before.items() if kind_of(name, w) == "matrix"]
    assert len(matrices) == 2 * 6  # of two blocks: queries, keys, values, output, up, down
    for name in matrices:
        rows, columns = before[name].shape
        scale = RATES["lr"] * math.sqrt(max(1, rows / columns))
        lengths = torch.linalg.svdvals(after[name] - before[name]) / scale
        assert lengths.max() < 1.25 and lengths.median() > 0.65, name


# --- the scale of float16's loss (arXiv:1710.03740)


def after(scale: LossScale, *finite: bool) -> float:
    for each in finite:
        scale.update(each)
    return scale.value


GOOD = [True]


def test_the_loss_scale_is_halved_after_an_overflow_and_doubled_after_2000_good_steps():
    scale = LossScale(torch.float16)
    first = scale.value
    assert first > 1
    assert after(scale, False) == first / 2
    assert after(scale, *GOOD * 1999) == first / 2
    assert after(scale, True) == first
    assert after(scale, *GOOD * 2000) == 2 * first


def test_an_overflow_begins_the_count_of_good_steps_anew():
    scale = LossScale(torch.float16)
    first = scale.value
    assert after(scale, *GOOD * 1500, False) == first / 2
    assert after(scale, *GOOD * 1999) == first / 2
    assert after(scale, True) == first


def test_the_loss_scale_goes_on_where_a_checkpoint_left_it():
    scale = LossScale(torch.float16)
    after(scale, False, *GOOD * 1999)
    resumed = LossScale(torch.float16, scale.state())
    assert resumed.value == scale.value
    assert after(resumed, True) == 2 * scale.value


def test_the_loss_scale_never_falls_below_one_and_other_types_need_none():
    assert after(LossScale(torch.float16), *[False] * 40) == 1
    for dtype in (torch.float32, torch.bfloat16):
        assert after(LossScale(dtype), False, *GOOD * 2000) == 1
