"""The filter: what it finds, that nothing leaks while text comes in pieces, and what it costs."""

import hashlib
import importlib
import json
import random
import re
import sys
from itertools import combinations

import pytest
from conftest import ROOT
from mistakes import check_sentence
from test_endings import word_tokenizer
from test_prepare import everything

import generate
import prepare
import sample
from engine import normal_form, settings, sources, wordfilter
from engine.wordfilter import Gate, WordFilter
from generate import TextStream

EXAMPLE = ROOT / "docs" / "words.example.txt"
DOCS = (ROOT / "docs" / "filter.md").read_text(encoding="utf-8")
WORDS = WordFilter(
    ["bad", "very bad", "badge of x", "坏蛋", "蛋糕坏", "bill", "ばか", "바보", "c-3"]
)
TEXTS = [  # with hits, beginnings of entries, and what has to wait for what comes behind it
    "abad bad!",
    "ba bada",
    "bad\u0301\u0302s",
    "bad\u0301\u200b",
    "b\u200ba\u0336d.",
    "very  bad",
    "b a d",
    "b a dx",
    "坏蛋糕坏了",
    "ばかはばが",
    "바보바복",
    "в4d b1ll 45",
    "ｂａｄ ﬁ bad",
    "🙂bad🙂",
    "a\u0e48 badge of",
    "กี่bad坏\u0301蛋",
    "c-3 C–3",
]


# --- what is found


def rows_of(heading: str) -> list[tuple[str, str]]:
    """The texts of a table, and whether each is caught, as it says."""
    part = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = []
    for line in re.findall(r"^\| (?!way|what)[^-].*\|$", part, re.MULTILINE):
        _, texts, said = (cell.strip() for cell in line.strip("|").split("|"))
        texts, said = re.findall("`(.*?)`", texts), said.split(", ")
        said = said * len(texts) if len(said) == 1 else said
        rows += zip(texts, said, strict=True)
    return [(re.sub(r"\\(u\w{4}|n)", lambda m: json.loads(f'"{m[0]}"'), t), s) for t, s in rows]


@pytest.mark.parametrize("heading", ["Caught", "Not caught", "False alarms"])
def test_the_table_of_the_documentation_is_what_the_filter_does(heading):
    words, rows = WordFilter(EXAMPLE), rows_of(heading)
    assert len(rows) > 20
    assert [(text, "no" if words.clean(text) else "yes") for text, _ in rows] == rows


def test_places_are_those_of_the_text_as_it_was():
    text = "So, ｖéry–\n B\u200bА\u0301D\u0302\u200d! x㎏ 大坏\u0301蛋"
    found = [(text[start:end], entry) for start, end, entry in WORDS.find(text)]
    bad = "B\u200bА\u0301D\u0302\u200d"
    assert found == [(f"ｖéry–\n {bad}", "very bad"), (bad, "bad"), ("坏\u0301蛋", "坏蛋")]
    masked = f"So, {'*' * (len(found[0][0]))}! x㎏ 大***"
    assert WORDS.mask(text) == masked and WORDS.clean(masked) and not WORDS.clean(text)
    assert WORDS.mask("x bad", "#") == "x ###"


def test_a_part_of_a_character_is_no_word():
    words = WordFilter(["2x", "株式"])
    assert words.clean("½x") and words.clean("㍿") and not words.clean("2x 株式")


def test_one_sign_may_stand_for_several_letters_and_letters_for_themselves():
    fall = WordFilter(["fall", "fail"])
    assert [entry for *_, entry in fall.find("fa11 fai1 fail")] == ["fail", "fall", "fail", "fail"]
    assert WordFilter(["fall"]).clean("fail")


def test_too_many_steps_are_forgotten_and_change_nothing(monkeypatch):
    text = "".join(random.Random(0).choices("bad very坏蛋糕1l", k=3000))
    expected = WORDS.find(text)
    monkeypatch.setattr(wordfilter, "MOST", 10)
    few = WordFilter(["bad", "very bad", "badge of x", "坏蛋", "蛋糕坏", "bill"])
    assert few.find(text) == expected and expected
    assert len(few.states) <= 11


# --- in pieces


def through(gate: Gate, pieces) -> str:
    return "".join(map(gate.feed, pieces)) + gate.end()


