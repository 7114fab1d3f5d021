"""Settings: defaults, then a config file, then the command line; nothing by accident."""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args, get_type_hints

import pytest
from conftest import ROOT

from engine import preflight, settings
from engine.settings import Fraction, Positive, settings_of


@dataclass
class Shape:
    size: int  # from elsewhere
    width: Positive = 4  # of it
    half: int = 0  # 0 means width / 2

    def __post_init__(self):
        self.half = self.half or self.width // 2


@dataclass
class Settings:
    config: str = "none"  # a file
    steps: int = 10  # how many
    lr: float = 0.5  # how fast
    compile: bool = True  # whether
    name: str = ""  # what
    batch: Positive = 3  # at once
    share: Fraction = 0.5  # of it
    shape: Literal["round", "square"] = "round"  # how it looks
    inside: Shape = field(default_factory=partial(Shape, size=7))


@dataclass
class Wrapped:
    steps: int = 10  # how many
    shape: str = (
        "round"  # how it looks
    )  # fmt: skip


def load(tmp_path, *argv, file="steps = 2 * 3\n"):
    path = tmp_path / "some.py"
    path.write_text(file)
    return settings.load(Settings, [str(path), *argv], "", "config")


def test_command_line_over_file_over_defaults(tmp_path):
    s = load(tmp_path, "--lr=2", "--name", "a=b", file="_half = 3\nsteps = _half * 2\nlr = 1\n")
    assert (s.steps, s.lr, s.name, s.compile) == (6, 2.0, "a=b", True)
    assert isinstance(s.lr, float)


@pytest.mark.parametrize(
    "text, value", [("false", False), ("False", False), ("true", True), ("TRUE", True)]
)
def test_booleans_are_true_and_false(tmp_path, text, value):
    assert load(tmp_path, f"--compile={text}").compile is value
    assert load(tmp_path, "--compile", text).compile is value


def test_a_bare_flag_is_true(tmp_path):
    assert load(tmp_path, "--compile", "--steps=3", file="compile = False").compile is True


