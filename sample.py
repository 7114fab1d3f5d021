"""Text from a checkpoint: python sample.py out/small --prompt="def " --num_samples=3

The command around generate.py. torch takes a second to load, so what needs it is imported where it
is used: a mistake in the arguments is answered at once.
"""

from engine import console

if __name__ == "__main__":  # before all else: a Ctrl-C while Python loads things is no traceback
    console.leave_quietly()

import sys
from dataclasses import dataclass, replace
from typing import Annotated

from engine import settings
from engine.settings import Bound, Count, NotNegative

Share = Annotated[float, Bound("above 0 and at most 1", lambda p: 0 < p <= 1)]
Penalty = Annotated[float, Bound("above 0; 1 is off", lambda x: x > 0)]
Samples = Annotated[int, Bound("from 1 to 1024", lambda n: 1 <= n <= 1024)]
Stops = Annotated[tuple, Bound("text, not nothing", all)]
Quantize = Annotated[str, Bound("int8 or left out", ("", "int8").__contains__)]

# what can change in the middle of an interactive session
CHANGEABLE = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
CHANGEABLE += ("num_samples", "stop", "seed")


@dataclass
class Settings:
    run: str = "out/small"  # folder of a run, or one checkpoint of it
    checkpoint: str = "best"  # of a run: best (lowest validation loss), latest, or a step
    prompt: str = ""  # text to continue; empty begins a new document
    prompt_file: str = ""  # read the prompt from this file; - is standard input
    max_tokens: Count = 200  # tokens to generate for each sample
    temperature: NotNegative = 0.8  # 0 takes the likeliest token, 1 samples from the model as it is
    top_k: Count = 0  # choose among the k likeliest tokens; 0 is all
    top_p: Share = 1.0  # choose among the likeliest tokens that together have this probability
    repetition_penalty: Penalty = 1.0  # above 1, tokens of the context are less likely; try 1.2
    num_samples: Samples = 1  # continuations of the same prompt
    stop: Stops = ()  # end a sample before this text; may be given several times
    seed: int = 1  # same seed, same text
    interactive: bool = False  # ask for one prompt after another
    quantize: Quantize = ""  # int8: weights of eight bits, on a CPU; faster, slightly higher loss
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of the weights and of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the model
    fast: bool = True  # parts that compute the same as model.py sooner; false runs model.py itself


def __getattr__(name: str):
    """For Python users: `from sample import load_model, generate`."""
    if name == "load_model":
        from engine.checkpoint import load_model

        return load_model
    if name == "generate":
        from generate import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Generate text from a checkpoint.", "run")
    given = "left out when prompt_file is given"
    talking = "left out in interactive mode"
    settings.require(not (s.prompt and s.prompt_file), s, "prompt", given)
    settings.require(not (s.prompt and s.interactive), s, "prompt", talking)
    settings.require(not (s.prompt_file and s.interactive), s, "prompt_file", talking)
    prompt = s.prompt
    if s.prompt_file:
        file = sys.stdin.buffer if s.prompt_file == "-" else open(s.prompt_file, "rb")
        prompt = file.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")

    from engine.checkpoint import find, load_weights

    model, tokenizer, _ = load_weights(find(s.run, s.checkpoint))

    from engine import inference, machine

    here = machine.pick(s.device, s.dtype, "false", rows=s.num_samples)
    model = model.eval().to(here.device, here.dtype)
    machine.use_threads(s.threads, here, model, s.num_samples)
    model = inference.ready(model, s.quantize, s.num_samples, parts=s.fast)
    if s.interactive:
        converse(model, tokenizer, s)
    else:
        write_samples(model, tokenizer, prompt, s)


def write_samples(model, tokenizer, prompt: str, s: Settings, echo: bool = True) -> None:
    """Prints continuations of `prompt`, behind it if `echo`: one as it comes, several in turn."""
    from generate import TextStream, generate

    tokens = tokenizer.encode_prompt(prompt)
    limit = model.config.block_size
    if len(tokens) > limit:
        note = f"the prompt has {len(tokens)} tokens; only its last {limit} fit the context"
        print(note, file=sys.stderr)
    steps = generate(
        model,
        tokens,
        s.max_tokens,
        num_samples=s.num_samples,
        seed=s.seed,
        repetition_penalty=s.repetition_penalty,
        unused=tokenizer.unused,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )
    streams = [TextStream(tokenizer, s.stop) for _ in range(s.num_samples)]
    texts = [prompt if echo else ""] * s.num_samples
    alone = s.num_samples == 1
    if alone:
        print(texts[0], end="", flush=True)
    for new in steps:
        for i, stream in enumerate(streams):
            text = stream.feed(new[i])
            texts[i] += text
            if alone:
                print(text, end="", flush=True)
        if all(stream.done for stream in streams):
            break
    for i, stream in enumerate(streams):
        text = stream.end()
        print(text if alone else f"--- sample {i + 1} of {s.num_samples}\n{texts[i]}{text}")
    for i, stream in enumerate(streams, start=1):
        if stream.stopped_by:
            who = "" if alone else f"sample {i} "
            print(f"({who}stopped before {stream.stopped_by!r})", file=sys.stderr)


def converse(model, tokenizer, s: Settings) -> None:
    """Answers one prompt after another; a line that begins with / changes a setting."""
    print("Type a prompt, or /help. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    for line in console.lines():
        try:
            if line.startswith("/"):
                s = changed(s, line)
            else:
                write_samples(model, tokenizer, line, s, echo=False)
        except KeyboardInterrupt:
            print()
        except ValueError as e:
            print(e, file=sys.stderr)


def changed(s: Settings, line: str) -> Settings:
    """The settings after `/name value`, or after `/name`, which brings the default back."""
    name, _, value = line[1:].partition(" ")
    if name in CHANGEABLE:
        words = [f"--{name}={value}"] if value else []
        given = settings.load(Settings, words, "", "run")
        s = replace(s, **{name: getattr(given, name)})
    elif name != "help":
        raise ValueError(f"/{name} cannot be changed here: /help tells what can")
    values = (f"{name}={getattr(s, name)!r}" for name in CHANGEABLE)
    print("settings, as in /temperature 0.5:", *values, file=sys.stderr)
    return s


if __name__ == "__main__":
    settings.run(main)
