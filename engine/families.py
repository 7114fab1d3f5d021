"""The architectures of Hugging Face's transformers that model.py covers, and how they are written.

A model there is a config.json and tensors with names, in one safetensors file or several. A
`Family` says in tables how these differ from GPTConfig and from the parameters of GPT. A new one is
a `Family`, its line in FAMILIES, and a model of it in tests/test_huggingface.py; code is needed
only if it stores some tensor differently (`turn`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import inf, prod
from pathlib import Path, PureWindowsPath
from typing import get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint import require_space
from model import GPT, GPTConfig

# --- the families


@dataclass
class Family:
    architecture: str  # the class of transformers
    shape: dict  # settings of GPTConfig that all its models share; others are as by default
    keys: dict  # a setting that a config.json decides: its key there
    defaults: dict  # key: its value where it is missing; None: derived, or off. No other may miss
    needs: dict  # key: the values whose meaning we have, too; the first is exported
    names: dict  # a word in the name of a parameter of GPT: the word there
    prefix: str = "model."  # of all names but the head's
    spare: str = ""  # a setting whose parameters are there always: all zero where it is off here


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    shape=dict(
        position="learned",
        norm="layer",
        norm_weight=True,
        embed_norm=False,
        qk_norm=False,
        mlp="gelu",
        logit_cap=0.0,
    ),
    keys=dict(
        vocab_size="vocab_size",
        block_size="n_positions",
        n_layer="n_layer",
        n_head="n_head",
        n_embd="n_embd",
        mlp_dim="n_inner",
        norm_eps="layer_norm_epsilon",
        tied="tie_word_embeddings",
    ),
    defaults=dict(n_inner=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    needs=dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
    names=dict(
        blocks="h",
        attn_norm="ln_1",
        wq="c_attn",
        wk="c_attn",
        wv="c_attn",
        wo="c_proj",
        mlp_norm="ln_2",
        up="c_fc",
        down="c_proj",
        norm="ln_f",
        head="lm_head",
    ),
    prefix="transformer.",
    spare="bias",
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    shape=dict(norm_weight=True, embed_norm=False, qk_norm=False, mlp="swiglu", logit_cap=0.0),
    keys=dict(
        vocab_size="vocab_size",
        block_size="max_position_embeddings",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_kv_head="num_key_value_heads",
        n_embd="hidden_size",
        head_dim="head_dim",
        mlp_dim="intermediate_size",
        norm_eps="rms_norm_eps",
        tied="tie_word_embeddings",
    ),
    defaults=dict(
        num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False
    ),
    needs=dict(hidden_act=("silu", "swish"), attention_bias=(False,), mlp_bias=(False,)),
    names=dict(
        wte="embed_tokens",
        blocks="layers",
        attn_norm="input_layernorm",
        attn="self_attn",
        wq="q_proj",
        wk="k_proj",
        wv="v_proj",
        wo="o_proj",
        mlp_norm="post_attention_layernorm",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        head="lm_head",
    ),
)
MISTRAL = replace(  # without its window a Llama, but one whose width need not divide by its heads
    LLAMA,
    architecture="MistralForCausalLM",
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
    defaults=dict(rms_norm_eps=1e-6, tie_word_embeddings=False),
    needs=dict(hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,)),
)
NANOCHAT = replace(
    LLAMA,
    architecture="NanoChatForCausalLM",
    shape={},  # the default shape is this one
    keys=LLAMA.keys | dict(logit_cap="final_logit_softcapping"),
    defaults=LLAMA.defaults | dict(final_logit_softcapping=15.0),
    needs=dict(hidden_act=("relu2",), attention_bias=(False,)),
    names=LLAMA.names | dict(up="fc1", down="fc2"),
)
FAMILIES = {  # of shapes that fit several, the first is exported
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "nanochat": NANOCHAT,
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # stored, but no weights
FLOATS = ("F32", "F16", "BF16")
LONGEST = 2**20  # tokens: no weight tells of a rotary context, but its table takes 1 KB a token
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0)  # of all Llamas 3.1 to 3.3


# --- config.json


def lacking(source: str, what: str) -> ValueError:
    return ValueError(f"{source} needs {what}, which this model lacks")


def from_config(theirs: dict, source: str) -> tuple[Family, GPTConfig]:
    """What a config.json describes. Raises ValueError with the name of what we lack."""
    family = FAMILIES.get(theirs.get("model_type"))
    if family is None:
        names = theirs.get("architectures") or [theirs.get("model_type", "no known architecture")]
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise ValueError(f"{source} has {names[0]}, but only {known} can be read")
    values, types = dict(family.shape), get_type_hints(GPTConfig)
    for ours, key in family.keys.items():
        value, optional = theirs.get(key, family.defaults.get(key)), key in family.defaults
        if value is None and optional:
            value = 0  # as in GPTConfig: derived, or off
        fits = isinstance(value, (int, float) if types[ours] is float else int)
        fits = fits and isinstance(value, bool) == (types[ours] is bool)  # a bool is an int, too
        most = LONGEST if ours == "block_size" else 2**31
        if not fits or not (not optional) <= value <= most:
            raise ValueError(f"config.json of {source} has {key}={value!r}, which cannot be")
        values[ours] = value
    if family.spare:
        values[family.spare] = True
    if family is not GPT2:
        values |= from_rope(theirs, source)
    needs = family.needs | dict(quantization_config=(None,))
    if family is MISTRAL and (window := theirs.get("sliding_window", 4096)) is not None:
        if window < values["block_size"]:
            raise lacking(source, f"sliding_window={window} (or max_position_embeddings={window})")
        del needs["sliding_window"]  # nothing is ever behind it
    for key, known in needs.items():
        value = theirs.get(key, known[0])
        if value not in known:
            raise lacking(source, f"{key}={value}")
    kinds = set(theirs.get("layer_types") or ()) | {"full_attention"}
    if len(kinds) > 1:
        raise lacking(source, f"layers of the types {', '.join(sorted(kinds))}")
    return family, GPTConfig(**values)


def from_rope(theirs: dict, source: str) -> dict:
    """The settings of rotary positions in a config.json, in the form since version 5 or before."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for_all = not any(isinstance(value, dict) for value in rope.values())  # not by type of layer
    if kind not in ("default", "llama3") or not for_all:
        raise lacking(source, f"a rotary scaling ({kind})")
    partial = rope.get("partial_rotary_factor") or theirs.get("partial_rotary_factor") or 1
    if partial != 1:
        raise lacking(source, f"a partial rotary embedding ({partial})")
    numbers = dict(rope_theta=rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0)
    if kind == "llama3":
        numbers |= {key: rope.get(key) for key in ("factor", "original_max_position_embeddings")}
        for key, value in LLAMA3.items():
            if rope.get(key) != value:
                raise lacking(source, f"{key}={rope.get(key)} of its rotary scaling (not {value})")
    for key, number in numbers.items():
        if not isinstance(number, (int, float)) or not 1 <= number < inf:
            raise ValueError(f"config.json of {source} has {key}={number!r}, which cannot be")
    return dict(
        rope_base=float(numbers["rope_theta"]),
        rope_factor=float(numbers.get("factor", 1)),
        rope_original=int(numbers.get("original_max_position_embeddings", 0)),
    )


