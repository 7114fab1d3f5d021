"""The shape of a GPT: every number and choice that decides what model.py builds."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class GPTConfig:
    """The defaults are the modern shape; see config/gpt2.py for GPT-2's.

    Raises ValueError for numbers that do not go together.
    """

    vocab_size: int  # tokens that the tokenizer has
    block_size: int = 256  # context: how many tokens the model sees at once
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int = 0  # heads of keys and values; 0 means n_head
    n_embd: int = 128  # width
    head_dim: int = 0  # width of a head; 0 means n_embd / n_head
    mlp_dim: int = 0  # width inside the MLP; 0 means 4 * n_embd
    position: Literal["rotary", "learned"] = "rotary"  # how a token knows where it stands
    rope_base: float = 10000.0  # of the rotary positions: larger turns slower
    rope_factor: float = 1.0  # Llama 3.1: long wavelengths turn this much slower; 1 is off
    rope_original: int = 0  # the context before that extension
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_weight: bool = False  # a learned scale in every norm
    norm_eps: float = 1e-6  # keeps norms from dividing by zero
    embed_norm: bool = True  # a norm after the embedding
    qk_norm: bool = True  # a norm of queries and keys
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"  # the function inside the MLP
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values alone (Qwen2)
    tied: bool = False  # the head is the embedding
    logit_cap: float = 15.0  # soft bound of the logits; 0 is none
    zero_init: bool = True  # residual projections and head begin at zero
    dropout: float = 0.0  # fraction of activations set to zero in training

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.mlp_dim = self.mlp_dim or 4 * self.n_embd
        if not self.head_dim:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} does not divide by n_head={self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} does not divide by n_kv_head={self.n_kv_head}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, but rotary positions turn pairs")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(choices)}")


CHOICES = {"position": ("rotary", "learned"), "norm": ("rms", "layer")}
CHOICES["mlp"] = ("relu2", "gelu", "swiglu")