@pytest.mark.parametrize("text, value", [("1e3", 1000), ("7", 7), ("-3", -3), ("2.0", 2)])
def test_whole_numbers(tmp_path, text, value):
    assert load(tmp_path, f"--steps={text}").steps == value


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--stps=3", ["stps", "did you mean steps"]),
        ("--steps=many", ["steps", "'many'", "whole number"]),
        ("--steps=1.5", ["1.5"]),
        ("--steps=nan", ["nan"]),
        ("--lr=fast", ["'fast'", "number"]),
        ("--lr=nan", ["nan"]),
        ("--compile=0", ["compile", "'0'", "true or false"]),
        ("--steps=", ["steps", "''"]),
        ("--steps=1e30", ["steps", "whole number"]),
        ("--batch=0", ["batch=0 should be at least 1"]),
        ("--share=1.5", ["share=1.5 should be from 0 to 1"]),
        ("--shape=oval", ["shape='oval' should be one of round, square"]),
        ("--width=0", ["width=0 should be at least 1"]),
        ("--size=3", ["'size'"]),
        ("stray", ["stray", "--name=value"]),
    ],
)
def test_a_mistake_is_named(tmp_path, argument, words):
    with pytest.raises(ValueError) as e:
        load(tmp_path, argument)
    assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize(
    "line, word",
    [
        ("stesp = 3", "did you mean steps"),
        ("steps = 'x'", "whole number"),
        ("lr = True", "number"),
        ("name = 3", "string"),
        ("import os", "os"),
        ("steps = 1 / 0", "ZeroDivisionError"),
        ("steps = (", "SyntaxError"),
        ("config = 'x'", "config"),
        ("batch = 0", "batch=0 should be at least 1"),
        ("shape = 'oval'", "one of round, square"),
        ("{'steps': 3}", "line 1 assigns nothing"),
        ("steps: 3", "line 1 assigns nothing"),
        ("lr = 1\nsteps == 3", "line 2 assigns nothing"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, line, word):
    with pytest.raises(ValueError) as e:
        load(tmp_path, file=line + "\n")
    assert word in str(e.value) and "some.py" in str(e.value)


@pytest.mark.parametrize("name", ["some.json", "some.yaml", "some"])
def test_a_config_file_is_python(tmp_path, name):
    (tmp_path / name).write_text("steps = 3\n")
    with pytest.raises(ValueError, match=rf"{name}: .*\.py file"):
        settings.load(Settings, [str(tmp_path / name)], "", "config")


def test_a_config_file_may_begin_with_a_docstring(tmp_path):
    assert load(tmp_path, file='"""Why."""\n# and how\nsteps = 3\n').steps == 3


def test_a_dataclass_inside_is_set_by_the_same_names(tmp_path):
    s = load(tmp_path, "--width=10", file="steps = 6\n")
    assert (s.inside.width, s.inside.half, s.inside.size) == (10, 5, 7)
    values = settings.flat(s)
    assert values["width"] == 10 and values["steps"] == 6 and "size" not in values
    assert settings.make(Settings, values) == s


def test_a_comment_that_is_on_another_line_is_missed_in_one_sentence():
    with pytest.raises(ValueError, match=r"Wrapped\.shape lacks the comment that --help shows"):
        settings_of(Wrapped)


def test_what_an_older_file_lacks_has_its_default():
    assert settings.known(Settings, {"steps": 4, "gone": 1, "width": 6}) == settings.flat(
        settings.make(Settings, {"steps": 4, "width": 6})
    )


def test_an_object_made_in_python_is_checked_as_well():
    from shape import GPTConfig

    bends = ", ".join(get_args(get_type_hints(GPTConfig)["mlp"]))
    with pytest.raises(ValueError, match=f"mlp='relu' should be one of {bends}"):
        GPTConfig(10, mlp="relu")
    with pytest.raises(ValueError, match=r"dropout=1.0 should be at least 0, below 1"):
        GPTConfig(10, dropout=1.0)


def test_settings_need_no_torch():
    import subprocess

    from conftest import ROOT

    code = "import sys; sys.modules['torch'] = None; import train, shape; train.main(['--help'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_help_shows_every_setting_with_comment_and_default(capsys):
    import plan
    import prepare
    import sample
    import train

    assert settings_of(plan.Settings)["block_size"].default == 2048  # its own, not GPTConfig's
    for script in (plan, prepare, sample, train):
        with pytest.raises(SystemExit) as e:
            script.main(["--help"])
        assert e.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for name, setting in settings_of(script.Settings).items():
            assert name in text
            assert "".join(setting.comment.split()) in "".join(text.split())  # it may be broken
            if setting.default not in ("", ()):
                assert f"(default: {setting.default})" in text
            assert "|".join(setting.choices) in text


def test_every_preset_loads_and_passes_the_checks(tmp_path):
    from conftest import ROOT

    import train

    files = list((ROOT / "config").glob("*.py"))
    assert len(files) >= 5
    for path in files:
        preflight.check(preflight.read(train.Settings, [str(path), f"--out={tmp_path}"]))


def test_no_setting_is_unused():
    """Each setting of a script is read somewhere in the code."""
    import re

    from conftest import CODE

    import evaluate
    import plot
    import prepare
    import sample
    import train

    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    for script in (evaluate, plot, prepare, sample, train):
        for name in settings_of(script.Settings):
            assert re.search(rf"\b(s|settings|self|c|config|model|reading)\.{name}\b", code), name


def test_names_of_nanogpt_are_answered_with_ours_and_the_page_has_them_all():
    import sample
    import train

    known = settings_of(train.Settings) | settings_of(sample.Settings)
    table = (ROOT / "docs" / "nanogpt.md").read_text(encoding="utf-8")
    for theirs, ours in settings.NANOGPT.items():
        assert ours in known and theirs not in known
        assert f"`{theirs}`" in table and f"`{ours}`" in table
    with pytest.raises(ValueError, match="'max_iters' in the command line: did you mean steps"):
        preflight.read(train.Settings, ["--max_iters=100"])
    with pytest.raises(ValueError, match="'lerning_rate' in the command line: did you mean lr?"):
        preflight.read(train.Settings, ["--lerning_rate=1"])
    with pytest.raises(ValueError, match="'backend' in the command line: torchrun chooses it"):
        preflight.read(train.Settings, ["--backend=nccl"])
    with pytest.raises(ValueError, match="'out_dir' .*: the run stands first, as in sample.py out"):
        sample.main(["--out_dir=out-x"])


def test_without_arguments_nothing_is_peeked_at():
    assert settings.peek("objective", [], "config/small.py") is None
    assert settings.peek("objective", [], "config/masked.py") == "masked"


def test_a_sentence_does_not_command_the_terminal():
    """A name may hold anything: here it would clear the screen, and name the window anew."""
    told = settings.sentence(ValueError("a\x1b[2J\x9b\u202e红.txt is missing"))
    assert told == r"a\x1b[2J\x9b\u202e红.txt is missing"
