"""What a model costs, by arithmetic: operations, memory. tests/test_plan.py holds it to account."""

from shape import GPTConfig

EVAL_TOKENS = 16_384  # in a forward pass that nothing is learned from
LOGITS = 1 << 26  # numbers of them at once, where each token's or answer's loss is wanted


def products(c: GPTConfig, T: int) -> float:
    """Floating-point operations of the matrix products of one token in a window of T, forward and
    backward.

    A weight is multiplied and added for each token: two operations forward, and four backward, for
    the gradients of what came in and of the weight itself. What is only looked up, an embedding, is
    no product. Attention's scores and sums are 2 C products for each of the T / 2 tokens that one
    sees on average (arXiv:2001.08361, table 1).
    """
    looked_up = 0 if c.tied else c.vocab_size * c.n_embd
    if c.position == "learned":
        looked_up += c.block_size * c.n_embd
    scores = c.n_layer * 2 * c.n_head * c.head_dim * T / 2
    return 6 * (c.parameters() - looked_up + scores)


def state(c: GPTConfig, optimizer: str) -> tuple[float, float]:
    """Bytes of parameters with their gradients, and of the moments: one of Muon for a matrix of a
    block, two of AdamW for all else. All are of 32 bits."""
    tables = c.vocab_size * c.n_embd * (1 if c.tied else 2)
    blocks = c.parameters() - tables - (c.block_size * c.n_embd if c.position == "learned" else 0)
    moments = 2 * c.parameters() - (blocks if optimizer == "muon" else 0)
    return 8.0 * c.parameters(), 4.0 * moments


def activations(c: GPTConfig) -> int:
    """Numbers that one token leaves behind in one layer, for the gradients to come: the inputs of
    all products, and what norms, rotations and attention need, as engine/fast.py computes them.
    Attention to short contexts on a CPU keeps its weights, too, one for each head and position."""
    C, Q, K = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    norms = 2 * C * (2 if c.norm_weight or c.norm == "layer" else 1)
    attention = (Q + 2 * K) + Q  # queries, keys and values; their sums, which wo reads
    attention += (Q + K) * ((c.position == "rotary") + c.qk_norm)
    canon = 2 * C if c.canon > 1 else 0
    # an activation that has no fast form keeps what goes into it and what comes out
    mlp = dict(swiglu=4, gelu=1, relu2=1).get(c.mlp, 2) * c.mlp_dim
    return norms + canon + attention + mlp
