"""The specimen: a model of 41,248 parameters that has learned to repeat a string, and how to look
inside it.

    python prepare.py repeat --tokenizer=bytes
    python train.py config/specimen.py
    python -m lessons.specimen out/specimen

made `specimen/`, a checkpoint like any other but without the state of its optimizer, and with an
end-of-text that begins every prompt: the last command measures how well a run copies and keeps it
if that is good enough.
"""

import math
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint, settings
from engine.files import atomic_folder, write_manifest
from tasks import repeat

FOLDER = Path(__file__).parent.parent / "specimen"
GOOD = 0.99  # of the letters behind the bar that are likeliest where they should be


def load(folder: Path = FOLDER):
    """The specimen and its tokenizer: made of whatever model.py is at the moment."""
    return checkpoint.load_model(str(folder))


def read(tokenizer, text: str) -> Tensor:
    """A text as the specimen knows texts: end-of-text stands before each. (1, T)"""
    return torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(text)]])


def asked(argv: list[str]):
    """The model and tokenizer of a run, and a text as its tokens: RUN TEXT of the command line."""
    if len(argv) != 2:
        raise ValueError('a run and a text are wanted, such as out/small "def main("')
    model, tokenizer = load(checkpoint.find(argv[0]))
    return model, tokenizer, read(tokenizer, argv[1])


@torch.no_grad()
def attention(model, tokens: Tensor) -> Tensor:
    """The weights of every head, (layers, H, T, S), for tokens (1, T). Recorded at the door of
    dropout, through which they pass: model.py knows nothing of it."""
    found: list[Tensor] = []
    doors = [block.attn.drop for block in model.blocks]
    hooks = [d.register_forward_pre_hook(lambda _, w: found.append(w[0][0])) for d in doors]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@torch.no_grad()
def surprise(model, tokens: Tensor) -> Tensor:
    """-ln p of each token but the first, in nats: (T - 1)."""
    return -model(tokens[:, :-1])[0].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]


def copied(model, tokenizer, texts: int = 500) -> dict[str, float]:
    """How well a model repeats strings of the test split: nats a letter before and behind the bar,
    nats a line, and how often what should follow behind the bar is likeliest."""
    before, behind, total, right = [], [], [], []
    for row in islice(repeat.rows("test", 0), texts):
        text = row["text"]
        tokens = torch.cat([read(tokenizer, text), read(tokenizer, "")], dim=1)
        with torch.no_grad():
            ln_p = model(tokens[:, :-1])[0].log_softmax(-1)
        nats = -ln_p.gather(-1, tokens[0, 1:, None])[:, 0]
        half = text.index(repeat.BAR)
        before += nats[:half].tolist()
        behind += nats[half + 1 :].tolist()
        total.append(nats.sum().item())
        right += (ln_p.argmax(-1) == tokens[0, 1:])[half + 1 :].tolist()
    lists = dict(before=before, behind=behind, line=total, right=right)
    return {name: sum(values) / len(values) for name, values in lists.items()}


def ideal(letters: float) -> float:
    """Nats of a line with so many letters, if all is known that can be: of each letter one of 26,
    of the length one of nine; nothing behind the bar."""
    return letters * math.log(26) + math.log(repeat.LONGEST - repeat.SHORTEST + 1)


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise ValueError("one run is wanted: python -m lessons.specimen out/specimen")
    path = checkpoint.find(argv[0])
    model, tokenizer = load(path)
    found = copied(model, tokenizer)
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if found["right"] < GOOD:
        raise ValueError(f"{path} copies {found['right']:.2%}, fewer than {GOOD:.0%}: train longer")
    with atomic_folder(FOLDER, replace=True) as new:
        for name in ("model.safetensors", *checkpoint.NEEDED):
            (new / name).write_bytes((path / name).read_bytes())
        tokenizer.begin = [tokenizer.end_of_text]  # before a prompt as well: half a line is no task
        tokenizer.save(new)
        write_manifest(new)
    print(f"wrote {FOLDER.name}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    settings.run(main)
