"""Weights in and out of the layout of Hugging Face's transformers, which need not be installed.

    python huggingface.py import gpt2 out/gpt2        a folder, or a name on huggingface.co
    python huggingface.py import ckpt.pt out/mine     a checkpoint of nanoGPT, see docs/nanogpt.md
    python huggingface.py export out/small hf/small   a run, or one checkpoint of it

What is imported is a checkpoint, as train.py writes them; what is exported opens there with
AutoModelForCausalLM and AutoTokenizer. Weights pass through one by one, so an import takes little
more memory than the largest of them.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import objectives
from engine import settings
from engine.files import atomic_folder, write_json, write_manifest
from engine.metrics import read_metrics


@dataclass
class Settings:
    command: tuple = ()  # import SOURCE TARGET, or export CHECKPOINT TARGET
    tokenizer: str = ""  # of a ckpt.pt, which does not tell: a name or a folder; else it is gpt2
    checkpoint: str = "best"  # of an exported run: best (lowest validation loss), latest, step-...
    trunk_only: bool = False  # export the weights alone, though no class there has the model's mask


WANTED = ["*.json", "model*.safetensors", "*.model", "merges.txt"]  # of a model on huggingface.co


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Import or export weights.", "command", nargs="*")
    if len(s.command) != 3 or s.command[0] not in ("import", "export"):
        raise ValueError("say what to do: import SOURCE TARGET, or export CHECKPOINT TARGET")
    command, source, target = s.command
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise ValueError(f"{target} exists already: choose another target, or remove it")
    if command == "import":
        import_model(source, s, Path(target))
    else:
        export_model(source, s, Path(target))


# --- in


def import_model(source: str, s: Settings, target: Path) -> None:
    """Writes the model `source` as checkpoint `target`. Raises ValueError if it does not fit."""
    file = Path(source).is_file()
    settings.require(file or not s.tokenizer, s, "tokenizer", "left out: a folder has its own")
    folder = None if file else locate(source)
    from engine import families, nanogpt, tensors, tokenizer_json
    from engine.run import NEW

    # 1. what it is, and whether it has the tensors of such a model
    if file:
        family, c, found, tokenizer = nanogpt.read(source, s.tokenizer or "gpt2")
        c, there = families.fit(family, c, found, source)
    else:
        theirs = tensors.read_json(folder / "config.json")
        try:
            family, c = families.from_config(theirs, source)
        except (TypeError, AttributeError) as e:
            raise ValueError(f"{folder / 'config.json'} is damaged ({e})") from e
        found = tensors.find(folder, family.prefix)
        c, there = families.fit(family, c, found, source)
        tokenizer = tokenizer_json.read_folder(folder, source)

    # 2. the checkpoint
    def weights() -> Iterator:
        for name, parts in there.items():
            yield from families.split(family, found[name].read(), parts, c.head_dim)

    shapes = {name: [*w.shape] for parts in there.values() for name, w in parts.items()}
    facts = dict(step=0, settings={}, model=asdict(c), data_digest=None, source=source)
    with atomic_folder(target) as new:
        tensors.write_safetensors(new / "model.safetensors", shapes, weights())
        tensors.write_safetensors(new / "optimizer.safetensors", {}, [])
        write_json(new / "state.json", NEW | facts)
        tokenizer.save(new)
        write_manifest(new)
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

        return Path(snapshot_download(source, allow_patterns=WANTED))
    except Exception as e:  # there are many; all of them mean that there is no model
        raise ValueError(
            f"{missing}, and no model of that name can be downloaded ({type(e).__name__}): check"
            " the name, the network, and that huggingface_hub is installed; or put its files into a"
            " folder and name that"
        ) from e


# --- out

CHAT = """\
`apply_chat_template(messages, task=...)` gives the ids that the model has learned from: whatever is
said in a message is text, also a literal `<|end|>`. `tokenizer(text)` reads that as the marker that
it is, unless it is told `split_special_tokens=True`."""
TRUNK = """\
These are the weights alone: the model was trained with mask={}, and the classes of transformers are
causal, so that what they compute is not what the model computes."""


def export_model(source: str, s: Settings, target: Path) -> None:
    """Writes a checkpoint as `target`. Raises ValueError if transformers has no such model."""
    import torch

    from engine import checkpoint, families, tensors, tokenizer_json

    path = checkpoint.find(source, s.checkpoint)
    model, tokenizer, facts = checkpoint.load_weights(path)
    mask = model.config.mask
    if not s.trunk_only:
        objectives.require_writer(facts, source)
    if mask != "causal" and not s.trunk_only:
        raise ValueError(
            f"{source} was trained with mask={mask}, and the classes of transformers are causal:"
            " export its weights alone with --trunk_only, for code of your own"
        )
    family, stored, theirs = families.to_config(replace(model.config, mask="causal"))
    state, there = model.state_dict(), families.layout(family, stored)

    def weights() -> Iterator:
        for parts in there.values():
            ours = {n: state[n] if n in state else torch.zeros(w.shape) for n, w in parts.items()}
            yield families.join(family, ours, stored.head_dim)

    shapes = {n: families.join(family, parts, stored.head_dim).shape for n, parts in there.items()}
    ids, words = about_tokens(tokenizer, stored.block_size)
    with atomic_folder(target) as new:
        tensors.write_safetensors(new / "model.safetensors", shapes, weights())
        write_json(new / "config.json", theirs | ids)
        write_json(new / "generation_config.json", ids)
        write_json(new / "tokenizer.json", tokenizer_json.to_json(tokenizer))
        write_json(new / "tokenizer_config.json", words)
        tokenizer.save(new)  # for the way back
        rows = [row for row in read_metrics(path.parent) if row["step"] <= facts["step"]]
        text = card(target.name, family.architecture, model, tokenizer, facts, rows)
        (new / "README.md").write_text(text, encoding="utf-8")
    print(f"{target}: {path} as a {family.architecture}")
    if mask != "causal":
        print(TRUNK.format(mask))
    if family is families.QWEN2:
        print(
            "AutoTokenizer (transformers 5) reads text for any Qwen2ForCausalLM as Qwen's own"
            " tokenizer does: if this is another, or has a chat template, open it with"
            " PreTrainedTokenizerFast",
            file=sys.stderr,
        )


def about_tokens(tokenizer, context: int) -> tuple[dict, dict]:
    """The ids with a meaning, as config.json has them, and the content of tokenizer_config.json."""
    from engine import chat_template, tokenizer_json

    end, ends = tokenizer.end_of_text, tokenizer.ends
    begin = tokenizer.begin[0] if tokenizer.begin else end
    ids = dict(bos_token_id=begin, eos_token_id=ends if len(ends) > 1 else end, pad_token_id=end)
    words = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context)
    for key, i in dict(bos_token=begin, eos_token=end, pad_token=end).items():
        words[key] = tokenizer_json.text_of(tokenizer, i)
    # text is text, as here: no space is tidied up, and no special token read out of it, but for
    # what a chat template writes
    words |= dict(clean_up_tokenization_spaces=False, split_special_tokens=not tokenizer.markers)
    if tokenizer.markers:
        words["chat_template"] = chat_template.chat_template(tokenizer)
    return ids, words


def card(name: str, architecture: str, model, tokenizer, facts: dict, rows: list[dict]) -> str:
    """A model card: what is on record about model and training, and nothing else."""
    record = dict(architecture=architecture, parameters=model.num_parameters())
    record |= dict(context=model.config.block_size, vocabulary=tokenizer.vocab_size)
    s, step = facts["settings"], facts["step"]
    if s:
        record |= dict(updates=step, tokens_seen=step * s["batch_tokens"])
        for key in ("loss", "val_loss", "val_bpb"):  # nats a token, and bits a byte of text
            known = [row[key] for row in rows if row.get(key) is not None]
            record[key] = known[-1] if known else None
        record |= {key: facts[key] for key in ("seconds", "machine", "data_digest", "settings")}
    else:
        record["imported_from"] = facts["source"]
    text = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    text += f"# {name}\n\n```json\n{json.dumps(record, indent=2)}\n```\n"
    if tokenizer.markers:
        text += f"\n{CHAT}\n"
    if model.config.mask != "causal":
        text += f"\n{TRUNK.format(model.config.mask)}\n"
    return text


if __name__ == "__main__":
    settings.run(main)
