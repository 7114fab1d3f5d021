"""How transformers gives a conversation the ids that `Tokenizer.encode_row` gives it.

There, a template writes the conversation as one text, and that text is read: whoever said "<|end|>"
would end a turn. So the template puts a GUARD behind the first character of whatever may be the
beginning of a special token, which is then none; and the normaliser, which sees only what stands
between special tokens, takes it away again:

    the end is <|end|>   ──template──▶   <|user|>the end is <GUARD|end|><|end|>
                         ──normaliser──▶ <|user|>, "the end is <|end|>", <|end|>

Guards that were said are guarded as well, so that nothing is lost. No text has any: U+FDD0 is a
noncharacter, which Unicode reserves for such purposes.
"""

import json
import re

from tokenizer import ROLES, Tokenizer

GUARD = "\ufdd0"

TEMPLATE = """\
{%- if task -%}
    {%- if task not in tasks -%}
        {{- raise_exception("unknown task " ~ task ~ ": known are " ~ tasks | join(", ")) -}}
    {%- endif -%}
    {{- "<|" ~ task ~ "|>" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in roles or message.content is not string -%}
        {{- raise_exception("a message has text, and a role of " ~ roles | join(", ")) -}}
    {%- endif -%}
    {%- set said = namespace(text=message.content) -%}
    {%- for plain, guarded in guards -%}
        {%- set said.text = said.text | replace(plain, guarded) -%}
    {%- endfor -%}
    {{- "<|" ~ message.role ~ "|>" ~ said.text ~ "<|end|>" -}}
{%- endfor -%}
{{- "<|assistant|>" if add_generation_prompt else end_of_text -}}
"""


def beginnings(tokenizer: Tokenizer) -> list[str]:
    """The first two characters of the special tokens that no text gives."""
    hidden = tokenizer.special.keys() - set(tokenizer.literal)
    return sorted({text[:2] for text in hidden if len(text) > 1})


def chat_template(tokenizer: Tokenizer) -> str:
    """The `chat_template` of tokenizer_config.json, in Jinja; `task` is an option of it."""
    begin = beginnings(tokenizer)
    guards = [(c + GUARD, c + GUARD + GUARD) for c in sorted({text[0] for text in begin})]
    guards += 2 * [(text, text[0] + GUARD + text[1]) for text in begin]  # "<<<" holds "<<" twice
    literal = {text: text for text in sorted(tokenizer.literal, key=len, reverse=True)}
    for plain, guarded in guards:
        literal = {text: said.replace(plain, guarded) for text, said in literal.items()}
    # these are read in a text, here as there
    guards += [(said, text) for text, said in literal.items() if said != text]
    tasks = [name for name in tokenizer.tasks() if f"<|{name}|>" in tokenizer.special]
    values = dict(tasks=sorted(tasks), roles=ROLES, guards=guards)
    values |= dict(end_of_text=tokenizer.decode([tokenizer.end_of_text]))
    lines = [
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + TEMPLATE


def normalizer(tokenizer: Tokenizer) -> dict:
    """The step in a tokenizer.json that takes the guards away."""
    begin = beginnings(tokenizer)
    first, second = ("".join(sorted({re.escape(text[i]) for text in begin})) for i in (0, 1))
    pattern = rf"(?<=[{first}]){GUARD}(?=[{GUARD}{second}]|\z)"
    return dict(type="Replace", pattern={"Regex": pattern}, content="")
