"""Weights in and out of the layout of Hugging Face's transformers, which need not be installed.

    python huggingface.py import gpt2 out/gpt2        a folder, or a name on huggingface.co
    python huggingface.py export out/small hf/small   a run, or one checkpoint of it

What is imported is a checkpoint, as train.py writes them; what is exported opens there with
AutoModelForCausalLM and AutoTokenizer. Weights pass through one by one, so an import takes little
more memory than the largest of them.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from engine import settings
from engine.files import atomic_folder, write_manifest


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
    from engine import families, tensors

    # 1. what it is, and whether it has the tensors of such a model
    theirs = tensors.read_json(folder / "config.json")
    try:
        family, c = families.from_config(theirs, source)
    except (TypeError, AttributeError) as e:
        raise ValueError(f"{folder / 'config.json'} is damaged ({e})") from e
    found = tensors.find(folder, family.prefix)
    c, there = families.fit(family, c, found, source)
    tokenizer = read_tokenizer(source, folder, theirs)

    # 2. the checkpoint
    def weights() -> Iterator:
        for name, parts in there.items():
            yield from families.split(family, found[name].read(), parts, c.head_dim)

    shapes = {name: [*w.shape] for parts in there.values() for name, w in parts.items()}
    facts = dict(step=0, settings={}, model=asdict(c), data_digest=None, metrics=None)
    facts |= dict(loss_scale=None, seconds=0.0, machine=None, source=source)
    with atomic_folder(target) as partial:
        tensors.write_safetensors(partial / "model.safetensors", shapes, weights())
        tensors.write_safetensors(partial / "optimizer.safetensors", {}, [])
        write_json(partial / "state.json", facts)
        tokenizer.save(partial)
        write_manifest(partial)
    count = sum(prod(shape) for shape in shapes.values())
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
    from engine.tensors import read_json
    from tokenizer import Tokenizer, published_tokenizer

    def read(name: str) -> dict:  # what need not be there
        return read_json(folder / name) if (folder / name).exists() else {}

    def text(token: dict | str | None) -> str | None:
        return token["content"] if isinstance(token, dict) else token

    # 1. the vocabulary
    path, vocab_size = folder / "tokenizer.json", theirs["vocab_size"]
    if info := read(path.name):
        if (folder / "vocab.tiktoken").exists() and (folder / "encoding.json").exists():
            ours = Tokenizer.load(folder)  # it was exported here; unless it was changed since,
            if ours.vocab_size == vocab_size and tokenizer_json.to_json(ours) == info:
                return ours
    elif theirs["model_type"] == "gpt2" and (vocab := read("vocab.json")):  # as in 2019
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        info = dict(model=dict(vocab=vocab, merges=merges))
        info |= dict(pre_tokenizer=dict(type="ByteLevel"))
    elif [*folder.glob("*.model")]:
        raise ValueError(f"the tokenizer of {source} needs SentencePiece, which this one lacks")
    elif vocab_size == 50257:
        return published_tokenizer("gpt2")
    else:
        raise ValueError(f"{source} has no tokenizer.json")

    # 2. what ends a sample: here in the order in which transformers looks for it
    words, ends = read("tokenizer_config.json"), read("generation_config.json").get("eos_token_id")
    ends = theirs.get("eos_token_id") if ends is None else ends
    choices = [ends if isinstance(ends, list) else [ends], [text(words.get("eos_token"))]]
    try:
        return tokenizer_json.from_json(info, source, vocab_size, choices)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is damaged, or of an unknown kind ({e!r})") from e


# --- out


def export_model(source: str, which: str, target: Path) -> None:
    """Writes a checkpoint as `target`. Raises ValueError if transformers has no such model."""
    import torch

    from engine import checkpoint, families, tensors, tokenizer_json
    from engine.metrics import read_metrics

    path = checkpoint.find(source, which)
    model, tokenizer, facts = checkpoint.load_weights(path)
    family, full, theirs = families.to_config(model.config)
    state, there = model.state_dict(), families.layout(family, full)

    def weights() -> Iterator:
        for parts in there.values():
            ours = {n: state[n] if n in state else torch.zeros(w.shape) for n, w in parts.items()}
            yield families.join(family, ours, full.head_dim)

    shapes = {
        name: [*families.join(family, parts, full.head_dim).shape] for name, parts in there.items()
    }
    end, ends = tokenizer.end_of_text, tokenizer.ends
    bos = tokenizer.begin[0] if tokenizer.begin else end
    ids = dict(bos_token_id=bos, eos_token_id=ends if len(ends) > 1 else end, pad_token_id=end)
    words = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=full.block_size)
    for key, i in dict(bos_token=bos, eos_token=end, pad_token=end).items():
        words[key] = tokenizer_json.text_of(tokenizer, i)
    # text is text, as here: no space is tidied up, and no special token read out of it
    words |= dict(clean_up_tokenization_spaces=False, split_special_tokens=True)
    with atomic_folder(target) as partial:
        tensors.write_safetensors(partial / "model.safetensors", shapes, weights())
        write_json(partial / "config.json", theirs | ids)
        write_json(partial / "generation_config.json", ids)
        write_json(partial / "tokenizer.json", tokenizer_json.to_json(tokenizer))
        write_json(partial / "tokenizer_config.json", words)
        tokenizer.save(partial)  # for the way back
        rows = [row for row in read_metrics(path.parent) if row["step"] <= facts["step"]]
        text = card(target.name, family.architecture, model, tokenizer, facts, rows)
        (partial / "README.md").write_text(text, encoding="utf-8")
    print(f"{target}: {path} as a {family.architecture}")
    cut = (tokenizer.encoding._pat_str, tokenizer.normalizer)
    if family is families.QWEN2 and cut != (tokenizer_json.QWEN_SPLIT, "NFC"):
        print(
            "AutoTokenizer (transformers 5) cuts the words for any Qwen2ForCausalLM as Qwen's own"
            " tokenizer does: open this one with PreTrainedTokenizerFast",
            file=sys.stderr,
        )


def card(name: str, architecture: str, model, tokenizer, facts: dict, rows: list[dict]) -> str:
    """A model card: what is on record about model and training, and nothing else."""
    s, step = facts["settings"], facts["step"]
    table = dict(architecture=architecture, parameters=f"{model.num_parameters():,}")
    table["context"] = f"{model.config.block_size:,} tokens"
    table["vocabulary"] = f"{tokenizer.vocab_size:,} tokens ({tokenizer.name})"
    if not s:
        table["imported from"] = facts["source"]
    else:
        table |= {"data": s["data"], "digest of the data": facts["data_digest"]}
        table |= {"updates": f"{step:,}", "tokens seen": f"{step * s['batch_tokens']:,}"}
        units = dict(loss="nats a token", val_loss="nats a token", val_bpb="bits a byte of text")
        for key, unit in units.items():
            for row in [row for row in rows if row.get(key) is not None][-1:]:
                table[key] = f"{row[key]:.4f} {unit} (step {row['step']:,})"
        table["time"] = f"{facts['seconds']:,.0f} seconds, torch {facts['machine']['torch']}"
    text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
    text += "| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in table.items())
    if s:
        text += f"\nThe settings of train.py:\n\n```json\n{json.dumps(s, indent=2)}\n```\n"
    return text


# --- files


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    settings.run(main)
