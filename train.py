"""Token shards to checkpoints: python train.py config/small.py --steps=500

Runs as one process, or as several under torchrun, on one machine or many:

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Interrupted, it continues where its newest checkpoint stands, when the same command is given again.
The file reads downwards: the settings; `update`, which is how a model learns; `train`, the run.
"""

import math
import os
import shlex
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from dataset import IGNORE
from engine import settings
from engine.settings import BelowOne, Bound, Count, Fraction, NotNegative, Positive
from engine.stop import Stop
from shape import GPTConfig

START = time.monotonic()
Rate = Annotated[float, Bound("from 0 to 1000", lambda x: 0 <= x <= 1000)]


@dataclass
class Settings:
    config: str = "config/small.py"  # file of settings; the command line overrides it

    # what goes in and out
    data: str = "data/python"  # folder that prepare.py has written; data/python is made if missing
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    out: str = ""  # folder of the run; by default out/<name of the config file>
    init_from: str = ""  # begin with the weights of this run or checkpoint
    seed: Count = 1  # of weights, order of the data, dropout

    # the model: n_layer, n_embd and the others stand in shape.py; vocab_size is that of the data
    model: GPTConfig = field(default_factory=partial(GPTConfig, vocab_size=0))

    # the optimization. The rates are those of Muon (kellerjordan.github.io/posts/muon) and of
    # nanochat, which uses it too. An update of Muon has singular values near 1, whatever the
    # gradient, and a fresh square matrix up to 2: so 0.02 is about a hundredth of it (what begins
    # at zero grows by 0.02 a step). AdamW moves each number by about its rate: 0.3 for embeddings,
    # whose numbers are near 1, and little for the head, which begins at zero.
    steps: Positive = 1000  # updates
    batch_tokens: Positive = 8192  # tokens in one update, over all processes
    device_batch: Count = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    optimizer: Literal["muon", "adamw", "nadamw"] = "muon"  # muon has AdamW for embeddings and head
    lr: Rate = 0.02  # of the matrices
    embed_lr: Rate = 0.3  # of the embeddings, with muon
    head_lr: Rate = 0.004  # of the head, biases and norm weights, with muon
    warmup: NotNegative = 0.0  # steps of linear rise; below 1: a fraction of steps
    decay: Fraction = 0.6  # last fraction of the steps, in which the rate falls
    schedule: Literal["linear", "cosine"] = "linear"  # the shape of the fall
    final_lr: Fraction = 0.0  # where it ends, as a fraction of lr
    momentum: BelowOne = 0.95  # of muon: how much of the last direction is kept
    beta1: BelowOne = 0.8  # of AdamW: decay of the mean gradient
    beta2: BelowOne = 0.95  # of AdamW: decay of the mean squared gradient
    weight_decay: NotNegative = 0.0  # of matrices; not of embeddings and head with muon
    grad_clip: NotNegative = 1.0  # largest norm of the gradient; 0 is no bound

    # what is kept and shown; the last step is always saved and evaluated
    log_every: Positive = 10  # steps between rows of metrics.jsonl
    eval_every: Positive = 500  # steps between evaluations on the validation split
    eval_tokens: Count = 0  # tokens of it to evaluate on, evenly spread; 0 is all
    save_every: Positive = 500  # steps between checkpoints
    patience: Count = 0  # stop after this many evaluations without a better one; 0 is never
    sample_tokens: Count = 200  # length of the sample at the end
    sample_prompt: str = ""  # its beginning
    tensorboard: bool = False  # also log to TensorBoard, in the folder of the run
    wandb: str = ""  # also log to this project of Weights & Biases

    # the machine
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of matrix products
    compile: settings.Compile = "auto"  # whether torch.compile makes kernels for this very model
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the work
    fast: bool = True  # parts that compute the same as model.py sooner; false runs model.py itself
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly

    # another beginning, or something else than training
    fresh: bool = False  # move what is in out aside and begin anew
    show_batch: Count = 0  # print what the update of this step learns from
    eval_only: bool = False  # evaluate the best checkpoint of the run and change nothing
    split: Literal["train", "val", "test"] = "val"  # which split eval_only takes


