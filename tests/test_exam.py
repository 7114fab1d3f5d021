"""What evaluate.py says of rows: answers, figures and floors are those that one finds by hand."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from promises import plain

import evaluate
import exam
import scores
import tasks
import train
from dataset import Dataset
from engine import inference, machine
from engine.checkpoint import load_model
from engine.shards import ShardWriter, Strip
from generate import answers
from grading import Exam, Row
from tokenizer import find_tokenizer


def turns(prompt: str, answer: str) -> list[dict]:
    return [dict(role="user", content=prompt), dict(role="assistant", content=answer)]


def animals(count: int, first: int = 0) -> list[dict]:
    """A task with two labels, which a single word decides."""
    rows = []
    for i in range(first, first + count):
        word, label = (("purrs", "cat"), ("barks", "dog"), ("meows", "cat"))[i % 3]
        rows.append(dict(messages=turns(f"number {i} {word}", label), task="animal"))
    return rows


def stories(count: int, first: int = 0) -> list[dict]:
    """Texts as answers, and more than one turn before them."""
    rows = []
    for i in range(first, first + count):
        begun = turns(f"Ask {i}.", "Who?")
        rows.append(
            dict(messages=begun + turns(f"Zoë, {i}", f"Zoë has {i} friends."), task="story")
        )
    return rows


def sums(split: str, count: int) -> list[dict]:
    return [row for row, _ in zip(tasks.find("sums").rows(split, 0), range(count), strict=False)]


def write_rows(folder, tokenizer, **splits):
    """A data set of rows, as prepare.py writes it."""
    folder.mkdir()
    tokenizer.save(folder)
    meta = dict(kind="rows", settings=dict(source=["sums", "rows.jsonl"]), splits={})
    for name, rows in splits.items():
        writer = ShardWriter(folder, name, tokenizer.vocab_size)
        for row in rows:
            ids = tokenizer.encode_row(row["messages"], row["task"])
            writer.write(np.array(ids, np.uint16))
        writer.close()
        tokens = sum(shard["tokens"] for shard in writer.shards)
        meta["splits"][name] = dict(
            shards=writer.shards, tokens=tokens, bytes=0, documents=len(rows)
        )
    meta |= dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.digest())
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exam")


@pytest.fixture(scope="module")
def rows(folder):
    tokenizer = find_tokenizer("bytes").extended(["animal", "story", "sums"])
    learned = animals(120) + stories(120) + sums("train", 120)
    held_out = animals(9, 1000) + stories(7, 1000) + sums("val", 11)
    return write_rows(folder / "rows", tokenizer, train=learned, val=held_out)


def trained(folder, name: str, data, *settings: str):
    (folder / "empty.py").write_text("")
    argv = [str(folder / "empty.py"), f"--data={data}", f"--out={folder / name}", *TINY]
    assert train.main([*argv, "--block_size=64", "--warmup=0", *settings]) == 0
    return folder / name


@pytest.fixture(scope="module")
def run(folder, rows):
    return trained(folder, "run", rows, "--steps=24", "--eval_every=24", "--save_every=24")


@pytest.fixture
def evaluated(run, capsys, tmp_path):
    """evaluated(*settings): what the command prints, and the lines that it writes."""

    def call(*settings: str, out=run):
        capsys.readouterr()
        file = tmp_path / "answers.jsonl"
        argv = [str(out), f"--answers={file}", "--dtype=float32", *settings]
        assert evaluate.main(argv) == 0
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return call


def figures(said: str, task: str) -> dict[str, list[float]]:
    """The table of a task: the numbers behind each name."""
    block = re.search(rf"^{task}: .*\n((?:.+\n)+)", said, re.MULTILINE)[1]
    found = {}
    for line in block.splitlines()[1:]:
        name, numbers = re.match(r"(\S+(?: [a-z]+)?)\s\s+(.*)", line).groups()
        found.setdefault(name, [float(n) for n in re.findall(r"-?[\d.]+", numbers)])
    return found


def nats_by_hand(model, tokenizer, messages, task: str) -> tuple[float, int]:
    """-ln p of the last answer with its end, from one forward pass over the row alone."""
    prompt = tokenizer.encode_row(messages[:-1], task, open=True)
    answer = [*tokenizer.encode(messages[-1]["content"]), tokenizer.markers.end]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        ln_p = model(ids[:, :-1]).double().log_softmax(-1)[0]
    nats = -sum(ln_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    return nats, len(answer)


def test_references_cost_what_one_pass_over_each_row_says(run, rows, evaluated):
    model, tokenizer = load_model(str(run))
    _, lines = evaluated()
    held_out = animals(9, 1000) + stories(7, 1000) + sums("val", 11)
    assert len(lines) == len(held_out)
    by_prompt = {line["prompt"]: line for line in lines}
    for row in held_out:
        prompt = "\n".join(turn["content"] for turn in row["messages"][:-1])
        line = by_prompt[prompt]
        nats, tokens = nats_by_hand(model, tokenizer, row["messages"], row["task"])
        assert line["nats"] == pytest.approx(nats, rel=1e-4)
        assert (line["tokens"], line["task"]) == (tokens, row["task"])
        assert line["reference"] == row["messages"][-1]["content"]


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_perplexity_is_the_loss_that_training_reports(folder, rows, evaluated, mask):
    """Of the task without several turns: training counts all answers of a row, an exam the last."""
    model_run = trained(folder, f"of_{mask}", rows, f"--mask={mask}", "--steps=4")
    model, tokenizer = load_model(str(model_run))
    here = machine.pick("cpu", "float32", "false")
    only = write_rows(
        folder / f"only_{mask}", tokenizer, train=sums("train", 20), val=sums("val", 30)
    )
    split = Dataset(str(only), "", mask).split("val")
    loss, bpb = evaluate.evaluate(plain(model), split, here).values()
    assert bpb is None
    said, _ = evaluated(f"--data={only}", out=model_run)
    assert figures(said, "sums")["perplexity"][0] == pytest.approx(math.exp(loss), abs=0.011)


def test_answers_are_those_that_the_model_writes_alone(run, evaluated):
    model, tokenizer = load_model(str(run))
    _, lines = evaluated("--task=sums", "--max_tokens=5", "--slots=3")
    for line in lines:
        prompt = tokenizer.encode_row(
            [dict(role="user", content=line["prompt"])], "sums", open=True
        )
        [(_, ids)] = answers(model, tokenizer, [prompt], 5, temperature=0)
        assert line["answer"] == tokenizer.decode(ids)
        assert 0 < line["probability"] <= 1


def test_the_label_is_the_one_that_the_model_finds_likeliest(run, evaluated):
    model, tokenizer = load_model(str(run))
    _, lines = evaluated("--task=animal", "--choices=auto")
    for line in lines:
        cost = {
            label: nats_by_hand(model, tokenizer, turns(line["prompt"], label), "animal")[0]
            for label in ("cat", "dog")
        }
        assert line["answer"] == min(cost, key=cost.get)
        share = math.exp(-min(cost.values())) / sum(math.exp(-c) for c in cost.values())
        assert line["probability"] == pytest.approx(share, rel=1e-4)


def test_labels_of_one_task_are_no_labels_of_another(evaluated):
    _, lines = evaluated("--choices=auto", "--max_tokens=3")
    assert {line["answer"] for line in lines if line["task"] == "animal"} <= {"cat", "dog"}
    assert not {line["answer"] for line in lines if line["task"] != "animal"} & {"cat", "dog"}


def test_normalised_labels_are_chosen_by_the_mean_of_their_tokens(run, evaluated):
    """A label of many tokens has a small probability as a whole, though each token is likely."""
    choices = "--choices=cat,dog,cat and dog and cat and dog"
    _, plain = evaluated("--task=animal", choices)
    _, normalised = evaluated("--task=animal", choices, "--normalise")
    model, tokenizer = load_model(str(run))
    for line in normalised:
        mean = {}
        for label in ("cat", "dog", "cat and dog and cat and dog"):
            nats, tokens = nats_by_hand(model, tokenizer, turns(line["prompt"], label), "animal")
            mean[label] = nats / tokens
        assert line["answer"] == min(mean, key=mean.get)
    assert all(len(line["answer"]) == 3 for line in plain)


def test_labels_are_seen_and_naive_bayes_stands_beside(evaluated):
    said, lines = evaluated("--task=animal")
    found = figures(said, "animal")
    right = [line["answer"] == line["reference"] for line in lines]
    value, _, _, most_frequent, bayes, above, _, _ = found["accuracy"]
    assert value == pytest.approx(100 * sum(right) / len(right), abs=0.01)
    assert (most_frequent, bayes) == (pytest.approx(66.7, abs=0.05), 100)
    assert above == pytest.approx(value - 100, abs=0.06)
    assert found["macro-F1"][3] == pytest.approx(40, abs=0.05)  # (80 + 0) / 2
    assert "naive Bayes" in said and "BLEU" not in said


def test_texts_are_compared_as_texts_and_floors_copy_the_prompt(evaluated):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    said, _ = evaluated("--task=story")
    found = figures(said, "story")
    assert {"exact match", "chrF", "BLEU", "ROUGE-L", "perplexity"} <= found.keys()
    rows = [Row("story", [], row["messages"][-1]["content"]) for row in stories(7, 1000)]
    copied = scores.chrf([f"Zoë, {i}" for i in range(1000, 1007)], [row.reference for row in rows])
    assert found["chrF"][4] == pytest.approx(copied.value, abs=0.06)  # behind the most frequent


def test_a_built_in_task_checks_answers_by_itself(evaluated):
    said, lines = evaluated("--task=sums")
    found = figures(said, "sums")
    assert found.keys() == {"exact match", "perplexity"}
    right = [tasks.find("sums").right(line["prompt"], line["answer"]) for line in lines]
    assert found["exact match"][0] == pytest.approx(100 * np.mean(right), abs=0.01)
    assert [bool(line["exact match"]) for line in lines] == right


def test_a_task_of_the_users_own_is_not_checked_by_ours(rows):
    some = [Row("sums", [dict(role="user", content="anything")], "else")]
    assert Exam(some, some, [], built_in=False, groups={}).module is None
    assert (
        Exam(some, some, [], built_in=False, groups={}).figures(["else"])["exact match"].value
        == 100
    )
    assert (
        Exam(some, some, [], built_in=True, groups={}).figures(["else"])["exact match"].value == 0
    )


def test_rows_of_a_group_count_as_one_and_labels_that_lack_are_named():
    """Each number is asked for in English twice, and both are right or wrong together."""
    some = [row for row, _ in zip(tasks.find("numbers").rows("val", 7), range(60), strict=False)]
    asked = [row["messages"] for row in some if row["task"] == "numbers_english"]
    some = [Row("numbers_english", messages[:1], messages[1]["content"]) for messages in asked]
    groups = tasks.groups("numbers_english", "val", dict(seed=7))
    numbers = Exam(some, [], [], True, groups)
    assert numbers.groups == [i // 2 for i in range(20)]
    assert numbers.figures([row.reference for row in some])["exact match"].rows.shape == (10, 2)
    assert numbers.title("val").startswith("numbers_english: 20 rows of the val split in 10 groups")
    assert Exam(some, [], [], True, tasks.groups("sums", "val", {})).groups == [*range(20)]
    known = [Row("animal", [], label) for label in ("cat", "dog", "eel") for _ in range(20)]
    title = Exam(known[:9], known, [], False, {}).title("test")
    assert title.endswith("floors from 60 of train; NO ROW of dog, eel")


def test_each_interval_holds_its_figure(evaluated):
    said, _ = evaluated()
    for task in ("animal", "story", "sums"):
        for value, low, high, *_ in figures(said, task).values():
            assert low <= value <= high


def test_a_run_does_not_differ_from_itself_and_differs_from_one_that_knows_nothing(
    folder, rows, run, evaluated
):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    said, _ = evaluated(f"--baseline={run}", "--task=story")
    assert said.count("no difference is shown") == 7 and "they differ" not in said
    other = trained(folder, "other", rows, "--steps=1", "--lr=0", "--embed_lr=0", "--head_lr=0")
    said, _ = evaluated(f"--baseline={other}", "--task=story")
    assert re.search(r"perplexity .* they differ", said)


@pytest.mark.cpu
def test_of_two_runs_the_first_alone_has_eight_bits_and_is_near(run, evaluated, monkeypatch):
    made, ready = [], inference.ready
    monkeypatch.setattr(inference, "ready", lambda *a, **k: made.append(ready(*a, **k)) or made[-1])
    said, _ = evaluated("--quantize=int8", f"--baseline={run}", "--task=story")
    kinds = [[getattr(m, "scales", None) is not None for m in model.modules()] for model in made]
    assert list(map(any, kinds)) == [True, False]
    value, gap = map(float, re.search(r"perplexity +(\S+) +([+-]\S+) ", said).groups())
    assert abs(gap) < 0.02 * value


def test_exchanged_prompts_are_those_of_the_next_row(run, evaluated):
    model, tokenizer = load_model(str(run))
    said, lines = evaluated("--task=animal", "--exchange")
    total = tokens = 0
    for line, other in zip(lines, lines[1:] + lines[:1], strict=True):
        nats, count = nats_by_hand(
            model, tokenizer, turns(other["prompt"], line["reference"]), "animal"
        )
        total, tokens = total + nats, tokens + count
    expected = math.exp(total / tokens)
    assert figures(said, "animal")["prompts exchanged"][0] == pytest.approx(expected, abs=0.011)


def test_a_marker_can_be_exchanged_and_left_out(run, evaluated):
    model, tokenizer = load_model(str(run))
    for marker, task in (("story", "story"), ("none", "")):
        _, lines = evaluated("--task=sums", f"--marker={marker}")
        for line in lines:
            row = turns(line["prompt"], line["reference"])
            assert line["nats"] == pytest.approx(
                nats_by_hand(model, tokenizer, row, task)[0], rel=1e-4
            )


def test_a_limit_takes_rows_of_each_task_evenly(rows):
    split = Dataset(str(rows)).split("val")
    found = exam.rows_of(split, limit=3)
    assert {task: len(some) for task, some in found.items()} == dict(animal=3, story=3, sums=3)
    assert [row.reference for row in found["story"]] == [
        f"Zoë has {i} friends." for i in (1000, 1002, 1004)
    ]


def test_only_the_rows_that_are_wanted_are_read(rows, monkeypatch):
    split = Dataset(str(rows)).split("train")
    read, plain_read = [], Strip.read
    monkeypatch.setattr(Strip, "read", lambda *place: read.append(place) or plain_read(*place))
    exam.rows_of(split, limit=3)
    assert len(read) == 9


def test_running_text_beside_rows_is_not_asked(rows, data):
    mixed = exam.rows_of(Dataset(f"{data},{rows}").split("val"))
    assert mixed == exam.rows_of(Dataset(str(rows)).split("val"))


def test_a_prompt_that_is_too_long_loses_its_front_and_keeps_its_marker(run):
    model, tokenizer = load_model(str(run))
    row = Row("story", [dict(role="user", content="x" * 99 + "the end")], "")
    [ids], shorter = exam.prompts_of(model, tokenizer, [row], "", 0.0, [10])
    assert shorter == 1
    assert len(ids) == 64 + 1 - 10
    assert ids[:2] == [tokenizer.task_id("story"), tokenizer.markers.user]
    assert (
        tokenizer.decode(ids[2:-2]).endswith("xthe end") and ids[-1] == tokenizer.markers.assistant
    )


LONG_ROWS = [("hi", "a" * 50), ("b" * 45, "no"), ("x" * 99, "wxyz"), ("q", "c" * 99)]


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_each_prompt_has_the_room_that_its_own_reference_leaves(folder, rows, evaluated, position):
    """Of a context of 64: one with a long reference, one with a long prompt, one that is too long,
    and one whose reference fits in no context. They are read side by side."""
    some = [dict(messages=turns(*text), task="story") for text in LONG_ROWS]
    model_run = trained(folder, f"{position}_run", rows, f"--position={position}", "--steps=4")
    model, tokenizer = load_model(str(model_run))
    data = write_rows(folder / f"{position}_rows", tokenizer, train=some, val=some)
    said, lines = evaluated(f"--data={data}", out=model_run)
    for row, line in zip(some[:2], lines[:2], strict=True):
        nats, tokens = nats_by_hand(model, tokenizer, row["messages"], "story")
        assert (line["nats"], line["tokens"]) == (pytest.approx(nats, rel=1e-4), tokens)
    fits = turns("x" * 56, "wxyz")  # with the answer's end and four markers in front it has 65
    assert lines[2]["nats"] == pytest.approx(
        nats_by_hand(model, tokenizer, fits, "story")[0], rel=1e-4
    )
    assert lines[3]["tokens"] == 64 - 4
    assert "of 4 rows, 1 prompts lose their front, 1 references their end" in said
    _, shorter = evaluated(f"--data={data}", "--max_tokens=2", out=model_run)
    assert [line["nats"] for line in shorter] == [line["nats"] for line in lines]
    assert all(len(line["answer"].encode(errors="replace")) <= 6 for line in shorter)


def test_beam_search_answers_too(run, evaluated):
    _, lines = evaluated("--task=sums", "--beam=2", "--max_tokens=4", "--limit=3")
    assert len(lines) == 3


def test_a_vote_gives_one_of_the_answers_that_were_drawn_to_a_row(run, evaluated, monkeypatch):
    drawn, written = [], exam.written
    monkeypatch.setattr(exam, "written", lambda *args: drawn.append(written(*args)) or drawn[-1])
    settings = ["--task=sums", "--vote=9", "--temperature=1", "--max_tokens=1"]
    _, lines = evaluated(*settings)
    tokenizer = load_model(str(run))[1]
    said = [tokenizer.decode(ids) for ids in drawn[0]]
    each = [said[i : i + 9] for i in range(0, len(said), 9)]
    expected = [some[scores.elected(some, scores.same)] for some in each]
    assert [line["answer"] for line in lines] == expected != [some[0] for some in each]
    assert evaluated(*settings)[1] == lines
    assert evaluated(*settings, "--seed=2")[1] != lines
    evaluated(*settings, "--vote=4")
    assert drawn[-1][:4] == drawn[0][:4] and drawn[-1][-4:] == drawn[0][-9:-5]


def test_exact_answers_are_voted_for_by_equality_and_texts_by_overlap(evaluated, monkeypatch):
    texts = ["q", "a b c", "a b d", "b d"]

    def written(model, tokenizer, prompts, *rest):
        return [tokenizer.encode(text) for text in texts] * len(prompts)

    monkeypatch.setattr(exam, "written", written)
    for task, answer in (("sums", "q"), ("story", "a b d")):
        _, lines = evaluated(f"--task={task}", "--vote=4", "--temperature=1")
        assert {line["answer"] for line in lines} == {answer}


def test_labels_are_written_for_rows_without_answers(run, evaluated, tmp_path):
    file = tmp_path / "unlabelled.jsonl"
    asked = [dict(messages=turns("it purrs", "?")[:1], task="animal"), animals(1)[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    _, lines = evaluated(f"--label={file}", "--choices=cat,dog")
    for row, line in zip(asked, lines, strict=True):
        assert line["messages"][:1] == row["messages"][:1]
        assert line["messages"][1]["role"] == "assistant"
        assert line["messages"][1]["content"] in ("cat", "dog")
        assert line["task"] == "animal" and 0.5 <= line["probability"] <= 1


def test_answers_without_reference_may_fill_half_of_the_context(
    run, evaluated, tmp_path, monkeypatch
):
    file, asked = tmp_path / "unlabelled.jsonl", []
    row = dict(messages=turns("a\u2028b", "?")[:1])
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")

    def written(model, tokenizer, prompts, most, *rest):
        asked.append((tokenizer.decode(prompts[0]), most))
        return [[65]]

    monkeypatch.setattr(exam, "written", written)
    _, [line] = evaluated(f"--label={file}")
    assert line["messages"][0]["content"] == "a\u2028b" and "a\u2028b" in asked[0][0]
    evaluated(f"--label={file}", "--max_tokens=7")
    assert [most for _, most in asked] == [32, 7]


def test_answers_lie_in_the_folder_of_the_run(run, capsys, tmp_path):
    [step] = run.glob("step-*")
    shutil.copytree(step, tmp_path / "model")
    evaluate.main([str(tmp_path / "model"), f"--data={run.parent / 'rows'}", "--limit=1"])
    assert (tmp_path / "model" / "answers.jsonl").exists()
    assert not (tmp_path / "answers.jsonl").exists()
    (tmp_path / "rows.jsonl").write_text(json.dumps(animals(1)[0]))
    evaluate.main([str(step), f"--label={tmp_path / 'rows.jsonl'}", "--choices=cat,dog"])
    assert (run / "labelled.jsonl").exists() and not (run / "answers.jsonl").exists()
    evaluate.main([str(run), "--limit=1"])
    assert len((run / "answers.jsonl").read_text().splitlines()) == 3
    assert f"wrote {run / 'answers.jsonl'}" in capsys.readouterr().out


def test_what_lacks_is_named_and_left_out(monkeypatch, evaluated):
    monkeypatch.setattr("grading.lacking", lambda: ["sacrebleu", "rouge_score"])
    said, _ = evaluated("--task=story")
    assert "pip install sacrebleu" in said and "pip install rouge_score" in said
    assert figures(said, "story").keys() == {"exact match", "perplexity"}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            ["--choices=cat,cow"],
            "'dog' is an answer to animal, but not among the choices cat,cow",
        ),
        (["--choices=cat,,dog"], "choices='cat,,dog' should be labels joined by commas"),
        (["--choices=cat,cat"], "choices='cat,cat' should be labels joined by commas"),
        (
            ["--task=story", "--choices=auto"],
            "choices='auto' finds no labels: the answers are more than 50",
        ),
        (["--task=tale"], "task='tale' is not in the data: there is animal, story, sums"),
        (["--marker=animals"], "no task 'animals': did you mean animal"),
        (["--beam=2", "--temperature=1"], "beam=2 should be 1 with a temperature above 0"),
        (["--vote=4", "--beam=2"], "beam=2 should be 1 with a temperature above 0, "),
        (["--vote=4"], "temperature=0.0 should be above 0 with --vote"),
        (["--vote=1", "--temperature=1"], "vote=1 should be at least 2"),
        (["--vote=4", "--temperature=1", "--choices=auto"], "no use with --vote: leave it out"),
        (["--label=missing.jsonl"], "label='missing.jsonl' should be a file of rows"),
        (["--split=test"], "has no test split"),
        (["--generate=5"], "--generate is for running text"),
        (["--generate=1"], "generate=1 should be at least 2"),
        (["--generate=5", "--beam=2"], "beam=2 should be 1 with"),
        ([f"--label={__file__}"], "--task has no use with --label"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run, settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        evaluate.main(
            [str(run), "--task=animal", *settings]
            if "--task" not in settings[0]
            else [str(run), *settings]
        )


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": [1]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": "a"}], "task": 5}',
    ],
)
def test_a_line_that_is_no_row_is_named(run, tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(animals(1)[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no row such as"):
        evaluate.main([str(run), f"--label={file}", "--choices=cat,dog"])


@pytest.mark.parametrize(
    "setting", ["--limit=3", "--baseline=run", "--exchange", "--vote=2 --temperature=1"]
)
def test_what_has_no_use_with_label_is_refused(run, tmp_path, setting):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]} has no use with --label"):
        evaluate.main([str(run), f"--label={tmp_path / 'rows.jsonl'}", *setting.split()])
    with pytest.raises(ValueError, match=r"rows.jsonl is empty"):
        evaluate.main([str(run), f"--label={tmp_path / 'rows.jsonl'}"])


def test_a_model_of_running_text_is_not_asked_rows(train, rows):
    text_run = train("text")
    with pytest.raises(ValueError, match="learned from running text alone"):
        evaluate.main([str(text_run), f"--data={rows}"])


def test_rows_of_another_vocabulary_are_refused(run, folder):
    other = find_tokenizer("bytes").extended(["other"])
    data = write_rows(folder / "others", other, train=[animals(1)[0] | dict(task="other")])
    with pytest.raises(ValueError, match="reads bytes"):
        evaluate.main([str(run), f"--data={data}", "--split=train"])


@pytest.mark.parametrize(
    "setting", ["--choices=a,b", "--task=x", "--limit=3", "--exchange", "--vote=2 --temperature=1"]
)
def test_what_is_for_rows_is_refused_for_text(train, setting):
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]} is for rows"):
        evaluate.main([str(train("text")), *setting.split()])