def to_config(c: GPTConfig) -> tuple[Family, GPTConfig, dict]:
    """The family of a shape, the shape that it stores, and its config.json but for special ids.

    Raises ValueError with what keeps the shape from the nearest family.
    """
    plain = {f.name: f.default for f in fields(GPTConfig)}
    plain |= dict(n_kv_head=c.n_head, head_dim=c.n_embd / c.n_head)
    differences = {}
    for model_type, family in FAMILIES.items():
        free = {*family.keys, family.spare, "dropout", "rope_base", "rope_factor", "rope_original"}
        wanted = {k: v for k, v in (plain | family.shape).items() if k not in free}
        differ = [name for name, value in wanted.items() if getattr(c, name) != value]
        if family is LLAMA and c.n_embd % c.n_head:
            differ.append("n_head")
        differences[model_type] = differ
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
    if c.position == "rotary":  # in both forms: since version 5, and before
        rope = dict(rope_type="default", rope_theta=c.rope_base)
        if c.rope_factor != 1:
            rope |= LLAMA3 | dict(rope_type="llama3", factor=c.rope_factor)
            rope["original_max_position_embeddings"] = c.rope_original
            theirs["rope_scaling"] = rope
        theirs |= dict(rope_parameters=rope, rope_theta=c.rope_base)
    return family, replace(c, **{family.spare: True} if family.spare else {}), theirs


# --- tensors