@pytest.mark.parametrize("text", TEXTS)
def test_no_entry_leaves_however_the_text_is_split(text):
    """Over every way to split it: what leaves is what would leave of the whole."""
    found = WORDS.find(text)
    stopped = text[: found[0][0]] if found else text
    for count in range(len(text)):
        for cuts in combinations(range(1, len(text)), count):
            pieces = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
            gate = Gate(WORDS, "mask")
            assert through(gate, pieces) == WORDS.mask(text)
            assert gate.released == len(text)
            gate = Gate(WORDS)
            assert through(gate, pieces) == stopped and gate.done
            assert gate.hit == (found[0][2] if found else "") and gate.released == len(stopped)
    assert WORDS.clean(WORDS.mask(text)) and WORDS.clean(stopped)


def test_random_texts_in_random_pieces_leak_nothing():
    rng = random.Random(1)
    symbols = "bad very1l坏蛋糕ばが바보c-3\u0301\u200b\u0e01\u0e35в4.\n½*"
    for _ in range(800):
        text = "".join(rng.choices(symbols, k=rng.randint(1, 24)))
        cuts = [0, *sorted(rng.choices(range(len(text) + 1), k=5)), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        mask = WORDS.mask(text)
        assert WORDS.clean(mask), text
        assert through(Gate(WORDS, "mask"), pieces) == mask, text
        found = WORDS.find(text)
        stopped = text[: found[0][0]] if found else text
        assert through(Gate(WORDS), pieces) == stopped and WORDS.clean(stopped), text


def test_only_what_may_become_an_entry_waits():
    """A character waits if some text behind it would make it part of a hit, and no other does."""
    rng = random.Random(2)
    forms = [normal_form.normal(entry)[0] for entry in ("bad", "very bad", "坏蛋", "bill", "ばか")]
    forms += [normal_form.spelled(form) for form in forms]
    words = WordFilter(["bad", "very bad", "坏蛋", "bill", "ばか"])
    for text in [*TEXTS, *("".join(rng.choices("bad very1l坏蛋.4x", k=7)) for _ in range(200))]:
        gate = Gate(words, "mask")
        gate.feed(text)
        endings = {form[n:] for form in forms for n in range(len(form) + 1)}
        starts = [
            start
            for ending in endings
            for start, end, _ in words.find(f"{text}{ending}!")
            if end >= len(text) > start
        ]
        assert gate.released == min(starts, default=len(text)), text


def test_a_word_at_the_very_end_waits_and_nothing_else():
    for text, waits in [("grab ", ""), ("so ba", "ba"), ("so bad", "bad"), ("so bax", "")]:
        assert Gate(WORDS).feed(text) == text.removesuffix(waits)
    for text, waits in [("坏", "坏"), ("蛋糕", "蛋糕"), ("x1", ""), ("x b", "b"), ("y é", "")]:
        assert Gate(WORDS).feed(text) == text.removesuffix(waits)
    gate = Gate(WORDS)
    assert [gate.feed(c) for c in "so badly"] == ["s", "o", " ", "", "", "", "badl", "y"]


def test_a_long_gap_costs_no_more_than_a_short_one():
    """What waits is looked through again with each token: it has to be short in normal form."""
    gate, pieces = Gate(WORDS, "mask"), ["b", *[" \n" * 9] * 500, *["\u200b\u0301"] * 500, "ad"]
    for piece in pieces:
        assert (gate.feed(piece) == "") == (piece != "ad")
        assert len(gate.symbols) < 4
    assert gate.end() == "" and gate.released == sum(map(len, pieces))


def test_a_prompt_is_what_a_word_may_begin_in():
    assert through(Gate(WORDS, before="so b"), ["ad", " x"]) == ""
    assert through(Gate(WORDS, "mask", before="so b"), ["ad", " x"]) == "** x"
    assert through(Gate(WORDS, before="so a"), ["bad", " x"]) == "bad x"
    assert through(Gate(WORDS, before="so b"), ["all"]) == "all"
    assert through(Gate(WORDS), ["bad", " x"]) == ""
    gate = Gate(WORDS, before="so b")
    assert (gate.feed("a"), gate.released, gate.feed("lly"), gate.released) == ("", 0, "ally", 4)


def test_what_has_been_released_is_known_for_the_tokens_of_logprobs():
    gate = Gate(WORDS, "mask", before="b")
    gate.feed("ad, very bad b")
    assert gate.released == len("ad, very bad ")
    shown = [gate.shows(i, i + 1) for i in range(len("ad, very bad b"))]
    assert shown == [False] * 2 + [True] * 2 + [False] * 8 + [True, False]
    gate = Gate(WORDS)
    gate.feed("so bad x")
    assert gate.done and gate.released == 3 and gate.shows(0, 3) and not gate.shows(2, 4)


def test_without_a_filter_everything_leaves_at_once():
    gate = Gate(None, before="b")
    assert gate.feed("ad") + gate.feed("") + gate.end() == "ad" and gate.released == 2


@pytest.mark.parametrize("text", ["so bad, no", "坏蛋糕", "b\u0301ad x END", "so ba END bad"])
def test_tokens_stop_strings_and_the_filter_go_together(text):
    """Bytes in, through the stream with its stop strings, through the gate: nothing in between."""
    tokenizer = word_tokenizer()
    stream, gate = TextStream(tokenizer, ["END"]), Gate(WORDS)
    out = "".join(gate.feed(stream.feed(byte)) for byte in text.encode())
    out += gate.feed(stream.end()) + gate.end()
    text = text.split("END")[0]
    found = WORDS.find(text)
    assert out == (text[: found[0][0]] if found else text)


# --- the list


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "has no entry"),
        (b"# nothing\n\n", "has no entry"),
        (b"fine\n\n\xe2\x80\x8b\n", "line 3: the entry '\\u200b' has nothing to compare"),
        (b"fine\n--- # dashes\n", "line 2: the entry '---' has nothing to compare"),
        (b"f*ne\n", "line 1: 'f*ne' has *, of which masks are made"),
        (b"fine\n\xff\n", "line 2 is not UTF-8"),
        (None, "no list of words"),
    ],
)
@pytest.mark.parametrize("script", ["sample", "prepare"])
def test_a_list_that_says_nothing_is_one_sentence(script, content, named, tmp_path, capsys):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    source = str(tmp_path / "none" if script == "sample" else EXAMPLE)
    given = [source, f"--filter={path}"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [f"{script}.py", *given])
        patch.chdir(tmp_path)
        settings.run(importlib.import_module(script).main)
    assert ended.value.code == 2 and not (tmp_path / "data").exists()
    check_sentence(capsys.readouterr().err, script, named, str(path))


