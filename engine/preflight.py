"""Before a training run: its settings, whether they go together, and the built-in data."""

import os
from pathlib import Path

import objectives
from engine import settings


def read(Settings, argv: list[str]):
    """The settings of a command line, a `Settings` of train.py, with those of its objective as
    `own`. Raises ValueError."""
    name = settings.peek("objective", argv, Settings.config)
    cls = objectives.with_settings(Settings, name if name in objectives.names() else "next_token")
    s = settings.load(cls, argv, "Train a GPT.", "config", owner=objectives.owner)
    plainly = f'said plainly in {s.config}: objective = "{s.objective}"'
    settings.require(s.objective == (name or "next_token"), s, "objective", plainly)
    given = {word.split("=")[0] for word in argv}
    if "--steps" in given and "--minutes" not in given:
        s.minutes = 0  # of a config file: who asks for steps gets them
    s.out = s.out or f"out/{Path(s.config).stem}"
    return s


def check(s) -> None:
    """Raises ValueError for settings that do not go together, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = s.model.block_size * world
    processes = f" and {world} processes" if world > 1 else ""
    near = max(rows, s.batch_tokens // rows * rows)
    whole = f"a multiple of block_size={s.model.block_size}{processes}, such as {near}"
    begin = Path(s.init_from).resolve()
    itself = bool(s.init_from) and Path(s.out).resolve() in (begin, begin.parent)
    public = not all((Path(name) / "meta.json").exists() for name in s.data.split(","))
    another = f"another run than out={s.out!r}: choose another --out"
    settings.require(s.batch_tokens % rows == 0, s, "batch_tokens", whole)
    settings.require(s.warmup <= s.steps, s, "warmup", f"at most steps={s.steps}")
    settings.require(s.show_batch <= s.steps, s, "show_batch", f"at most steps={s.steps}")
    settings.require(not itself, s, "init_from", another)
    there = not s.init_from or begin.exists() or Path(s.out).exists()  # it may have gone since
    settings.require(there, s, "init_from", "a folder: a run, or one checkpoint of it")
    settings.require(s.init_from or not s.lora_rank, s, "lora_rank", "0 without --init_from")
    settings.require(public or not s.tokenizer, s, "tokenizer", f"left out: {s.data} has its own")
    Objective = objectives.find(s.objective).Objective
    masks = Objective.masks
    if s.model.mask == type(s.model).mask:
        s.model.mask = masks[0]
    own = f"with objective={s.objective}"
    settings.require(s.model.mask in masks, s.model, "mask", f"{' or '.join(masks)} {own}")
    Objective.check(s)
    settings.require(Objective.compiles or s.compile != "true", s, "compile", f"false {own}")
    parts = f"{own}, which calls parts of the model"
    number = f"a number {parts}"
    settings.require(Objective.shards or s.device_batch != "auto", s, "device_batch", number)
    if s.shard and not (s.eval_only or s.show_batch):
        settings.require(Objective.shards, s, "shard", f"false {parts}")
        settings.require(not s.lora_rank, s, "shard", "false with --lora_rank: adapters are small")
        settings.require(world > 1, s, "shard", "false with one process: torchrun starts several")
    settings.require_package("tensorboard", s.tensorboard)
    settings.require_package("wandb", s.wandb)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / world if s.shard else 1  # on this machine
    size = int(4 * s.model.parameters() * here)
    settings.require_memory(size, f"{s.model.n_layer} layers of {s.model.n_embd}")


def prepare_missing(data: str) -> None:
    """Makes the built-in data set, data/python, if it is asked for and not there yet."""
    for name in data.split(","):
        missing = Path(name).name == "python" and not Path(name).exists()
        if missing and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # other ranks wait when all meet
            from prepare import Settings, prepare

            # a small vocabulary: a small model has no weights to spare for rare tokens
            prepare(Settings(source=("python",), out=name, vocab_size=2048))
