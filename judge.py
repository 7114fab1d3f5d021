"""What a classifier says of texts: python -m objectives.classify out/classify --text="..."

The probability of each label, for a text or for the rows of a file; rerank.py asks it, too.
"""

import json
from pathlib import Path

import numpy as np
import torch

from dataset import layout
from exam import by_length, labelled, prompts_of, unanswered
from grading import Row

PASS = 8192  # tokens of prompts that are read at once


def pooled(x, ends, pool: str):
    """Of the states x (B, T, C) up to position `ends` (B) the last, or their mean: (B, C)."""
    if pool == "last":
        return x[torch.arange(len(x), device=x.device), ends]
    read = torch.arange(x.size(1), device=x.device) <= ends[:, None]
    return (read[:, None].to(x.dtype) @ x)[:, 0] / (ends[:, None] + 1)


def laid(prompts: list, policy: str, markers) -> tuple:
    """Prompts, filled up: (B, T), positions, mask. Causal ones see no filling, and need neither."""
    T = max(1, *map(len, prompts))
    there = np.arange(T) < np.array([len(prompt) for prompt in prompts])[:, None]
    tokens = np.full((len(prompts), T), markers.end_of_text)
    tokens[there] = np.concatenate(prompts)
    if policy == "causal":
        return tokens, None, None
    positions, mask = layout(tokens, markers, policy)
    return tokens, positions, mask & there[:, None, None] | np.eye(T, dtype=bool)


class Judge:
    """A run of objectives/classify.py, in eval mode. Raises ValueError if it is none."""

    def __init__(self, run: str):
        from engine.learner import opened

        self.learner, self.tokenizer = opened(run, "classify")
        self.labels, self.task = self.learner.objective.labels, self.learner.objective.task

    def of_text(self, text: str, task: str = "") -> Row:
        """A row that asks for the label of a text."""
        return Row(task or self.task, [dict(role="user", content=text)], "")

    @torch.no_grad()
    def __call__(self, rows: list[Row]) -> np.ndarray:
        """The probability of each label, (rows, labels). Long prompts lose their front."""
        gpt, head = self.learner.gpt, self.learner.heads["label"]
        pool = self.learner.objective.own.pool
        prompts, _ = prompts_of(gpt, self.tokenizer, rows, "", 0.0, [1] * len(rows))
        found = np.zeros((len(prompts), len(self.labels)))
        for some in by_length(prompts, lambda n: PASS // n):
            arrays = laid([prompts[i] for i in some], gpt.config.mask, self.tokenizer.markers)
            tokens, positions, mask = (z if z is None else torch.from_numpy(z) for z in arrays)
            ends = torch.tensor([len(prompts[i]) - 1 for i in some])
            h = pooled(gpt.trunk(tokens, mask, positions), ends, pool)  # (rows, C)
            found[some] = head(h).float().softmax(dim=-1).numpy()
        return found


def tell(s) -> None:
    """Prints the labels of a text, the likeliest first; or the rows of a file, each with its label
    as the answer and how sure that is: `prepare.py --above=0.9` takes those that are sure."""
    judge = Judge(s.run)
    if s.text:
        [p] = judge([judge.of_text(s.text, s.task)])
        for i in np.argsort(-p):
            print(f"{p[i]:7.2%}  {judge.labels[i]}")
        return
    rows = [row._replace(task=s.task or row.task or judge.task) for row in unanswered(Path(s.rows))]
    for row, p in zip(rows, judge(rows), strict=True):
        line = labelled(row, judge.labels[int(p.argmax())], float(p.max()))
        print(json.dumps(line, ensure_ascii=False))
