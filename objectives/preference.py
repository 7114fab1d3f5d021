"""Preference: of two answers, which is better? (direct preference optimization, arXiv:2305.18290)

    reward(y) = beta (ln p(y | x) - ln p0(y | x))         p0: the weights that the run begins with
    loss      = - ln sigmoid(reward(chosen) - reward(rejected))

Learning from people used to take a model of their judgement, which then rewarded what another wrote
(reinforcement learning, arXiv:2203.02155). But the best p for any reward, among those that stay
near p0, is p0 e^(reward/beta) / Z, so p tells the reward that it is best for, up to a Z that falls
out of the difference: it can be taught to prefer by gradient descent alone. At the beginning p = p0
and the loss is ln 2. beta says how near p0 it stays. Only the difference counts, so both answers
may become less likely, the chosen one, too; --likelihood holds it up (arXiv:2404.19733).

    python evaluate.py out/RUN --split=train --temperature=1 --pairs=pairs.jsonl
    python prepare.py pairs.jsonl --tokenizer=out/RUN
    python train.py config/preference.py --data=data/pairs --init_from=out/RUN

The first writes a pair of each wrong answer. Any prompts with chosen and rejected answers will do.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dataset import IGNORE, layout
from engine import settings
from engine.prepared import SPLITS
from engine.settings import AboveZero, NotNegative
from objectives import Base

PASS_TOKENS = 8192  # in one pass that computes the log-probabilities of the reference


@dataclass
class Settings:
    beta: AboveZero = 0.1  # the larger, the nearer it stays to the weights it begins with
    likelihood: NotNegative = 0.0  # weight of -ln p of the chosen answer, a token; 0 is off


class Objective(Base):
    kinds = ("pairs",)
    lines = True
    shards = False
    unit = "nats a pair"

    def __init__(self, s, tokenizer):
        super().__init__(s, tokenizer)
        settings.require(bool(s.init_from), s, "init_from", "a run that has learned to answer")
        settings.require(s.train_on == "answers", s, "train_on", "answers, of which pairs consist")
        told = dict(accuracy=0.0, margin=0.0, chosen=0.0, rejected=0.0)
        self.terms = dict(loss=1.0, nats=self.own.likelihood) | told
        self.reference = {}  # of each pair by its key: ln p0 of both answers

    def begin(self, learner, data, here):
        """ln p0 of all pairs. Each process computes its share of the passes."""
        keys, found, T = [], [], self.s.model.block_size
        rows = max(1, PASS_TOKENS // (2 * T))
        rows = min(rows, self.s.device_batch or rows)
        learner.eval()
        for name in (n for n in SPLITS if any(f.files.get(n) for f in data.folders)):
            for i, batch in enumerate(data.split(name).in_order(rows, T)):
                keys += [key_of(row, self.tokenizer.markers) for row in batch.tokens]
                ln_p = torch.zeros(len(batch.tokens), 2)
                if i % here.world == here.rank:
                    *inputs, _ = self.prepare(batch, learner)[0]
                    with torch.no_grad(), here.autocast():
                        ln_p = ln_p_of(learner.gpt, *map(here.put, inputs))
                found += ln_p.flatten().tolist()
        learner.train()
        return dict(keys=torch.tensor(keys), ln_p=torch.tensor(here.sum(found)).view(-1, 2))

    def kept(self, tensors):
        keys, ln_p = tensors["keys"].tolist(), tensors["ln_p"].numpy()
        self.reference = dict(zip(keys, ln_p, strict=True))

    def prepare(self, batch, learner):
        """Both answers of each pair behind its prompt, (B, 2, T), with their targets, positions and
        mask, and what the reference thinks of them."""
        markers = self.tokenizer.markers
        pairs = [pair_in(row, markers) for row in batch.tokens]
        T = max([2, *(len(ids) for pair in pairs for ids, _ in pair)]) - 1
        tokens = np.full((len(pairs), 2, T + 1), markers.end_of_text)
        targets = np.full((len(pairs), 2, T), IGNORE)
        for i, pair in enumerate(pairs):
            for k, (ids, start) in enumerate(pair):
                tokens[i, k, : len(ids)] = ids
                targets[i, k, start - 1 : len(ids) - 1] = ids[start:]
        tokens = tokens[:, :, :-1]
        positions = mask = None  # causal: what fills up stands behind, where nobody sees it
        if self.s.model.mask == "prefix":
            positions, mask = layout(tokens.reshape(-1, T), markers, "prefix")
            positions = positions.reshape(tokens.shape)
            mask = mask.reshape(len(pairs), 2, 1, T, T)
        real = [i for i, pair in enumerate(pairs) if pair]
        reference = np.zeros((len(pairs), 2), np.float32)
        for i in real if self.reference else ():
            reference[i] = self.known(key_of(batch.tokens[i], markers))
        return (tokens, targets, positions, mask, reference), [len(real)] * len(self.terms)

    def known(self, key: int):
        if key not in self.reference:
            raise ValueError(
                "of a pair it is not known how likely its answers were at the beginning of the run:"
                " evaluate on the data of the run"
            )
        return self.reference[key]

    def shown(self, inputs, i):
        tokens, targets = inputs[0][i], inputs[1][i]
        said = [self.tokenizer.decode(row[row != IGNORE].tolist()) for row in targets]
        prompt = tokens[0, : np.argmax(targets[0] != IGNORE) + 1].tolist()
        return f"{self.tokenizer.decode(prompt)}\n  chosen    {said[0]}\n  rejected  {said[1]}"

    def loss(self, gpt, heads, tokens, targets, positions, mask, reference):
        there = (targets != IGNORE).any(dim=-1).all(dim=-1)  # (B): and not filled up
        ln_p = ln_p_of(gpt, tokens, targets, positions, mask)  # (B, 2)
        rewards = self.own.beta * (ln_p - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        nats = -ln_p[:, 0] / (targets[:, 0] != IGNORE).sum(dim=-1).clamp(min=1)
        terms = [-F.logsigmoid(margin), nats, (margin > 0).float(), margin, *rewards.T]
        return [(term * there).sum() for term in terms]


def pair_in(row: np.ndarray, markers) -> list[tuple]:
    """The tokens of the prompt with either answer, up to its end, and where the answer starts; the
    chosen one is first. Nothing if there is no pair in the row."""
    begins = np.flatnonzero(row == markers.assistant)[-2:]
    if len(begins) < 2:
        return []
    prompt, *answers = np.split(row[: np.flatnonzero(row == markers.end)[-1] + 1], begins)
    return [(np.concatenate([prompt, ids]), len(prompt) + 1) for ids in answers]


def key_of(row: np.ndarray, markers) -> int:
    """A number by which a pair is known, however far its row is filled up."""
    ids = row[: np.flatnonzero(row == markers.end)[-1] + 1]
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def ln_p_of(gpt, tokens, targets, positions, mask):
    """ln p of each answer, (B, 2): the sum over its tokens, of tokens and targets (B, 2, T)."""
    z = [x if x is None else x.flatten(0, 1) for x in (tokens, mask, positions)]
    at = targets.flatten(0, 1) != IGNORE
    x = gpt.trunk(*z)[at]  # (N, C): of what is asked for, and of nothing else
    nats = F.cross_entropy(gpt.logits(x), targets[targets != IGNORE], reduction="none")
    zeros = torch.zeros(at.shape, device=nats.device)
    return -zeros.masked_scatter(at, nats).sum(dim=-1).view(-1, 2)
