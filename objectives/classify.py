"""Classify: which of a few labels fits this text? (GPT-1: Radford et al. 2018, section 3.2)

    <|user|> a gripping film <|end|> <|assistant|>        of each row, what stands before its answer
                                          |
                                       h (C) ── W ──▶ a score for each label

    loss = - ln softmax(W h)[label]  -  lm_weight x mean of ln p(x[t] | x[0], ..., x[t-1])

The state at the last token has seen the whole prompt; one linear layer makes of it a score for each
label: the answers that stand in the training split. With --pool=mean h is the mean of all states of
the prompt, and each token tells by itself: what gives a machine away is a word here and there. The
trunk goes on predicting prompts, so that it keeps what it has learned before (--init_from).

    python -m objectives.classify out/classify --text="a gripping film"
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import IGNORE
from engine import settings
from engine.settings import BelowOne, NotNegative
from grading import LABELS
from judge import laid, pooled, tell
from objectives import Base


@dataclass
class Settings:
    lm_weight: NotNegative = 0.5  # of the loss of the prompt's own tokens, beside that of the label
    head_dropout: BelowOne = 0.1  # fraction of h that is set to zero in training
    pool: Literal["last", "mean"] = "last"  # which states of the prompt h is made of


class Objective(Base):
    terms = {"label": 1.0, "prompt": 0.5, "accuracy": 0.0}
    masks = ("causal", "prefix", "full")
    kinds = ("rows",)
    lines = True
    generates = False
    unit = "nats"
    instead = 'python -m objectives.classify RUN --text="..."'

    def __init__(self, s, tokenizer):
        super().__init__(s, tokenizer)
        sound = not self.own.lm_weight or s.model.mask == "causal"
        settings.require(sound, self.own, "lm_weight", "0, unless --mask=causal hides what comes")
        self.terms = self.terms | {"prompt": self.own.lm_weight}
        self.labels, self.task = [], ""

    def require(self, data):
        """Finds the labels, and the task of the rows if they all have the same."""
        super().require(data)
        rows = [np.array(ids) for ids in data.split("train").rows()]
        found = {self.parted(ids)[1] for ids in rows}
        tasks = {int(ids[0]) for ids in rows}
        if not 2 <= len(found) <= LABELS:
            raise ValueError(
                f"the answers in {data.folder} are {len(found):,} different ones, and labels are 2"
                f" to {LABELS}: use objective=next_token, for which they are texts"
            )
        self.labels = sorted(found)
        self.task = "".join(name for name, i in self.tokenizer.tasks().items() if tasks == {i})
        for ids in data.split("val").rows():
            self.number(self.parted(np.array(ids))[1])

    def begin(self, learner, data, here):
        text = json.dumps([self.labels, self.task]).encode()
        return {"labels": torch.tensor([*text], dtype=torch.uint8)}

    def kept(self, tensors):
        self.labels, self.task = json.loads(bytes(tensors["labels"].tolist()))

    def heads(self, gpt):
        head = nn.Linear(gpt.config.n_embd, len(self.labels))
        for p in head.parameters():
            nn.init.zeros_(p)  # all labels are as likely: the loss begins at ln labels
        return {"label": head}

    def parted(self, ids):
        """A row up to its last `<|assistant|>`, and the text behind; of what fills up, nothing."""
        at = np.flatnonzero(ids == self.tokenizer.markers.assistant).max(initial=-1) + 1
        answer = ids[at:].tolist()
        answer = answer[: answer.index(self.tokenizer.markers.end)] if at else []
        return ids[:at], self.tokenizer.decode(answer)

    def number(self, answer: str) -> int:
        if answer not in self.labels:
            raise ValueError(f"{answer[:60]!r} is no answer in the training split: no label for it")
        return self.labels.index(answer)

    def prepare(self, batch, learner):
        """Prompts without their answers, as `laid` has them, the tokens to come, and the labels."""
        prompts, answers = zip(*map(self.parted, batch.tokens), strict=True)
        labels = [self.number(answer) if answer else IGNORE for answer in answers]
        ends = np.array([max(0, len(prompt) - 1) for prompt in prompts])
        tokens, *seen = laid(prompts, self.s.model.mask, self.tokenizer.markers)
        targets = np.full(tokens.shape, IGNORE)
        if self.own.lm_weight:
            before = np.arange(tokens.shape[1]) < ends[:, None]
            targets[before] = np.roll(tokens, -1, axis=1)[before]
        asked, read = (int((np.array(z) != IGNORE).sum()) for z in (labels, targets))
        return (tokens, *seen, ends, targets, np.array(labels)), [asked, read, asked]

    def loss(self, gpt, heads, tokens, positions, mask, ends, targets, labels):
        x = gpt.trunk(tokens, mask, positions)  # (B, T, C)
        h = pooled(x, ends, self.own.pool)  # (B, C)
        scores = heads["label"](F.dropout(h, self.own.head_dropout, gpt.training)).float()
        nats = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
        at = targets != IGNORE
        prompt = gpt.cross_entropy(x[at], targets[at], "sum")
        return [nats, prompt, (scores.argmax(dim=-1) == labels).sum()]


# --- the command


@dataclass
class Command:
    run: str = "out/classify"  # folder of a run, or one checkpoint of it
    text: str = ""  # which label fits it?
    rows: str = ""  # jsonl of rows: prints each with the likeliest label, for prepare.py
    task: str = ""  # of the text; by default that of the rows that were learned from


def main(argv: list[str]) -> None:
    s = settings.load(Command, argv, "Label texts.", "run")
    settings.require(bool(s.text) != bool(s.rows), s, "text", "given, or --rows=FILE, not both")
    tell(s)


if __name__ == "__main__":
    settings.run(main)
