"""The shape of a model: its settings, the only place where they stand. Needs no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from engine import settings
from engine.settings import AboveZero, BelowOne, Bound, Count, NotNegative, Positive

# bounds beyond every published model: what a damaged file claims is refused before it takes memory
Context = Annotated[int, Bound("from 1 to 1,048,576", lambda n: 1 <= n <= 2**20)]
Layers = Annotated[int, Bound("from 1 to 10,000", lambda n: 1 <= n <= 10_000)]
AtLeastOne = Annotated[float, Bound("at least 1", lambda x: x >= 1)]
# who may see whom, obeyed wherever the model is used; dataset.layout has a drawing. With "prefix"
# a prompt sees itself whole, since nobody has to predict it; "full" makes an encoder
Mask = Literal["causal", "prefix", "full"]


@dataclass
class GPTConfig:
    """The defaults are the modern shape; config/gpt2.py has GPT-2's. Published sizes:

                       n_layer  n_embd  n_head  n_kv_head  mlp_dim  block_size  vocab_size
        GPT-2               12     768      12         12     3072        1024       50257
        GPT-2 XL            48    1600      25         25     6400        1024       50257
        Llama 2 7B          32    4096      32         32    11008        4096       32000
        Llama 3.1 8B        32    4096      32          8    14336      131072      128256
        Qwen3 0.6B          28    1024      16          8     3072       40960      151936

    (Qwen3's head_dim is 128; Llama's and Qwen's mlp is swiglu.) Raises ValueError for a shape that
    cannot be. n_kv_head, head_dim and mlp_dim are computed where they are 0.
    """

    vocab_size: int  # that of the tokenizer; without a default it is no setting of the command line
    block_size: Context = 256  # longest context, in tokens
    n_layer: Layers = 4  # blocks
    n_head: Positive = 4  # attention heads
    n_kv_head: Count = 0  # grouped-query attention: heads of keys and values; 0 means n_head
    n_embd: Positive = 128  # width
    head_dim: Count = 0  # width of a head; 0 means n_embd / n_head
    mlp_dim: Count = 0  # width inside the MLP; 0 means 4 * n_embd
    position: Literal["rotary", "learned"] = "rotary"  # how the model knows the order of tokens
    rope_base: AboveZero = 10000.0  # rotary pair i turns by rope_base^(-2i / head_dim) a token
    rope_factor: AtLeastOne = 1.0  # Llama 3.1: long wavelengths turn this much slower; 1 is off
    rope_original: Count = 0  # the context before that extension
    canon: Count = 0  # layers read this many tokens at once, a short convolution: canon.py; 0: no
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_weight: bool = False  # a learned scale in every norm
    norm_eps: NotNegative = 1e-6  # keeps norms from dividing by zero
    embed_norm: bool = True  # a norm after the embedding
    qk_norm: bool = True  # a norm of each query and key
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"  # the non-linearity in the MLP
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values alone (Qwen2)
    tied: bool = False  # the head is the embedding
    logit_cap: NotNegative = 15.0  # logits = cap * tanh(logits / cap); 0 is none
    mask: Mask = "causal"  # a token sees what is before; prefix: a prompt sees itself; full: all
    dropout: BelowOne = 0.0  # fraction of activations set to zero in training
    zero_init: bool = True  # residual layers, and a head of its own, begin at zero; false: as GPT-2

    def __post_init__(self):
        settings.require_bounds(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.mlp_dim = self.mlp_dim or 4 * self.n_embd
        given = "head_dim" if self.head_dim else "n_embd"
        whole = f"a multiple of n_head={self.n_head}, unless head_dim is set"
        shared = f"a multiple of n_kv_head={self.n_kv_head}"
        even = "such that a head has an even width, for rotary positions turn pairs"
        known = f"at least 1, for rope_factor={self.rope_factor:g} extends that context"
        divides = self.head_dim or self.n_embd % self.n_head == 0
        settings.require(divides, self, "n_embd", whole)
        settings.require(self.n_head % self.n_kv_head == 0, self, "n_head", shared)
        extends = self.rope_factor == 1 or self.rope_original > 0
        settings.require(extends, self, "rope_original", known)
        head_dim = self.head_dim or self.n_embd // self.n_head
        turns = self.position != "rotary" or head_dim % 2 == 0
        settings.require(turns, self, given, even)
        self.head_dim = head_dim

    def parameters(self) -> int:
        """How many numbers are learned, less norms, biases and canon layers, which are few."""
        C, D = self.n_embd, self.head_dim
        attention = 2 * C * (self.n_head + self.n_kv_head) * D  # wq and wo, wk and wv
        mlp = (3 if self.mlp == "swiglu" else 2) * C * self.mlp_dim
        tables = self.vocab_size * (1 if self.tied else 2)  # rows of the embedding and the head
        if self.position == "learned":
            tables += self.block_size
        return self.n_layer * (attention + mlp) + tables * C
