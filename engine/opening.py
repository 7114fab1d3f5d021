"""Before sample.py writes: its settings, whether they go together, and the models, made ready."""

from functools import lru_cache

import objectives
from engine import locked, settings
from engine.checkpoint import find, load_weights
from engine.wordfilter import WordFilter


def check(s) -> None:
    """Raises ValueError for settings that do not go together."""
    talking = s.interactive or s.chat
    alone = "left out in a conversation (--interactive, --chat)"
    settings.require(not (s.prompt and s.prompt_file), s, "prompt", "left out beside prompt_file")
    settings.require(not (s.prompt and talking), s, "prompt", alone)
    settings.require(not (s.prompt_file and talking), s, "prompt_file", alone)
    settings.require(not s.system or s.chat or s.task, s, "system", "given with --chat or --task")
    settings.require(s.beam == 1 or s.num_samples == 1, s, "num_samples", "1 with --beam")
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        off = getattr(s, name) in (getattr(type(s), name), 0)
        settings.require(s.beam == 1 or off, s, name, "left out with --beam, which draws nothing")
    one = s.beam == 1 and not s.grid
    settings.require(one or not s.speculate, s, "speculate", "left out with --beam or --grid")
    asked = s.prompt or s.prompt_file or talking or s.grid or not s.task
    settings.require(asked, s, "prompt", "a question for --task, or give --interactive")
    texts = talking or s.prompt_file or s.beam > 1 or s.system or s.stop or s.filter
    settings.require(not (s.grid and texts), s, "grid", "left out but with a --prompt of labels")
    settings.require(s.filter or s.filtered == "stop", s, "filtered", "given with --filter")


@lru_cache
def listed(filter: str) -> WordFilter | None:
    """The words of the list that --filter names."""
    return WordFilter(filter) if filter else None


def require_clean(prompt: str, s) -> None:
    """Raises ValueError if a word of --filter stands in what the model is to read."""
    if words := listed(s.filter):
        words.require_clean(s.system, "the system's message")
        words.require_clean(prompt, "the prompt")


def load(s) -> tuple:
    """The model of `s.run`, ready for as many samples as are asked for, its tokenizer, and the
    smaller model that guesses for it, if --speculate names one. Of pictures that nobody has counted
    `s.num_samples` becomes images.EACH. Raises ValueError."""
    from engine import inference, machine

    path = find(s.run, s.checkpoint)
    smaller = find(s.speculate) if s.speculate not in ("", "lookup") else None
    locked.use(s.passphrase_file, path, *([smaller] if smaller else []))
    model, tokenizer, state = load_weights(path)
    objectives.require_writer(state, s.run)
    draft = load_draft(smaller, tokenizer, s) if smaller else None
    if s.chat or s.task:
        tokenizer.encode_row([], s.task)  # a model that has not learned from rows is refused
    if s.grid and s.num_samples == 1:
        import images

        s.num_samples = images.EACH
    rows = max(s.num_samples, s.beam)
    here = machine.pick(s.device, s.dtype, "false", rows, model.config.parameters())
    model = model.eval().to(here.device, here.dtype)
    machine.use_threads(s.threads, here, model, rows)
    model = inference.ready(model, s.quantize, rows, parts=s.fast, several=bool(s.speculate))
    if draft:
        own = machine.pick(s.device, s.dtype, "false", 1, draft.config.parameters())
        draft = inference.ready(draft.eval().to(own.device, own.dtype), parts=s.fast)
    return model, tokenizer, draft


def load_draft(path, tokenizer, s):
    """The smaller model that --speculate names. Raises ValueError for another tokenizer."""
    small, theirs, state = load_weights(path)
    objectives.require_writer(state, s.speculate)
    same = "lookup, or a run with the very tokenizer of the large one (prepare.py --tokenizer=RUN)"
    alike = tokenizer.extends(theirs) and theirs.extends(tokenizer)
    settings.require(alike, s, "speculate", same)
    return small
