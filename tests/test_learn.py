"""docs/learn says what the code does: blocks run, answers are computed, exercises can fail, whys
hold."""

import ast
import doctest
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import forked
import pytest
import torch
from conftest import CODE, ROOT

import learn
import lessons
from dataset import Dataset
from engine import preflight, settings
from lessons import ablations, languages, specimen
from tasks import repeat

NUMBERS = range(len(lessons.CHAPTERS))
PAGES = sorted(lessons.PAGES.glob("[0-9]*.md"))  # in all languages
ANSWERS = lessons.PAGES / "answers"
RIGHT, WRONG = "✓", "✗"


def answer(number: int) -> Path:
    return ANSWERS / f"{number:02}.py"


# --- the specimen


def test_the_specimen_is_small_and_whole_and_git_keeps_it():
    files = {path.name: path.stat().st_size for path in specimen.FOLDER.iterdir()}
    assert sum(files.values()) < 200_000
    assert set(files) == {"model.safetensors", "state.json", "encoding.json"} | {
        "vocab.tiktoken",
        "manifest.json",
    }
    model, tokenizer = specimen.load()  # which verifies every byte
    assert (model.num_parameters(), tokenizer.vocab_size) == (41_248, 257)
    assert tokenizer.encode_prompt("a|") == [256, 97, 124]  # as it has read each line
    header = (specimen.FOLDER / "model.safetensors").read_bytes()
    assert b"__metadata__" not in header[: 8 + int.from_bytes(header[:8], "little")]
    if shutil.which("git"):
        path = str(specimen.FOLDER / "model.safetensors")
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode
        assert ignored != 0


def test_the_specimen_is_that_of_its_command():
    from train import Settings

    state = json.loads((specimen.FOLDER / "state.json").read_text(encoding="utf-8"))
    given = settings.read_file("config/specimen.py", settings.settings_of(Settings))
    assert given.items() <= state["settings"].items()


