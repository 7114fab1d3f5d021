"""Token shards to checkpoints: python train.py config/small.py --steps=500

Runs as one process, or as several under torchrun, on one machine or many:

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Interrupted, it continues where its newest checkpoint stands, when the same command is given again.
"""

import importlib.util
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from engine import settings, threads
from engine.stop import Stop

START = time.monotonic()


@dataclass
class Settings:
    config: str = "config/small.py"  # file of settings; the command line overrides it

    # what goes in and out
    data: str = "data/python"  # folder that prepare.py has written; data/python is made if missing
    tokenizer: str = ""  # vocabulary of a folder of public shards, which has no meta.json
    out: str = ""  # folder of the run; by default out/<name of the config file>
    init_from: str = ""  # begin with the weights of this run or checkpoint
    seed: int = 1  # of weights, order of the data, dropout

    # the model (see model.py)
    block_size: int = 256  # context in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int = 0  # heads of keys and values; 0 means n_head
    n_embd: int = 128  # width
    head_dim: int = 0  # width of a head; 0 means n_embd / n_head
    mlp_dim: int = 0  # width inside the MLP; 0 means 4 * n_embd
    position: str = "rotary"  # positions: rotary or learned
    rope_base: float = 10000.0  # of the rotary positions: larger turns slower
    norm: str = "rms"  # rms (RMSNorm) or layer (LayerNorm)
    norm_weight: bool = False  # a learned scale in every norm
    norm_eps: float = 1e-6  # keeps norms from dividing by zero
    embed_norm: bool = True  # a norm after the embedding
    qk_norm: bool = True  # a norm of queries and keys
    mlp: str = "relu2"  # relu2, gelu or swiglu
    bias: bool = False  # biases in linear layers and LayerNorm
    tied: bool = False  # the head is the embedding
    logit_cap: float = 15.0  # soft bound of the logits; 0 is none
    dropout: float = 0.0  # fraction of activations set to zero in training
    zero_init: bool = True  # residual projections and head begin at zero

    # the optimization
    steps: int = 1000  # updates
    batch_tokens: int = 8192  # tokens in one update, over all processes
    device_batch: int = 0  # most rows in one forward pass, which bounds memory; 0 is no bound
    optimizer: str = "muon"  # muon (AdamW for embeddings and head), adamw or nadamw
    lr: float = 0.02  # of the matrices
    embed_lr: float = 0.3  # of the embeddings, with muon
    head_lr: float = 0.004  # of the head, biases and norm weights, with muon
    warmup: float = 0.0  # steps of linear rise; below 1: a fraction of steps
    decay: float = 0.6  # last fraction of the steps, in which the rate falls
    schedule: str = "linear"  # or cosine: the shape of the fall
    final_lr: float = 0.0  # where it ends, as a fraction of lr
    momentum: float = 0.95  # of muon
    beta1: float = 0.8  # of AdamW: decay of the mean gradient
    beta2: float = 0.95  # of AdamW: decay of the mean squared gradient
    weight_decay: float = 0.0  # of matrices; not of embeddings and head with muon
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is no bound

    # what is kept and shown; the last step is always saved and evaluated
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 500  # steps between evaluations on the whole validation split
    save_every: int = 500  # steps between checkpoints
    patience: int = 0  # stop after this many evaluations without a better one; 0 is never
    sample_tokens: int = 200  # length of the sample at the end
    sample_prompt: str = ""  # its beginning
    tensorboard: bool = False  # also log to TensorBoard, in the folder of the run
    wandb: str = ""  # also log to this project of Weights & Biases

    # the machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # of matrix products: bfloat16, float16, float32
    compile: str = "auto"  # true or false
    threads: str = "auto"  # of a CPU: a number, or chosen by the size of the work
    deterministic: bool = False  # equal bits in every run on a GPU too, more slowly

    # another beginning
    fresh: bool = False  # move what is in out aside and begin anew

    # instead of training
    show_batch: int = 0  # print what the update of this step learns from
    eval_only: bool = False  # evaluate the best checkpoint of the run and change nothing
    split: str = "val"  # which split eval_only takes: train, val or test


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


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check(s: Settings) -> None:
    """Raises ValueError for the first setting that cannot work, before anything is loaded."""
    positive = "block_size n_layer n_head n_embd steps batch_tokens log_every eval_every save_every"
    settings.check(s, *((name, "at least 1", getattr(s, name) >= 1) for name in positive.split()))
    world = int(os.environ.get("WORLD_SIZE", 1))
    rows = s.block_size * world
    processes = f" and {world} processes" if world > 1 else ""
    choices = dict(optimizer="muon adamw nadamw", schedule="linear cosine", split="train val test")
    choices |= dict(position="rotary learned", norm="rms layer", mlp="relu2 gelu swiglu")
    not_negative = "n_kv_head head_dim mlp_dim norm_eps logit_cap device_batch lr embed_lr head_lr"
    not_negative += " warmup weight_decay grad_clip patience sample_tokens seed show_batch"
    fractions = "decay final_lr"
    below_one = "dropout momentum beta1 beta2"
    settings.check(
        s,
        *((name, "at least 0", 0 <= getattr(s, name) < 2**63) for name in not_negative.split()),
        *((name, "from 0 to 1", 0 <= getattr(s, name) <= 1) for name in fractions.split()),
        *((name, "at least 0, below 1", 0 <= getattr(s, name) < 1) for name in below_one.split()),
        *(
            (name, f"one of {', '.join(options.split())}", getattr(s, name) in options.split())
            for name, options in choices.items()
        ),
        ("rope_base", "above 0", s.rope_base > 0),
        *(
            (name, f"used when it is installed: pip install {name}", installed(name))
            for name in ("tensorboard", "wandb")
            if getattr(s, name)
        ),
        (
            "n_embd",
            f"a multiple of n_head={s.n_head}, unless head_dim is set",
            s.head_dim or s.n_embd % s.n_head == 0,
        ),
        ("n_head", f"a multiple of n_kv_head={s.n_kv_head}", s.n_head % (s.n_kv_head or 1) == 0),
        (
            "head_dim" if s.head_dim else "n_embd",
            "such that a head has an even width, for rotary positions turn pairs",
            s.position != "rotary" or (s.head_dim or s.n_embd // s.n_head) % 2 == 0,
        ),
        (
            "batch_tokens",
            f"a multiple of block_size={s.block_size}{processes}, such as "
            f"{max(rows, s.batch_tokens // rows * rows)}",
            s.batch_tokens % rows == 0,
        ),
        ("warmup", f"at most steps={s.steps}", s.warmup <= s.steps),
        ("threads", "auto or a number from 1 to 1024", threads.valid(s.threads)),
    )


def train(s: Settings, stop: Stop) -> int:
    import torch

    import sample
    from dataset import Dataset
    from engine import checkpoint, machine
    from engine.metrics import best_row, since_best
    from engine.run import Run
    from evaluate import compressors, evaluate
    from model import IGNORE
    from optim import LossScale, learning_rate, make_optimizers

    # 1. the machine and the processes on it
    here = machine.pick(s.device, s.dtype, s.compile)
    machine.start(here, s.deterministic)
    say = print if here.rank == 0 else lambda *_: None  # the first process speaks for all
    say(f"machine: {here.why}")
    stop.at_once = here.world == 1 or here.compile  # otherwise the processes stop together

    # 2. the data
    data = Dataset(s.data, s.tokenizer)
    digest = here.first_does(data.verify)
    train_split, val_split = data.split("train"), data.split("val")
    train_split.require(s.block_size)
    sizes = f"{train_split.tokens:,} tokens to train on, {val_split.tokens:,} to validate"
    say(f"data: {s.data}, {sizes}, vocabulary {data.tokenizer.vocab_size:,}")

    # 3. the model: new, or as the newest checkpoint of the run has it
    run = here.first_does(lambda: Run(s, START, here))  # None in all other processes
    done = int(here.from_first(run.step if run else 0))  # updates so far
    if done:
        path = Path(s.out) / checkpoint.name(done)
        model, _, state = checkpoint.load_weights(path)
    else:
        model = new_model(s, data.tokenizer)
        state = dict(metrics=None, seconds=0.0, loss_scale=None)
    model.to(here.device)
    at_once = min(s.batch_tokens // here.world, (s.device_batch or math.inf) * s.block_size)
    used = machine.use_threads(s.threads, here, model, at_once, state.get("machine"))
    optimizers = make_optimizers(model, s, here.dtype)
    if done:
        checkpoint.load_optimizers(path, model, optimizers)
    scale = LossScale(here.dtype, state["loss_scale"])
    here.first_does(lambda: run.begin(state, digest, model))
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    say(f"model: {count:,} parameters, {s.batch_tokens:,} tokens a step, {used}")

    # 4. what happens beside the updates
    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == s.steps

    def validate(step: int) -> bool:
        """Evaluates the model; false if a stop was asked for, and there is no result."""
        before, stop.at_once = stop.at_once, here.world == 1  # this step is saved
        result = evaluate(model, val_split, here, stop)
        stop.at_once = before
        if result is None:
            return False
        loss, bpb = result
        if not math.isfinite(loss):
            loss = bpb = None  # JSON has no such number, and it is never the best
        bits = f", {bpb:.4f} bits per byte" if bpb else ""
        say(f"step {step}: validation loss {loss or math.nan:.4f}{bits}")
        if run:
            run.record(step=step, val_loss=loss, val_bpb=bpb, tokens=step * s.batch_tokens)
            run.log.mark()
        return True

    def save(step: int) -> None:
        run.save(step, model, optimizers, scale.state(), data.tokenizer)

    def stopped(step: int) -> int:
        if run:
            run.close()
        say(f"stopped by a signal after step {step}, which is saved; the same command continues")
        return 0

    def impatient() -> bool:
        waited = since_best(run.folder) if run else 0  # the first process has the file
        return 0 < s.patience <= here.sum([waited])[0]

    if here.sum([bool(run and done and due(done, s.eval_every) and not run.log.evaluated)])[0]:
        say(f"the evaluation of step {done} is made again")  # its row is gone, or was never there
        if not validate(done):
            return stopped(done)
    if done >= s.steps or impatient():
        why = "" if done >= s.steps else f" and {s.patience} evaluations without a better one"
        say(f"nothing to do: {s.out} has reached step {done} of {s.steps}{why}")
        return 0

    # 5. the updates
    forward = torch.compile(model) if here.compile else model
    gradients = machine.GradientSum(parameters) if here.world > 1 else None
    rows = s.batch_tokens // s.block_size  # of a batch, over all processes
    share = rows // here.world  # of this process
    micro = next(n for n in range(min(s.device_batch or share, share), 0, -1) if share % n == 0)
    busy, last_shown, last_saved = 0.0, done, done
    for step in range(done + 1, s.steps + 1):  # the update that makes it `step`
        began = time.monotonic()
        factor = learning_rate(step - 1, s.steps, s.warmup, s.decay, s.final_lr, s.schedule)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["base_lr"] * factor
        x, y = train_split.batch(step - 1, rows, s.block_size, s.seed, here.rank, here.world)
        (counted,) = here.sum([int((y != IGNORE).sum())])
        loss = torch.zeros((), device=here.device)
        for i in range(0, share, micro):
            if s.dropout:
                machine.seed(s.seed, step, here.rank, i)
            if gradients:
                gradients.active = i + micro == share  # once, while the last backward pass runs
            inputs, targets = here.put(x[i : i + micro]), here.put(y[i : i + micro])
            with here.autocast():
                part = forward(inputs, targets, reduction="sum") / counted
            (part * scale.value).backward()
            loss += part.detach()
        if gradients:
            gradients.wait()
        scale.unscale(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip or math.inf).item()
        loss, stopping = here.sum([loss.item(), stop.asked])
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and not (scale.value > 1 and math.isfinite(loss)):
            say(
                f"stopped at step {step}: its loss is {loss} and its gradient norm {norm}, so no"
                f" update was made. Its batch is windows {(step - 1) * rows} to {step * rows - 1}"
                f" (--show_batch={step} prints it); the last saved step is {last_saved or 'none'}"
            )
            if run:
                run.close()
            return 3
        stop.at_once = False  # from here to the end of the step all is done or nothing
        if finite:  # float16 may overflow now and then: that update is left out
            for optimizer in optimizers:
                optimizer.step()
        scale.update(finite)
        model.zero_grad(set_to_none=True)
        busy += time.monotonic() - began

        if due(step, s.log_every):
            speed = (step - last_shown) * s.batch_tokens / busy
            rate, shown_norm = s.lr * factor, norm if finite else None  # JSON has no infinity
            row = dict(step=step, loss=loss, lr=rate, grad_norm=shown_norm)
            row |= dict(tokens=step * s.batch_tokens, tokens_per_second=round(speed, 1))
            if run:
                run.record(**row)
            minutes, seconds = divmod(int((s.steps - step) * s.batch_tokens / speed), 60)
            say(
                f"step {step} of {s.steps}  loss {loss:.4f}  lr {rate:.2e}  gradient {norm:.3f}"
                f"  {speed:,.0f} tokens/s  {minutes}:{seconds:02d} left"
            )
            busy, last_shown = 0.0, step
        evaluating = due(step, s.eval_every)
        if evaluating or due(step, s.save_every) or stopping:
            here.first_does(partial(save, step))
            last_saved = step
            if stopping or (evaluating and not validate(step)):
                return stopped(step)
            if run:
                checkpoint.prune(run.folder)
            if evaluating and impatient():
                say(f"stopped early: no better evaluation in the last {s.patience}")
                break

    # 6. the result
    stop.at_once = True
    if not run:
        return 0
    run.close()
    best = best_row(run.folder)
    if best:
        print(
            f"\nbest validation loss: {best['val_loss']:.4f} nats a token, at step {best['step']}"
        )
    if best and best["val_bpb"]:
        others = compressors(val_split, data.tokenizer)
        others = f" ({others})" if others else ""
        print(f"bits per byte of that text: {best['val_bpb']:.3f}{others}")
    if s.sample_tokens:
        print("\na sample:\n")
        torch.use_deterministic_algorithms(False)  # picking a token has no such form on a GPU
        picked = sample.Settings(max_tokens=s.sample_tokens, seed=s.seed)
        sample.write_samples(model.eval(), data.tokenizer, s.sample_prompt, picked)
    print(f"\nnext: python sample.py {s.out} --prompt={shlex.quote(s.sample_prompt)}")
    return 0


def new_model(s: Settings, tokenizer):
    """A model with random weights, or with those of the checkpoint `init_from`."""
    from engine.checkpoint import find, load_weights
    from model import GPT, GPTConfig

    if s.init_from:
        model, theirs, _ = load_weights(find(s.init_from))
        if theirs.digest() != tokenizer.digest():
            raise ValueError(
                f"init_from={s.init_from!r} reads {theirs.name} ({theirs.vocab_size} tokens), and"
                f" {s.data} is written in {tokenizer.name} ({tokenizer.vocab_size} tokens): prepare"
                " the data with the tokenizer of the model"
            )
        shape, theirs = asdict(model.config), []
        for name in sorted(set(shape) & set(asdict(s)) - {"block_size", "dropout"}):
            if shape[name] != (getattr(s, name) or shape[name]):
                theirs.append(f"{name}={shape[name]}")
        if theirs:
            print(f"the shape is that of {s.init_from}, not of the settings: {', '.join(theirs)}")
        model.set_context(s.block_size, s.dropout)
        return model
    shape = {f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)}
    model = GPT(GPTConfig(tokenizer.vocab_size, **shape))
    model.init_weights(s.seed, s.zero_init)
    return model


def show_batch(s: Settings) -> int:
    """Prints the windows that the update of step `s.show_batch` learns from, decoded."""
    from dataset import Dataset

    data = Dataset(s.data, s.tokenizer)
    rows = s.batch_tokens // s.block_size
    split = data.split("train")
    split.require(s.block_size)
    x, y = split.batch(s.show_batch - 1, rows, s.block_size, s.seed)
    for i, (inputs, targets) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        text = data.tokenizer.decode([*inputs, targets[-1]])
        print(f"--- step {s.show_batch}, window {(s.show_batch - 1) * rows + i}\n{text}")
    return 0


if __name__ == "__main__":
    settings.run(main)