def test_comments_marks_of_windows_and_several_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeff# mine\r\nbad   word # two\r\nc#x\r\n".encode())
    words = WordFilter(path)
    assert [entry for *_, entry in words.find("c#x, Bad word, two")] == ["c#x", "bad   word"]
    assert words.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- prepare.py


def rows_file(folder, *texts):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    return path


def test_prepare_drops_or_masks_and_counts(tmp_path, capsys):
    texts = [f"a clean text of number {i}" for i in range(40)]
    path = rows_file(tmp_path, *texts, "oh h3ck", "DARN, heck", "the 坏蛋")
    common = [str(path), "--tokenizer=bytes", "--workers=1", f"--filter={EXAMPLE}"]
    prepare.main([*common, f"--out={tmp_path / 'a'}"])
    assert "3 filtered documents" in capsys.readouterr().out
    assert everything(tmp_path / "a") == sorted(texts)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["filter"] == {"filtered": 3, "masked": 0, "words masked": 0}
    assert meta["settings"]["filter_sha256"] == WordFilter(EXAMPLE).sha256
    prepare.main([*common, f"--out={tmp_path / 'b'}", "--filtered=mask"])
    assert "4 words masked" in capsys.readouterr().out
    assert everything(tmp_path / "b") == sorted([*texts, "oh ****", "****, ****", "the **"])
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    assert meta["filter"] == {"filtered": 0, "masked": 3, "words masked": 4}


def test_prepare_filters_the_turns_of_rows(tmp_path):
    said = [("what is it?", "a scoundrel"), *((f"is it {i}?", f"it is {i}") for i in range(60))]
    turns = [[("user", question), ("assistant", answer)] for question, answer in said]
    rows = [[dict(role=role, content=text) for role, text in row] for row in turns]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(messages=row)) + "\n" for row in rows))
    common = [str(path), "--tokenizer=bytes", "--workers=1", f"--filter={EXAMPLE}"]
    prepare.main([*common, f"--out={tmp_path / 'a'}"])
    prepare.main([*common, f"--out={tmp_path / 'b'}", "--filtered=mask"])
    text = {name: "".join(everything(tmp_path / name)) for name in "ab"}
    assert "scoundrel" not in text["a"] + text["b"] and "a *********" in text["b"]
    assert text["a"].count("is it 1?") == text["b"].count("is it 1?") == 1


