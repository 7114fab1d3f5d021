"""Parameter groups, Muon beside AdamW, and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, warmup: float, decay: float, final: float, shape: str):
    """The factor on every learning rate for update number `step` of `steps`, counted from 0.

    Rises in a line over `warmup` steps, holds 1, and falls over the last `decay` (a fraction of
    `steps`) to `final`, in a line or as half a cosine. `warmup` below 1 is a fraction of `steps`.
    """
    warmup = warmup if warmup >= 1 else warmup * steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    left = (steps - step) / max(1.0, min(decay * steps, steps - warmup))  # 1 .. 0 over the decay
    if left >= 1:
        return 1.0
    if shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return final + (1 - final) * left


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly, to each matrix of g (N, rows, columns).

    A quintic Newton-Schulz iteration drives all singular values into about [0.7, 1.2]. Only matrix
    products, so it runs well in bfloat16. Source: kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero: small singular values grow fastest
    wide = g.size(1) <= g.size(2)
    x = g if wide else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values of at most 1
    for _ in range(steps):
        xx = x @ x.mT  # x = a x + (b xx + c xx^2) x, with the sums inside the products
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class LossScale:
    """Dynamic loss scaling for float16, whose small gradients would vanish (arXiv:1710.03740).

    The loss is multiplied by `value`, the gradients divided by it. After an overflow it is halved,
    and after 2,000 good steps doubled. For other types `value` stays 1.
    """

    def __init__(self, dtype: torch.dtype, state: list | None = None):
        self.on = dtype == torch.float16
        first = (2.0**16 if self.on else 1.0, 0)
        self.value, self.good_steps = state if self.on and state else first

    def unscale(self, parameters: list[nn.Parameter]) -> None:
        if self.on:
            torch._foreach_mul_([p.grad for p in parameters], 1 / self.value)

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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix learns equally fast.

    For the matrices inside the blocks; embeddings, head and vectors belong to AdamW. Equal shapes
    are stacked and orthogonalised in one go, in `dtype`. The update of a (rows, columns) matrix is
    scaled by sqrt(max(1, rows / columns)). Momentum rises from 0.85 to `momentum` in `rise` steps.
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
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    if p not in self.state:
                        self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                    self.state[p]["step"] += 1
                done = self.state[params[0]]["step"].item() - 1
                beta = 0.85 + (group["momentum"] - 0.85) * min(1.0, done / group["rise"])
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - beta)
                ahead = torch._foreach_lerp(grads, buffers, beta)  # Nesterov: look one step ahead
                updates = orthogonalise(torch.stack(ahead).to(self.dtype))
                scale = -group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=scale)


def make_optimizers(model: nn.Module, s, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers of settings `s`; each group keeps its full rate as `base_lr`.

    muon: block matrices by Muon at `lr`; embeddings at `embed_lr`, head and vectors at `head_lr`
    by AdamW. adamw, nadamw: everything at `lr`. Weight decay falls on matrices only, on embeddings
    not at all under Muon, where their rate is large.
    """
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim >= 2}
    vectors = [p for p in named.values() if p.ndim < 2]
    betas, fused = (s.beta1, s.beta2), next(model.parameters()).device.type in ("cpu", "cuda")
    if s.optimizer == "muon":
        inner = [p for n, p in matrices.items() if n.startswith("blocks.")]
        embed = [p for n, p in matrices.items() if n in ("wte.weight", "wpe.weight")]
        head = [p for n, p in matrices.items() if n == "head.weight"]
        groups = [dict(params=embed, lr=s.embed_lr), dict(params=head + vectors, lr=s.head_lr)]
        adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-10, weight_decay=0, fused=fused)
        muon = Muon(inner, s.lr, s.momentum, weight_decay=s.weight_decay, dtype=dtype)
        optimizers = [adamw, muon]
    else:
        groups = [
            dict(params=list(matrices.values()), weight_decay=s.weight_decay),
            dict(params=vectors, weight_decay=0.0),
        ]
        groups = [g for g in groups if g["params"]]
        if s.optimizer == "adamw":
            optimizers = [torch.optim.AdamW(groups, s.lr, betas, fused=fused)]
        else:
            nadam = torch.optim.NAdam(groups, s.lr, betas, decoupled_weight_decay=True)
            optimizers = [nadam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
