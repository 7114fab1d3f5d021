"""Optimizers: how gradients become changes of the weights.

Gradient descent, w -= lr * g, works, slowly. Each line below mends one of its troubles:

momentum    Each batch pulls elsewhere. m = beta * m + (1 - beta) * g is the mean of the last
            1 / (1 - beta) gradients or so: what they disagree about cancels, the rest adds up.
Nesterov    m lags behind. (1 - beta) * g + beta * m counts the newest gradient once more.
Adam        The embedding of a rare token has tiny gradients, the head large ones, and one rate
            cannot serve both. Adam keeps a second moment, v = beta2 * v + (1 - beta2) * g^2, and
            moves each weight by lr * m / (sqrt(v) + eps): by about lr where the gradients agree,
            whatever their size, and by less where they contradict each other. Both begin at zero,
            hence too small at first, and are divided by 1 - beta^step, each by its own.
            arXiv:1412.6980
AdamW       Weights that nothing pulls back grow and fit noise. w -= lr * decay * w pulls them back,
            apart from the gradient, or it would be divided by sqrt(v), too, and those with large
            gradients would be pulled less (arXiv:1711.05101). Only matrices decay: a bias or a
            norm's weight is one number a channel and has little to overfit with, and a norm's
            weight, which begins at 1, would shrink what its layer sees.
Muon        Adam treats a matrix as a list of numbers. Muon treats it as a map: see below.

Before the step, `update` in train.py undoes loss scaling (`LossScale`) and then clips the gradient:
clipped first, to length 1, and then divided by 65,536, it would be next to nothing.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, warmup: float, decay: float, final: float, shape: str):
    """The factor on every learning rate for update number `step` of `steps`, counted from 0.

    Rises in a line over `warmup` steps, holds 1, and falls over the last `decay` (a fraction of
    `steps`) to `final`, in a line or as half a cosine. `warmup` below 1 is a fraction of `steps`.

    Why rise: Adam's moments rest on a few gradients at first, and large steps along such guesses do
    harm that takes long to mend (arXiv:1908.03265). The small models of config/ do without it, as
    is the default. Why fall: at a constant rate the noise of the batches keeps the weights bouncing
    between the walls of a valley; small steps reach its floor. Why hold between: a long run is then
    a short one with more steps before the fall (arXiv:2405.18392).
    """
    warmup = warmup if warmup >= 1 else warmup * steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    # from 1 towards 0 over the decay: the last update still moves
    left = (steps - step) / max(1.0, min(decay * steps, steps - warmup))
    if left >= 1:
        return 1.0
    if shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return final + (1 - final) * left


def set_rates(optimizers: list, factor: float) -> None:
    """Sets every rate to `factor` times what its group began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def orthogonalise(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest orthogonal matrix, roughly, to each matrix of g (N, rows, columns), in `dtype`.

    g = U diag(s) V^T; wanted is U V^T: the same directions, all equally strong. A singular value
    decomposition would be slow. But a x + b x x^T x + c (x x^T)^2 x has the same U and V, and each
    singular value s has become a s + b s^3 + c s^5. Five rounds of that do to s:

        0.001   0.003  0.012  0.041  0.140  0.471
        0.01    0.034  0.118  0.400  1.093  0.699
        0.1     0.340  0.992  0.707  1.107  0.712
        0.5     1.189  0.896  0.824  0.938  0.765
        1       0.701  1.114  0.721  1.090  0.696

    So whatever began above 0.0016 ends within 0.68 to 1.21, near enough to 1; what began at 0.001
    has come to 0.47 only. Source: kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # of the source: steep at zero, below 1.21 up to 1
    wide = g.size(1) <= g.size(2)
    x = g if wide else g.mT  # x x^T is the smaller of the two squares
    # singular values of at most 1. In float32, since float16 would round a small gradient to zero
    x = x.float()
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype or g.dtype)
    for _ in range(steps):
        xx = x @ x.mT  # x = a x + (b xx + c xx^2) x, with the sums inside the products
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's) whose mean is orthogonalised: all directions of a matrix learn alike.

    The gradient of a matrix is dominated by a few directions; the many weak ones, which matter as
    well, would hardly move. For the matrices inside the blocks: embeddings, head and vectors belong
    to AdamW. Products of matrices are done in `dtype`, equal shapes in one go. The update of a
    (rows, columns) matrix is scaled by sqrt(max(1, rows / columns)), so that its outputs change
    alike for every shape. Momentum rises from 0.85 to `momentum` in `rise` steps, since early
    gradients are soon out of date. Source: as above.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, rise=300, weight_decay=0.0, dtype=None):
        defaults = dict(lr=lr, momentum=momentum, rise=rise, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.dtype = dtype or torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is None:  # nothing has been asked of it
                    continue
                shapes.setdefault(p.shape, []).append(p)
                if p not in self.state:
                    self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            for (rows, columns), params in shapes.items():
                done = self.state[params[0]]["step"].item() - 1
                first = min(0.85, group["momentum"])
                beta = first + (group["momentum"] - first) * min(1.0, done / group["rise"])
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - beta)  # m = beta m + (1 - beta) g
                ahead = torch._foreach_lerp(grads, momenta, beta)  # (1 - beta) g + beta m
                updates = self.directions(ahead)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(params, updates, alpha=-scale)

    def directions(self, ahead: list[Tensor]) -> list[Tensor]:
        """Each of these matrices, of one shape, made orthogonal."""
        return [*orthogonalise(torch.stack(ahead), dtype=self.dtype).to(ahead[0].dtype)]


