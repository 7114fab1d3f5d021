"""What OpenAI's clients send: requests checked by one table. answers.py has what they expect.

A field that changes the answer is obeyed or refused by name; one that does not is ignored. Every
mistake of a client is a `Refusal` with a status of 4xx, since clients send again what met a 5xx.
Source: platform.openai.com/docs/api-reference, and vLLM for top_k, return_token_ids and
continue_final_message.
"""

import difflib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizer import ROLES, Tokenizer

STOPS, STOP_LENGTH = 4, 200
ALTERNATIVES = 20
DEFAULT_TOKENS = 16  # of a completion; of a chat what the context has left
MOST_TOKENS = 1 << 20  # that may be asked for; the context bounds what is given

# what would change the answer, and is not to be had: the values that change nothing
NEUTRAL = dict(
    allowed_token_ids=(None,),
    audio=(None,),
    bad_words=(None, []),
    best_of=(None, 1),
    frequency_penalty=(None, 0),
    function_call=(None, "none", "auto"),
    functions=(None, []),
    grammar=(None, ""),
    guided_choice=(None,),
    guided_grammar=(None,),
    guided_json=(None,),
    guided_regex=(None,),
    ignore_eos=(None, False),
    json_schema=(None, {}),
    length_penalty=(None, 1),
    logit_bias=(None, {}),
    min_p=(None, 0),
    min_tokens=(None, 0),
    mirostat=(None, 0),
    modalities=(None, ["text"]),
    prediction=(None,),
    presence_penalty=(None, 0),
    prompt_logprobs=(None,),
    repetition_penalty=(None, 1),
    response_format=(None, {"type": "text"}),
    stop_token_ids=(None, []),
    structured_outputs=(None,),
    suffix=(None, ""),
    tool_choice=(None, "none", "auto"),
    tools=(None, []),
    truncate_prompt_tokens=(None,),
    typical_p=(None, 1),
    use_beam_search=(None, False),
    web_search_options=(None,),
)
KNOWN = {*NEUTRAL, "model", "prompt", "messages", "n", "seed"}
KNOWN |= {"max_tokens", "max_completion_tokens"}
KNOWN |= {"temperature", "top_p", "top_k", "stop", "logprobs", "top_logprobs", "echo", "stream"}
KNOWN |= {"stream_options", "return_token_ids", "continue_final_message", "add_generation_prompt"}


class Refusal(Exception):
    """What a client has to change: one sentence, the field, a code, and the status of HTTP."""

    def __init__(self, message: str, param: str | None = None, code: str = "", status: int = 400):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error"}
        kinds |= {500: "server_error", 403: "permission_error"}
        kind = kinds.get(status, "invalid_request_error")
        error = dict(message=message, type=kind, param=param, code=code or None)
        self.status, self.body = status, {"error": error}


def read(body: bytes) -> dict:
    """The object of a request. Raises Refusal for what is no JSON, as NaN is none."""

    def no_number(word: str):
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise Refusal(f"the body is no JSON in UTF-8: {reason}") from e
    if not isinstance(found, dict):
        raise Refusal('the body has to be a JSON object, as in {"prompt": "def "}')
    return found


def number(body: dict, name: str, kind: type, default, least: float, most: float):
    """A field of one number. A bool is none, nor is 1.5 a whole one."""
    value = body.get(name)
    if value is None:
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    sound = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (sound and (kind is float or whole) and least <= value <= most):
        what = "a whole number" if kind is int else "a number"
        raise Refusal(f"{name}={value!r:.60} should be {what} from {least} to {most}", name)
    return kind(value)


def flag(body: dict, name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name}={value!r:.60} should be true or false", name)
    return default if value is None else value


