"""The architectures of Hugging Face's transformers that model.py covers, and how they are written.

A model there is a config.json and tensors with names. A `Family` says in tables how these differ
from GPTConfig and from the parameters of GPT. To add one, write its `Family`, a line in FAMILIES,
and a model of it in tests/test_huggingface.py, which holds it against transformers; code is needed
only if it stores some tensor differently (`turn`).
"""

from dataclasses import dataclass, field, fields, replace
from math import prod

import torch
from torch import Tensor

from engine.machine import shapes_only
from engine.settings import convert, settings_of
from engine.tensors import FLOATS, Stored
from model import GPT
from shape import GPTConfig

# --- the families


# a word in the name of a parameter of GPT: the word for GPT-2, and for Llama
NAMES = {
    "wte": ("wte", "embed_tokens"),
    "blocks": ("h", "layers"),
    "attn_norm": ("ln_1", "input_layernorm"),
    "attn": ("attn", "self_attn"),
    "wq": ("c_attn", "q_proj"),  # GPT-2's holds all three
    "wk": ("c_attn", "k_proj"),
    "wv": ("c_attn", "v_proj"),
    "wo": ("c_proj", "o_proj"),
    "mlp_norm": ("ln_2", "post_attention_layernorm"),
    "gate": ("", "gate_proj"),
    "up": ("c_fc", "up_proj"),
    "down": ("c_proj", "down_proj"),
    "norm": ("ln_f", "norm"),
    "head": ("lm_head", "lm_head"),
}
# a setting that config.json decides: its key there
KEYS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_kv_head": ("", "num_key_value_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "head_dim": ("", "head_dim"),
    "mlp_dim": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "tied": ("tie_word_embeddings", "tie_word_embeddings"),
}


def column(table: dict, i: int) -> dict:
    return {word: row[i] for word, row in table.items() if row[i]}


@dataclass
class Family:
    architecture: str  # the class of transformers
    shape: dict  # settings of GPTConfig that all its models share; what is not named is as default
    defaults: dict  # a key that may be missing: its value then; None is derived, or off
    needs: dict  # key: the values whose meaning we have, too; the first is exported
    keys: dict = field(default_factory=lambda: column(KEYS, 1))
    names: dict = field(default_factory=lambda: column(NAMES, 1))
    prefix: str = "model."  # of all names there but the head's
    described: str = "config.json"  # where its settings stand


PLAIN = dict(norm_weight=True, embed_norm=False, qk_norm=False, logit_cap=0.0)  # unlike our default

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    shape=PLAIN | dict(position="learned", norm="layer", mlp="gelu", bias=True),
    defaults=dict(n_inner=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    needs=dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
    keys=column(KEYS, 0),
    names=column(NAMES, 0),
    prefix="transformer.",
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    shape=PLAIN | dict(mlp="swiglu"),
    defaults=dict(num_key_value_heads=None, head_dim=None, tie_word_embeddings=False),
    needs=dict(hidden_act=("silu", "swish"), attention_bias=(False,), mlp_bias=(False,)),
)
MISTRAL = replace(  # without its window a Llama, but one whose width need not divide by its heads
    LLAMA,
    architecture="MistralForCausalLM",
    defaults=LLAMA.defaults | dict(sliding_window=4096),
    needs=dict(hidden_act=("silu",), sliding_window=(None,)),
)
QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    shape=LLAMA.shape | dict(qkv_bias=True),
    needs=dict(hidden_act=("silu",), use_sliding_window=(False,)),
)
QWEN3 = replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    shape=LLAMA.shape | dict(qk_norm=True),
    defaults=dict(tie_word_embeddings=False),
    needs=dict(hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,)),
)
NANOCHAT = replace(
    LLAMA,
    architecture="NanoChatForCausalLM",
    shape={},
    keys=LLAMA.keys | dict(logit_cap="final_logit_softcapping", qkv_bias="attention_bias"),
    defaults=LLAMA.defaults | dict(final_logit_softcapping=15.0, attention_bias=False),
    needs=dict(hidden_act=("relu2",)),
    names=LLAMA.names | dict(up="fc1", down="fc2"),
)
FAMILIES = dict(  # by model_type; of those that a shape fits, it leaves as the first
    gpt2=GPT2, llama=LLAMA, mistral=MISTRAL, qwen2=QWEN2, qwen3=QWEN3, nanochat=NANOCHAT
)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # stored, but no weights

