"""What a model has written, as something that it can learn from: a rollout.

    row       <|sums|> <|user|> 57+68= <|end|> <|assistant|> 521 <|end|>
    prompt    <|sums|> <|user|> 57+68= <|end|> <|assistant|>
    answer    5 1 2 <|end|>                                       its own: ended, or cut short

Shapes: N answers, T time.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE
from generate import answers
from model import GPT

SLOTS = 256  # answers that are written side by side


def written(
    gpt: GPT,
    tokenizer,
    rows: list[list[int]],
    keys: list,
    max_tokens: int,
    temperature: float,
    most: int = 0,
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer for each of the rows (ids); that of row i is drawn from keys[i] alone. At
    most `most` are written side by side, if it is above 0."""
    begins = [len(row) - row[::-1].index(tokenizer.markers.assistant) for row in rows]
    prompts = [row[:begin] for row, begin in zip(rows, begins, strict=True)]
    found: list[list[int]] = [[] for _ in rows]
    options = dict(keys=keys, with_end=True, temperature=temperature)
    slots = min(most or SLOTS, SLOTS, max(1, len(rows)))
    for i, ids in answers(gpt, tokenizer, prompts, max_tokens, slots=slots, **options):
        found[i] = ids
    return list(zip(prompts, found, strict=True))


def padded(texts: list[tuple[list, list]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (N, T) of pairs of a prompt and an answer: the answers are targets."""
    T = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    tokens, targets = np.full((len(texts), T), fill), np.full((len(texts), T), IGNORE)
    for row, target, (prompt, answer) in zip(tokens, targets, texts, strict=True):
        ids = [*prompt, *answer]
        row[: len(ids) - 1] = ids[:-1]
        target[len(prompt) - 1 : len(ids) - 1] = answer
    return tokens, targets


def log_p(gpt: GPT, tokens, targets, positions, mask, temperature: float = 1.0) -> Tensor:
    """ln p of each target that counts, all rows in one, as it is drawn at this temperature."""
    at = targets != IGNORE
    logits = gpt.logits(gpt.trunk(tokens, mask, positions)[at]) / temperature
    return -F.cross_entropy(logits, targets[at], reduction="none")


@torch.no_grad()
def log_p_old(learner, tokens, targets, positions, mask, temperature: float, most: int = 0):
    """The same by the weights of a learner as they are, as an array (N, T), 0 at what does not
    count; at most so many rows in one pass, which bounds memory (0 is no bound)."""
    gpt, old = learner.gpt, np.zeros(tokens.shape, np.float32)
    for i in range(0, len(tokens), most or len(tokens)):
        some = slice(i, i + (most or len(tokens)))
        inputs = [z if z is None else z[some] for z in (tokens, targets, positions, mask)]
        inputs = [z if z is None else torch.from_numpy(z).to(gpt.wte.weight.device) for z in inputs]
        with learner.autocast():  # as in the update that it will be compared with
            old[some][targets[some] != IGNORE] = log_p(gpt, *inputs, temperature).cpu()
    return old
