"""Before a training run: its settings, whether they go together, the built-in data, and all that
the loop begins with."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import objectives
from dataset import Dataset, Split
from engine import settings

if TYPE_CHECKING:  # torch takes a second to load: mistakes in settings are told before that
    from engine.learner import Learner
    from engine.machine import Machine
    from engine.run import Run
    from engine.stop import Stop
    from model import GPT
    from objectives import Base

# what nanoGPT begins with, and who does that here
INIT_FROM = dict(gpt2="huggingface.py import makes one", resume="the same command again resumes")
INIT_FROM |= dict(scratch="leave it out to begin there")


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
    least = s.model.block_size * world  # tokens: a window for each process
    processes = f" and {world} processes" if world > 1 else ""
    near = max(least, s.batch_tokens // least * least)
    whole = f"a multiple of block_size={s.model.block_size}{processes}, such as {near}"
    begin = Path(s.init_from).resolve()
    itself = bool(s.init_from) and Path(s.out).resolve() in (begin, begin.parent)
    public = not all((Path(name) / "meta.json").exists() for name in s.data.split(","))
    another = f"another run than out={s.out!r}: choose another --out"
    settings.require(s.batch_tokens % least == 0, s, "batch_tokens", whole)
    settings.require(s.warmup <= s.steps, s, "warmup", f"at most steps={s.steps}")
    settings.require(s.show_batch <= s.steps, s, "show_batch", f"at most steps={s.steps}")
    settings.require(not itself, s, "init_from", another)
    remedy = INIT_FROM.get(s.init_from.partition("-")[0])
    settings.require(not remedy or begin.exists(), s, "init_from", f"a folder: {remedy}")
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


def set_up(s, stop: "Stop", start: float) -> "tuple[Machine, Dataset, Base, Run]":
    """Where it is computed; what there is to learn from, and what is learned; the run's folder.
    `start` is when the command began, of time.monotonic. Raises ValueError."""
    from engine import machine
    from engine.run import Run

    Objective = objectives.find(s.objective).Objective
    here = machine.pick(s.device, s.dtype, s.compile if Objective.compiles else "false")
    machine.start(here, s.deterministic)
    data = Dataset(s.data, s.tokenizer, s.model.mask, s.train_on, s.mix, Objective.lines)
    objective = Objective(s, data.tokenizer)
    objective.require(data)
    run = Run(s, here, stop, start)
    T = s.model.block_size
    data.split("train").require(T)
    if next(data.split("val").in_order(1, T), None) is None:  # of rows, which may be too long
        raise ValueError(f"no answer in the val split of {s.data} fits block_size={T}: use more")
    return here, data, objective, run


def make_ready(learner: "Learner", split: Split, s, here: "Machine", run: "Run") -> None:
    """Takes the learner to the device, with fast parts and the heads of the checkpoint that it goes
    on from, and finds how many windows a pass may have there."""
    from engine import checkpoint, fast, machine, memory
    from engine.adopt import adopt_heads
    from model import GPT

    if run.step:
        checkpoint.load_heads(run.path, learner)
    elif s.init_from:
        adopt_heads(s.init_from, learner, here.say)
    B = s.batch_tokens // s.model.block_size
    share = B // here.world
    windows = s.windows_in_a_pass(share)
    asked = s.device_batch if s.device_batch != "auto" else 0
    if 2 * windows <= min(asked, share):  # told if passes are half as large, or smaller still
        why = f"the most up to {s.device_batch} that divides {share} evenly"
        here.say(f"a pass has {windows} of {share} windows, {why}: choose another batch_tokens")
    if s.checkpoint_activations:
        memory.checkpoint_blocks(learner)
    if s.shard:
        from engine import sharding  # which takes a second to load

        sharding.shard_learner(learner, here)
    learner.to(here.device)
    learner.autocast = here.autocast
    before = run.state["machine"]
    machine.use_threads(s.threads, here, learner.gpt, windows * s.model.block_size, before)
    for gpt in learner.modules():  # some heads are a GPT as well
        if isinstance(gpt, GPT):
            fast.use(gpt, here, s.fast, before)
    shared = [] if s.shard or here.world == 1 else list(learner.parameters())
    here.gradients = machine.GradientSum(shared)
    if s.device_batch == "auto":
        batch = split.batch(0, B, s.model.block_size, s.seed, here.rank, here.world)
        s.device_batch = memory.device_batch(learner, batch, here, before)
    if s.optimizer != "muon" and s.lr > 0.01:
        here.say(f"lr={s.lr:g} is a rate for muon: {s.optimizer} wants about 0.001")


def compile_kernels(learner: "Learner", split: Split, s, here: "Machine") -> None:
    """Where the machine compiles: for the very shape that each pass will have."""
    from engine import machine

    if here.compile:
        T = s.model.block_size
        B = s.batch_tokens // T
        some = split.batch(0, B, T, s.seed).windows(0, s.windows_in_a_pass(B // here.world))
        machine.compile(learner, here, learner.objective.prepare(some, learner)[0])


def new_model(s, data: Dataset, here: "Machine") -> "GPT":
    """A model with random weights, or with those of the checkpoint `init_from` (fine-tuning)."""
    import torch

    import lora
    from engine.adopt import adopt
    from model import GPT

    if s.init_from:
        model, added = adopt(s.init_from, s.model, data, here.say)
        if s.lora_rank:
            own = not model.config.tied or s.lora_on != "all+head"
            settings.require(own, s, "lora_on", "all: the head of this model is its embedding")
            lora.add(model, s.lora_rank, s.lora_alpha, s.lora_on, added, s.seed)
        return model
    shape = replace(s.model, vocab_size=data.tokenizer.vocab_size)
    if s.shard:
        from engine import sharding

        return sharding.new_model(shape, s.seed, here)  # the same, of which each keeps its part
    torch.manual_seed(s.seed)  # of layers that somebody adds, which draw their weights themselves
    model = GPT(shape)
    model.init_weights(s.seed)
    return model