def text(value, name: str) -> str:
    """A string, or parts of type text joined. Raises Refusal; also for half a surrogate pair."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value if isinstance(part.get("type"), str)}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in value):
            value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise Refusal(f"{name} should be text, or parts of type text: {value!r:.60}", name)
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise Refusal(f"{name} holds half a surrogate pair, which is no text", name) from e
    return value


@dataclass
class Served:
    """What is served: the names of the model, its vocabulary, and its limits."""

    name: str
    tokenizer: Tokenizer
    context: int
    slots: int
    most: int = 0  # tokens of an answer; 0 is no bound but the context
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        vocabulary = self.tokenizer.encoding._mergeable_ranks
        self.longest = max(map(len, vocabulary))  # bytes of a token

    def models(self) -> dict[str, str]:
        """Name to task: of a model that knows tasks, `name:task` asks for one."""
        tasks = self.tokenizer.tasks() if self.tokenizer.markers else {}
        return {self.name: ""} | {f"{self.name}:{task}": task for task in tasks}

    def about(self, name: str) -> dict:
        """Raises Refusal for a model that is not there."""
        if not isinstance(name, str) or name not in self.models():
            there = ", ".join(self.models())
            message = f"there is no model {name!r:.80}: choose {there}"
            raise Refusal(message, "model", "model_not_found", 404)
        found = dict(id=name, object="model", created=self.created, owned_by="nutshell")
        return found | dict(max_model_len=self.context)


@dataclass
class Ask:
    """A checked request, of a chat or of completions."""

    chat: bool
    model: str
    prompts: list[list[int]]
    before: list[str]  # what stands in front of the answers: the text of each prompt
    echo: bool  # and is given back
    n: int
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    options: dict
    top_logprobs: int | None
    stream: bool
    usage: bool
    ids: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def check(body: dict, chat: bool, served: Served, clean: Callable[[str], str]) -> Ask:
    """A request to the model that is `served`. `clean` gives back a text, or raises Refusal.

    Raises Refusal, which names the field, for what cannot be given.
    """
    model = body.get("model", served.name)
    served.about(model)
    for name in {*body} - KNOWN:  # a name that says nothing to us is ignored, a slip is told
        if near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.85):
            raise Refusal(f"unknown field {name!r:.40}: did you mean {near[0]}?", name)
    for name, values in NEUTRAL.items():
        value = body.get(name)
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
        ):
            raise Refusal(f"{name} is not supported: leave it out", name, "unsupported_parameter")
    most = number(body, "max_tokens", int, None, 0, MOST_TOKENS)
    most = number(body, "max_completion_tokens", int, most, 0, MOST_TOKENS)
    options = dict(temperature=number(body, "temperature", float, 1.0, 0, 2))
    options["top_p"] = number(body, "top_p", float, 1.0, 0, 1)
    # -1 is off, too, as in vLLM
    options["top_k"] = max(0, number(body, "top_k", int, 0, -1, MOST_TOKENS))
    n = number(body, "n", int, 1, 1, served.slots)
    found = [conversation(body, model, served, clean)] if chat else plain(body, served, clean)
    prompts = [prompt for prompt, _ in found]
    if len(prompts) * n > served.slots:
        raise Refusal(f"{len(prompts)} prompts with n={n} exceed the {served.slots} slots", "n")
    for prompt in prompts:
        if len(prompt) > served.context:
            too_long(served, "messages" if chat else "prompt", f"{len(prompt)} tokens")
    most = most if most is not None else served.context if chat else DEFAULT_TOKENS
    stream = flag(body, "stream")
    more = body.get("stream_options") or {}
    if not isinstance(more, dict) or (more and not stream):
        raise Refusal("stream_options should be an object, beside stream=true", "stream_options")
    return Ask(
        chat=chat,
        model=model,
        prompts=prompts,
        before=[said for _, said in found],
        echo=not chat and flag(body, "echo"),
        n=n,
        max_tokens=min(most, served.most or most),
        seed=number(body, "seed", int, None, -(2**63), 2**64 - 1),
        stop=stops(body),
        options=options,
        top_logprobs=wanted(body, chat),
        stream=stream,
        usage=flag(more, "include_usage"),
        ids=flag(body, "return_token_ids"),
    )


def too_long(served: Served, name: str, size: str):
    message = f"{name} has {size}, and the context of the model {served.context} tokens"
    raise Refusal(message, name, "context_length_exceeded")


def wanted(body: dict, chat: bool) -> int | None:
    """How many alternatives to each token; None for no log-probabilities."""
    if not chat:
        return number(body, "logprobs", int, None, 0, ALTERNATIVES)
    top = number(body, "top_logprobs", int, None, 0, ALTERNATIVES)
    if flag(body, "logprobs"):
        return top or 0
    if top:
        raise Refusal("top_logprobs needs logprobs=true beside it", "top_logprobs")
    return None


def stops(body: dict) -> tuple[str, ...]:
    value = body.get("stop")
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > STOPS:
        raise Refusal(f"stop should be text, or up to {STOPS} of them", "stop")
    for stop in value:
        if not isinstance(stop, str) or not 0 < len(text(stop, "stop")) <= STOP_LENGTH:
            raise Refusal(f"stop should have from 1 to {STOP_LENGTH} characters", "stop")
    return tuple(value)


def plain(body: dict, served: Served, clean) -> list[tuple[list[int], str]]:
    """Prompts of completions, each as ids and as text: text, ids, or a list of either."""
    value = body.get("prompt")
    if not isinstance(value, (str, list)) or value == []:
        raise Refusal("prompt should be text, token ids, or a list of either", "prompt")
    one = isinstance(value, str) or not isinstance(value[0], (str, list))
    found = []
    for prompt in [value] if one else value:
        if len(found) == served.slots:
            raise Refusal(f"more prompts than the {served.slots} slots", "prompt")
        if isinstance(prompt, list):
            check_ids(prompt, served)
            special = {*served.tokenizer.special.values()}
            said = served.tokenizer.decode([i for i in prompt if i not in special])
            found.append((prompt, clean(said)))
        else:
            said = text(prompt, "prompt")
            require_fit(served, "prompt", len(said))
            found.append((served.tokenizer.encode_prompt(clean(said)), said))
    return found


def check_ids(ids: list, served: Served) -> None:
    """Raises Refusal for ids of no text, but for what a document begins with."""
    tokenizer = served.tokenizer
    refused = {*tokenizer.special.values()} | {*tokenizer.unused}
    if len(ids) > served.context:
        too_long(served, "prompt", f"{len(ids)} tokens")
    for place, i in enumerate(ids):
        sound = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < tokenizer.vocab_size
        begins = (place == 0 and i == tokenizer.end_of_text) or i in tokenizer.begin
        if not sound or (i in refused and not begins):
            raise Refusal(f"prompt holds {i!r:.40}, which is the id of no text", "prompt")
    if not ids:
        raise Refusal("prompt should have a token at least", "prompt")


def require_fit(served: Served, name: str, characters: int) -> None:
    """Refuses what is too long in any case, before anything is done with it."""
    if characters > served.context * served.longest:
        too_long(served, name, f"{characters:,} characters")


def conversation(body: dict, model: str, served: Served, clean) -> tuple[list[int], str]:
    """The ids of a chat, open for an answer, or, with continue_final_message, in its middle: then
    also what has been said of it."""
    tokenizer, messages = served.tokenizer, body.get("messages")
    if not tokenizer.markers:
        message = f"{served.name} has not learned conversations"
        message += ": use /v1/completions, or train on rows"
        raise Refusal(message, "messages", "model_not_supported")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages should be a list of turns, each with role and content", "messages")
    turns = []
    for turn in messages:
        role = turn.get("role") if isinstance(turn, dict) else None
        role = "system" if role == "developer" else role
        if not isinstance(role, str) or role not in ROLES:
            raise Refusal(f"a turn should have one of the roles {', '.join(ROLES)}", "messages")
        turns.append(dict(role=role, content=text(turn.get("content"), "messages")))
    require_fit(served, "messages", sum(len(turn["content"]) for turn in turns))
    for turn in turns:
        clean(turn["content"])
    go_on = flag(body, "continue_final_message")
    if go_on == flag(body, "add_generation_prompt", not go_on):
        message = "continue_final_message and add_generation_prompt: one true, the other false"
        raise Refusal(message, "continue_final_message")
    if go_on and turns[-1]["role"] != "assistant":
        raise Refusal("the final message, to be continued, is the assistant's", "messages")
    begun = turns.pop()["content"] if go_on else ""
    task = served.models()[model]
    return tokenizer.encode_row(turns, task, open=True) + tokenizer.encode(begun), begun
