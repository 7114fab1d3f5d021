"""Dropout: in three places while the model learns, in none while it is used."""

import pytest
import torch

from model import GPT, GPTConfig, KVCache

P = 0.5
WIDTH = 64


def make(**more) -> GPT:
    """Logits are the final hidden states themselves, so that zeros stay visible as zeros."""
    shape = dict(vocab_size=WIDTH, n_embd=WIDTH, n_head=4, n_layer=1, block_size=32, bias=True)
    shape |= dict(embed_norm=False, qk_norm=False, logit_cap=0.0, mlp="gelu", norm="rms")
    model = GPT(GPTConfig(**(shape | dict(dropout=P) | more)))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        dict(model.named_parameters())["head.weight"].copy_(torch.eye(WIDTH))
    return model


@torch.no_grad()
def fill(model: GPT, ending: str, value) -> None:
    """Sets all parameters with this ending: a number, or a tensor of their shape."""
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert found, ending
    for p in found:
        p.copy_(torch.as_tensor(value, dtype=p.dtype).expand_as(p))


def hidden(model: GPT, training: bool = True) -> torch.Tensor:
    """The final hidden states of 8 x 32 equal tokens: (8, 32, WIDTH)."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model.train(training)(torch.zeros(8, 32, dtype=torch.long))


def share_of_zeros(x: torch.Tensor) -> float:
    return (x == 0).float().mean().item()


@pytest.mark.parametrize("ending", ["wte.weight", "wo.bias", "down.bias"])
def test_training_drops_half_of_the_embedding_and_of_each_residual_branch(ending):
    """All else is zero: what reaches the end is this one source, all ones."""
    model = make()
    fill(model, ending, 1.0)
    assert share_of_zeros(hidden(model)) == pytest.approx(P, abs=0.03)
    assert share_of_zeros(hidden(model, training=False)) == 0


def attention_sums(model: GPT, training: bool = True) -> torch.Tensor:
    """Values of one, copied to the stream: each head's sum of attention probabilities."""
    fill(model, "wv.bias", 1.0)
    fill(model, "wo.weight", torch.eye(WIDTH))
    return hidden(model, training)


def test_training_drops_attention_probabilities():
    """Without it the heads of a position agree, where the residual's dropout has left them."""
    x = attention_sums(make())
    left = [row[row != 0] for row in x.view(-1, WIDTH)]
    assert sum(bool(row.numel() and row.std() > 1e-3) for row in left) > 0.9 * len(left)


def test_evaluation_drops_no_attention_probabilities():
    x = attention_sums(make(), training=False)
    torch.testing.assert_close(x, torch.ones_like(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["plain", "mask", "cache", "one token"])
def test_evaluation_with_dropout_equals_evaluation_without(how):
    shape = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32)
    dropping, plain = GPT(GPTConfig(**shape, dropout=P)), GPT(GPTConfig(**shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, q in zip(dropping.parameters(), plain.parameters(), strict=True):
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
            q.copy_(p)
    tokens = torch.randint(61, (2, 24), generator=generator)

    def logits(model: GPT) -> torch.Tensor:
        model.eval()
        if how == "mask":
            return model(tokens, mask=torch.ones(24, 24, dtype=torch.bool).tril())
        if how == "cache":
            return model(tokens, cache=KVCache(model.config, batch=2))
        return model(tokens[:, :1] if how == "one token" else tokens)

    torch.testing.assert_close(logits(dropping), logits(plain), atol=1e-5, rtol=1e-5)
    tokens = tokens.roll(1, 0)
    torch.testing.assert_close(logits(dropping), logits(dropping), atol=0, rtol=0)
