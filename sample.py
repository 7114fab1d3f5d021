"""Text from a checkpoint: python sample.py out/small --prompt="def " --num_samples=3

    --prompt="def "                     the model goes on where the prompt ends
    --task=translate --prompt="A dog"   one question to a model that has learned from rows
    --chat                              a conversation with such a model, in the terminal
    --grid=digits.png                   pictures by a model that has learned from such rows

At its plainest, from Python, that is

    from sample import generate, load_model

    model, tokenizer = load_model("out/small")                      # on the CPU, without dropout
    prompt = tokenizer.encode_prompt("def ")
    new = generate(model, prompt, 200, temperature=0.8)             # a list for each token,
    tokens = [token[0] for token in new]                            # one entry for each sample
    print("def " + tokenizer.decode(tokens))                        # also beyond an end-of-text

(this `generate` is that of generate.py, with faster parts in its model, see engine/twin.py), and
what follows is the command around it. How a token is picked is told in pick.py, how text is made of
them in generate.py, what a conversation is to a model in chat.py. torch takes a second to load, so
what needs it is imported where it is used: a mistake in the arguments is answered at once.
"""

from engine import console

if __name__ == "__main__":  # before all else: a Ctrl-C while Python loads things is no traceback
    console.leave_quietly()

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import chat
from engine import opening, settings
from engine.settings import Bound, Count, NotNegative

Png = Annotated[str, Bound("a name that ends in .png", lambda s: not s or s.endswith(".png"))]
Share = Annotated[float, Bound("above 0 and at most 1", lambda p: 0 < p <= 1)]
Penalty = Annotated[float, Bound("above 0; 1 is off", lambda x: x > 0)]
Samples = Annotated[int, Bound("from 1 to 1024", lambda n: 1 <= n <= 1024)]
Stops = Annotated[tuple, Bound("text, not nothing", all)]


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
    num_samples: Samples = 1  # continuations of the same prompt; a chat goes on with the first
    beam: Samples = 1  # width of a beam search for the likeliest text, which is no sample; 1 is off
    length_penalty: NotNegative = 0.6  # of beam search: higher makes longer answers win
    speculate: str = ""  # guess tokens, to be faster: lookup (in the text so far), or a smaller run
    stop: Stops = ()  # end a sample before this text; may be given several times
    filter: str = ""  # a list of words: prompts that have one are refused, samples end before it
    filtered: Literal["stop", "mask"] = "stop"  # or go on, with asterisks in its place
    seed: int = 1  # same seed, same text
    interactive: bool = False  # ask for one prompt after another
    chat: bool = False  # ask for one turn of a conversation after another
    system: str = ""  # what a conversation begins with, as in "Answer in one sentence."
    task: str = ""  # the prompt is a question for this task; with chat, the whole conversation
    grid: Png = ""  # draw pictures into this PNG: a row of them for each word of the prompt
    width: Count = 0  # of a picture in pixels; 0: it is square
    passphrase_file: str = ""  # opens locked weights, in memory alone: a file with the passphrase
    quantize: settings.Quantize = ""  # int8: weights of eight bits, on a CPU: faster, less exact
    device: settings.Device = "auto"  # auto, cpu, mps, cuda, or one GPU such as cuda:1
    dtype: settings.DType = "auto"  # of the weights and of matrix products
    threads: settings.Threads = "auto"  # of a CPU: a number, or chosen by the size of the model
    fast: bool = True  # parts that compute the same as model.py, faster; false runs model.py itself


def __getattr__(name: str):
    """For Python users: `from sample import load_model, generate`."""
    if name == "load_model":
        from engine.checkpoint import load_model

        return load_model
    if name == "generate":
        from engine.twin import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str]) -> None:
    s = settings.load(Settings, argv, "Generate text from a checkpoint.", "run")
    opening.check(s)
    prompt = read_prompt(s)
    opening.require_clean(prompt, s)
    model, tokenizer, draft = opening.load(s)
    limit = model.config.block_size

    def go_on(prompt: str, s: Settings, echo: str = "") -> str:
        tokens = read(prompt, tokenizer, limit, s)
        return write_samples(model, tokenizer, tokens, s, prompt, echo, draft)

    def answer(turns: list[dict], s: Settings) -> str:
        tokens = chat.recalled(turns, tokenizer, limit, s)
        return write_samples(model, tokenizer, tokens, s, draft=draft)

    if s.grid:
        import images

        images.draw(model, tokenizer, s)
    elif s.chat or s.interactive:
        chat.converse(s, go_on, answer)
    elif s.task:
        answer([chat.turn("user", prompt)], s)
    else:
        go_on(prompt, s, echo=prompt)


