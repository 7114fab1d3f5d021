"""What a run of rows shows at its end: answers to rows that it has not learned from."""

import re

from test_rows import prepared, save, talk

import sample


def test_the_last_question_of_three_rows_is_answered_without_chance(
    train, tmp_path, capsys, monkeypatch
):
    talks = [talk(f"{n}", f"{n}!", f"and {n + 1}", f"{n + 1}!", task="shout") for n in range(99)]
    data = prepared(tmp_path / "talks", save(tmp_path / "talks.jsonl", talks))
    rows = [data.tokenizer.decode_row(ids)[1] for ids in data.split("val").rows()][:3]
    asked, write = [], sample.write_samples

    def noted(model, tokenizer, tokens, s):
        asked.append((tokens, s.temperature, s.max_tokens))
        write(model, tokenizer, tokens, s)

    monkeypatch.setattr(sample, "write_samples", noted)
    run = train("run", "--sample_tokens=6", data=data.folder)
    prompts = [data.tokenizer.encode_row(turns[:3], "shout", open=True) for turns in rows]
    assert asked == [(prompt, 0, 6) for prompt in prompts]
    said = capsys.readouterr().out.split("rows that they have not seen:\n")[1]
    assert re.findall(r"^(.+)\n> ", said, re.MULTILINE) == [turns[2]["content"] for turns in rows]
    assert f"next: python sample.py {run} --chat" in said