def make_optimizers(learner: nn.Module, s, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers of settings `s`; each group keeps its full rate as `base_lr`.

    muon: block matrices by Muon at `lr`; the others by AdamW, embeddings at `embed_lr`, all else
    (head, vectors, thin matrices, the heads of an objective) at `head_lr`. adamw,
    nadamw (Nesterov's momentum in it): everything at `lr`. Weight decay falls on matrices only, and
    beside Muon, as in its source, on none that AdamW has.

    Why three rates: an update of Muon has about the size of lr, whatever the gradient's, and a
    fresh matrix, unless it begins at zero, about 2 to 3 (the largest of its singular values): 0.02
    changes it by a hundredth. AdamW changes each number by about its rate: much for embeddings,
    whose numbers begin near 1 (or near 0.02, and then as much less), little for the head, which
    begins at zero. The rates are those of kellerjordan.github.io/posts/muon and of nanochat, which
    uses it too.
    """
    named = {n.removeprefix("gpt."): p for n, p in learner.named_parameters() if p.requires_grad}
    trunk = getattr(learner, "gpt", learner)
    betas = (s.beta1, s.beta2)
    if s.optimizer == "muon":
        embed = [p for n, p in named.items() if {"wte", "wpe"} & {*n.split(".")}]
        thin = (".A", ".B", "canon.weight")  # of lora.py, and shares of channels, which are no maps
        blocks = [n for n in named if "blocks" in n.split(".") and not n.endswith(thin)]
        inner = [named[n] for n in blocks if named[n].ndim == 2]
        taken = {*embed, *inner}
        others = [p for p in named.values() if p not in taken]
        embed_lr = s.embed_lr * trunk.wte.std
        groups = [dict(params=embed, lr=embed_lr), dict(params=others, lr=s.head_lr)]
        adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-10, weight_decay=0, fused=True)
        optimizers: list = [adamw]
        if inner:
            muon = Muon(inner, s.lr, s.momentum, weight_decay=s.weight_decay, dtype=dtype)
            optimizers.append(muon)
    else:
        shares = [p for n, p in named.items() if n.endswith("canon.weight")]  # are pulled nowhere
        vectors = [p for p in named.values() if p.ndim < 2] + shares
        matrices = [p for p in named.values() if p not in {*vectors}]
        groups = [dict(params=matrices, weight_decay=s.weight_decay)]
        if vectors:
            groups.append(dict(params=vectors, weight_decay=0.0))
        if s.optimizer == "adamw":
            optimizers = [torch.optim.AdamW(groups, s.lr, betas, fused=True)]
        elif s.optimizer == "nadamw":
            optimizers = [torch.optim.NAdam(groups, s.lr, betas, decoupled_weight_decay=True)]
        else:
            raise ValueError(f"make_optimizers knows no optimizer={s.optimizer!r}: make it here")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["base_lr"] = group["lr"]
    owned = [p for group in groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(named), "each parameter belongs to one group"
    return optimizers


class LossScale:
    """Dynamic loss scaling for float16, whose small gradients would vanish (arXiv:1710.03740).

    float16 ends at 6e-8 below and 65,504 above. So the loss, and with it every gradient, is
    multiplied by `value` before the backward pass, and the gradients divided by it after. After an
    overflow, whose update is left out, it is halved, and after 2,000 good steps doubled: as large
    as will do. bfloat16 and float32 reach down to 1e-38, and `value` stays 1.
    """

    def __init__(self, dtype: torch.dtype, state: list | None = None):
        self.on = dtype == torch.float16
        first = (2.0**16 if self.on else 1.0, 0)
        self.value, self.good_steps = state if self.on and state else first

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.on:
            grads = [p.grad for p in parameters if p.grad is not None]  # frozen ones have none
            torch._foreach_mul_(grads, 1 / self.value)

    def update(self, finite: bool) -> None:
        if not self.on:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % 2000 == 0:
            self.value *= 2

    def state(self) -> list | None:
        return [self.value, self.good_steps] if self.on else None