def layout(family: Family, c: GPTConfig) -> dict[str, dict[str, Tensor]]:
    """Each tensor there, by its name without prefix: the parameters of GPT that it joins, empty."""
    if c.position == "rotary":
        c = replace(c, block_size=1)  # no parameter depends on it, but a table does
    with torch.device("meta"):  # shapes only
        state = GPT(c).state_dict()
    there: dict[str, dict[str, Tensor]] = {}
    for name, w in state.items():
        words = (family.names.get(word, word) for word in name.split("."))
        there.setdefault(".".join(words), {})[name] = w
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
    """The tensor there that these parameters of GPT make."""
    name, *_ = parts
    w = torch.cat([*parts.values()]) if len(parts) > 1 else parts[name]
    return turn(family, name, w, head_dim)


def split(family: Family, w: Tensor, parts: dict[str, Tensor], head_dim: int) -> tuple:
    """The way back: the parameters that the tensor `w` there makes, of the shapes of `parts`."""
    name, *_ = parts
    return turn(family, name, w, head_dim).split([len(p) for p in parts.values()])


def fit(family: Family, c: GPTConfig, found: dict, source: str) -> tuple[GPTConfig, dict]:
    """The shape, with what is spare in the tensors `found` off, and its layout.

    Raises ValueError if they are not the tensors of such a model. Sizes that are larger than any
    tensor are refused before anything of them is made.
    """
    if c.n_layer > len(found):
        raise ValueError(f"{source} has {len(found)} tensors, too few for {c.n_layer} layers")
    largest = max(max(shape) for _, _, shape, _ in found.values() if prod(shape))
    for size in (c.vocab_size, c.n_embd, c.mlp_dim, c.n_head * c.head_dim):
        if size > largest:
            raise ValueError(
                f"{source}: config.json implies a size of {size}, but no tensor has it"
            )
    there = layout(family, c)
    for name, parts in there.items():
        if name not in found:
            raise ValueError(f"{source} lacks the tensor {name}, which its config.json implies")
        *_, shape, kind = found[name]
        want = [*join(family, parts, c.head_dim).shape]
        if shape != want:
            raise ValueError(f"{source}: {name} has shape {shape}, but config.json implies {want}")
        if kind not in FLOATS:
            raise lacking(source, f"{kind} weights ({name})")
    for name in sorted(found.keys() - there.keys()):
        if not name.endswith((*BUFFERS, *["lm_head.weight"] * c.tied)):
            raise lacking(source, name)
    if family.spare:
        bare = replace(c, **{family.spare: False})
        fewer = layout(family, bare)
        if not any(read(found[name]).any() for name in there.keys() - fewer.keys()):
            return bare, fewer
    return c, there


# --- files


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is missing or damaged ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it should begin with a brace")
    return content


def find_tensors(folder: Path) -> dict[str, tuple]:
    """The tensors of a model, by name without prefix: file, whole name, shape, type."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = {one.name}
    if not one.exists() and index.exists():
        shards = read_json(index).get("weight_map")
        shards = set(shards.values()) if isinstance(shards, dict) else {None}
    elif not one.exists():
        for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
            raise ValueError(
                f"{path} is a pickle, which could run any program, so it is not read: convert it"
                " where you trust it, with transformers: AutoModelForCausalLM.from_pretrained("
                f"{str(folder)!r}).save_pretrained('converted')"
            )
        raise ValueError(f"{folder} has no {one.name} and no {index.name}")
    for shard in shards:
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
            raise ValueError(f"{index} is damaged: its weight_map has {shard!r}, no file beside it")
    found = {}
    for path in [folder / shard for shard in sorted(shards)]:
        if not path.exists():
            raise ValueError(f"{path} is missing, though {index.name} names it")
        try:
            with safe_open(path, "pt") as f:  # which compares its header with the file's size
                for whole in f.keys():  # noqa: SIM118, it is no dict
                    name = whole.removeprefix("transformer.").removeprefix("model.")
                    if name in found:
                        raise ValueError(f"{path} is damaged: it has a second tensor {name}")
                    part = f.get_slice(whole)
                    found[name] = (path, whole, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is damaged or cut short ({e})") from e
    return found


def read(facts: tuple) -> Tensor:
    """The tensor of which `find_tensors` tells, memory-mapped."""
    path, name, *_ = facts
    with safe_open(path, "pt") as f:  # anew for each: what was read is let go of
        return f.get_tensor(name)


def write_safetensors(path: Path, shapes: dict[str, list[int]], tensors: Iterable) -> None:
    """Writes tensors of these shapes, in this order, as float32, holding one at a time.

    The header's length in 8 bytes, the header, the numbers: github.com/huggingface/safetensors.
    """
    header, size = {}, 0
    for name, shape in shapes.items():
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[size, size + 4 * prod(shape)])
        size += 4 * prod(shape)
    require_space(path.parent, size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            f.write(tensor.float().contiguous().numpy())
