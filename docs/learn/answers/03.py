from torch import nn


def rms_norm(x, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)  # noqa: F821  all of model.py
        self.attn = Attention(config, layer)  # noqa: F821
        self.mlp_norm = Norm(config.n_embd, config)  # noqa: F821
        self.mlp = MLP(config)  # noqa: F821

    def forward(self, x, rope, mask, cache):
        return x + self.attn(self.attn_norm(x), rope, mask, cache) + self.mlp(self.mlp_norm(x))