def read_prompt(s: Settings) -> str:
    """What is to be continued."""
    prompt = s.prompt
    if s.prompt_file:
        file = sys.stdin.buffer if s.prompt_file == "-" else open(s.prompt_file, "rb")
        prompt = file.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if s.task:
        prompt = prompt.removesuffix("\n")  # of the file, and not of the question
    return prompt


def read(prompt: str, tokenizer, limit: int, s: Settings) -> list[int]:
    """What a model of context `limit` goes on from. A beam search ends with the context, which text
    that is drawn does not (see generate): so there it leaves room."""
    tokens = tokenizer.encode_prompt(prompt)
    room, fit = limit, "fit the context"
    if s.beam > 1:
        room, fit = limit - min(s.max_tokens, limit // 4), f"leave room in the context of {limit}"
    if len(tokens) > room:
        print(f"the prompt has {len(tokens)} tokens; only its last {room} {fit}", file=sys.stderr)
    if s.beam == 1:  # `generate` cuts by itself, and guesses look further back
        return tokens
    return tokens[-room:]


def new_tokens(model, tokenizer, tokens: list[int], s: Settings, draft) -> Iterator[list[int]]:
    """The next token of each sample that continues `tokens`, again and again."""
    from generate import beam, generate
    from speculate import Draft, lookup, speculate

    most = s.max_tokens
    if s.chat or s.task:  # an answer, too, ends with the context
        most = min(most, model.config.block_size + 1 - len(tokens))
    if s.beam > 1:
        best = beam(model, tokenizer, tokens, most, s.beam, s.length_penalty) if most else []
        return ([token] for token in best)
    write = partial(generate, num_samples=s.num_samples)
    if s.speculate and s.num_samples > 1:
        note = f"speculate serves one sample: these {s.num_samples} are written side by side"
        print(note, file=sys.stderr)
    elif s.speculate:
        guess = Draft(draft, model, s.seed, tokenizer.markers) if draft else lookup
        write = partial(speculate, guess=guess)
    options = dict(
        unused=tokenizer.unused,
        markers=tokenizer.markers,
        seed=s.seed,
        repetition_penalty=s.repetition_penalty,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )
    return write(model, tokens, most, **options)


def write_samples(
    model, tokenizer, tokens: list[int], s: Settings, before: str = "", echo: str = "", draft=None
) -> str:
    """Prints, after `echo`, what follows `tokens`: one sample as it comes, or several in turn.

    Returns the first. A word of --filter may begin in the text `before` it.
    """
    from engine.transcript import Transcript

    count = 1 if s.beam > 1 else s.num_samples
    words = opening.listed(s.filter)
    outputs = [Transcript(tokenizer, s.stop, words, s.filtered, before) for _ in range(count)]
    texts = [""] * count
    live = count == 1
    if live:
        print(echo, end="", flush=True)
    for new in new_tokens(model, tokenizer, tokens, s, draft):
        for i, output in enumerate(outputs):
            if output.finish:
                continue
            text = output.feed(new[i]).text  # what is certain by now: whole characters
            texts[i] += text
            if live:
                print(text, end="", flush=True)
        if all(output.finish for output in outputs):
            break
    for i, output in enumerate(outputs):
        rest = output.end().text
        texts[i] += rest
        print(rest if live else f"--- sample {i + 1} of {count}\n{echo}{texts[i]}")
        who = "" if live else f"sample {i + 1} "
        if output.finish == "content_filter":
            print(f"({who}stopped before {output.gate.hit!r}, of {s.filter})", file=sys.stderr)
        elif output.stream.stopped_by:
            print(f"({who}stopped before {output.stream.stopped_by!r})", file=sys.stderr)
    return texts[0]


if __name__ == "__main__":
    settings.run(main)