# settings of rotary positions: their keys; and what else may stand there, with the one value that
# model.py has for it
ROPE = dict(
    rope_base="rope_theta", rope_factor="factor", rope_original="original_max_position_embeddings"
)
ROPE_NEEDS = dict(low_freq_factor=1.0, high_freq_factor=4.0, partial_rotary_factor=1.0)


# --- config.json


def lacking(source: str, what: str) -> ValueError:
    return ValueError(f"{source} needs {what}, which this model lacks")


def setting(ours: str, key: str, value, source: str):
    """The value of a setting of GPTConfig, which their `key` gives, if it can be one."""
    known = settings_of(GPTConfig)
    try:
        return convert(key, value, known.get(ours, known["n_embd"]))  # vocab_size is like n_embd
    except ValueError as e:
        raise ValueError(f"config.json of {source}: {e}") from e


def from_config(theirs: dict, source: str) -> tuple[Family, GPTConfig]:
    """What a config.json describes. Raises ValueError with the name of what we lack."""
    family = FAMILIES.get(theirs.get("model_type"))
    if family is None:
        names = theirs.get("architectures") or [theirs.get("model_type", "no known architecture")]
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise ValueError(f"{source} has {names[0]}, but only {known} can be read")
    values = dict(family.shape)
    for ours, key in family.keys.items():
        value = theirs.get(key, family.defaults.get(key))
        if value is None and key in family.defaults:
            value = 0  # as in GPTConfig: derived, or off
        values[ours] = setting(ours, key, value, source)
    if family is not GPT2:
        values |= from_rope(theirs, source)
    for key, known in (family.needs | dict(quantization_config=(None,))).items():
        value = theirs.get(key, family.defaults.get(key, known[0]))
        if key == "sliding_window" and value and value >= values["block_size"]:
            value = None  # a window that holds the whole context is none
        if value not in known:
            raise lacking(source, f"{key}={value}")
    for kind in theirs.get("layer_types") or ():
        if kind != "full_attention":
            raise lacking(source, f"layers of the type {kind}")
    return family, GPTConfig(**values)


