"""What README and the pages behind it say is so: commands run as they stand there, with a few steps
each, and so does Python; files, tests, symbols and links exist; what is to be read is as long."""

import importlib.util
import os
import re
import shlex

import forked
import pytest
from conftest import ROOT

import lessons
from lessons import first_run, languages, pictures

BEHIND = ("results", "promises", "sample", "data", "gpus", "weights")
BEHIND = [ROOT / "docs" / f"{name}.md" for name in BEHIND]
README, *PAGES = [p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *BEHIND)]
RESULTS, PROMISES, *_ = PAGES
BLOCKS = re.findall(r"```sh\n(.*?)```", "".join([README, *PAGES]), flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.split("&& ")[-1] for line in COMMANDS]  # less what sets everything up
COMMANDS += re.findall(r"^\|.*?`(python train\.py .+?)`", RESULTS + PROMISES, flags=re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", "".join([README, *PAGES]), flags=re.DOTALL)
COMMANDS += [f"python block{i}.py" for i in range(len(PYTHON))]

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
    for name in ("python", "shakespeare", "shakespeare_bpe"):
        (folder / "data" / name).symlink_to(data)
    (folder / "my_text.txt").write_text((ROOT / "README.md").read_text() * 20)
    (folder / "some_file.py").write_text("import os\n")
    for i, block in enumerate(PYTHON):
        (folder / f"block{i}.py").write_text(block)
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


@pytest.mark.cpu  # there nothing is compiled
def test_every_command_of_the_readme_runs(place, monkeypatch):
    ran = [line for line in dict.fromkeys(COMMANDS) if small(line)]
    # shakespeare needs a network, and stands prepared already
    ran = [line for line in ran if " prepare.py shakespeare" not in line]
    scripts = {word for command in ran for word in re.findall(r"(\w+)\.py", command)}
    assert {"prepare", "train", "sample", "plot", "block0"} <= scripts, ran
    if not importlib.util.find_spec("matplotlib"):
        ran = [line for line in ran if " plot.py" not in line]
    monkeypatch.chdir(place)
    for command in ran:
        words, _, there = small(command).partition(" < ")
        mistake = "stpes" in command  # shown on purpose
        argv = shlex.split(words)[1:]
        argv[0] = argv[0] if argv[0] == "-m" else place / argv[0]
        forked.run(*argv, status=2 if mistake else 0, stdin=there or os.devnull)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: all but plot.py ran")


def test_the_first_command_comes_first_and_two_need_nothing_before_them():
    alone = [block.strip() for block in BLOCKS if "python3 -m venv .venv && . " in block]
    assert len(alone) == 2 and alone[0] == BLOCKS[0].strip()
    assert alone[0].endswith("&& python train.py config/small.py")
    assert alone[1].endswith("&& python -m pytest")


def test_files_that_are_named_exist_and_scripts_are_named():
    room = (ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    for text in (README, *PAGES, room):
        for name in re.findall(r"`([\w/.-]+\.(?:py|md|txt|png))`", text):
            there = any((ROOT / folder / name).exists() for folder in ("", "engine"))
            assert there or name.startswith("my_"), name
    for folder, text in ((ROOT, README), (ROOT / "engine", room)):
        assert {p.name for p in folder.glob("[!_]*.py")} <= set(re.findall(r"\w+\.py", text))


OWN = [pair for pair in languages.pairs() if pair[0].parent != lessons.PAGES]


@pytest.mark.parametrize("english, chinese", OWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(english, chinese):
    for path in (english, chinese):
        for target in re.findall(r"\]\(([^)]*)\)", path.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, target


def test_what_is_to_be_edited_is_there():
    found = re.findall(r"`([\w/]+\.py): (\w+)`", README)
    assert len(found) > 8
    assert all(lessons.lines(*name) for name in found)


def test_the_book_is_as_long_as_it_says():
    count, names = re.search(r"files, ([\d,]+) lines.*?`wc -l ([^`]+)`", README, re.S).groups()
    names = names.split()
    lines = sum((ROOT / name).read_text(encoding="utf-8").count("\n") for name in names)
    assert lines == pytest.approx(int(count.replace(",", "")), rel=0.05)
    table = README[README.index("| file | what it tells |") :].partition("\n\n")[0]
    assert re.findall(r"`(\w+\.py)`", table) == names  # in the same order
    assert len(names) == 9 and "nine files" in README


def test_the_picture_has_the_numbers_of_the_text():
    data = pictures.kept(first_run.PICTURE)
    for text in (README, RESULTS):
        assert f"{data['evaluated'][-1][1]:.3f} bits per byte" in text
        assert all(f"{name} {bits:.3f}" in text for name, bits in data["packed"].items())


def test_tests_that_are_named_exist():
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for words in re.findall(r'-k "?([\w ]+)"?`', "".join([README, *PAGES])):
        for word in words.split(" or "):
            assert re.search(rf"def test_\w*{word.strip()}", code), word