def update(model, optimizers, loss_scale, gradient_sum, x, y, step: int, s: Settings, here):
    """One step of learning: returns the batch's mean loss before it, in nats, and the norm of its
    gradient (infinite: float16 overflowed, and the update was left out).

    `x` and `y`, (B, T), are this process's share of the batch: inputs, and at each position the
    token that comes next. `here` is the machine: its device, its type of numbers, and the other
    processes, over which `gradient_sum` adds up gradients; `loss_scale` is 1 but for float16.
    Raises FloatingPointError, with no weight changed, if loss or gradient are not finite and a
    smaller loss scale is no remedy.
    """
    import torch  # takes a second to load: mistakes in settings have been told by now

    from engine import machine

    # the loss is the mean over all targets of the global batch. Each pass gives a sum, divided by
    # their number in all passes and processes: means of means would weigh some targets more
    (targets,) = here.sum([int((y != IGNORE).sum())])
    mean_loss = torch.zeros((), device=here.device)
    rows = rows_in_a_pass(len(x), s)
    # 1. forward, and backward: by the chain rule, from the loss back to the first layer, how much
    # the loss would change with each weight: p.grad. A batch too large for memory is taken in
    # passes of some rows, since backward() adds to the p.grad that is there: gradient accumulation
    for i in range(0, len(x), rows):
        machine.seed(s.seed, step, here.rank, i)  # of dropout, which is so the same when resumed
        # the processes (DDP) hold equal weights and learn from different rows. Once, while the last
        # backward pass runs, their gradients are summed: then all make the same update
        gradient_sum.active = i + rows == len(x)
        # autocast: products in 16 bits are faster where the hardware has them; weights, gradients
        # and the optimizer's sums stay in 32, where a small update to a large number is not rounded
        # away (arXiv:1710.03740)
        with here.autocast():
            summed = model(here.put(x[i : i + rows]), here.put(y[i : i + rows]), reduction="sum")
        part = summed / targets
        (part * loss_scale.value).backward()  # scaled, where float16 would round gradients to zero
        mean_loss += part.detach()
    gradient_sum.wait()
    loss_scale.unscale(list(model.parameters()))
    # 2. clipping: a gradient longer than grad_clip is shortened, its direction kept, so that one
    # odd batch does not outweigh all others in the optimizers' running means (arXiv:1211.5063)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf).item()
    # 3. the step itself, unless there is nothing sound to follow
    (loss,) = here.sum([mean_loss.item()])
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite and (loss_scale.value == 1 or not math.isfinite(loss)):
        raise FloatingPointError(f"its loss is {loss} and its gradient norm {norm}")
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    loss_scale.update(finite)
    model.zero_grad(set_to_none=True)
    return loss, norm


