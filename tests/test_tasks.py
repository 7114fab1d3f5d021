"""Built-in tasks: their rows are right, their splits are disjoint, their checks can say no."""

import random
import re
import sysconfig
from hashlib import blake2b
from itertools import islice

import pytest

import prepare
import tasks
from dataset import Dataset
from engine.index import draw
from tasks import docstrings, facts, library, numbers, sums, sums_plain

SPLITS = ("train", "val", "test")
GENERATED = ("facts", "numbers", "sums", "sums_plain", "tictactoe")


def texts(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"][:2]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A library of a hundred files: packages, a file twice, one that is cut, one that is no text,
    one that is no Python, line ends and accents in two forms."""
    folder = tmp_path / "library"
    function = 'def f{0}(x):\n    """Adds {0} to x. Returns it."""\n    return x + {0}\n'
    for i in range(100):
        path = folder / ("asyncio", "email", "tests", "json")[i % 4] / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(function.format(10 * i + j) for j in range(10))
        path.write_bytes(f"# e\u0301 {i}\r\n{body}".encode())
    (folder / "copy.py").write_text((folder / "email" / "file1.py").read_text())

    def digest(text: str) -> bytes:
        return blake2b(text.encode(), digest_size=16).digest()

    # by its hash the large one would be held back, were it not cut
    large = (f"x = {i}\n" * 10_000 for i in range(1000))
    held = (text for text in large if draw(digest(text), 0) < 0.05)
    (folder / "large.py").write_text(next(held))
    (folder / "binary.py").write_bytes(bytes(range(256)) * 9)
    (folder / "syntax.py").write_text("print 'an older Python'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    library.all_files.cache_clear()
    yield folder
    library.all_files.cache_clear()


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_answer_is_right_and_another_is_not(name):
    task = tasks.find(name)
    for row in islice(task.rows("val", 0), 300):
        prompt, answer = texts(row)
        assert task.right(prompt, answer)
        assert task.right(prompt, f" {answer}\n", answer)
        assert not task.right(prompt, answer + "1", answer)
        assert not task.right(prompt, "", answer)
        assert tasks.find(row["task"]) is task


@pytest.mark.parametrize("name", GENERATED)
def test_no_seed_shows_in_training_what_another_seed_tests(name):
    """Of sums the pair in either order, of numbers the number in any form, of facts the story."""

    def held(split: str, seed: int) -> set:
        few = dict(facts=300, tictactoe=600)  # they take long; 78 of 600 games are in both seeds
        rows = islice(tasks.find(name).rows(split, seed), few.get(name, 1500))
        prompts = [texts(row)[0] for row in rows]
        if name == "numbers":
            return {numbers.read(prompt) for prompt in prompts}
        if name == "facts":
            return {prompt.split("\n")[0] for prompt in prompts}
        if name == "tictactoe":
            return {*prompts}
        return {tuple(sorted(re.findall(r"\d+", prompt))) for prompt in prompts}

    test, other = held("test", 0), held("test", 1)
    assert not held("train", 0) & other
    assert not held("val", 0) & test
    assert len(other - test) > 100  # fresh rows
    assert held("test", 0) == test


@pytest.mark.parametrize("name", GENERATED)
def test_no_row_comes_twice_and_nothing_is_held_back_if_that_is_asked(name):
    some = islice(tasks.find(name).rows("train", 0), 10_000 if name == "facts" else 20_000)
    rows = [(row["task"], str(row["messages"])) for row in some]
    assert len(rows) == len(set(rows)) >= 10_000
    assert not list(tasks.find(name).rows("test", 0, test=0.0))


def test_sums_are_written_from_the_lowest_digit_and_plainly():
    assert sums.right("57+68=", "521") and not sums.right("57+68=", "125")
    assert sums_plain.right("57+68=", "125") and not sums_plain.right("57+68=", "521")
    assert not sums.right("57+68", "521")
    assert {row["task"] for row in islice(sums_plain.rows("val", 0), 9)} == {"sums_plain"}


@pytest.mark.parametrize(
    "n, english, chinese",
    [
        (0, "zero", "零"),
        (12, "twelve", "十二"),
        (110, "one hundred ten", "一百一十"),
        (205, "two hundred five", "二百零五"),
        (1010, "one thousand ten", "一千零一十"),
        (10_000, "ten thousand", "一万"),
        (20_300, "twenty thousand three hundred", "二万零三百"),
        (100_010, "one hundred thousand ten", "十万零一十"),
        (112_000, "one hundred twelve thousand", "十一万二千"),
        (310_502, "three hundred ten thousand five hundred two", "三十一万零五百零二"),
        (707_021, "seven hundred seven thousand twenty-one", "七十万七千零二十一"),
    ],
)
def test_numbers_as_they_are_written_by_hand(n, english, chinese):
    assert numbers.write(n, "english") == english
    assert numbers.write(n, "chinese") == chinese
    assert numbers.read(english) == numbers.read(chinese) == numbers.read(str(n)) == n


def test_numbers_are_read_as_they_are_written():
    rng = random.Random(0)
    some = [*range(1200), *(rng.randrange(10**6) for _ in range(3000)), 999_999]
    for form in numbers.FORMS:
        assert [numbers.read(numbers.write(n, form)) for n in some] == some


@pytest.mark.parametrize(
    "text", ["", "一十", "两百", "一万零", "twenty one", "ten ten", "007", "1000000", "-1"]
)
def test_what_is_no_number_in_its_one_form_is_refused(text):
    assert numbers.read(text) is None
    assert not numbers.right(text, "21") and not numbers.right("21", text)


def test_a_number_may_not_answer_in_the_form_of_its_prompt_nor_in_another_than_is_wanted():
    assert numbers.right("12", "twelve") and numbers.right("12", "十二")
    assert not numbers.right("12", "12")
    assert numbers.right("12", "十二", "十二") and not numbers.right("12", "twelve", "十二")


def test_each_direction_of_numbers_is_asked_for_equally_often():
    rows = list(numbers.rows("val", 0))
    ways = [(numbers.form_of(texts(row)[0]), row["task"]) for row in rows]
    assert len(set(ways)) == 6
    assert {ways.count(way) for way in ways} == {len(rows) // 6}
    assert all(task != f"numbers_{form}" for form, task in ways)


def test_each_question_of_a_story_to_learn_from_has_its_own_answer():
    for row in islice(facts.rows("train", 0), 100):
        turns = [turn["content"] for turn in row["messages"]]
        for i in range(1, len(turns), 2):
            assert facts.right("\n".join(turns[:i]), turns[i])
        assert 2 <= len(turns) <= 10 and len({*turns[::2]}) == len(turns[::2])
    assert {len(row["messages"]) for row in facts.rows("test", 0)} == {2}


STORY = (
    "Nora went to the attic. Nora took the rope. Felix ran to the attic. Nora walked to the cellar."
    " Nora put down the rope. Nora took the rope. Nora went to the harbour. Nora left the rope."
    " Felix picked up the map."
)


@pytest.mark.parametrize(
    "question, answer",
    [
        ("Where is Nora?", "harbour"),
        ("Where is the rope?", "harbour"),  # put down where she went with it at last
        ("Where is the map?", "attic"),
        ("Who has the map?", "Felix"),
        ("Who has the rope?", "nobody"),
        ("Is Felix in the attic?", "yes"),
        ("Is Nora in the attic?", "no"),
        ("Where is Boris?", None),
        ("Who has the lantern?", None),
        ("Why?", None),
    ],
)
def test_facts_as_a_reader_would_answer_them(question, answer):
    assert facts.solve(f"{STORY}\n{question}") == answer
    assert facts.right(f"{STORY}\n{question}", "harbour") == (answer == "harbour")


def test_what_is_no_story_has_no_right_answer():
    assert not facts.right("hello", "cellar")
    assert facts.solve("Nora put down the rope.\nWhere is the rope?") is None


def test_files_of_the_library_are_split_as_prepare_splits_them(small_library, tmp_path):
    out = tmp_path / "python"
    prepare.main(["python", f"--out={out}", "--tokenizer=bytes", "--skip_bad"])
    data = Dataset(str(out))
    for split in SPLITS:
        ids = data.split(split).read(0, 10**9).tolist()
        prepared = set(data.tokenizer.decode(ids).split("<|endoftext|>")[:-1])
        ours = {text for _, text in library.files(split, 0.05, 0.05)}
        cut = {text for text in ours | prepared if text.startswith("x = ")}
        assert ours - cut == prepared - cut
        assert ours
    assert any(text.startswith("x = ") for _, text in library.files("train", 0.05, 0.05))


@pytest.mark.parametrize("name", ["docstrings", "modules"])
def test_rows_of_one_file_stay_in_one_split(small_library, name):
    groups = {s: {row["group"] for row in tasks.find(name).rows(s, 0, 0.2, 0.2)} for s in SPLITS}
    assert all(groups.values())
    assert not groups["train"] & groups["test"] and not groups["val"] & groups["test"]
    assert list(tasks.find(name).rows("train", 0)) != list(tasks.find(name).rows("train", 1))


def test_docstrings_leave_the_function_without_its_docstring(small_library):
    found = dict(texts(row) for row in docstrings.rows("train", 0))
    assert found["def f10(x):\n    return x + 10"] == "Adds 10 to x."
    assert docstrings.right("", "Adds  10 to x.", "Adds 10 to x.")
    assert not docstrings.right("", "", "")


@pytest.mark.parametrize(
    "docstring, first",
    [
        ("Adds x.\n\nMore.", "Adds x."),
        ("Two\nlines. And more.", "Two lines."),
        ("Reads e.g. a file. Returns it.", "Reads e.g. a file."),
        ("Writes .py files", "Writes .py files"),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, first):
    assert docstrings.first_sentence(docstring) == first


@pytest.mark.parametrize(
    "name, words",
    [
        ("get_word2", "get word 2"),
        ("HTTPThing", "http thing"),
        ("parseURL", "parse url"),
        ("__init__", "init"),
        ("aB", "a b"),
    ],
)
def test_a_name_as_words(name, words):
    assert docstrings.name_as_words(f"def {name}(x):\n    pass") == words


def test_modules_come_from_the_ten_packages_alone(small_library):
    rows = list(tasks.find("modules").rows("train", 0))
    assert {texts(row)[1] for row in rows} == {"asyncio", "email"}
    assert all(texts(row)[0].count("\n") == 9 for row in rows)


def test_a_task_is_found_by_its_name_and_by_its_markers():
    assert tasks.find("sums") is sums and tasks.find("sums_plain") is sums_plain
    assert tasks.find("numbers_english") is numbers
    assert tasks.find("translate") is None and tasks.find("summary") is None
