"""The command: prompts from everywhere, settings obeyed, a conversation, a quiet Ctrl-C."""

import io
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ROOT
from test_accidents import errors_into

import generate
import sample
from chat import turn
from sample import load_model


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    from conftest import TINY

    import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text("")
    argv = [str(folder / "tiny.py"), f"--data={data}", f"--out={folder / 'run'}", *TINY]
    assert train.main(argv) == 0
    return folder / "run"


def text_of(capsys, *argv) -> str:
    sample.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_same_seed_same_text(run, capsys):
    first = text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=0")
    assert first.startswith("the ") and len(first) > 10
    assert first == text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=0")
    assert first != text_of(capsys, run, "--prompt=the ", "--max_tokens=30", "--seed=1")


def test_prompts_from_everywhere(run, capsys, monkeypatch, tmp_path):
    expected = text_of(capsys, run, "--prompt=a 文\n", "--max_tokens=9")
    (tmp_path / "prompt.txt").write_text("a 文\n", encoding="utf-8")
    assert (
        text_of(capsys, run, f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_tokens=9")
        == expected
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a 文\n".encode())))
    assert text_of(capsys, run, "--prompt_file=-", "--max_tokens=9") == expected
    (tmp_path / "prompt.txt").write_bytes("a 文\r\n".encode())  # from Windows
    assert (
        text_of(capsys, run, f"--prompt_file={tmp_path}/prompt.txt", "--max_tokens=9") == expected
    )
    assert text_of(capsys, run, "--max_tokens=0") == "\n"
    sample.main([str(run), "--prompt=" + "long " * 50, "--max_tokens=3"])
    assert "only its last 32 fit" in capsys.readouterr().err


def test_several_samples_are_told_apart(run, capsys):
    out = text_of(capsys, run, "--prompt=x", "--num_samples=3", "--max_tokens=12")
    assert [f"--- sample {i} of 3" in out for i in (1, 2, 3)] == [True] * 3


def test_each_sample_ends_by_itself(run, capsys, monkeypatch):
    end, a, b = 256, ord("a"), ord("b")
    steps = [[a, a, a], [end, b, a], [b, end, a], [b, b, end], [b, b, b]]
    monkeypatch.setattr(generate, "generate", lambda *_, **how: iter(steps))
    out = text_of(capsys, run, "--prompt=x", "--num_samples=3")
    assert out.split("\n")[1::2] == ["xa", "xab", "xaaa"]


def test_every_setting_arrives_where_tokens_are_picked(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(generate, "generate", lambda *_, **how: seen.update(how) or iter(()))
    given = dict(temperature=0.5, top_k=7, top_p=0.25, seed=9, num_samples=2)
    given |= dict(repetition_penalty=1.25)
    sample.main([str(run), *(f"--{name}={value}" for name, value in given.items())])
    assert given.items() <= seen.items()


def test_ids_that_no_token_has_are_never_sampled(run, monkeypatch):
    model, tokenizer = load_model(str(run))
    tokenizer.unused = range(100, 200)
    seen = {}
    monkeypatch.setattr(generate, "generate", lambda *_, **how: seen.update(how) or iter(()))
    sample.write_samples(model, tokenizer, [120], sample.Settings())
    assert list(seen["unused"]) == list(range(100, 200))


def test_a_stop_text_that_is_met_is_said_beside_the_text(run, capsys, monkeypatch):
    steps = list(zip(b"one two", b"END nor", [*b"three ", 256], strict=True))
    monkeypatch.setattr(generate, "generate", lambda *_, **how: iter(steps))
    sample.main([str(run), "--prompt=>", "--stop=two", "--stop=e t"])
    assert capsys.readouterr() == (">on\n", "(stopped before 'e t')\n")
    sample.main([str(run), "--stop=ND", "--stop=two", "--num_samples=3"])
    out, err = capsys.readouterr()
    assert out.split("\n")[1::2] == ["one ", "E", "three "]
    assert err == "(sample 1 stopped before 'two')\n(sample 2 stopped before 'ND')\n"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--prompt_file=x.txt", "--interactive"], "prompt_file='x.txt' should be left out in"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0 should be above 0"),
    ],
)
def test_what_would_be_ignored_or_is_impossible_is_refused(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample.main(argv)


def test_a_run_opens_at_its_best_step_anywhere_without_its_data(run, tmp_path, monkeypatch):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    monkeypatch.chdir(tmp_path)
    rows = (
        (moved / "metrics.jsonl")
        .read_text()
        .replace('"step": 8, "val_loss": ', '"step": 8, "val_loss": 9')
    )
    (moved / "metrics.jsonl").write_text(rows)
    best, tokenizer = load_model("moved")
    fourth, _ = load_model("moved", "step-00000004")
    by_number, _ = load_model("moved", "4")
    latest, _ = load_model("moved", "latest")
    assert torch.equal(best.wte.weight, fourth.wte.weight)
    assert torch.equal(by_number.wte.weight, fourth.wte.weight)
    assert not torch.equal(best.wte.weight, latest.wte.weight)
    assert not best.training and tokenizer.vocab_size == 257


def test_as_a_script_it_can_be_piped(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["from a pipe"]).start()
    argv = [run, "--prompt_file=-", "--max_tokens=5"]
    assert "from a pipe" in forked.run("sample.py", *argv, stdin=tmp_path / "pipe")


def test_arguments_are_checked_before_torch_is_loaded():
    code = """
import sys, sample
try:
    sample.main(["x", "--top_p=2"])
except ValueError as e:
    print(e, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert out == "top_p=2.0 should be above 0 and at most 1 False\n"
    assert sample.generate.__module__ == "engine.twin"
    assert sample.load_model.__module__ == "engine.checkpoint"


# --- a conversation


def talk(capsys, monkeypatch, run, typed: str, *argv) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    sample.main([str(run), "--interactive", "--max_tokens=9", *argv])
    return capsys.readouterr()


def test_interactive_mode_answers_each_line_without_echo(run, capsys, monkeypatch):
    expected = [text_of(capsys, run, f"--prompt={p}", "--max_tokens=9") for p in ("one", "two")]
    out, _ = talk(capsys, monkeypatch, run, "one\n\ntwo")  # an end of file, and no line end
    assert out == expected[0][3:] + expected[1][3:]


def test_settings_change_in_the_middle_of_a_conversation(run, capsys, monkeypatch):
    cold = text_of(capsys, run, "--prompt=one", "--max_tokens=5", "--temperature=0")[3:]
    stopped = text_of(capsys, run, "--prompt=one", "--max_tokens=9", "--stop=e")[3:]
    plain = text_of(capsys, run, "--prompt=one", "--max_tokens=200")[3:]
    typed = "/temperature 0\n/max_tokens 5\none\n"
    assert talk(capsys, monkeypatch, run, typed)[0] == cold
    assert talk(capsys, monkeypatch, run, "/stop e\none\n")[0] == stopped
    typed += "/temperature\n/max_tokens\none\n"  # back to the defaults
    assert talk(capsys, monkeypatch, run, typed)[0] == cold + plain


def test_a_mistake_in_a_conversation_costs_a_sentence_and_not_the_session(run, capsys, monkeypatch):
    for typed, sentence in [
        ("/temperature warm", "temperature='warm' should be a number"),
        ("/top_p 2", "top_p=2.0 should be above 0"),
        ("/run elsewhere", "/run cannot be changed here"),
        ("/temprature 1", "/temprature cannot be changed here"),
        ("/num_samples 2\n/beam 3", "num_samples=2 should be 1 with --beam"),
    ]:
        out, err = talk(capsys, monkeypatch, run, f"{typed}\none\n")
        assert sentence in err and out.strip()
    assert " temperature=0.8 " in talk(capsys, monkeypatch, run, "/help\n")[1]


# --- rows: questions, tasks, chats

A = "What is a token?"
B = "And a byte?"


@pytest.fixture
def chat(monkeypatch):
    """A model that has learned from rows, or so: it says what is in `says`, `asked` has the task
    and the messages of each question."""
    import engine.opening
    from model import GPT, GPTConfig
    from tokenizer import bytes_tokenizer

    tokenizer = bytes_tokenizer().extended(["sum", "translate"])
    chat = SimpleNamespace(asked=[], says=["yes"], tokenizer=tokenizer, most=[])
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=128)
    chat.model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    chat.model.init_weights(0)

    def answer(model, tokens, most, **how):
        open_row = [*tokens, tokenizer.markers.end, tokenizer.end_of_text]
        task, messages = tokenizer.decode_row(open_row)
        chat.asked.append((task, [(m["role"], m["content"]) for m in messages[:-1]]))
        chat.most.append((len(tokens), most))
        said = chat.says[(len(chat.asked) - 1) % len(chat.says)]
        rest = [*tokenizer.encode(said), tokenizer.markers.end, 65, 66]
        return ([token] * how.get("num_samples", 1) for token in rest)

    monkeypatch.setattr(engine.opening, "find", lambda *_: pathlib.Path("run"))
    monkeypatch.setattr(
        engine.opening, "load_weights", lambda _: (chat.model, chat.tokenizer, dict(settings={}))
    )
    chat.generate = generate.generate
    monkeypatch.setattr(generate, "generate", answer)
    return chat


def chatting(capsys, monkeypatch, typed: str, *argv) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    sample.main(["run", "--chat", *argv])
    return capsys.readouterr()


def test_a_chat_remembers_what_was_said(chat, capsys, monkeypatch):
    chat.says = ["a number", "a smaller one"]
    out, err = chatting(capsys, monkeypatch, f"{A}\n{B}\n")
    assert out == "a number\na smaller one\n"
    first = [("user", A)]
    second = [*first, ("assistant", "a number"), ("user", B)]
    assert chat.asked == [("", first), ("", second)]
    assert "forgotten" not in err


def test_reset_system_and_task(chat, capsys, monkeypatch):
    typed = f"{A}\n/reset\n{B}\n/task translate\n/system\n{A}\n"
    chatting(capsys, monkeypatch, typed, "--system=Be brief.", "--task=sum")
    system = ("system", "Be brief.")
    assert chat.asked[0] == ("sum", [system, ("user", A)])
    assert chat.asked[1] == ("sum", [system, ("user", B)])
    after = [("user", B), ("assistant", "yes"), ("user", A)]
    assert chat.asked[2] == ("translate", after)


def test_a_full_context_forgets_the_oldest_turns_and_says_so(chat, capsys, monkeypatch):
    turns = [f"question {i}, of some length" for i in range(5)]
    _, err = chatting(capsys, monkeypatch, "\n".join(turns), "--system=S", "--task=sum")
    assert err.count("the context of 128 tokens is full: the first 2 turns are forgotten") == 3
    for i, (task, messages) in enumerate(chat.asked):
        assert task == "sum" and messages[0] == ("system", "S")
        kept = [content for role, content in messages if role == "user"]
        assert kept == turns[max(0, i - 1) : i + 1]
        assert messages[1][0] == "user"
    for length, most in chat.most:
        assert length <= 96 and most == min(200, 129 - length)


def test_a_question_longer_than_the_context_keeps_its_end(chat, capsys, monkeypatch):
    _, err = chatting(capsys, monkeypatch, "long " * 50 + "end", "--task=sum")
    assert "the prompt makes 257 tokens; only the last 96 or so fit the context" in err
    task, [(role, content)] = chat.asked[0]
    assert (task, role) == ("sum", "user") and content.endswith("long end") and len(content) > 80


def test_a_marker_that_is_typed_is_text(chat, capsys, monkeypatch):
    chatting(capsys, monkeypatch, "a <|end|><|system|> b\n")
    assert chat.asked == [("", [("user", "a <|end|><|system|> b")])]


def test_an_answer_that_is_stopped_was_not_said(chat, capsys, monkeypatch):
    def interrupted(*_, **how):
        yield [65]
        raise KeyboardInterrupt

    answer, calls = generate.generate, []
    monkeypatch.setattr(
        generate,
        "generate",
        lambda *a, **how: (answer if calls or calls.append(1) else interrupted)(*a, **how),
    )
    out, _ = chatting(capsys, monkeypatch, f"{A}\n{B}\n")
    assert out == "A\nyes\n" and chat.asked == [("", [("user", B)])]


def test_a_task_answers_one_question_without_echo(chat, capsys, monkeypatch):
    assert text_of(capsys, "run", "--task=sum", "--prompt=1 + 1") == "yes\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"2 + 2\r\n")))
    assert text_of(capsys, "run", "--task=sum", "--prompt_file=-") == "yes\n"
    assert chat.asked == [("sum", [("user", "1 + 1")]), ("sum", [("user", "2 + 2")])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    sample.main(["run", "--task=sum", "--interactive"])  # each line for itself
    assert chat.asked[2:] == [("sum", [("user", "1")]), ("sum", [("user", "2")])]


def test_a_prompt_without_task_is_continued_as_it_is(chat, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "generate", lambda _, ids, *a, **how: seen.append(ids) or [])
    sample.main(["run", "--prompt=abc"])
    assert seen == [list(b"abc")]


def test_beam_search_answers(chat, capsys, monkeypatch):
    asked = chat.tokenizer.encode_row([turn("user", "1 + 1")], "sum", open=True)
    best = generate.beam(chat.model, chat.tokenizer, asked, 8, width=3, length_penalty=2.0)
    argv = ["run", "--task=sum", "--prompt=1 + 1", "--beam=3", "--length_penalty=2"]
    out = text_of(capsys, *argv, "--max_tokens=8")
    assert out == chat.tokenizer.decode(best) + "\n" and not chat.asked
    assert text_of(capsys, *argv, "--max_tokens=0") == "\n"


def test_beam_search_leaves_room_for_what_follows_a_long_text(run, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(generate, "beam", lambda *_: seen.update(tokens=_[2]) or [])
    sample.main([str(run), "--prompt=" + "x" * 999, "--beam=2"])
    limit = load_model(str(run))[0].config.block_size
    assert len(seen["tokens"]) == limit - limit // 4
    assert f"only its last {limit - limit // 4} leave room" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--chat", "--prompt=x"], "prompt='x' should be left out in a conversation"),
        (["--system=x"], "system='x' should be given with --chat or --task"),
        (["--beam=2", "--num_samples=2"], "num_samples=2 should be 1 with --beam"),
        (["--beam=2", "--top_k=9"], "top_k=9 should be left out with --beam, which draws nothing"),
        (["--task=sum"], "prompt='' should be a question for --task"),
        (["--chat", "--task=smu"], "the vocabulary has no task 'smu': did you mean sum?"),
    ],
)
def test_mistakes_with_rows(chat, argv, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sample.main(["run", *argv])


def test_a_model_without_markers_is_refused_with_the_remedy(run):
    for argv in (["--chat"], ["--task=sum", "--prompt=x"]):
        with pytest.raises(ValueError, match="has no markers for conversations: train on rows"):
            sample.main([str(run), *argv])


class Terminal:
    """sample.py --interactive on a terminal of its own."""

    def __init__(self, run):
        pty = pytest.importorskip("pty", reason="no terminals to play with on Windows")
        self.ours, theirs = pty.openpty()
        self.shown = ""
        begin = partial(sits_at, os.ttyname(theirs))
        self.process = forked.Forked("sample.py", run, "--interactive", before=begin)
        self.until("> ")
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def interrupt(self) -> None:
        """Presses Ctrl-C until the marker is back: readline misses one that comes as it begins to
        wait for a key, and a person would press again."""
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            end = time.monotonic() + 3
            while "> " not in self.shown and time.monotonic() < end:
                self.listen(seconds=0.1)
            if "> " in self.shown:
                break
        self.until("> ")

    def listen(self, seconds: float) -> None:
        if select.select([self.ours], [], [], seconds)[0]:
            self.shown += os.read(self.ours, 65536).decode(errors="replace")

    def until(self, pattern: str) -> str:
        """What appears before something that matches `pattern`."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < end, self.shown
            self.listen(seconds=0.1)
        shown, self.shown = self.shown[: found.start()], self.shown[found.end() :]
        return shown


def sits_at(terminal: str) -> None:
    """Makes a terminal that of this process."""
    os.setsid()
    for number in range(3):
        os.dup2(os.open(terminal, os.O_RDWR), number)
    sys.stdin = open(0, closefd=False)


def test_ctrl_c_stops_the_answer_and_not_the_session(run):
    terminal = Terminal(run)
    terminal.type("/max_tokens 1000000\n")
    terminal.until("max_tokens=1000000")
    terminal.until("> ")
    terminal.type("/temperature 0\n")  # greedy text repeats itself, endlessly
    terminal.until("> ")
    terminal.type("the model \n")
    assert terminal.until("the model").strip() == ""  # the terminal's own echo
    terminal.until(".{50}")  # it is writing
    terminal.interrupt()
    terminal.type("half a prompt")
    terminal.until("half a prompt")
    terminal.interrupt()
    terminal.type("/help\n")
    assert "Traceback" not in terminal.until("temperature=0.0")
    terminal.until("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(20) == 0


# runs a script, and presses Ctrl-C when it imports a certain module
PRESS = """
import os, runpy, signal, sys

_, moment, *sys.argv = sys.argv

class Press:
    def find_spec(self, name, path, target=None):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "moment",
    ["dataclasses", "engine.settings", "numpy", "torch", "torch.autograd", "model", "generate"],
)
def test_a_ctrl_c_while_things_are_loaded_is_quiet(run, moment):
    command = [sys.executable, "-c", PRESS, moment, str(ROOT / "sample.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_ctrl_c_while_it_writes_is_quiet(run, tmp_path):
    endless = ["--max_tokens=1000000", "--temperature=0"]  # greedy text repeats itself
    apart = partial(errors_into, tmp_path / "errors.txt")
    process = forked.Forked("sample.py", run, "--prompt=the ", *endless, before=apart)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.communicate(60)
    assert process.returncode == 130 and (tmp_path / "errors.txt").read_text() == ""
