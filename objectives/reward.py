"""Reward: try, and do more of what went better than usual (GRPO, arXiv:2402.03300)

    question    57+68=
    answers     521    125    52     521       a group, drawn from the model as it is
    rewards     1      0      0      1         each is checked
    A           1     -1     -1      1         (reward - mean) / standard deviation, of the group

    loss = - sum over tokens min(r A, clip(r, 1 - e, 1 + e) A) / tokens     r = p(token) / p_old

Nobody has to know the answers, only how to check one. The gradient of r A makes each token of an
answer that was better than its group likelier, and those of the others less likely; the mean of the
group stands in for the network that in PPO (arXiv:1707.06347) guesses how hard a question is. To
write costs as much as to learn, so several updates learn from what was written once: r says how far
the model has moved since, and beyond e nothing more is gained. A group whose rewards are all equal
teaches nothing. The paper also holds the model near its beginning (KL); here what it forgets is
measured instead. All tokens count alike (arXiv:2503.14476), or those of long mistakes were cheap.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
import torch

import tasks
from dataset import IGNORE, layout
from engine.settings import Bound, NotNegative, Positive
from objectives import Base
from rollout import log_p, log_p_old, padded, written

Group = Annotated[int, Bound("at least 2: an answer is compared with others", lambda n: n >= 2)]
Temperature = Annotated[float, Bound("above 0: else all of a group are equal", lambda x: x > 0)]


@dataclass
class Settings:
    reward: str = ""  # what checks answers: a built-in task, or module:function; "": the row's task
    group: Group = 16  # answers to each question
    inner: Positive = 2  # updates that learn from them
    clip: NotNegative = 0.2  # e: an update gains nothing by moving a probability further
    max_tokens: Positive = 64  # of an answer
    temperature: Temperature = 1.0  # at which answers are drawn


class Objective(Base):
    terms = {"loss": 1.0, "reward": 0.0}
    kinds = ("rows",)
    lines = True
    shards = False
    unit = "(1 - mean reward)"

    def __init__(self, s, tokenizer):
        super().__init__(s, tokenizer)
        self.named = False  # by the user: a function that a checkpoint names is not imported
        if not s.init_from:
            raise ValueError(
                "objective='reward' learns from its own answers, of which some must be right: give"
                " --init_from=RUN, a model that solves a part of the task"
            )
        if s.model.dropout:
            raise ValueError(
                f"dropout={s.model.dropout} should be 0 with objective='reward': r compares two"
                " sets of weights, and not what was dropped"
            )

    def require(self, data):
        super().require(data)
        self.named = True
        for part in data.split("train").parts:
            self.checker(part.task)

    def checker(self, task: str):  # only what the user names is imported, and not what data name
        return tasks.checker(self.own.reward or task, self.named and self.own.reward != "")

    def prepare(self, batch, learner):
        """For evaluation: the reward of the likeliest answer to each row; nan if there is none."""
        rewards = np.full(len(batch.keys), np.nan, np.float32)
        there = np.flatnonzero((batch.targets != IGNORE).any(axis=1))  # rows that fill up are none
        some = batch.tokens[there].tolist(), [batch.keys[i] for i in there]
        _, rewards[there] = self.answered(learner.gpt, *some, temperature=0.0)
        return (batch.tokens, rewards), [len(there)] * 2

    def exercises(self, batch, learner):
        """Tokens (N, T) and rewards (N) of the answers, targets (N, T), A (N), p_old, as ln p
        (N, T), positions and mask: N answers, of those that can teach something."""
        if learner is None:  # --show_batch
            yield (batch.tokens,), [0, 0]
            return
        # 1. a group of answers to each question, and what they are worth
        group, config = self.own.group, learner.gpt.config
        rows = [row for row in batch.tokens.tolist() for _ in range(group)]
        drawn = [(*key, i) for key in batch.keys for i in range(group)]
        with learner.autocast():
            texts, rewards = self.answered(learner.gpt, rows, drawn, self.own.temperature)
        self.told = {"reward": (float(rewards.sum()), len(rewards))}
        # 2. answers that are alike are one, with the sum of their A; without those of no weight
        _, first, which = np.unique([*map(str, texts)], return_index=True, return_inverse=True)
        better = np.bincount(which, advantages(rewards.reshape(-1, group)).ravel())
        teaches = better != 0 if better.any() else [0]  # there has to be something
        kept, better = first[teaches], better[teaches].astype(np.float32)
        tokens, targets = padded([texts[i] for i in kept], self.tokenizer.end_of_text)
        positions = mask = None  # causal
        if config.mask != "causal":
            positions, mask = layout(tokens, self.tokenizer.markers, config.mask)
        # 3. the same for each of the updates. Tokens that teach nothing count all the same
        asked = (tokens, targets, positions, mask, self.own.temperature, self.s.device_batch)
        old = log_p_old(learner, *asked) if self.own.inner > 1 else None  # None: as it is now
        count = sum(len(answer) for _, answer in texts)
        for _ in range(self.own.inner):
            inputs = (tokens, rewards[kept], targets, better, old, positions, mask)
            yield inputs, [count, len(kept)]

    def answered(self, gpt, rows: list, keys: list, temperature: float) -> tuple[list, np.ndarray]:
        """The ids of prompt and answer for each row, and what the answer is worth."""
        most, slots = self.own.max_tokens, self.s.device_batch
        texts = written(gpt, self.tokenizer, rows, keys, most, temperature, slots)
        worth = cache(self.worth)  # answers that are alike are checked once
        found = (worth((*row,), (*ids,)) for row, (_, ids) in zip(rows, texts, strict=True))
        return texts, np.fromiter(found, np.float32)

    def worth(self, row: tuple[int], ids: tuple[int]) -> float:
        task, turns = self.tokenizer.decode_row(row)
        prompt = "\n".join(turn["content"] for turn in turns[:-1])
        answer = self.tokenizer.decode([i for i in ids if i not in self.tokenizer.ends])
        return tasks.worth(self.checker(task), prompt, answer, turns[-1]["content"])

    def loss(self, gpt, heads, tokens, rewards, *rest):
        if not rest:  # in evaluation
            return [(1 - rewards).nansum(), rewards.nansum()]
        targets, better, old, positions, mask = rest
        at = targets != IGNORE
        new = log_p(gpt, tokens, targets, positions, mask, self.own.temperature)
        old = new.detach() if old is None else old[at]
        better = better[:, None].expand_as(targets)[at]
        return [-gain(new, old, better, self.own.clip).sum(), rewards.sum()]


def advantages(rewards: np.ndarray) -> np.ndarray:
    """(reward - mean) / standard deviation of each group (questions, group); 0 if all are equal."""
    away = rewards - rewards.mean(axis=1, keepdims=True)
    spread = rewards.std(axis=1, keepdims=True)
    equal = np.ptp(rewards, axis=1, keepdims=True) == 0  # where rounding makes a spread above 0
    return np.where(equal, 0, away / np.where(equal, 1, spread)).astype(np.float32)


def gain(new, old, better, clip: float):
    """min(r A, clip(r, 1 - e, 1 + e) A): no more is won beyond e, but what got worse is felt."""
    r = (new - old).exp()
    return torch.minimum(r * better, r.clamp(1 - clip, 1 + clip) * better)
