"""`generate` for Python, as fast as sample.py: by a twin of the model, which itself stays as it is.

A model that is made ready to generate (engine/inference.py) can neither learn nor be saved. So it
is a copy that is made ready, once, and anew when weights have changed. It shares the weights of the
model, but for those that it keeps in another layout or number type.
"""

import copy
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn

import generate as book
import speculate as speculation
from engine import inference, machine, replay
from engine.blas import using
from model import GPT

twins: WeakKeyDictionary = WeakKeyDictionary()  # of a model: {form: (state of its weights, twin)}


def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    num_samples: int = 1,
    speculate: str | GPT = "",
    dtype: str = "float32",
    **options,
) -> Iterator[list[int]]:
    """`generate` of generate.py, with the products, the threads and the number type of sample.py.

    `speculate` is "lookup", or a smaller model with the same tokenizer, see speculate.py: the same
    text, faster, for one sample. `dtype` is that of the products: "auto" takes what sample.py takes
    here, which may be bfloat16; a model that is not of float32 keeps its own.
    """
    if speculate and num_samples > 1:
        raise ValueError(f"num_samples={num_samples} should be 1 with speculate")
    require_guesser(speculate, model, options)
    ready, threads = twin(model, num_samples, dtype, bool(speculate))
    if speculate:
        guess = speculation.lookup
        if speculate != "lookup":
            small, _ = twin(speculate, 1, dtype)
            more = options.get("seed", 0), options.get("markers")
            guess = speculation.Draft(small, ready, *more)
        steps = speculation.speculate(ready, prompt, max_tokens, guess, **options)
    else:
        steps = book.generate(ready, prompt, max_tokens, num_samples=num_samples, **options)
    while True:
        with using(threads):
            new = next(steps, None)
        if new is None:
            return
        yield new


def require_guesser(speculate: str | GPT, model: GPT, options: dict) -> None:
    """Raises ValueError for what cannot guess what `model` writes."""
    if isinstance(speculate, str):
        if speculate not in ("", "lookup"):
            raise ValueError(f"speculate={speculate!r} should be 'lookup', or a smaller model")
        return
    if speculate.config.vocab_size != model.config.vocab_size:
        raise ValueError("speculate should be a model with the same tokenizer")
    if "pick" in options:
        raise ValueError("speculate by a model follows temperature and the like: leave out pick")


def twin(model: GPT, rows: int, dtype: str, several: bool = False) -> tuple[GPT, int]:
    """One that generates `rows` texts as `model` would, see `ready`; the threads for it."""
    like, parameters = model.wte.weight, [*model.parameters()]
    if like.dtype != torch.float32:
        dtype = str(like.dtype).removeprefix("torch.")
    here = machine.pick(str(like.device), dtype, "false", rows, model.config.parameters())
    with using(torch.get_num_threads()):
        machine.use_threads("auto", here, model, rows)
        threads = torch.get_num_threads()
    if isinstance(model, inference.FastGPT):  # is ready itself
        return model, threads
    state = [*map(mark, parameters), replay.structure(model)]
    made, form = twins.setdefault(model, {}), (rows > 1, several, here.dtype)
    if form not in made or made[form][0] != state:
        like = dict(requires_grad=False)
        shared = {id(p): nn.Parameter(p.detach().to(here.dtype), **like) for p in parameters}
        ready = copy.deepcopy(model, shared).eval()
        with using(threads):
            inference.ready(ready, rows=rows, several=several)
        made[form] = state, ready
    return made[form][1], threads


def mark(p: torch.Tensor) -> tuple[int, int]:
    """Changes with the numbers of p. Its version does not: a fused optimizer leaves that alone."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    return p.data_ptr(), int(p.detach().contiguous().view(bits).sum(dtype=torch.int64))
