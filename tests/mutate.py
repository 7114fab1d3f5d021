"""Puts small bugs into a copy of the project, one at a time, and tells which a test notices.

    python tests/mutate.py                      all bugs of mutants.txt: hours on two cores
    python tests/mutate.py --only=optim.py      those whose file or description has this text
    python tests/mutate.py --quick              only the tests of its own file, not the whole suite
    python tests/mutate.py --trust              without running the tests without a bug first
    python tests/mutate.py --check              only whether each bug still fits the code

A bug is a file, a text that stands in it exactly once, what stands there instead, and one line that
says what is then wrong: see mutants.txt. It is put into a copy of the repository in a
temporary folder, one copy for each worker; the repository itself is never touched. Then pytest
runs the tests most likely to notice (`NEAR`, by file), up to the first failure; a bug that passes
them has to pass all the others, too (but those marked slow or soak). Before that the copy without
a bug has to pass, since otherwise everything would count as caught.

The table at the end has a line for each bug: its number, what it breaks, and

    caught    by the test that is named: often the promise, sometimes a test that fails by accident
    SURVIVED  every test passes: a promise without a test, or a change that changes nothing
    STALE     its text stands nowhere in the file, or more than once: write it anew in mutants.txt

The status is 0 if all were caught, 1 if some survived, and 2 if some are stale.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 1800  # seconds; a bug that makes the tests wait for ever is noticed, too

# beside tests/test_<its name>.py, the tests most likely to notice a bug in a file, quickest first
NEAR = {
    "model.py": ("dropout", "fast", "inference", "updates", "huggingface"),
    "shape.py": ("settings", "model", "mistakes", "train"),
    "optim.py": ("updates", "machine", "lora", "train"),
    "train.py": ("updates", "kept", "train"),
    "cache.py": ("model", "generate", "inference"),
    "chat.py": ("sample",),
    "canon.py": ("model", "rows", "fast"),
    "dataset.py": ("parts", "rows", "splits", "evaluate", "train"),
    "tokenizer.py": ("rows", "prepare", "huggingface"),
    "bpe.py": ("tokenizer", "prepare"),
    "evaluate.py": ("exam", "splits", "updates", "train"),
    "grading.py": ("exam",),
    "generate.py": ("endings", "inference", "serve", "sample"),
    "pick.py": ("generate", "endings", "sample"),
    "robust.py": ("robust",),
    "sample.py": ("endings",),
    "prepare.py": ("rows", "splits", "kept", "mistakes", "accidents"),
    "huggingface.py": ("chat_template", "mistakes"),
    "engine/agreement.py": ("fast", "inference"),
    "engine/batching.py": ("batching", "serve"),
    "engine/guard.py": ("server", "hostile"),
    "engine/protocol.py": ("serve", "hostile"),
    "engine/server.py": ("server", "serve", "hostile"),
    "engine/transcript.py": ("batching", "serve"),
    "engine/wider.py": ("speculate",),
    "engine/checkpoint.py": (
        "files",
        "lora",
        "weights",
        "kept",
        "sample",
        "train",
        "interruptions",
    ),
    "engine/adopt.py": ("lora", "train"),
    "engine/encodings.py": ("encodings", "prepare"),
    "engine/families.py": ("huggingface",),
    "engine/fast.py": ("fast", "inference", "machine", "train"),
    "engine/files.py": ("kept", "prepare", "train", "interruptions"),
    "engine/gradients.py": ("fast",),
    "engine/inference.py": ("sample", "speculate"),
    "engine/linear.py": ("inference", "speculate"),
    "engine/replay.py": ("inference", "one_token_cpu", "sample"),
    "engine/recording.py": ("inference", "again"),
    "engine/loops.py": ("one_token_cpu",),
    "engine/locked.py": ("weights",),
    "engine/machine.py": ("updates", "train"),
    "engine/metrics.py": ("kept", "train", "interruptions"),
    "engine/normal_form.py": ("wordfilter",),
    "engine/opening.py": ("sample", "endings", "wordfilter"),
    "engine/outcome.py": ("rows", "preference", "train"),
    "engine/packing.py": ("rows", "dataset"),
    "engine/preflight.py": ("pace", "objectives", "lora", "mistakes", "train"),
    "engine/prepared.py": ("prepare", "mistakes"),
    "engine/resume.py": ("kept", "train", "interruptions"),
    "engine/run.py": ("kept", "pace", "train", "interruptions"),
    "engine/settings.py": ("mistakes", "accidents"),
    "engine/shards.py": ("dataset", "splits", "prepare"),
    "engine/signatures.py": ("weights",),
    "engine/sources.py": ("prepare", "mistakes"),
    "engine/spool.py": ("parts", "wordfilter", "prepare", "splits", "rows"),
    "engine/duplicates.py": ("parts",),
    "engine/index.py": ("parts", "prepare", "splits", "rows"),
    "engine/stop.py": ("train", "interruptions"),
    "engine/tables.py": ("rows", "prepare", "mistakes"),
    "engine/tensors.py": ("huggingface",),
    "engine/threads.py": ("machine",),
    "engine/tokenizer_json.py": ("tokenizer", "chat_template", "huggingface"),
    "engine/vocabulary.py": ("tokenizer", "mistakes"),
}


for task in ("__init__", "docstrings", "facts", "library", "modules", "numbers", "sums"):
    NEAR[f"tasks/{task}.py"] = ("tasks",)


class Mutant(NamedTuple):
    file: str
    breaks: str  # the promise that does not hold any more
    old: str  # stands in the file exactly once
    new: str


def read_mutants(path: Path) -> list[Mutant]:
    """The blocks of mutants.txt that have a line with "- "; the others are remarks."""
    found = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        title, *lines = block.strip("\n").split("\n")
        old = [line[2:] for line in lines if line.startswith("- ")]
        new = [line[2:] for line in lines if line.startswith("+ ")]
        if old:
            file, breaks = title.split(": ", 1)
            found.append(Mutant(file, breaks, "\n".join(old), "\n".join(new)))
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose file or description has this text")
    parser.add_argument("--workers", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--quick", action="store_true", help="only the tests of the file itself")
    parser.add_argument("--trust", action="store_true", help="do not run it without a bug first")
    parser.add_argument("--check", action="store_true", help="only whether each bug fits the code")
    s = parser.parse_args(argv)
    numbered = list(enumerate(read_mutants(ROOT / "tests" / "mutants.txt"), start=1))
    chosen = [(i, m) for i, m in numbered if s.only in f"{m.file}: {m.breaks}"]
    stale = [(i, m) for i, m in chosen if not fits(m)]
    for i, m in stale:
        print(f"STALE     {i:3} {m.file}: {m.breaks}: its text stands there {count(m)} times")
    if s.check:
        print(f"{len(chosen) - len(stale)} of {len(chosen)} bugs fit the code")
        return 2 if stale else 0
    fitting = [(i, m) for i, m in chosen if fits(m)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = try_all(fitting, Path(folder), s)
    lines = [f"{i:3}  {m.file:22}  {m.breaks:60}  {result}" for (i, m), result in results]
    print("\n" + "\n".join(lines))
    survived = sum(result.startswith("SURVIVED") for _, result in results)
    print(f"\n{len(results) - survived} caught, {survived} survived, {len(stale)} stale")
    return 2 if stale else 1 if survived else 0


def count(m: Mutant) -> int:
    path = ROOT / m.file
    return path.read_text(encoding="utf-8").count(m.old) if path.exists() else 0


def fits(m: Mutant) -> bool:
    return count(m) == 1 and m.old != m.new


def near(m: Mutant) -> list[str]:
    """The test files most likely to notice a bug in this file."""
    own, others = Path(m.file).stem, NEAR.get(m.file, ())
    names = others if own in others else (own, *others)
    paths = [f"tests/test_{name}.py" for name in names]
    return [path for path in paths if (ROOT / path).exists()]


def try_all(fitting: list, folder: Path, s: argparse.Namespace) -> list:
    """((number, mutant), result) in the order of `fitting`."""
    copies: SimpleQueue[Path] = SimpleQueue()  # those that are free
    for i in range(s.workers):
        copies.put(copy_project(folder / str(i)))

    def one(numbered):
        copy = copies.get()
        try:
            result = attempt(copy, numbered[1], s.quick)
        finally:
            copies.put(copy)
        print(f"{numbered[0]:3} {numbered[1].file}: {numbered[1].breaks}: {result}", flush=True)
        return numbered, result

    if not s.trust:
        copy = copies.get()
        tests = sorted({name for _, m in fitting for name in near(m)})
        noticed = failing(copy, tests if s.quick else [])
        copies.put(copy)
        if noticed:
            raise SystemExit(f"without any bug {noticed} fails already: mend that first")
    with ThreadPoolExecutor(s.workers) as pool:
        return list(pool.map(one, fitting))


def copy_project(target: Path) -> Path:
    """A copy of what git knows, or would know if it were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def attempt(copy: Path, m: Mutant, quick: bool) -> str:
    """Puts the bug into `copy`, lets the tests look for it, and takes it out again."""
    path, began = copy / m.file, time.monotonic()
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(m.old, m.new), encoding="utf-8")
    try:
        first = near(m)
        noticed = failing(copy, first) if first else ""
        if not noticed and not quick:
            noticed = failing(copy, [f"--ignore={name}" for name in first])
    finally:
        path.write_text(sound, encoding="utf-8")
    seconds = time.monotonic() - began
    return f"caught by {noticed} ({seconds:.0f} s)" if noticed else f"SURVIVED ({seconds:.0f} s)"


def failing(copy: Path, arguments: list[str]) -> str:
    """The first test that fails in `copy`, or what else went wrong; empty if all pass."""
    # two bugs may come in one second: compiled files of the one before must not be believed
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    temporary = tempfile.mkdtemp(dir=copy.parent)
    command += [f"--basetemp={temporary}/pytest", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment | {"TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"a wait of more than {TIMEOUT} s"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return found[1] if found else f"pytest itself, status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