def test_the_specimen_comes_near_the_ideal_and_its_heads_can_be_read():
    model, tokenizer = specimen.load()
    found = specimen.copied(model, tokenizer)
    assert found["right"] > 0.99
    assert found["behind"] < 0.01
    letters = (len("abcd|abcd") - 1) / 2
    assert specimen.ideal(letters) == pytest.approx(4 * 3.2581 + 2.1972, abs=1e-3)
    strings = [row["text"] for row in islice(repeat.rows("test", 0), 500)]
    least = specimen.ideal(sum(len(text) // 2 for text in strings) / len(strings))
    assert least < found["line"] < 1.03 * least
    # each head of the second layer that copies looks at the letter that it has to write
    on_next = torch.zeros(2, 4)
    for text in strings[:50]:
        weights = specimen.attention(model, specimen.read(tokenizer, text))
        bar = text.index("|") + 1
        at = range(bar, weights.size(-1) - 1)  # the bar writes letter 1, the next one letter 2
        on_next += torch.stack([weights[:, :, i, i - bar + 1] for i in at]).mean(0) / 50
    assert (on_next[1] > 0.7).sum() >= 2
    assert on_next[0].max() < 0.2


def test_strings_and_their_copies_in_splits_that_share_none(tmp_path, monkeypatch):
    import prepare

    monkeypatch.setattr(repeat, "ROWS", dict(train=900, val=90, test=90))
    out = tmp_path / "repeat"
    prepare.main(["repeat", f"--out={out}", "--tokenizer=bytes", "--workers=1"])
    seen, lengths = [], Counter()
    data = Dataset(str(out))
    assert data.kind == "text"
    for name, count in repeat.ROWS.items():
        split = data.split(name)
        text = data.tokenizer.decode(split.read(0, split.tokens).tolist())
        lines = text.split("<|endoftext|>")[:-1]
        assert len(lines) == count
        assert all(repeat.right(line[: len(line) // 2 + 1], line.split("|")[1]) for line in lines)
        seen += lines
        lengths.update(line.index("|") for line in lines)
    assert len(set(seen)) == len(seen) == 1080
    assert set(lengths) == {*range(4, 13)}
    assert all(80 < count < 160 for count in lengths.values())
    assert not repeat.right("abc|", "abd")


# --- pages


@pytest.mark.parametrize("number", NUMBERS)
def test_every_block_of_a_page_runs_and_prints_what_stands_there(number):
    torch.set_num_threads(1)
    flags = doctest.ELLIPSIS | doctest.REPORT_ONLY_FIRST_FAILURE
    first, *others = [path for path in PAGES if path.name.startswith(f"{number:02}.")]
    failed, tried = doctest.testfile(
        str(first), module_relative=False, optionflags=flags, encoding="utf-8"
    )
    assert tried
    assert not failed
    for path in others:  # the same blocks, but for the language of comments
        blocks, same = (
            [
                (languages.bare(block.source), block.want)
                for block in doctest.DocTestParser().get_examples(text)
            ]
            for text in (first.read_text(encoding="utf-8"), path.read_text(encoding="utf-8"))
        )
        assert blocks == same, path.name


@pytest.mark.parametrize("number", NUMBERS)
def test_every_answer_on_a_page_is_what_the_code_gives(number, capsys):
    torch.set_num_threads(1)
    pages = [path for path in PAGES if path.name.startswith(f"{number:02}.")]
    computed = [question() for question in lessons.chapter(number).QUESTIONS]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) >= 2 * len(computed)  # how it comes about
    sentences = [line for line in shown if re.search(r"\b[a-z]{2,} [a-z]{2,}\b", line)]
    assert all(lessons.said(line, "zh") != line for line in sentences), sentences
    for path in pages:
        asked = lessons.questions(path)
        assert [q.number for q in asked] == [f"{number}.{i + 1}" for i in range(len(computed))]
        for question, value in zip(asked, computed, strict=True):
            assert question.answer == lessons.as_printed(value, question.answer), question.number


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere_and_line_numbers_are_those_of_today(path):
    text = path.read_text(encoding="utf-8")
    assert lessons.linked(text) == text, "run python learn.py --links"
    assert lessons.SOURCE.search(text)
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.is_file(), target
        if anchor and not re.fullmatch(r"L\d+-L\d+", anchor):
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def figures_not_found(paragraph: str) -> list[str]:
    """Of a paragraph that quotes pages of docs/: decimals that stand in none, rounded or not."""
    pages = re.findall(r"(?:\]\(\.\./|\(docs/)(\w+\.md)", paragraph)
    texts = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages]
    there = [float(x) for text in texts for x in re.findall(r"\d+\.\d+", text.replace(",", ""))]
    # not our figures: names of papers, code, and the numbers of questions
    words = re.sub(r"\]\(.*?\)|`[^`]*`|arXiv:\S+|question \d+\.\d+", "", paragraph)
    told = re.findall(r"(?<![\w.])\d+\.\d+", words.replace(",", "")) if pages else []
    return [x for x in told if not any(f"{y:.{len(x.partition('.')[2])}f}" == x for y in there)]


@pytest.mark.parametrize(
    "path", [*map(lessons.page, NUMBERS), ROOT / "docs" / "log.md"], ids=lambda path: path.name
)
def test_figures_quoted_from_another_page_stand_there(path):
    paragraphs = re.split(r"\n\n", path.read_text(encoding="utf-8"))
    assert [x for paragraph in paragraphs for x in figures_not_found(paragraph)] == []
    stale = "Reading brings 2.7 points, to 76.55 ([docs/tasks.md](../tasks.md#mr))."
    assert figures_not_found(stale) == ["76.55"]


def test_line_numbers_follow_the_code_and_a_name_that_is_gone_is_told():
    first, last = lessons.lines("model.py", "Attention.forward")
    source = (ROOT / "model.py").read_text(encoding="utf-8").splitlines()
    assert "def forward" in source[first - 1]
    assert "return self.wo" in source[last - 1]
    link = lessons.linked("see [`model.py: Attention.forward`](), please")
    here = f"../../model.py#L{first}-L{last}"
    assert link == f"see [`model.py: Attention.forward`]({here}), please"
    with pytest.raises(ValueError, match="no Atention"):
        lessons.lines("model.py", "Atention")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_are_accepted(path):
    import evaluate
    import plan
    import prepare
    import sample
    import train

    known = {
        "prepare.py": (prepare.Settings, "source", "*"),
        "sample.py": (sample.Settings, "run", "?"),
        "learn.py": (learn.Settings, "chapter", "?"),
        "evaluate.py": (evaluate.Settings, "out", "?"),
        "plan.py": (plan.Settings, "runs", "*"),
    }
    commands = re.findall(r"^python (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        name, *argv = shlex.split(command)
        if name == "train.py":
            preflight.read(train.Settings, argv)
        elif name in known:
            cls, positional, nargs = known[name]
            s = settings.load(cls, argv, "", positional, nargs)
            if name == "learn.py" and s.check:
                assert s.chapter == str(int(path.name[:2]))
        else:
            assert command == "-m lessons.specimen out/specimen"


# --- exercises


@pytest.mark.parametrize("number", NUMBERS)
def test_the_answers_to_the_exercises_pass_and_stubs_do_not(number, tmp_path):
    torch.set_num_threads(1)
    lesson = lessons.chapter(number)
    exercises = [f.__name__ for of_book, f in lessons.labelled(lesson) if not of_book]
    assert len(exercises) == 2
    page = lessons.page(number).read_text(encoding="utf-8")
    letters = [page.index(f"**{number}.{letter}** `") for letter in "ab"]
    assert all(re.search(rf"`(class )?{name}\b", page[min(letters) :]) for name in exercises)

    passed = dict(lessons.check(lesson, answer(number)))
    assert not any(passed.values()), passed
    assert passed.keys() >= {*exercises}

    stub = tmp_path / "stub.py"
    nothing = "def {}(*args, **options):\n    return None\n"
    stub.write_text("".join(map(nothing.format, exercises)))
    failed = dict(lessons.check(lesson, stub))
    assert all(failed[name] for name in exercises), failed


# a chapter, what stands in its answer, what is put there instead, and which check notices
MISTAKES = [
    (0, "12 * L", "8 * L", "count"),
    (0, "net.norm(x)", "x", "read"),
    (1, "i += 2", "i += 1", "merge"),
    (1, "min(joined", "max(joined", "encode"),
    (2, "start + 1 : start + T + 1", "start : start + T", "exercises"),
    (2, "step * rows + row", "step + row", "window_of"),
    (3, " + eps", "", "rms_norm"),
    (3, "return x + ", "return ", "Block"),
    (4, " / math.sqrt(D)", "", "attend"),
    (4, "range(i + 1)", "range(T)", "attend"),
    (4, ".tril(S - T)", "", "causality"),
    (4, "S - T - 3", "S - T - 4", "causal_mask"),
    (5, "a * c - b * s", "a * c + b * s", "rotate"),
    (5, "x[..., i], x[..., i + D // 2]", "x[..., i], x[..., i - 1]", "rotate"),
    (5, "heads.transpose(1, 2)", "heads", "to_neighbours"),
    (6, "logits - logits.amax(dim=-1, keepdim=True)", "logits", "cross_entropy"),
    (6, " / math.log(2)", "", "bits_per_byte"),
    (7, "(warmup + 1)", "warmup", "learning_rate"),
    (7, "m / (1 - beta1**step)", "m", "adam_step"),
    (8, "kept[:, -1:]", "1", "min_p"),
    (8, "tokens = [logits", "tokens = tokens + [logits", "write"),
    (9, " / 3600", "", "hours"),
    (9, "(1 + 1 + 1)", "(1 + 1 + 2)", "training_bytes"),
    (10, "token != end", "True", "answers"),
    (10, " if spread else 0.0", "", "advantages"),
    (11, "eps=eps", "eps=1", "fast_norm"),
    (11, "(step - 1)", "step", "window_numbers"),
    (12, "dim=1, ", "dim=0, ", "quantize"),
    (12, "decoder.decode(part)", 'part.decode(errors="replace")', "pieces"),
]


@pytest.mark.parametrize("number, right, wrong, check", MISTAKES)
def test_a_mistake_is_found(number, right, wrong, check, tmp_path):
    torch.set_num_threads(1)
    text = answer(number).read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / "my_file.py"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    assert dict(lessons.check(lessons.chapter(number), file))[check]


def test_a_whole_copy_of_the_book_with_a_change_is_checked_and_leaves_nothing_behind(tmp_path):
    import model

    before, lesson = dict(vars(model)), lessons.chapter(4)
    file = tmp_path / "my_model.py"
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    file.write_text(source, encoding="utf-8")
    found = dict(lessons.check(lesson, file))
    assert not found["causality"]
    assert found["causal_mask"]  # the book's own is no window
    file.write_text(source.replace(".tril(S - T)", ".tril(S - T + 1)"), encoding="utf-8")
    assert "leaks" in dict(lessons.check(lesson, file))["causality"]
    assert vars(model) == before


# --- the command


def test_predictions_are_compared_and_none_are_needed(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    learn.main(["4"])
    silent = capsys.readouterr().out
    assert silent.count("= 0.503\n") == 1
    assert "predict by --answer=" in silent  # what is piped is not read
    assert RIGHT not in silent
    learn.main(["4", "--answer=0.52,64,0,b"])  # the last is left open
    told = capsys.readouterr().out
    for line in ("✓ 0.503", "✗ you said 64; it is 8.0", "✓ 0", "✓ b", "= c", "✓ 3 / 4"):
        assert f"{line}\n" in told
    assert "[0.248 0.248 0.503]" in told  # a real step, in numbers


@pytest.mark.parametrize(
    "words, value, printed, right",
    [
        ("50% ０．５ ５０％ .5", 0.503, "0.503", True),
        ("0.3 5 0.5%", 0.503, "0.503", False),
        ("131万 1.3M 1,310,720 １３１万 1300k", 1310720, "1,310,720", True),
        ("12万", 1310720, "1,310,720", False),
        ("11 11. １１。 11%", 11, "11", True),
        ("10 12", 11, "11", False),  # what can be counted
        ("0.01 1%", 0.01, "0.010", True),
        ("0 0.02 -0.01", 0.01, "0.010", False),
        ("0 0%", 1e-5, "0.0", True),
        ("b B （b） (b) b。 ｂ", "b", "b", True),
        ("a (c)", "b", "b", False),
    ],
)
def test_what_counts_as_right_however_it_is_typed(words, value, printed, right):
    body = "(a) so （b）so (c)" if isinstance(value, str) else "How many?"
    question = lessons.Question("1.1", "", body, f"**{printed}**")
    for word in words.split(" "):
        assert lessons.predicted(word, value, question) == right, word


def test_a_page_in_another_language_is_enough(tmp_path, monkeypatch, capsys):
    shutil.copytree(lessons.PAGES, tmp_path / "learn")
    page = (tmp_path / "learn" / "01.md").read_text(encoding="utf-8")
    page = page.replace("How many bytes?", "几个字节？")
    (tmp_path / "learn" / "01.zh.md").write_text(page, encoding="utf-8")
    (tmp_path / "learn" / "04.zh.md").unlink(missing_ok=True)
    monkeypatch.setattr(lessons, "PAGES", tmp_path / "learn")
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    learn.main(["1", "--language=zh", "--answer=15"])
    assert "1.1  几个字节？" in capsys.readouterr().out
    learn.main(["1", "--answer=15"])
    assert "几个字节" not in capsys.readouterr().out
    assert lessons.page(4, "zh").name == "04.md"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["13"], "chapter='13' should be a number from 0 to 12"),
        (["four"], "chapter='four' should be a number from 0 to 12"),
        (["4", "--answer=many"], "the prediction 'many' should be a number"),
        (["5", "--answer=1,1,1,z"], "the prediction 'z' should be one of a, b, c"),
        (["4", "--answer=1,2,3,4,5,6"], "6 answers, but 04.md has 5 questions"),
        (["4", "--check=nothing.py"], "no such file: 'nothing.py'"),
        (["4", "--check=README.md"], "is no Python"),
        (["4", "--check=broken.py"], "broken.py does not run: ZeroDivisionError"),
    ],
)
def test_mistakes_of_readers_cost_a_sentence(argv, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# A page\n\nThis is no Python.\n")
    Path("broken.py").write_text("1 / 0\n")
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    with pytest.raises(ValueError, match=re.escape(words)):
        learn.main(argv)


def messages() -> set[str]:
    """What the code says to readers, with {} for what it fills in."""
    found = set()
    for file in ("learn", "lessons/__init__", *(f"lessons/{name}" for name in lessons.CHAPTERS)):
        tree = ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            at = {"require": 1, "said": 0, "ValueError": 0}.get(
                ast.unparse(call.func).split(".")[-1]
            )
            if at is None or ast.unparse(call.func) == "settings.require":
                continue
            word = call.args[at]
            parts = word.values if isinstance(word, ast.JoinedStr) else [word]
            texts = [getattr(part, "value", None) for part in parts]
            text = "".join(x if isinstance(x, str) else "{}" for x in texts)
            found |= {text} - {"{}"}  # what is handed on
    return found


def test_every_message_to_a_reader_has_its_chinese():
    tables = (lessons.PAGES / "messages.zh.md").read_text(encoding="utf-8").split("\n## ")
    rows, printed = (lessons.ROW.findall(table)[1:] for table in tables)
    authors = {text for text in messages() if "names it" in text or "not rendered" in text}
    assert len(authors) == 2
    told = {english for english, _ in rows}
    assert told >= messages() - authors
    of_settings = {re.match(r"\w+", english)[0] for english in told - messages()}
    assert of_settings == {"chapter", "language", "unknown", "unexpected"}
    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    for english, _ in printed:
        assert all(part.strip(" =") in code for part in re.split("{}|: ", english)), english
    for english, chinese in {*rows, *printed}:
        values = [f"<{i}>" for i in range(english.count("{}"))]
        said = lessons.said(english.format(*values), "zh")
        assert said == chinese.format(*values)  # by its own row
        assert sorted(re.findall(r"<\d>", said)) == values
        for pattern, better in languages.FORBIDDEN.items():
            assert not re.search(pattern, chinese), f"{chinese}: {better}"
    assert lessons.said("no such file: 'x'", "en") == "no such file: 'x'"


def test_mistakes_are_told_in_the_language_of_the_lesson(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def attend(q, k, v):\n    return v\n")
    with pytest.raises(ValueError, match="第 4 章的检查有 1 项没通过"):
        learn.main(["4", "--language=zh", "--check=mine.py"])
    told = capsys.readouterr().out
    assert re.search(r"✗ attend: T=3、D=2 时，有一个数差了 \d\.\d+\n", told)
    assert "- causal_mask: mine.py 里没有\n" in told
    with pytest.raises(ValueError, match="预测 'many' 应是一个数"):
        learn.main(["4", "--language=zh", "--answer=many"])
    learn.main(["4", "--language=zh", "--answer=0.3"])
    assert "✗ 你答的是 0.3，应是 0.503\n" in capsys.readouterr().out
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    for argv, words in (
        (["x", "4"], "多出一个参数 '4'"),
        (["99"], "chapter='99' 不对：应是 0 到 12 之间的一个数"),
        (["4", "--langauge=en"], "是不是想写 language"),
        (["4", "--language=auto", "--answer=many"], "预测 'many' 应是一个数"),
        (["4", "--lang=en", "--answer=many"], "the prediction 'many' should be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            learn.main(argv)
    monkeypatch.delenv("LC_ALL")
    monkeypatch.setenv("LANG", "C.UTF-8")
    with pytest.raises(ValueError, match="language='fr' should be one of auto, en, zh"):
        learn.main(["4", "--lang", "fr"])
    capsys.readouterr()
    words = iter(["many", "0.5"])
    monkeypatch.setattr(learn, "ask", lambda: next(words, ""))
    learn.main(["4", "--language=zh"])
    told = capsys.readouterr().out
    assert "预测 'many' 应是一个数\n" in told
    assert "16 个权重里最大的 0.83   查询处的梯度 1.96   softmax(q.k)\n" in told


def test_a_file_that_is_wrong_ends_with_status_2(tmp_path):
    file = tmp_path / "my_model.py"
    file.write_text("def attend(q, k, v):\n    return v\n")
    out = forked.run("learn.py", "4", f"--check={file}", status=2)
    assert f"{WRONG} attend" in out
    assert f"{RIGHT} model.py: causality" in out  # the book's own


@pytest.mark.parametrize("argv", [[], ["--language=en"], ["--language=zh"]])
def test_the_contents_name_every_chapter_in_even_columns(argv, capsys):
    learn.main(argv)
    rows = [line.partition("docs/learn/") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(NUMBERS) and all(sign for _, sign, _ in rows)
    assert len({learn.columns(before) for before, _, _ in rows}) == 1


def test_a_terminal_shows_words_and_no_markdown():
    text = "**0.503** of [`model.py: MLP`](../../model.py#L1-L2), **[chapter 8](08.zh.md)**: `2**3`"
    said = "0.503 of `model.py: MLP`, chapter 8: `2**3`"
    code = "\n```\nx**2 + [y](z)**2\n```"
    assert learn.plain(text + code) == said + code


# --- whys


def rows(path: Path) -> dict[str, list[float]]:
    """The rows of ablations on a page: name to both means, their deviations, and how far apart."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    found = [(name, cells) for name, cells in found if name in ablations.ABLATIONS]
    return {name: [float(x) for x in re.split(r"[|±]", cells)] for name, cells in found}


def told() -> dict[str, list[float]]:
    """Those of all English pages."""
    return {k: v for number in NUMBERS for k, v in rows(lessons.page(number)).items()}


def test_every_ablation_stands_on_a_page_and_only_large_effects_are_told():
    english = told()
    assert english.keys() == ablations.ABLATIONS.keys()
    for name, (*_, apart) in english.items():
        effect = ablations.ABLATIONS[name].effect
        assert effect * apart >= ablations.BEYOND if effect else abs(apart) < ablations.BEYOND, name
    for path in PAGES:
        assert all(english[name] == row for name, row in rows(path).items()), path


TOLD = [name for name, change in ablations.ABLATIONS.items() if change.effect]
USUAL = [n for n in TOLD if not (ablations.ABLATIONS[n].base or ablations.ABLATIONS[n].few)]
OTHER = [n for n in TOLD if n not in USUAL]


@pytest.mark.slow
def test_what_the_pages_tell_of_ablations_is_found_again():
    """The base with all seeds, each change with one of them, in turn."""
    torch.set_num_threads(1)
    base = [ablations.learn(seed, ablations.Ablation())["behind"] for seed in ablations.SEEDS]
    for name, seed in zip(USUAL, cycle(ablations.SEEDS)):
        change = ablations.ABLATIONS[name]
        assert change.measure == "behind"
        mean, spread, changed, wider, _ = told()[name]
        found = ablations.learn(seed, change)["behind"]
        assert statistics.mean(base) == pytest.approx(mean, abs=0.1 + 3 * spread), name
        assert found == pytest.approx(changed, abs=0.1 + 3 * wider), name
        apart = (found - statistics.mean(base)) / math.hypot(statistics.stdev(base), wider)
        assert change.effect * apart >= ablations.BEYOND, f"{name}: {base}, {found}"


@pytest.mark.soak
@pytest.mark.parametrize("names", [USUAL, OTHER], ids=["usual", "other"])
def test_what_the_pages_tell_of_ablations_is_found_again_with_all_seeds(names):
    torch.set_num_threads(1)
    for name, found in ablations.measure(names).items():
        change = ablations.ABLATIONS[name]
        assert change.effect * found.apart() >= ablations.BEYOND, f"{name}: {found}"
        base, spread, changed, wider, _ = told()[name]
        means = [statistics.mean(losses) for losses in found]
        assert means[0] == pytest.approx(base, abs=0.1 + 3 * spread), name
        assert means[1] == pytest.approx(changed, abs=0.1 + 3 * wider), name


def test_a_merge_with_which_the_book_would_never_end_is_told(tmp_path):
    file = tmp_path / "my_bpe.py"
    file.write_text("def merge(ids, pair, new):\n    return ids\n")
    found = dict(lessons.check(lessons.chapter(1), file))
    assert all("should give [9, 3]" in found[name] for name in ("merge", "slow_and_fast_agree"))
