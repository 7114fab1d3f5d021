"""Which token comes next, given a score for each: greedy, top-k, temperature, top-p.

Shapes: B samples, T time, V vocabulary.
"""

import math
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

COLDEST = 1e-6  # a temperature below this counts as 0, which nothing can be divided by
AHEAD = 64  # tokens whose numbers are drawn at once: a tensor for each takes longer than its draw
FIRST = 1024  # tokens among which top-p looks first: to sort all of 50,257 takes five times as long


def pick(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """A token (B,) for each row of logits (B, V), by one number in [0, 1) a row, uniform (B,).

    The numbers are float64 on the CPU, the tokens stand where the logits do. Raises ValueError if
    a logit is NaN or inf, or all are -inf. To sample in another way, write a function like this
    one, which may call `invert` as well, and hand it to `generate` or `answers` with its own
    settings by name. That of exercise 8.a in docs/learn/08.md: generate(model, prompt, 100,
    pick=min_p, p=0.1). Ids that must never be picked come with -inf; a temperature of 0 it has to
    handle itself.
    """
    highest, likeliest = logits.max(dim=-1)  # (B) both
    require_finite(highest)

    # 0. greedy: the likeliest token. It soon repeats itself: behind a sentence that stands there
    # twice, nothing is likelier than the same sentence once more (arXiv:1904.09751, figure 4)
    if temperature < COLDEST:
        return likeliest

    # 1 to 3, below: top-k, temperature, top-p, and sums of probabilities
    cumulative, ids = running_sums(logits, temperature, top_k, top_p)

    # 4. inversion: for 0.50 0.30 0.15 0.05 the sums are 0.50 0.80 0.95 1; the number 0.87 lies
    #    between the second and the third, so the third token it is. A uniform number falls into an
    #    interval as often as the interval is long, and that is the token's probability. (As
    #    torch.multinomial, but that the number comes from outside: so a sample is the same on every
    #    device, and whatever is drawn beside it)
    index = invert(cumulative, uniform).to(logits.device)  # (B, 1)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def uniform_numbers(seed: int, count: int) -> Iterator[Tensor]:
    """Token by token the numbers (count,) that `pick` draws by.

    Keyed by (seed, i) and not from the device's one stream of random numbers: those of sample i are
    the same on every device and however many others are made beside it, and so is its text, unless
    a rounding moves a boundary between two tokens.
    """
    draws = [random.Random(f"{seed} {i}") for i in range(count)]
    while True:
        numbers = [[draw.random() for draw in draws] for _ in range(AHEAD)]
        yield from torch.tensor(numbers, dtype=torch.float64)  # (AHEAD, count)


def running_sums(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor | None]:
    """Cumulative probabilities (B, k) of the k tokens that may be chosen, and their ids (B, k), or
    None if these are all V in order."""
    # 1. top-k: only the k likeliest
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))  # (B, k) both

    # 2. temperature: probabilities of 0.50 0.30 0.15 0.05 become 0.68 0.25 0.06 0.01 at 0.5, which
    #    is safer and duller, and 0.38 0.29 0.21 0.12 at 2, bolder and less coherent. (The maximum
    #    goes first: divided by a small number, large logits lose the digits they differ in)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = (logits / temperature).softmax(dim=-1)  # (B, k or V)

    # 3. top-p, the nucleus: of what is left, the fewest tokens that together reach probability
    #    top_p; at 0.9 the first three of 0.50 0.30 0.15 0.05. Where the model is sure that is one
    #    or two, where it is not hundreds; any fixed k is wrong for one of them. At 0.95 thousands
    #    of tokens with almost nothing each are left out, which would otherwise come up in every
    #    twentieth place and spoil the text (arXiv:1904.09751)
    if top_p < 1:
        probabilities, order = likeliest_first(probabilities, top_p)  # (B, n) both
        ids = order if ids is None else ids.gather(-1, order)

    # their sums
    cumulative = exact(probabilities).cumsum(dim=-1)
    if top_p < 1:
        most = cumulative.size(-1) - 1
        last = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=most)
        cumulative = cumulative.minimum(cumulative.gather(-1, last))  # nothing behind it
    return cumulative, ids


def likeliest_first(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of probabilities (B, V) the n largest of each row in falling order, and their ids, (B, n)
    both: so many, or more, that they have together that share, in each row."""
    if probabilities.is_cuda:  # which sorts all in less time than it finds so many
        return probabilities.sort(descending=True)
    n, V = FIRST, probabilities.size(-1)
    while True:
        some, ids = probabilities.topk(min(n, V))
        if n >= V or (some.cpu().double().sum(dim=-1) >= share).all():
            return some, ids
        n *= 8  # rarely: the model is that unsure


def exact(p: Tensor) -> Tensor:
    """As float64, since there may be 200,000 small ones to be added. On the CPU where the device
    has no such type (Apple's), where a few are added sooner, and where sums must be the same each
    time, in whose order a GPU is free."""
    there = p.is_cuda and p.size(-1) > FIRST and not torch.are_deterministic_algorithms_enabled()
    return (p if there else p.cpu()).double()


def invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Where the numbers uniform (B,), of the whole, fall among cumulative sums (B, k): (B, 1)."""
    whole = cumulative[:, -1:]  # 1, but for rounding and top-p
    sought = uniform[:, None].to(whole.device) * whole
    return torch.searchsorted(cumulative, sought, right=True)


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """With which probability `pick` chooses each token: (B, V), float64 on the CPU."""
    highest, likeliest = logits.max(dim=-1)
    require_finite(highest)
    if temperature < COLDEST:
        return F.one_hot(likeliest, logits.size(-1)).cpu().double()
    cumulative, ids = running_sums(logits, temperature, top_k, top_p)
    p = cumulative.diff(dim=-1, prepend=cumulative.new_zeros(len(cumulative), 1))
    p = (p / cumulative[:, -1:]).cpu()
    return p if ids is None else p.new_zeros(logits.shape).scatter(-1, ids.cpu(), p)


def require_finite(highest: Tensor) -> None:
    """Raises ValueError unless the highest logit (B,) of each row is finite; a NaN makes it NaN."""
    if not all(map(math.isfinite, highest.tolist())):
        raise ValueError("the logits are not finite: try --dtype=float32")


def penalise(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) in which the tokens of context (B, T) are less likely: CTRL, arXiv:1909.05858.

    Positive ones are divided by the penalty as in the paper, and negative ones multiplied.
    """
    seen = logits.gather(-1, context)  # (B, T)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))
