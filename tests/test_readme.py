"""README's commands run as they stand there, with a few steps each; its files and tests exist."""

import importlib.util
import os
import re
import shlex

import forked
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.split("&& ")[-1] for line in COMMANDS]  # less what sets everything up

SMALL = ["--steps=2", "--batch_tokens=512", "--block_size=64", "--n_layer=1", "--n_head=2"]
SMALL += ["--n_embd=32", "--device_batch=2", "--sample_tokens=5", "--eval_every=2", "--warmup=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, data):
    """A folder like a clone, in which the sources are small."""
    folder = tmp_path_factory.mktemp("clone")
    folders = [ROOT / name for name in ("config", "engine", "objectives", "tasks")]
    for path in [*ROOT.glob("*.py"), *folders, ROOT / "README.md"]:
        (folder / path.name).symlink_to(path)
    (folder / "data").mkdir()
    for name in ("python", "shakespeare"):
        (folder / "data" / name).symlink_to(data)
    (folder / "my_text.txt").write_text((ROOT / "README.md").read_text() * 20)
    (folder / "some_file.py").write_text("import os\n")
    rows = "".join(f"what is {i} and {i}?,{2 * i}\n" for i in range(200))
    (folder / "questions.csv").write_text(f"question,answer\n{rows}")
    return folder


def small(command: str) -> str | None:
    """The command with a few steps; None for what cannot run here."""
    if "venv" in command or "nproc_per_node=8" in command or not command:
        return None
    if any(word in command for word in ("pytest", "bench.py", "serve.py", "curl", "pip ")):
        return None
    if "--interactive" in command or "--chat" in command:
        return None
    if "gpt2" in command or "hf/" in command:
        return None  # tests of its own
    if "weights.py" in command or "--passphrase_file" in command:
        return None  # tests of their own
    if " train.py" in command:
        given = {word.split("=")[0] for word in command.split()}
        command += " " + " ".join(a for a in SMALL if a.split("=")[0] not in given)
        command = re.sub(r"--steps=\d+|--n_layer=\d+", lambda m: m[0].split("=")[0] + "=2", command)
    if "sample.py" in command:
        command = re.sub(r"--max_tokens=\d+", "", command) + " --max_tokens=5"
        command = re.sub(r" < (\S+) (--.*)", r" \2 < \1", command)
    # other sources, since the library takes long to read
    command = command.replace(" modules ", " questions.csv --prompt=question --answer=answer ")
    command = command.replace("prepare.py python ", "prepare.py my_text.txt ")
    return command.replace("--vocab_size=4096", "--vocab_size=300")


def test_every_command_of_the_readme_runs(place, monkeypatch):
    ran = [line for line in COMMANDS if small(line)]
    # shakespeare needs a network, and stands prepared already
    ran = [line for line in ran if " prepare.py shakespeare" not in line]
    scripts = {word for command in ran for word in re.findall(r"(\w+)\.py", command)}
    assert {"prepare", "train", "sample", "plot"} <= scripts, ran
    if not importlib.util.find_spec("matplotlib"):
        ran = [line for line in ran if " plot.py" not in line]
    monkeypatch.chdir(place)
    for command in ran:
        words, _, there = small(command).partition(" < ")
        mistake = "stpes" in command  # shown on purpose
        forked.run(*shlex.split(words)[1:], status=2 if mistake else 0, stdin=there or os.devnull)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: all but plot.py ran")


def test_the_two_commands_come_first():
    first, second = BLOCKS[:2]
    assert first.strip().endswith("&& python train.py config/small.py")
    assert second.strip().endswith("python -m pytest")
    assert all(
        "python3 -m venv .venv && . .venv/bin/activate" in block for block in (first, second)
    )


def test_files_that_are_named_exist():
    for name in re.findall(r"`([\w/.-]+\.(?:py|md|txt|png))`|\(([\w/.-]+\.(?:png|md))\)", README):
        name = name[0] or name[1]
        if not name.startswith("my_"):
            assert (ROOT / name).exists(), name
    scripts = {p.name for p in [*ROOT.glob("*.py"), *ROOT.glob("engine/[!_]*.py")]}
    assert scripts <= set(re.findall(r"[\w]+\.py", README))


def test_tests_that_are_named_exist():
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for words in re.findall(r'-k "?([\w ]+)"?`', README):
        for word in words.split(" or "):
            assert re.search(rf"def test_\w*{word.strip()}", code), word