def from_rope(theirs: dict, source: str) -> dict:
    """The settings of rotary positions in a config.json, as since version 5 or as before."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rope = {"rope_theta": theirs.get("rope_theta") or 10000.0, **rope}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind not in ("default", "llama3"):
        raise lacking(source, f"a rotary scaling ({kind})")
    for key, value in rope.items():
        if key not in ROPE.values() and ROPE_NEEDS.get(key) != value:
            raise lacking(source, f"{key}={value} of its rotary scaling")
    wanted = ROPE if kind == "llama3" else ["rope_base"]
    return {ours: setting(ours, ROPE[ours], rope.get(ROPE[ours]), source) for ours in wanted}


def to_config(c: GPTConfig) -> tuple[Family, GPTConfig, dict]:
    """The family of a shape, the shape that it stores, and its config.json but for special ids.

    Raises ValueError with what keeps the shape from the nearest family.
    """
    plain = {f.name: f.default for f in fields(GPTConfig)}
    plain |= dict(n_kv_head=c.n_head, head_dim=c.n_embd / c.n_head)
    differences = {}
    for model_type, family in FAMILIES.items():
        free = {*family.keys, *ROPE, "dropout", "zero_init"}
        wanted = {name: v for name, v in (plain | family.shape).items() if name not in free}
        stored = with_biases(family, c)
        differences[model_type] = [name for name, v in wanted.items() if getattr(stored, name) != v]
        if family is LLAMA and c.n_embd % c.n_head:
            differences[model_type].append("n_head")
    model_type = min(differences, key=lambda name: len(differences[name]))
    family, reasons = FAMILIES[model_type], differences[model_type]
    if reasons:
        raise ValueError(
            "transformers has no model of this shape: the nearest would be"
            f" {family.architecture}, but for {', '.join(f'{k}={getattr(c, k)}' for k in reasons)}"
        )
    theirs = dict(architectures=[family.architecture], model_type=model_type, dtype="float32")
    theirs |= {key: getattr(c, ours) for ours, key in family.keys.items()}
    theirs |= {key: values[0] for key, values in family.needs.items()}
    if family is NANOCHAT:
        theirs["final_logit_softcapping"] = c.logit_cap or None
    if family is not GPT2:  # in both forms: since version 5, and before
        rope = dict(rope_type="default", rope_theta=c.rope_base)
        if c.rope_factor != 1:
            rope = {key: getattr(c, ours) for ours, key in ROPE.items()}
            rope |= ROPE_NEEDS | dict(rope_type="llama3")
            theirs["rope_scaling"] = rope
        theirs |= dict(rope_theta=c.rope_base, rope_parameters=rope)
    return family, with_biases(family, c), theirs


def with_biases(family: Family, c: GPTConfig) -> GPTConfig:
    """The shape as it is stored: GPT-2 always has biases, all zero if they are off here."""
    return replace(c, bias=True) if family is GPT2 else c


# --- tensors


def layout(family: Family, c: GPTConfig) -> dict[str, dict[str, Tensor]]:
    """Each tensor there, by name: the parameters of GPT that it joins, by name and without data."""
    with shapes_only():
        state = GPT(c).state_dict()
    there: dict[str, dict[str, Tensor]] = {}
    for name, w in state.items():
        name_there = ".".join(family.names.get(word, word) for word in name.split("."))
        prefix = "" if name.startswith("head.") else family.prefix
        there.setdefault(prefix + name_there, {})[name] = w
        if name.endswith("wo.weight") and family is NANOCHAT and c.qkv_bias:  # zero, see `fit`
            bias = {name.replace("weight", "bias"): w.new_empty(len(w))}
            there[prefix + name_there.replace("weight", "bias")] = bias
    return there


def turn(family: Family, name: str, w: Tensor, head_dim: int) -> Tensor:
    """Parameter `name` of GPT, or several joined, from our layout to theirs; and back, likewise."""
    if family is GPT2 and name.startswith("blocks.") and w.ndim == 2:
        return w.T  # (in, out) there
    if family is NANOCHAT and name.split(".")[-2] in ("wq", "wk"):
        # pairs of channels turn the other way there; with swapped halves that is our way
        return w.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
    return w


def join(family: Family, parts: dict[str, Tensor], head_dim: int) -> Tensor:
    """The tensor there of these parameters of GPT."""
    return turn(family, next(iter(parts)), torch.cat([*parts.values()]), head_dim)


def split(family: Family, w: Tensor, parts: dict[str, Tensor], head_dim: int) -> tuple:
    """The way back: the tensor `w` there as parameters of the shapes of `parts`."""
    sizes = [len(part) for part in parts.values()]
    return turn(family, next(iter(parts)), w, head_dim).split(sizes)


def fit(family: Family, c: GPTConfig, found: dict[str, Stored], source: str) -> tuple:
    """The shape, without biases that are all zero, and its layout, if the tensors `found` fit.

    Raises ValueError if they do not. A size that no tensor has is refused before anything is made
    of it.
    """
    if c.n_layer > len(found):
        raise ValueError(f"{source} has {len(found)} tensors, too few for {c.n_layer} layers")
    largest = max((n for w in found.values() if prod(w.shape) for n in w.shape), default=0)
    for size in (c.vocab_size, c.n_embd, c.mlp_dim, c.n_head * c.head_dim):
        if size > largest:
            where = family.described
            raise ValueError(f"{source}: no tensor has the size {size} that {where} implies")
    there = layout(family, c)
    implied = {name: [*join(family, w, c.head_dim).shape] for name, w in there.items()}
    unread = {"lm_head.weight"} if c.tied else set()
    unread |= {name for name in found if name.endswith(BUFFERS)}
    for name in sorted(implied.keys() | found.keys() - unread):
        shape = found[name].shape if name in found else "missing"
        if shape != implied.get(name):
            wanted = implied.get(name, "no such tensor")
            raise ValueError(
                f"{name} of {source} is {shape}: its {family.described} implies {wanted}"
            )
        if found[name].kind not in FLOATS:
            raise lacking(source, f"{found[name].kind} weights ({name})")
    if family is GPT2 and not any(found[n].read().any() for n in there if n.endswith(".bias")):
        c = replace(c, bias=False)
        there = layout(family, c)
    if family is NANOCHAT:  # where queries have a bias, what leaves the heads has one, too
        for name in [name for name in there if name.endswith("o_proj.bias")]:
            if found[name].read().any():
                raise lacking(source, f"a bias that is not zero ({name})")
            del there[name]
    return c, there
