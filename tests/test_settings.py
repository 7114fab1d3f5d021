"""Settings: defaults, then a config file, then the command line; nothing by accident."""

from dataclasses import dataclass

import pytest

from engine import settings


@dataclass
class Settings:
    config: str = "none"  # a file
    steps: int = 10  # how many
    lr: float = 0.5  # how fast
    compile: bool = True  # whether
    name: str = ""  # what


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
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, line, word):
    with pytest.raises(ValueError) as e:
        load(tmp_path, file=line + "\n")
    assert word in str(e.value) and "some.py" in str(e.value)


def test_help_shows_every_setting_with_comment_and_default(capsys):
    import prepare
    import sample
    import train

    for script in (prepare, sample, train):
        with pytest.raises(SystemExit) as e:
            script.main(["--help"])
        assert e.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for name, field in script.Settings.__dataclass_fields__.items():
            assert name in text
            if field.default not in ("", ()):
                assert f"{field.default}" in text


def test_every_preset_loads_and_passes_the_checks():
    from conftest import ROOT

    import train

    files = list((ROOT / "config").glob("*.py"))
    assert len(files) >= 5
    for path in files:
        train.check(settings.load(train.Settings, [str(path)], "", "config"))


def test_no_setting_is_unused():
    """Each setting of a script is read somewhere in the code."""
    import re

    from conftest import CODE

    import plot
    import prepare
    import sample
    import train

    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    shape = {"position", "norm", "norm_weight", "norm_eps", "embed_norm", "qk_norm", "mlp", "bias"}
    shape |= {"tied", "logit_cap", "rope_base", "n_kv_head", "mlp_dim", "n_layer"}  # by GPTConfig
    for script in (plot, prepare, sample, train):
        for name in set(script.Settings.__dataclass_fields__) - shape:
            assert re.search(rf"\b(s|settings|self|c|config)\.{name}\b", code), name
