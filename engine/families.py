"""The architectures of Hugging Face's transformers that model.py covers, and how they are written.

A model there is a config.json and tensors with names, in one safetensors file or several. A
`Family` holds all in which these differ from GPTConfig and from the parameters of GPT; the code is
the same for all families, but for `turn`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.files import require_space
from model import GPTConfig


@dataclass
class Family:
    architecture: str  # the class of transformers
    shape: dict  # settings of GPTConfig that all its models share
    keys: dict  # the other settings: their key in config.json
    defaults: dict  # key: its default there; what has none must be given. None: derived, or off
    needs: dict  # key: the values that we have, too; the first is exported
    words: dict  # a word in the name of a parameter of GPT: the word there
    prefix: str = "model."  # of all names but the head's


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


GPT2 = Family(
    "GPT2LMHeadModel",
    shape=dict(position="learned", norm="layer", norm_weight=True, embed_norm=False)
    | dict(qk_norm=False, mlp="gelu", logit_cap=0),
    keys=pairs(
        "vocab_size=vocab_size block_size=n_positions n_layer=n_layer n_head=n_head n_embd=n_embd"
        " mlp_dim=n_inner norm_eps=layer_norm_epsilon tied=tie_word_embeddings bias=bias"
    ),
    # bias is a key of our own: there it is always true, and exported biases are zero where it isn't
    defaults=dict(n_positions=1024, n_inner=None, layer_norm_epsilon=1e-5, bias=True)
    | dict(tie_word_embeddings=True),
    needs=dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,))
    | dict(scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)),
    words=pairs(
        "blocks=h attn_norm=ln_1 wq=c_attn wk=c_attn wv=c_attn wo=c_proj mlp_norm=ln_2 up=c_fc"
        " down=c_proj norm=ln_f head=lm_head"
    ),
    prefix="transformer.",
)
LLAMA = Family(
    "LlamaForCausalLM",
    shape=dict(position="rotary", norm="rms", norm_weight=True, embed_norm=False)
    | dict(qk_norm=False, mlp="swiglu", bias=False, logit_cap=0),
    keys=pairs(
        "vocab_size=vocab_size block_size=max_position_embeddings n_layer=num_hidden_layers"
        " n_head=num_attention_heads n_kv_head=num_key_value_heads n_embd=hidden_size"
        " head_dim=head_dim mlp_dim=intermediate_size norm_eps=rms_norm_eps"
        " tied=tie_word_embeddings"
    ),
    defaults=dict(max_position_embeddings=2048, num_key_value_heads=None, head_dim=None)
    | dict(rms_norm_eps=1e-6, tie_word_embeddings=False),
    needs=dict(hidden_act=("silu", "swish"), attention_bias=(False,), mlp_bias=(False,)),
    words=pairs(
        "wte=embed_tokens blocks=layers attn_norm=input_layernorm attn=self_attn wq=q_proj"
        " wk=k_proj wv=v_proj wo=o_proj mlp_norm=post_attention_layernorm gate=gate_proj"
        " up=up_proj down=down_proj head=lm_head"
    ),
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    shape=LLAMA.shape | dict(qk_norm=True),
    keys=LLAMA.keys,
    defaults=LLAMA.defaults | dict(num_key_value_heads=32, head_dim=128),
    needs=dict(hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,)),
    words=LLAMA.words,
)
NANOCHAT = Family(
    "NanoChatForCausalLM",
    shape=dict(position="rotary", norm="rms", norm_weight=False, embed_norm=True)
    | dict(qk_norm=True, mlp="relu2", bias=False),
    keys=LLAMA.keys | dict(logit_cap="final_logit_softcapping"),
    defaults=LLAMA.defaults | dict(final_logit_softcapping=15.0),
    needs=dict(hidden_act=("relu2",), attention_bias=(False,)),
    words=LLAMA.words | dict(up="fc1", down="fc2"),
)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # stored, but no weights
FLOATS = ("F32", "F16", "BF16")
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "nanochat": NANOCHAT}


def from_config(theirs: dict, source: str) -> tuple[Family, GPTConfig]:
    """What a config.json describes. Raises ValueError with the name of what we lack."""

    def require(has: bool, what: str) -> None:
        if not has:
            raise ValueError(f"{source} needs {what}, which this model lacks")

    family = FAMILIES.get(theirs.get("model_type"))
    if family is None:
        names = theirs.get("architectures") or [theirs.get("model_type", "no known architecture")]
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise ValueError(f"{source} has {names[0]}, but only {known} can be read")
    for key, values in (family.needs | dict(quantization_config=(None,))).items():
        value = theirs.get(key, values[0])
        require(value in values, f"{key}={value}")
    kinds = set(theirs.get("layer_types") or ())
    require(kinds <= {"full_attention"}, f"layers of the types {', '.join(sorted(kinds))}")
    values, types = dict(family.shape), {f.name: f.type for f in fields(GPTConfig)}
    for ours, key in family.keys.items():
        value, least = theirs.get(key, family.defaults.get(key)), key not in family.defaults
        if value is None and not least:
            value = 0  # as in GPTConfig: derived, or off
        kind = (int, float) if types[ours] is float else int  # a bool is an int, too
        fits = isinstance(value, kind) and isinstance(value, bool) == (types[ours] is bool)
        if not fits or not least <= value < 2**31:
            raise ValueError(f"config.json of {source} has {key}={value!r}, which cannot be")
        values[ours] = value
    if values["position"] == "rotary":
        # the older form has rope_theta and rope_scaling instead
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        single = kind == "default" and not any(isinstance(value, dict) for value in rope.values())
        require(single, f"a rotary scaling ({kind})")
        partial = rope.get("partial_rotary_factor") or theirs.get("partial_rotary_factor") or 1
        require(partial == 1, f"a partial rotary embedding ({partial})")
        base = rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0
        require(isinstance(base, (int, float)) and base > 0, f"rope_theta={base!r}")
        values["rope_base"] = float(base)
    return family, GPTConfig(**values)


def to_config(c: GPTConfig) -> tuple[Family, dict]:
    """The family of a shape, and its config.json but for the vocabulary's ids.

    Raises ValueError with what keeps the shape from the nearest family.
    """
    differences = {}
    for model_type, family in FAMILIES.items():
        differ = [k for k, value in family.shape.items() if getattr(c, k) != value]
        if family is GPT2:
            differ += ["n_kv_head"] * (c.n_kv_head != c.n_head)
            differ += ["head_dim"] * (c.head_dim * c.n_head != c.n_embd)
        differ += ["n_head"] * (family is LLAMA and c.n_embd % c.n_head > 0)
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
        theirs |= dict(rope_parameters=rope, rope_theta=c.rope_base)
    return family, theirs


def names_there(family: Family, names) -> dict[str, list[str]]:
    """Each tensor there, by its name without prefix: the parameters of GPT that it joins."""
    there: dict[str, list[str]] = {}
    for name in names:
        words = (family.words.get(word, word) for word in name.split("."))
        there.setdefault(".".join(words), []).append(name)
    return there


def turn(family: Family, name: str, w: Tensor, head_dim: int) -> Tensor:
    """Parameter `name` of GPT, or several joined, from our layout to theirs; and back, likewise."""
    if family is GPT2 and name.startswith("blocks.") and w.ndim == 2:
        return w.T  # (in, out) there
    if family is NANOCHAT and name.split(".")[-2] in ("wq", "wk"):
        # pairs of channels turn the other way there; with swapped halves that is our way
        return w.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
    return w


# --- files


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is missing or damaged ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it should begin with a brace")
    return content


def find_tensors(folder: Path) -> dict[str, tuple]:
    """The tensors of a model, by name without prefix: file, whole name, shape, type."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists():
        paths = [one]
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{index} is damaged: it has no weight_map")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
            raise ValueError(
                f"{path} is a pickle, which could run any program, so it is not read: convert it"
                " where you trust it, with transformers: AutoModelForCausalLM.from_pretrained("
                f"{str(folder)!r}).save_pretrained('converted')"
            )
        raise ValueError(f"{folder} has no {one.name} and no {index.name}")
    found = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is missing, though {index.name} names it")
        try:
            with safe_open(path, "pt") as f:
                for name in f.keys():  # noqa: SIM118, it is no dict
                    part = f.get_slice(name)
                    facts = (path, name, part.get_shape(), part.get_dtype())
                    found[name.removeprefix("transformer.").removeprefix("model.")] = facts
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
