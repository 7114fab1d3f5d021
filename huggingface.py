"""Weights in and out of the layout of Hugging Face's transformers, which need not be installed.

    python huggingface.py import gpt2 out/gpt2        a folder, or a name on huggingface.co
    python huggingface.py export out/small hf/small   a run, or one checkpoint of it

What is imported is a checkpoint, as train.py writes them; what is exported opens there with
AutoModelForCausalLM and AutoTokenizer. Weights pass through one by one, so an import takes little
more memory than the largest of them.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import settings
from engine.files import atomic_folder, write_json, write_manifest


@dataclass
class Settings:
    command: tuple = ()  # import SOURCE TARGET, or export CHECKPOINT TARGET
    checkpoint: str = "best"  # of an exported run: best (lowest validation loss), latest, step-...


WANTED = ["*.json", "*.safetensors", "merges.txt"]  # of a model on huggingface.co


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Import or export weights.", "command", nargs="*")
    if len(s.command) != 3 or s.command[0] not in ("import", "export"):
        raise ValueError("say what to do: import SOURCE TARGET, or export CHECKPOINT TARGET")
    command, source, target = s.command
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise ValueError(f"{target} exists already: choose another target, or remove it")
    if command == "import":
        import_model(source, locate(source), Path(target))
    else:
        export_model(source, s.checkpoint, Path(target))


# --- in


def import_model(source: str, folder: Path, target: Path) -> None:
    """Writes the model in `folder` as checkpoint `target`. Raises ValueError if it does not fit."""
    import torch
    from safetensors.torch import save_file

    from engine import families
    from model import GPT

    # 1. what it is, and whether it has the tensors of such a model
    theirs = families.read_json(folder / "config.json")
    try:
        family, c = families.from_config(theirs, source)
    except (TypeError, AttributeError) as e:
        raise ValueError(f"{folder / 'config.json'} is damaged ({e})") from e
    found = families.find_tensors(folder)
    if c.n_layer > len(found):
        raise ValueError(f"{source} has {len(found)} tensors, too few for {c.n_layer} layers")
    biases = [n for n in found if n.endswith(".bias")] if family is families.GPT2 else []
    if not c.bias and any(families.read(found[n]).any() for n in biases):
        c.bias = True  # exported without biases, and trained on there
    with torch.device("meta"):  # shapes only
        state = GPT(c).state_dict()
    there = families.names_there(family, state)
    for name, ours in there.items():
        if name not in found:
            raise ValueError(f"{source} lacks the tensor {name}, which its config.json implies")
        *_, shape, kind = found[name]
        want = [
            *families.turn(family, ours[0], torch.cat([state[n] for n in ours]), c.head_dim).shape
        ]
        if shape != want:
            raise ValueError(f"{source}: {name} has shape {shape}, but config.json implies {want}")
        if kind not in families.FLOATS:
            raise ValueError(f"{source} needs {kind} weights, which this model lacks ({name})")
    ignored = (*families.BUFFERS, *["lm_head.weight"] * c.tied)
    for name in sorted(found.keys() - there.keys() - set(biases if not c.bias else ())):
        if not name.endswith(ignored):
            raise ValueError(f"{source} needs {name}, which this model lacks")
    tokenizer = read_tokenizer(source, folder, theirs)

    # 2. the checkpoint
    def weights() -> Iterator:
        for name, ours in there.items():
            w = families.turn(family, ours[0], families.read(found[name]), c.head_dim)
            yield from w.split([len(state[n]) for n in ours])

    facts = dict(step=0, settings={}, model=asdict(c), data_digest=None, metrics=None)
    facts |= dict(loss_scale=None, seconds=0.0, machine=None, source=source)
    with atomic_folder(target) as partial:
        shapes = {n: [*state[n].shape] for ours in there.values() for n in ours}
        families.write_safetensors(partial / "model.safetensors", shapes, weights())
        save_file({}, partial / "optimizer.safetensors")
        write_json(partial / "state.json", facts)
        tokenizer.save(partial)
        write_manifest(partial)
    count = sum(w.numel() for w in state.values())
    print(f"{target}: a {family.architecture} of {count:,} parameters, {c.vocab_size:,} tokens")
    print(f"next: python sample.py {target}")


def locate(source: str) -> Path:
    """The folder of a model: here, or where huggingface_hub has put it."""
    if Path(source).is_dir():
        return Path(source)
    missing = f"no such folder: {source!r}"
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{missing} (of a model, with its config.json)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ValueError(
            f"{missing}; to download a model of that name, pip install huggingface_hub, or put its"
            " files into a folder and name that"
        ) from e
    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except Exception as e:  # there are many; all of them mean that there is no model
        raise ValueError(
            f"{missing}, and no model of that name can be downloaded ({type(e).__name__}): check"
            " the name and the network, or put its files into a folder and name that"
        ) from e


def read_tokenizer(source: str, folder: Path, theirs: dict):
    """The tokenizer of a model, with an id for each row of its embedding. Raises ValueError."""
    from engine import tokenizer_json
    from engine.families import read_json
    from tokenizer import Tokenizer, bytes_tokenizer, published_tokenizer

    vocab_size, path = theirs["vocab_size"], folder / "tokenizer.json"
    if path.exists():
        info = read_json(path)
        if (folder / "vocab.tiktoken").exists() and (folder / "encoding.json").exists():
            ours = Tokenizer.load(folder)  # it was exported here; unless it was changed since,
            if ours.vocab_size == vocab_size and tokenizer_json.to_json(ours) == info:
                return ours
    elif (path := folder / "vocab.json").exists() and theirs["model_type"] == "gpt2":
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        info = dict(model=dict(vocab=read_json(path), merges=merges))
        info |= dict(pre_tokenizer=dict(type="ByteLevel"))
    elif [*folder.glob("*.model")]:
        raise ValueError(f"the tokenizer of {source} needs SentencePiece, which this one lacks")
    elif vocab_size == 50257:
        return published_tokenizer("gpt2")
    else:
        print(f"{source} has no tokenizer.json: its ids are taken for bytes", file=sys.stderr)
        info = tokenizer_json.to_json(bytes_tokenizer())
    ends = theirs.get("eos_token_id")
    ends = [*ends] if isinstance(ends, list) else [ends]
    if (folder / "tokenizer_config.json").exists():
        end = read_json(folder / "tokenizer_config.json").get("eos_token")
        ends.append(end.get("content") if isinstance(end, dict) else end)
    try:
        return tokenizer_json.from_json(info, source, vocab_size, ends)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is damaged, or of an unknown kind ({e!r})") from e


# --- out


def export_model(source: str, which: str, target: Path) -> None:
    """Writes a checkpoint as `target`. Raises ValueError if transformers has no such model."""
    import torch

    from engine import checkpoint, families, tokenizer_json
    from engine.metrics import read_metrics
    from model import GPT, GPTConfig

    path = checkpoint.find(source, which)
    model, tokenizer, facts = checkpoint.load_weights(path)
    c, state = model.config, model.state_dict()
    family, theirs = families.to_config(c)
    with torch.device("meta"):
        full = GPT(GPTConfig(**asdict(c) | dict(bias=family is families.GPT2))).state_dict()
    there = {
        name if name.startswith("lm_head.") else family.prefix + name: ours
        for name, ours in families.names_there(family, full).items()
    }

    def joined(ours: list[str]):
        parts = [state[n] if n in state else torch.zeros(full[n].shape) for n in ours]
        return families.turn(
            family, ours[0], torch.cat(parts) if len(parts) > 1 else parts[0], c.head_dim
        )

    end = tokenizer.end_of_text
    ids = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    names = {i: text for text, i in tokenizer.special.items()}
    name = names.get(end) or tokenizer_json.spell(tokenizer.decode_bytes([end]))
    words = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=c.block_size)
    words |= dict(bos_token=name, eos_token=name, pad_token=name)
    # text is text, as here: no space is tidied up, and no special token read out of it
    words |= dict(clean_up_tokenization_spaces=False, split_special_tokens=True)
    with atomic_folder(target) as partial:
        shapes = {name: [*joined(ours).shape] for name, ours in there.items()}
        families.write_safetensors(
            partial / "model.safetensors", shapes, map(joined, there.values())
        )
        write_json(partial / "config.json", theirs | ids)
        write_json(partial / "generation_config.json", ids)
        write_json(partial / "tokenizer.json", tokenizer_json.to_json(tokenizer))
        write_json(partial / "tokenizer_config.json", words)
        tokenizer.save(partial)  # for the way back
        rows = [row for row in read_metrics(path.parent) if row["step"] <= facts["step"]]
        text = card(target.name, family.architecture, model, tokenizer, facts, rows)
        (partial / "README.md").write_text(text, encoding="utf-8")
    print(f"{target}: {path} as a {family.architecture}")


def card(name: str, architecture: str, model, tokenizer, facts: dict, rows: list[dict]) -> str:
    """A model card: what is on record about model and training, and nothing else."""
    from train import Settings as Training

    c, s, step = model.config, facts["settings"], facts["step"]
    table = dict(architecture=architecture, parameters=f"{model.num_parameters():,}")
    table["context"] = f"{c.block_size:,} tokens"
    table["vocabulary"] = f"{tokenizer.vocab_size:,} tokens ({tokenizer.name})"
    if s:
        table |= {"data": s["data"], "digest of the data": facts["data_digest"]}
        table |= {"updates": f"{step:,}", "tokens seen": f"{step * s['batch_tokens']:,}"}
        units = dict(loss="nats a token", val_loss="nats a token", val_bpb="bits a byte of text")
        for key, unit in units.items():
            for row in [row for row in rows if row.get(key) is not None][-1:]:
                table[key] = f"{row[key]:.4f} {unit} (step {row['step']:,})"
        table["time"] = f"{facts['seconds']:,.0f} seconds, torch {facts['machine']['torch']}"
    else:
        table["imported from"] = facts["source"]
    text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
    text += "| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in table.items())
    if s:
        chosen = {k: s[k] for k, v in asdict(Training()).items() if k in s and s[k] != v}
        words = [f"--{k}={shlex.quote(str(v))}" for k, v in chosen.items() if k != "config"]
        text += f"\n```sh\npython train.py {s['config']} {' '.join(words)}\n```\n"
        text += f"\nAll settings:\n\n```json\n{json.dumps(s, indent=2)}\n```\n"
    return text


if __name__ == "__main__":
    settings.run(main)