def test_a_word_across_the_pieces_of_a_large_text_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 64)
    text = "".join(f"{i} bad\nword {'x' * (i % 40)} assassin\n" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    argv = [str(tmp_path / "text.txt"), f"--out={tmp_path / 'out'}", "--filtered=mask"]
    prepare.main([*argv, "--tokenizer=bytes", "--workers=1", f"--filter={EXAMPLE}", "--test=0"])
    parts = everything(tmp_path / "out")
    assert sorted("".join(parts)) == sorted(WordFilter(EXAMPLE).mask(text))
    assert "bad\nword" not in "".join(parts)


def test_a_changed_list_is_noticed(tmp_path, capsys):
    path = rows_file(tmp_path, *(f"a text of number {i}" for i in range(40)))
    words = tmp_path / "words.txt"
    argv = [str(path), f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--workers=1"]
    argv += [f"--filter={words}"]
    words.write_text("heck\n")
    prepare.main(argv)
    prepare.main(argv)
    assert "already prepared" in capsys.readouterr().out
    words.write_text("heck\nnumber 7\n")
    with pytest.raises(ValueError, match="was made with another filter_sha256"):
        prepare.main(argv)
    prepare.main([*argv, "--overwrite"])
    assert "a text of number 7" not in everything(tmp_path / "out")
    with pytest.raises(ValueError, match="was made with another filter "):
        prepare.main(argv[:-1])


@pytest.mark.parametrize("script, how", [("sample", "stop"), ("prepare", "drop")])
def test_how_without_a_list_is_refused(script, how):
    with pytest.raises(ValueError, match="filtered='mask' should be given with --filter"):
        importlib.import_module(script).main(["none", "--filtered=mask"])
    with pytest.raises(ValueError, match=f"filtered='x' should be one of {how}, mask"):
        importlib.import_module(script).main(["none", "--filtered=x"])


# --- sample.py


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    from conftest import TINY

    import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text("")
    argv = [str(folder / "tiny.py"), f"--data={data}", f"--out={folder / 'run'}", *TINY]
    assert train.main([*argv, "--steps=1"]) == 0
    return folder / "run"


def test_samples_end_before_an_entry_or_are_masked(run, capsys, monkeypatch):
    steps = list(zip(b"ck, heck.", b"cked heck", b"heck, x!!", strict=True))
    monkeypatch.setattr(generate, "generate", lambda *_, **how: iter(steps))
    given = [str(run), f"--filter={EXAMPLE}", "--prompt=he"]
    sample.main([*given, "--num_samples=3"])
    out, err = capsys.readouterr()
    assert out.split("\n")[1::2] == ["he", "hecked ", "heheck, x!!"]
    assert err == "".join(f"(sample {i} stopped before 'heck', of {EXAMPLE})\n" for i in (1, 2))
    sample.main(given)
    assert capsys.readouterr() == ("he\n", f"(stopped before 'heck', of {EXAMPLE})\n")
    sample.main([*given, "--filtered=mask", "--num_samples=3"])
    out, err = capsys.readouterr()
    assert out.split("\n")[1::2] == ["he**, ****.", "hecked ****", "heheck, x!!"] and not err


def test_a_prompt_with_an_entry_is_refused_before_anything_is_loaded(tmp_path):
    for prompt in ("oh, h3ck!", "坏 蛋"):
        with pytest.raises(ValueError, match=r"the prompt has '\w+' in it, which .*example.txt"):
            sample.main([str(tmp_path / "none"), f"--filter={EXAMPLE}", f"--prompt={prompt}"])
    with pytest.raises(ValueError, match="the system's message has 'darn' in it"):
        sample.main(["none", f"--filter={EXAMPLE}", "--chat", "--system=darn"])


def test_a_conversation_refuses_a_turn_and_goes_on(run, capsys, monkeypatch):
    monkeypatch.setattr(sample.console, "lines", lambda: iter(["oh heck", "fine"]))
    sample.main([str(run), f"--filter={EXAMPLE}", "--interactive", "--max_tokens=2"])
    out, err = capsys.readouterr()
    assert "the prompt has 'heck' in it" in err and out.count("\n") == 1
