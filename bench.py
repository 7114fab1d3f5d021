"""How fast each stage is, beside this machine's own limits and a peer: python bench.py train

    train     training steps of GPT-2's smallest shape, beside transformers (if installed)
    decode    text from that shape, one sequence and eight, beside transformers and CTranslate2
    prepare   the whole of prepare.py with GPT-2's vocabulary, beside tiktoken's own batch call
    loss      the whole command of config/shakespeare.py and config/small.py: seconds and loss

Every figure comes from a process of its own. The variants take turns for `rounds` rounds, and the
table shows medians, so that a machine that is slower for a while is slower for all.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import settings


@dataclass
class Settings:
    what: str = "train"  # train, decode, prepare or loss
    rounds: int = 3  # times that each variant runs
    rows: int = 4  # train: sequences in a step
    length: int = 256  # train: tokens of a sequence
    tokens: int = 64  # decode: tokens to generate
    run: str = "out/small"  # decode: the run whose loss is measured with weights of eight bits
    seeds: int = 1  # loss: runs of each config
    only: str = ""  # run this variant alone, in this process, and print its figures as JSON


# GPT-2's smallest shape, with random weights: speed does not depend on what they have learned
SHAPE = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
SHAPE |= dict(position="learned", norm="layer", norm_weight=True, norm_eps=1e-5, tied=True)
SHAPE |= dict(embed_norm=False, qk_norm=False, mlp="gelu", bias=True, logit_cap=0)
TRAIN_STEPS = 4  # training steps measured: a number, since several processes must agree on it
WARM_UP = 2  # runs of each measurement that do not count


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Measure speed.", "what")
    variants = VARIANTS.get(s.what)
    settings.check(
        s,
        ("what", f"one of {', '.join(VARIANTS)}", variants is not None),
        *((name, "at least 1", getattr(s, name) >= 1) for name in ("rounds", "rows", "tokens")),
        ("only", "one of its variants", not s.only or s.only in variants),
    )
    if s.only:
        result = variants[s.only](s)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
        return
    found: dict[str, list[dict]] = {}
    for number in range(s.rounds):
        for name in variants:
            print(f"round {number + 1} of {s.rounds}: {name}", file=sys.stderr)
            command = [sys.executable, __file__, *argv, f"--only={name}"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8")
            last = done.stdout.strip().splitlines()[-1:]
            if done.returncode or not last:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                print(f"  left out: {reason}", file=sys.stderr)
            else:
                found.setdefault(name, []).append(json.loads(last[0]))
    print_table(found)


def print_table(found: dict[str, list[dict]]) -> None:
    """Medians, a row a variant; the first row with the same unit is what ratios refer to."""
    first: dict[str, float] = {}
    print(f"{'variant':34} {'median':>10} {'unit':12} {'ratio':>6}  {'peak MB':>8}  more")
    for name, runs in found.items():
        value = statistics.median(run["value"] for run in runs)
        unit, more = runs[0]["unit"], runs[0].get("more", "")
        ratio = value / (first.setdefault(unit, value) or 1)
        peak = statistics.median(run["peak_mb"] for run in runs)
        print(f"{name:34} {value:>10,.2f} {unit:12} {ratio:>6.2f}  {peak:>8,.0f}  {more}")


def figure(value: float, unit: str, more: str = "") -> dict:
    scale = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, else in kB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return dict(value=value, unit=unit, peak_mb=peak, more=more)


def timed(function, seconds: float = 8.0, steps: int = 0) -> float:
    """The median duration of `function`, called `steps` times or for `seconds`, after a warm-up."""
    for _ in range(WARM_UP):
        function()
    times: list[float] = []
    while len(times) < steps or (not steps and (sum(times) < seconds or len(times) < 3)):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# --- what the machine can do


def matrix_product(dtype: str) -> dict:
    import torch

    n = 2048
    a, b = (torch.randn(n, n, dtype=getattr(torch, dtype)) for _ in range(2))
    return figure(2 * n**3 / timed(lambda: a @ b, 2) / 1e9, "GFLOP/s")


def memory_read() -> dict:
    import torch

    x = torch.ones(1 << 28, dtype=torch.int8).view(torch.int64)  # 256 MB, beyond any cache
    return figure(x.nbytes / timed(lambda: x.sum(), 2) / 1e9, "GB/s")


# --- train


def train_ours(s: Settings, dtype: str) -> dict:
    import torch

    from engine import machine
    from model import GPT, GPTConfig

    here = machine.pick(dtype=dtype)
    machine.start(here, deterministic=False)
    model = GPT(GPTConfig(**SHAPE)).to(here.device)
    model.init_weights(0, zero_init=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    gradients = machine.GradientSum(parameters) if here.world > 1 else None
    x = torch.randint(SHAPE["vocab_size"], (s.rows, s.length + 1), device=here.device)

    def step() -> None:
        with here.autocast():
            loss = model(x[:, :-1], x[:, 1:].contiguous()) / here.world
        if gradients:
            gradients.active = True
        loss.backward()
        if gradients:
            gradients.wait()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    seconds, n = timed(step, steps=TRAIN_STEPS), sum(p.numel() for p in parameters)
    # products: 6 for each weight and token, but the positions; attention's scores and sums
    per_token = 6 * (n - model.wpe.weight.numel()) + 12 * 12 * 768 * s.length / 2
    tokens = s.rows * s.length * here.world / seconds
    return figure(tokens, "tokens/s", f"{per_token * tokens / 1e9:,.0f} GFLOP/s")


def train_two_processes(s: Settings) -> dict:
    """The same on two processes of one thread each, which sum their gradients."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    only = [__file__, "train", f"--rows={s.rows}", f"--length={s.length}", "--only=ours, bfloat16"]
    done = subprocess.run(
        launch + only,
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def train_transformers(s: Settings, dtype: str) -> dict:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())  # its default is the smallest GPT-2
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randint(50257, (s.rows, s.length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return figure(s.rows * s.length / timed(step, steps=TRAIN_STEPS), "tokens/s")


# --- decode


def decode_ours(
    s: Settings, dtype: str, samples: int = 1, context: int = 1, quantize: str = ""
) -> dict:
    import torch

    from engine.inference import ready
    from model import GPT, GPTConfig
    from sample import generate

    model = GPT(GPTConfig(**SHAPE))
    model.init_weights(0, zero_init=False)
    model = ready(model.eval().to(getattr(torch, dtype)), quantize, samples)
    prompt = torch.randint(SHAPE["vocab_size"], (context,)).tolist()
    steps = generate(model, prompt, 10**9, temperature=0, num_samples=samples)
    next(steps)  # the prompt is read

    def some() -> None:
        for _ in range(s.tokens // 4):
            next(steps)

    return figure(samples * (s.tokens // 4) / timed(some, 4), "tokens/s")


def first_token(s: Settings) -> dict:
    """sample.py on a checkpoint of that shape: seconds to its first token, without import torch."""
    import torch

    from engine import checkpoint
    from model import GPT, GPTConfig
    from tokenizer import published_tokenizer

    model = GPT(GPTConfig(**SHAPE))
    model.init_weights(0, zero_init=False)
    state = dict(step=1, settings={}, model=asdict(model.config))
    with tempfile.TemporaryDirectory() as run:
        tensors = model.state_dict(), {"none": torch.zeros(1)}
        checkpoint.save(Path(run), 1, *tensors, state, published_tokenizer("gpt2"))

        def start(*command: str) -> float:
            begin = time.perf_counter()
            with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as process:
                process.stdout.read(2)  # the prompt, and a byte more
                seconds = time.perf_counter() - begin
                process.kill()
            return seconds

        sample = str(Path(__file__).with_name("sample.py"))
        later = [
            start(sample, run, "--prompt=a") - start("-c", "import torch; print('ab')")
            for _ in range(5)
        ]
    return figure(statistics.median(later), "s", "later than import torch alone")


def int8_loss(s: Settings) -> dict:
    """By how much weights of eight bits raise the validation loss of a run (unpacked first, since
    evaluation has many rows: the same weights, multiplied another way)."""
    from dataset import Dataset
    from engine import machine
    from engine.checkpoint import find, load_weights
    from engine.inference import ready
    from evaluate import evaluate

    here = machine.pick("cpu")
    model, _, state = load_weights(find(s.run))
    settings = state["settings"]
    split = Dataset(settings["data"], settings["tokenizer"]).split("val")
    model = model.to(here.dtype)
    before, _ = evaluate(model, split, here)
    after, _ = evaluate(ready(model, "int8"), split, here)
    return figure(1000 * (after - before), "nats / 1000", f"{before:.4f} becomes {after:.4f}")


def decode_transformers(s: Settings, dtype: str) -> dict:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).to(getattr(torch, dtype)).eval()
    prompt = torch.randint(50257, (1, 1))

    def run() -> None:
        model.generate(prompt, max_new_tokens=s.tokens, min_new_tokens=s.tokens, do_sample=False)

    return figure(s.tokens / timed(run, 4), "tokens/s")


def decode_ctranslate2(s: Settings, dtype: str) -> dict:
    import ctranslate2
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        # the converter reads a folder in Hugging Face layout, tokenizer included
        GPT2LMHeadModel(GPT2Config()).save_pretrained(f"{folder}/hf")
        write_gpt2_tokenizer(Path(folder) / "hf")
        converter = ctranslate2.converters.TransformersConverter(f"{folder}/hf")
        converter.convert(f"{folder}/ct2", quantization=dtype)
        cores = len(os.sched_getaffinity(0))
        generator = ctranslate2.Generator(f"{folder}/ct2", "cpu", intra_threads=cores)

        def run() -> None:
            generator.generate_batch(
                [["a"]], max_length=s.tokens, min_length=s.tokens, sampling_topk=1
            )

        return figure(s.tokens / timed(run, 4), "tokens/s")


def write_gpt2_tokenizer(folder: Path) -> None:
    """A vocabulary of the right size: speed does not depend on what the tokens mean."""
    from tokenizers import Tokenizer, models

    end = "<|endoftext|>"
    vocab = {end: 50256, "a": 0} | {f"t{i}": i for i in range(1, 50256)}
    Tokenizer(models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    special = dict(eos_token=end, bos_token=end, unk_token=end)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast") | special)
    )


# --- prepare


def library_text() -> str:
    """About 64 MB: the standard library, several times over."""
    from engine.sources import documents

    texts = ["".join(pieces) for pieces in documents("python", "", "text")]
    text = "".join(texts)
    return text * (64_000_000 // len(text) + 1)


def encode_ours(s: Settings) -> dict:
    """Our whole prepare.py on a file of that text: reading, cleaning and writing included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(library_text(), encoding="utf-8")
        command = [sys.executable, "prepare.py", str(path), "--tokenizer=gpt2"]
        start = time.perf_counter()
        subprocess.run(
            [*command, f"--out={folder}/out"],
            check=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        meta = json.loads((Path(folder) / "out" / "meta.json").read_text(encoding="utf-8"))
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    return figure(tokens / seconds / 1e6, "M tokens/s", "whole command")


def encode_tiktoken(s: Settings) -> dict:
    """tiktoken's own batch call on the same text, in documents of a megabyte, on all cores."""
    from prepare import cores
    from tokenizer import published_tokenizer

    encoding, text = published_tokenizer("gpt2").encoding, library_text()
    parts = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
    start = time.perf_counter()
    tokens = sum(map(len, encoding.encode_ordinary_batch(parts, num_threads=cores())))
    return figure(tokens / (time.perf_counter() - start) / 1e6, "M tokens/s", "encoding only")


# --- loss


def whole_command(s: Settings, name: str) -> dict:
    """The whole command of a config: its wall-clock time, and the loss it ends with."""
    from engine.metrics import best_row

    root, losses, seconds = Path(__file__).parent, [], []
    for seed in range(1, s.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", f"config/{name}.py", f"--seed={seed}"]
            start = time.perf_counter()
            subprocess.run(
                [*command, f"--out={folder}/run"], check=True, cwd=root, stdout=sys.stderr
            )
            seconds.append(time.perf_counter() - start)
            row = best_row(Path(folder) / "run")
            losses.append((row["val_loss"], row["val_bpb"]))
    loss, bpb = sorted(losses)[len(losses) // 2]
    return figure(statistics.median(seconds), "s", f"loss {loss:.4f}, {bpb:.4f} bits per byte")


LIMITS = {
    "matrix product, float32": lambda s: matrix_product("float32"),
    "matrix product, bfloat16": lambda s: matrix_product("bfloat16"),
    "memory read": lambda s: memory_read(),
}
VARIANTS = {
    "train": LIMITS
    | {
        "ours, bfloat16": lambda s: train_ours(s, "bfloat16"),
        "ours, float32": lambda s: train_ours(s, "float32"),
        "ours, two processes of a thread": train_two_processes,
        "transformers, bfloat16": lambda s: train_transformers(s, "bfloat16"),
        "transformers, float32": lambda s: train_transformers(s, "float32"),
    },
    "decode": LIMITS
    | {
        "ours, bfloat16": lambda s: decode_ours(s, "bfloat16"),
        "ours, float32": lambda s: decode_ours(s, "float32"),
        "ours, int8": lambda s: decode_ours(s, "bfloat16", quantize="int8"),
        "ours, bfloat16, eight sequences": lambda s: decode_ours(s, "bfloat16", samples=8),
        "ours, bfloat16, behind 900 tokens": lambda s: decode_ours(s, "bfloat16", context=900),
        "transformers, bfloat16": lambda s: decode_transformers(s, "bfloat16"),
        "transformers, float32": lambda s: decode_transformers(s, "float32"),
        "sample.py, first token": first_token,
        "loss of int8 weights": int8_loss,
        "CTranslate2, float32": lambda s: decode_ctranslate2(s, "float32"),
        "CTranslate2, int8": lambda s: decode_ctranslate2(s, "int8"),
    },
    "prepare": {"ours": encode_ours, "tiktoken": encode_tiktoken},
    "loss": {
        "config/shakespeare.py": lambda s: whole_command(s, "shakespeare"),
        "config/small.py": lambda s: whole_command(s, "small"),
    },
}


if __name__ == "__main__":
    settings.run(main)
