"""An encoder and a decoder: a stack reads the question, another writes (arXiv:1706.03762, figure 1)

    prompt ──▶ encoder: every token sees all of the prompt ──▶ states
                                                                 │ keys and values
    <|assistant|> answer ──▶ decoder: causal, and in each block a cross-attention ──▶ next token

    loss = - sum over the answer of ln p(y[t] | prompt, y[0], ..., y[t-1])

The task is that of objective=next_token with --mask=prefix, in which one stack is both. There all
weights serve prompts and answers, and an answer looks at a prompt as each layer leaves it; here
each stack has one thing to do, and an answer looks at what the encoder's last layer says. The
decoder is the trunk; encoder and cross-attention, which no causal model has, are heads. Hence

    python -m objectives.encoder_decoder out/run --split=test

which answers rows as evaluate.py does, and says what the answers are worth (seq2seq.py).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import IGNORE
from engine import settings
from engine.settings import Positive
from model import GPT, Attention, Norm, draw, rotary
from objectives import Base


@dataclass
class Settings:
    encoder_layers: Positive = 2  # blocks of the encoder; those of the decoder are n_layer


class Objective(Base):
    masks = ("causal",)
    kinds = ("rows",)
    generates = False
    shards = False
    instead = "python -m objectives.encoder_decoder RUN"

    def __init__(self, s, tokenizer):
        super().__init__(s, tokenizer)
        settings.require(s.train_on == "answers", s, "train_on", "answers: prompts are only read")

    def require(self, data):
        super().require(data)
        if any(part.kind == "text" for part in data.split("train").parts):
            raise ValueError(f"{data.folder} holds running text, which has no prompt to encode")

    def heads(self, gpt):
        none = "0 with objective=encoder_decoder, also in what it begins with"
        settings.require(not gpt.config.canon, gpt.config, "canon", none)
        c = replace(gpt.config, n_layer=self.own.encoder_layers, tied=True)
        encoder = GPT(c)
        encoder.wte = nn.Identity()  # it reads the embeddings of the trunk
        encoder.init_weights(self.s.seed)
        return {"encoder": encoder, "cross": Cross(gpt.config, self.s.seed)}

    def prepare(self, batch, learner):
        """Prompts and answers of each window, side by side: tokens, targets of answers, positions
        in their rows, and the numbers of these rows, by which it is known who may see whom."""
        tokens, at, markers = batch.tokens, batch.positions, self.tokenizer.markers
        begins, answers = at == 0, tokens == markers.assistant
        row, said = begins.cumsum(axis=1), answers.cumsum(axis=1)  # said: in this window so far
        before = np.maximum.accumulate(np.where(begins, said - answers, 0), axis=1)
        there = tokens != markers.end_of_text
        prompts = packed(there & (said == before), tokens, at, row)
        answers = packed(there & (said > before), tokens, at, row, batch.targets)
        answers[-1][answers[2] == 0] = IGNORE
        return (*prompts, *answers), [int((batch.targets != IGNORE).sum())]

    def shown(self, inputs, i):
        parts = [inputs[k][i][inputs[k + 2][i] > 0].tolist() for k in (0, 3)]
        return "\n-> ".join(self.tokenizer.decode(ids) for ids in parts)

    def loss(self, gpt, heads, prompt, prompt_at, prompt_row, answer, answer_at, row, targets):
        seen = prompt_row[:, None, :, None] == prompt_row[:, None, None]  # (B, 1, S, S)
        states = heads["encoder"].trunk(prompt, seen, prompt_at, embedded=gpt.wte(prompt))
        mask = (row[:, None, :, None] == row[:, None, None]).tril()  # (B, 1, T, T)
        # fill-up has row 0 and sees nothing
        cross = (row[:, None, :, None] == prompt_row[:, None, None]) & (row > 0)[:, None, :, None]
        x = decode(gpt, heads["cross"], answer, answer_at, mask, states, cross)
        at = targets != IGNORE
        return [gpt.cross_entropy(x[at], targets[at], "sum")]


def packed(chosen, *arrays) -> list:
    """What is chosen of each row of arrays (B, T), moved left; in the third, 0 is what fills up."""
    longest = max(1, chosen.sum(axis=1).max())
    order = np.argsort(~chosen, axis=1, kind="stable")[:, :longest]
    found = [np.take_along_axis(z, order, axis=1) for z in arrays]
    found[2][~np.take_along_axis(chosen, order, axis=1)] = 0
    return found


class Cross(nn.Module):
    """Cross-attention for each block of the decoder."""

    def __init__(self, c, seed: int):
        super().__init__()
        self.blocks = nn.ModuleList(CrossAttention(c, i) for i in range(c.n_layer))
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if hasattr(module, "std"):
                draw(module, c, generator)


class CrossAttention(Attention):
    """Attention whose queries are one stack's and whose keys and values another's."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.norm = Norm(config.n_embd, config)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, C), states (B, S, C), mask (B, 1, T, S) to (B, T, C). Without positions: where a
        word stands in the prompt, the encoder has to say."""
        D = self.config.head_dim
        q, k, v = self.wq(self.norm(x)), self.wk(states), self.wv(states)
        q, k, v = (z.unflatten(-1, (-1, D)).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        any_seen = mask.any(dim=-1, keepdim=True)  # (B, 1, T, 1)
        p = self.drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask | ~any_seen, p, enable_gqa=True)
        return self.wo((y * any_seen).transpose(1, 2).flatten(2))


def decode(gpt: GPT, cross: Cross, tokens, positions, mask, states, seen, cache=None) -> Tensor:
    """As gpt.trunk, with a look at the states of the encoder in each block: (B, T, C)."""
    x, rope = gpt.wte(tokens), None
    if gpt.config.position == "learned":
        x = x + gpt.wpe(positions)
    else:
        rope = rotary(positions, gpt.config)
    x = gpt.drop(gpt.embed_norm(x))
    for block, look in zip(gpt.blocks, cross.blocks, strict=True):
        x = x + block.drop(block.attn(block.attn_norm(x), rope, mask, cache))
        x = x + block.drop(look(x, states, seen))
        x = x + block.drop(block.mlp(block.mlp_norm(x)))
    return gpt.norm(x)


if __name__ == "__main__":
    import seq2seq  # the command

    settings.run(seq2seq.main)