def train(s: Settings, stop: Stop) -> int:
    """Trains a model, from the beginning or from where its run stands; returns the exit status."""
    from dataset import Dataset
    from engine import checkpoint, fast, machine
    from engine.run import NEW, Run
    from optim import LossScale, make_optimizers, set_rates

    # 1. the machine, the data, the folder of the run
    here = machine.pick(s.device, s.dtype, s.compile)
    here.say(f"machine: {here.why}")
    machine.start(here, s.deterministic)
    stop.at_once = here.world == 1 or here.compile  # otherwise all processes stop after a step
    data = Dataset(s.data, s.tokenizer)
    digest = here.first_does(data.verify)
    learned, held_out = data.split("train"), data.split("val")
    learned.require(s.model.block_size)
    sizes = f"{learned.tokens:,} tokens to train on, {held_out.tokens:,} to validate"
    here.say(f"data: {s.data}, {sizes}, vocabulary {data.tokenizer.vocab_size:,}")
    run = Run(s, here, stop, START)

    # 2. the model and its optimizers: new, or as the newest checkpoint of the run has them
    if run.step:
        model, _, state = checkpoint.load_weights(run.path)
    else:
        model, state = new_model(s, data, here), NEW
    model.to(here.device)
    work = rows_in_a_pass(s.batch_tokens // s.model.block_size // here.world, s)
    machine.use_threads(s.threads, here, model, work * s.model.block_size, state["machine"])
    fast.use(model, here, s.fast, state["machine"])
    optimizers = make_optimizers(model, s, here.dtype)
    if run.step:
        checkpoint.load_optimizers(run.path, model, optimizers)
    loss_scale = LossScale(here.dtype, state["loss_scale"])
    run.begin(state, digest, model)

    # 3. what an interruption has left undone, and whether anything else is to do
    if run.evaluation_missing():
        evaluated = validate(model, held_out, run.step, s, here, run)
        if not evaluated:
            return run.stopped(run.step)
    run.prune()
    if run.finished():
        return 0

    # 4. the steps
    runner = machine.compiled(model, here, work) if here.compile else model
    gradient_sum = machine.GradientSum(list(model.parameters()) if here.world > 1 else [])
    with stop.deferred():  # from here on a request to stop waits for the end of a step
        for step in range(run.step + 1, s.steps + 1):  # the update that makes it `step`
            with run.timed():
                lr = set_rates(optimizers, step, s)
                x, y, *_ = next_batch(learned, step, s, here)
                try:
                    loss, norm = update(
                        runner, optimizers, loss_scale, gradient_sum, x, y, step, s, here
                    )
                except FloatingPointError as e:
                    return run.not_finite(step, e)
            if run.logs(step):
                run.report(step, loss, lr, norm)
            stopping = here.any(stop.asked)
            if stopping or run.saves(step):
                run.save(step, model, optimizers, loss_scale.state(), data.tokenizer)
            if stopping:
                return run.stopped(step)
            if run.evaluates(step):
                evaluated = validate(model, held_out, step, s, here, run)
                if not evaluated:  # a stop was asked for meanwhile
                    return run.stopped(step)
            if run.saves(step):
                run.prune()
            if run.evaluates(step) and run.out_of_patience():
                break
    if here.rank == 0:
        show_result(model, data, s, run)
    return 0


def new_model(s: Settings, data, here):
    """A model with random weights, or with those of the checkpoint `init_from` (fine-tuning)."""
    from engine.checkpoint import adopt
    from model import GPT

    if s.init_from:
        return adopt(s.init_from, s.model, data, here.say)
    model = GPT(replace(s.model, vocab_size=data.tokenizer.vocab_size))
    model.init_weights(s.seed)
    return model


def next_batch(split, step: int, s: Settings, here) -> tuple:
    """Inputs and targets for the update that makes it `step`, a function of it and the seed alone:
    step 1000 needs no memory of those before it. dataset.py has how."""
    T = s.model.block_size
    return split.batch(step - 1, s.batch_tokens // T, T, s.seed, here.rank, here.world)


def rows_in_a_pass(share: int, s: Settings) -> int:
    """The most rows that device_batch allows and that divide the share of a process evenly."""
    most = min(s.device_batch or share, share)
    return next(n for n in range(most, 0, -1) if share % n == 0)


def validate(model, split, step: int, s: Settings, here, run) -> bool:
    """Records the loss on text that is not learned from; false if a stop was asked for meanwhile.

    Without it, nobody could tell learning from learning by heart.
    """
    from evaluate import evaluate

    with run.stop.honoured(at_once=here.world == 1):  # the weights of this step are saved
        result = evaluate(model, split, here, run.stop, s.device_batch, s.eval_tokens)
    if result:
        run.evaluated(step, *result)
    return result is not None


def show_result(model, data, s: Settings, run) -> None:
    """Prints how good the best checkpoint is, beside general compressors, and a sample."""
    import torch

    import sample
    from evaluate import compressors

    run.stop.at_once = True  # all is saved
    run.close()
    run.tell_best(lambda: compressors(data.split("val"), data.tokenizer))
    if s.sample_tokens:
        print("\na sample, by the weights of the last step:\n")
        torch.use_deterministic_algorithms(False)  # picking a token has no such form on a GPU
        picked = sample.Settings(max_tokens=s.sample_tokens, seed=s.seed)
        sample.write_samples(model.eval(), data.tokenizer, s.sample_prompt, picked)
    print(f"\nnext: python sample.py {s.out} --prompt={shlex.quote(s.sample_prompt)}")


def show_batch(s: Settings) -> int:
    """Prints the windows that the update of step `s.show_batch` learns from, decoded."""
    from dataset import Dataset

    data = Dataset(s.data, s.tokenizer)
    split = data.split("train")
    split.require(s.model.block_size)
    rows = s.batch_tokens // s.model.block_size
    x, y, *_ = split.batch(s.show_batch - 1, rows, s.model.block_size, s.seed)
    for i, (inputs, targets) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        text = data.tokenizer.decode([*inputs, targets[-1]])
        print(f"--- step {s.show_batch}, window {(s.show_batch - 1) * rows + i}\n{text}")
    return 0


def check(s: Settings) -> None:
    """Raises ValueError for settings that do not go together, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = s.model.block_size * world
    processes = f" and {world} processes" if world > 1 else ""
    near = max(rows, s.batch_tokens // rows * rows)
    whole = f"a multiple of block_size={s.model.block_size}{processes}, such as {near}"
    begin = Path(s.init_from).resolve()
    itself = bool(s.init_from) and Path(s.out).resolve() in (begin, begin.parent)
    public = not (Path(s.data) / "meta.json").exists()
    settings.check(
        s,
        ("batch_tokens", whole, s.batch_tokens % rows == 0),
        ("warmup", f"at most steps={s.steps}", s.warmup <= s.steps),
        ("show_batch", f"at most steps={s.steps}", s.show_batch <= s.steps),
        ("init_from", f"another run than out={s.out!r}: choose another --out", not itself),
        ("tokenizer", f"left out: {s.data} has its own", public or not s.tokenizer),
    )
    settings.require_package("tensorboard", s.tensorboard)
    settings.require_package("wandb", s.wandb)
    settings.require_memory(
        4 * s.model.parameters(), f"{s.model.n_layer} layers of {s.model.n_embd}"
    )


def main(argv: list[str]) -> int:
    s = settings.load(Settings, argv, "Train a GPT.", "config")
    s.out = s.out or f"out/{Path(s.config).stem}"
    check(s)
    stop = Stop()  # before torch is imported, which takes a second or more
    missing = Path(s.data).name == "python" and not Path(s.data).exists()
    if missing and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # other ranks wait when all meet
        from prepare import Settings as Preparation
        from prepare import prepare

        # a small vocabulary: a small model has no weights to spare for rare tokens
        prepare(Preparation(source=("python",), out=s.data, vocab_size=2048))
    if s.show_batch:
        return show_batch(s)
    if s.eval_only:
        from evaluate import evaluate_run

        return evaluate_run(s)
    return train(s, stop)


if __name__ == "__main__":
    settings.run(main)
