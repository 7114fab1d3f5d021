"""prepare.py: all text arrives, cleaned, once, in one split; same input, same bytes."""

import gzip
import hashlib
import inspect
import io
import json
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import ROOT, make_text

import prepare
from bpe import bpe_tokenizer
from dataset import Dataset
from engine import pipeline, sources, spool
from engine.tables import Reading


def read(folder) -> dict[str, list[str]]:
    """The documents of each split, decoded."""
    data = Dataset(str(folder))
    end = data.tokenizer.end_of_text
    found = {}
    for name, files in data.folders[0].files.items():
        tokens = data.split(name).read(0, 10**9).tolist() if files else []
        assert not tokens or tokens[-1] == end
        documents, ids = [], []
        for token in tokens:
            if token == end:
                documents.append(data.tokenizer.decode(ids))
                ids = []
            else:
                ids.append(token)
        found[name] = documents
    return found


def everything(folder) -> list[str]:
    return sorted(doc for documents in read(folder).values() for doc in documents)


def files_of(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_one_document_is_cut_in_order_at_line_ends(tmp_path, text_file):
    out = tmp_path / "out"
    prepare.main([str(text_file), f"--out={out}", "--tokenizer=bytes", "--val=0.1", "--test=0.2"])
    splits = read(out)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [1, 1, 1]
    text = text_file.read_text(encoding="utf-8")
    (train,), (val,), (test,) = splits["train"], splits["val"], splits["test"]
    assert train + val + test == text
    size = len(text.encode())
    for part, fraction in ((train, 0.7), (train + val, 0.8)):
        length = len(part.encode())
        assert part.endswith("\n") and fraction * size < length <= fraction * size + 60


def test_the_last_tenth_is_the_last_tenth(tmp_path, text_file):
    out = tmp_path / "out"
    prepare.main([str(text_file), f"--out={out}", "--tokenizer=bytes", "--val=0.1", "--test=0"])
    splits = read(out)
    assert splits["test"] == []
    assert splits["train"][0] + splits["val"][0] == text_file.read_text(encoding="utf-8")


def test_documents_are_cleaned_counted_and_never_cross_splits(tmp_path, capsys):
    rows = [make_text(3, seed) for seed in range(200)]
    rows += rows[:50] + ["", "  \n "] + ["e\u0301a\r\nb\rc\x00\x07d\ttab \ud800"]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"id": 1, "text": row}) + "\n" for row in rows)
    out = tmp_path / "out"
    prepare.main([str(path), f"--out={out}", "--tokenizer=bytes", "--val=0.2", "--test=0.2"])
    assert everything(out) == sorted({*rows[:200], "éa\nb\ncd\ttab ?"})
    printed = capsys.readouterr().out
    assert "2 empty documents, 50 repeated documents" in printed
    assert "2 control characters" in printed
    counts = [len(documents) for documents in read(out).values()]
    assert all(20 < count < 160 for count in counts) and sum(counts) == 201


def test_the_split_of_a_document_does_not_depend_on_its_company(tmp_path):
    rows = [make_text(3, seed) for seed in range(100)]
    places = []
    for name, some in (("a", rows), ("b", rows[::-1] + [make_text(4, 999)])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in some))
        prepare.main([str(path), f"--out={tmp_path / name}", "--tokenizer=bytes"])
        places.append({doc: split for split, docs in read(tmp_path / name).items() for doc in docs})
    assert all(places[1][row] == places[0][row] for row in rows)


def test_a_folder_ignores_no_type_of_file_that_can_be_read():
    source = inspect.getsource(sources.file_documents)
    types = {*re.findall(r"endswith\(\"(\.\w+)\"", source)} - {".json"}  # that one is refused
    assert types >= {".parquet", ".jsonl"}
    for name in types:
        assert sources.matches(Path(f"a{name}"), Reading().pattern), (
            f"pattern of Reading lacks {name}"
        )


def test_every_kind_of_source_gives_the_same_documents(tmp_path, monkeypatch):
    rows = [make_text(5, seed) for seed in range(60)]
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("not this")
    (folder / "skipped.dat").write_text("nor this")
    for i, row in enumerate(rows):
        place = folder / "deep" if i % 2 else folder
        (place / f"{i:03}.txt").write_text(row, encoding="utf-8-sig", newline="\r\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": r}) + "\n" for r in rows))
    given = {"folder": [str(folder)], "jsonl": [str(tmp_path / "rows.jsonl"), "--field=body"]}
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    table = pyarrow.table({"body": rows, "other": range(60)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    given["parquet"] = [str(tmp_path / "rows.parquet"), "--field=body"]
    for name, argv in given.items():
        argv += ["--tokenizer=bytes", "--val=0.2", "--test=0.2"]
        prepare.main([*argv, f"--out={tmp_path / name}.out"])
        assert everything(tmp_path / f"{name}.out") == sorted(rows), name
    stdin = io.TextIOWrapper(io.BytesIO("".join(rows).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    prepare.main(["-", f"--out={tmp_path / 'stdin'}", "--tokenizer=bytes", "--val=0", "--test=0"])
    assert everything(tmp_path / "stdin") == ["".join(rows)]


def test_same_input_same_bytes_whatever_the_workers(tmp_path):
    lines = make_text(1000).splitlines()
    path = tmp_path / "long.txt"
    with open(path, "w", encoding="utf-8") as f:
        for i in range(100):  # no two alike, as far as words go
            f.writelines(f"{line} {i}{chr(97 + i % 26)}\n" for line in lines)
    made = []
    for workers in (1, 3):
        out = tmp_path / f"workers{workers}"
        prepare.main([str(path), f"--out={out}", "--vocab_size=300", f"--workers={workers}"])
        made.append(files_of(out))
    assert path.stat().st_size > 3 * sources.PIECE, "several chunks"
    assert made[0] == made[1]
    assert not list(tmp_path.glob("*.partial"))


def test_a_long_document_goes_through_in_pieces(tmp_path, monkeypatch):
    """Small pieces: characters, line ends and words lie across every kind of border."""
    for module in (prepare, sources, spool):
        monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InProcess)  # so that it holds for workers
    text = make_text(400, seed=5) + "文" * 3000 + "\n" + "x" * 3000 + "\n　　缩进。\n" * 400
    path = tmp_path / "long.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    out = tmp_path / "out"
    prepare.main([str(path), f"--out={out}", "--vocab_size=300", "--val=0", "--test=0"])
    assert read(out)["train"] == [text]


class InProcess:
    """Stands in for a pool of processes."""

    def __init__(self, workers, context, initializer=None, initargs=()):
        if initializer:
            initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_chunks_are_cut_where_tokens_do_not_change(monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "PIECE", 4000)
    text = make_text(500, seed=2).replace("学习", "learns")
    path = tmp_path / "spool"
    path.write_bytes(text.encode() + b"\0")
    chunks = [spool.read_chunk(path, i) for i in range(-(-path.stat().st_size // 4000))]
    assert "".join(chunks) == text + "\0"
    cut = [word for chunk in chunks for word in prepare.regex.findall(prepare.SPLIT, chunk)]
    assert len(chunks) > 3 and cut == prepare.regex.findall(prepare.SPLIT, text + "\0")


def test_a_vocabulary_knows_the_training_text_alone(tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text("lorem\n" * 800 + "dizzy\n" * 100 + "quick\n" * 100)
    prepare.main([str(path), f"--out={out}", "--val=0.1", "--test=0.1"])
    tokenizer = Dataset(str(out)).tokenizer
    assert [len(tokenizer.encode(word)) for word in ("lorem", "dizzy", "quick")] == [1, 5, 5]


def test_a_vocabulary_that_reads_a_part_reads_of_the_end_as_of_the_beginning(tmp_path, monkeypatch):
    for module in (prepare, sources, spool, pipeline):
        monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InProcess)
    path, out = tmp_path / "halves.txt", tmp_path / "out"
    path.write_text("lorem ipsum\n" * 500 + "dolor amet\n" * 500)
    prepare.main([str(path), f"--out={out}", "--bpe_bytes=2000", "--val=0", "--test=0"])
    tokenizer = Dataset(str(out)).tokenizer
    assert len(tokenizer.encode("lorem")) == len(tokenizer.encode("dolor")) == 1


def test_prepared_before_is_said_and_nothing_is_touched(tmp_path, text_file, capsys):
    out = tmp_path / "out"
    argv = [str(text_file), f"--out={out}", "--tokenizer=bytes"]
    prepare.main(argv)
    before = files_of(out)
    prepare.main(argv)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another val .0.05.*--overwrite"):
        prepare.main([*argv, "--val=0.1"])
    assert files_of(out) == before
    prepare.main([*argv, "--val=0.1", "--overwrite"])
    assert files_of(out) != before


def test_the_built_in_corpus_is_the_standard_library():
    heads = [next(iter(text))[:300] for text in sources.documents("python")]
    assert len(heads) > 300
    assert any("Command-line parsing library" in head for head in heads)  # argparse
    assert not any("Lib/test" in head for head in heads)


# --- splits


def novel(seed: int) -> str:
    return make_text(100 + seed, seed)


def folder_of(folder, texts) -> list[str]:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return [str(path) for path in sorted(folder.iterdir())]


def shares(splits: dict[str, list[str]]) -> list[float]:
    sizes = [sum(len(text.encode()) for text in splits[name]) for name in ("train", "val", "test")]
    return [size / sum(sizes) for size in sizes]


def test_a_folder_of_novels_is_split_as_its_files_listed(tmp_path):
    files = folder_of(tmp_path / "novels", map(novel, range(17)))
    for name, source in (("folder", [str(tmp_path / "novels")]), ("listed", files)):
        prepare.main([*source, f"--out={tmp_path / name}.out", "--tokenizer=bytes"])
    folder, listed = read(tmp_path / "folder.out"), read(tmp_path / "listed.out")
    assert folder == listed
    assert shares(folder) == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    parts = zip(folder["train"], folder["val"], folder["test"], strict=True)
    assert ["".join(part) for part in parts] == list(map(novel, range(17)))
    assert all(text.endswith("\n") for texts in folder.values() for text in texts)


def test_no_document_is_more_than_its_share_of_a_split(tmp_path):
    """One novel among many short texts; were it drawn, it could be all of a split."""
    long, short = make_text(3000, 1), [make_text(10, seed) for seed in range(2, 300)]
    for seed in range(2):
        folder_of(tmp_path / f"{seed}", [long + f"{seed}\n", *short])
        out = tmp_path / f"{seed}.out"
        prepare.main([str(tmp_path / f"{seed}"), f"--out={out}", "--tokenizer=bytes"])
        splits = read(out)
        assert shares(splits) == pytest.approx([0.9, 0.05, 0.05], abs=0.03)
        for name, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
            parts = [text for text in splits[name] if text in long + f"{seed}\n"]
            assert len(parts) == 1 and len(parts[0]) <= (share + 0.002) * len(long)
        assert set(short) <= {text for texts in splits.values() for text in texts}


@pytest.mark.parametrize("seed", range(5))
def test_no_split_of_a_few_short_rows_is_empty(tmp_path, seed):
    rows = [f"row number {i}" for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    argv = [str(tmp_path / "rows.jsonl"), f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    prepare.main([*argv, f"--seed={seed}"])
    splits = read(tmp_path / "out")
    assert [len(splits[name]) for name in ("train", "val", "test")] == [5, 1, 1]
    assert everything(tmp_path / "out") == sorted(rows)


def test_texts_that_were_published_as_splits_stay_apart(tmp_path):
    texts = [make_text(40, seed) for seed in range(30)]
    for name, some in (("train", texts[:20]), ("test", texts[18:])):
        folder_of(tmp_path / name, some)
    argv = [f"train={tmp_path / 'train'}", f"test={tmp_path / 'test'}", "--val=0.2"]
    prepare.main([*argv, f"--out={tmp_path / 'out'}", "--tokenizer=bytes"])
    splits = read(tmp_path / "out")
    assert sorted(splits["test"]) == sorted(texts[18:]) and splits["val"]
    assert sorted(splits["train"] + splits["val"]) == sorted(texts[:18])


def test_paragraphs_longer_than_a_split_do_not_empty_it(tmp_path):
    line = "words and words " * 100
    (tmp_path / "essay.txt").write_text(f"{line}\n{line}\n", encoding="utf-8")
    prepare.main([str(tmp_path / "essay.txt"), f"--out={tmp_path / 'out'}", "--tokenizer=bytes"])
    splits = read(tmp_path / "out")
    assert "".join(splits["train"] + splits["val"] + splits["test"]) == f"{line}\n{line}\n"
    assert shares(splits) == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


# --- what cannot be read


GBK = "他说这是一本好书，我们都来读。\n" * 40


@pytest.fixture
def mixed(tmp_path):
    """A folder of good files and bad ones."""
    folder = tmp_path / "mixed"
    folder_of(folder, [make_text(40, seed) for seed in range(5)])
    (folder / "a.txt").write_bytes(GBK.encode("gbk"))
    (folder / "b.txt").write_bytes(GBK[:-5].encode("gbk"))
    (folder / "c.txt").write_bytes(bytes(range(256)) * 10)
    (folder / "d.jsonl").write_bytes(b'{"text": "fine\\n"}\n{"text": oops\n{"body": 1}\n')
    (folder / "e.txt").write_text(GBK[5:], encoding="utf-16")
    return folder


def test_everything_that_cannot_be_read_is_named_in_one_message(mixed, tmp_path):
    with pytest.raises(ValueError) as refusal:
        prepare.main([str(mixed), f"--out={tmp_path / 'out'}", "--tokenizer=bytes"])
    said = str(refusal.value)
    for name in ("a.txt", "b.txt", "c.txt", "d.jsonl, line 2", "d.jsonl, line 3"):
        assert said.count(name) == 1, said
    assert "e.txt" not in said and "--encoding=gb18030" in said and "binary" in said
    assert "--skip_bad" in said and "iconv" not in said
    assert not (tmp_path / "out").exists()


def test_many_unreadable_files_are_counted(tmp_path):
    files = folder_of(tmp_path / "many", ["x"] * 25)
    for file in files:
        Path(file).write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match=r"000\.txt.*009\.txt.*and 15 more"):
        prepare.main([str(tmp_path / "many"), f"--out={tmp_path / 'out'}"])


def test_skip_bad_leaves_them_out_and_counts_them(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main([str(mixed), f"--out={out}", "--tokenizer=bytes", "--skip_bad"])
    assert "5 unreadable documents" in capsys.readouterr().out
    text = "".join(everything(out))
    assert len(text.encode()) == json.loads((out / "meta.json").read_text())["text"]["bytes"]
    assert sorted(text) == sorted("".join(make_text(40, i) for i in range(5)) + GBK[5:] + "fine\n")


def test_encoding_is_that_of_files_that_are_not_utf8(mixed, tmp_path):
    out = tmp_path / "out"
    argv = [str(mixed), f"--out={out}", "--tokenizer=bytes", "--encoding=GB18030", "--skip_bad"]
    prepare.main(argv)
    wanted = [make_text(40, i) for i in range(5)] + [GBK, GBK[:-5], GBK[5:], "fine\n"]
    assert sorted("".join(everything(out))) == sorted("".join(wanted))


def test_an_encoding_that_suits_one_file_does_not_spoil_another(mixed, tmp_path):
    (mixed / "f.txt").write_bytes("déjà vu, là-bas et ailleurs\n".encode("cp1252") * 9)
    argv = [str(mixed), f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--encoding=cp1252"]
    with pytest.raises(ValueError) as refusal:
        prepare.main(argv)
    said = str(refusal.value)
    assert "a.txt" in said and "GB18030, not cp1252" in said and "f.txt" not in said


@pytest.mark.parametrize("name", ["utf-16-le", "utf-32-be", "cp1252", "utf-8-sig", "utf-16"])
def test_text_in_any_encoding_arrives(tmp_path, name, monkeypatch):
    text = "déjà vu “là-bas”, plain words\n" * 50
    encoded = text.replace("\n", "\r\n").encode(name)
    (tmp_path / "a.txt").write_bytes(encoded)
    argv = ["--tokenizer=bytes", "--val=0", "--test=0", f"--encoding={name}"]
    prepare.main([str(tmp_path / "a.txt"), f"--out={tmp_path / 'a'}", *argv])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded)))
    prepare.main(["-", f"--out={tmp_path / 'b'}", *argv])
    assert everything(tmp_path / "a") == everything(tmp_path / "b") == [text]


def test_rows_in_another_encoding(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("cp1252") + '{"text": "là"}\n'.encode())
    argv = [str(path), f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--val=0", "--test=0"]
    with pytest.raises(ValueError, match="line 1: .*CP1252: add --encoding=cp1252"):
        prepare.main(argv)
    prepare.main([*argv, "--encoding=cp1252"])
    assert everything(tmp_path / "out") == ["café", "là"]


# --- what is there already


def test_an_edited_source_is_noticed(tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    argv = [str(path), f"--out={out}", "--tokenizer=bytes"]
    path.write_text(make_text())
    prepare.main(argv)
    before = files_of(out)
    path.write_text(make_text().replace("nobody", "n0body"))
    with pytest.raises(ValueError, match="made from another text.*--overwrite"):
        prepare.main(argv)
    assert files_of(out) == before
    prepare.main([*argv, "--overwrite"])
    assert "n0body" in everything(out)[0]


def test_other_standard_input_is_noticed(tmp_path, monkeypatch, capsys):
    argv = ["-", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    for text, seen in ((make_text(50), False), (make_text(50), True)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        prepare.main(argv)
        assert ("already prepared" in capsys.readouterr().out) == seen
    text = make_text(60).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(
        ValueError, match=f"another text .1 documents, 1,332 bytes then, 1 documents, {len(text):,}"
    ):
        prepare.main(argv)


def test_a_set_from_before_its_text_was_recorded_is_found(tmp_path, text_file, capsys):
    out = tmp_path / "out"
    argv = [str(text_file), f"--out={out}", "--tokenizer=bytes"]
    prepare.main(argv)
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    del meta["text"]
    for name in ("encoding", "skip_bad", "prompt", "answer", "task", "group", "above"):
        del meta["settings"][name]
    (out / "meta.json").write_text(json.dumps(meta))
    before = files_of(out)
    prepare.main(argv)
    assert "already prepared" in capsys.readouterr().out
    assert files_of(out) == before


def test_folders_of_others_are_not_touched(tmp_path, text_file):
    out = tmp_path / "out"
    argv = [str(text_file), f"--out={out}", "--tokenizer=bytes"]
    prepare.main(argv)
    for name in ("out.old", "new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    prepare.main([*argv, "--val=0.1", "--overwrite"])
    with pytest.raises(ValueError, match=r"new\.partial is in the way"):
        prepare.main([str(text_file), f"--out={tmp_path / 'new'}", "--tokenizer=bytes"])
    for name in ("out.old", "new.partial"):
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_two_at_once_prepare_one_set(tmp_path, text_file):
    command = [sys.executable, str(ROOT / "prepare.py"), str(text_file), f"--out={tmp_path / 'x'}"]
    command += ["--tokenizer=bytes", "--workers=1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("already prepared" in text for text in said) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# --- the rest


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one_aloud(
    tmp_path, text_file, monkeypatch, capsys
):
    def smaller(words, vocab_size, *more):
        return bpe_tokenizer(words, vocab_size - 10, *more)

    monkeypatch.setattr(prepare, "bpe_tokenizer", smaller)
    prepare.main([str(text_file), f"--out={tmp_path / 'out'}", "--vocab_size=300"])
    assert "yields only 290 tokens, fewer than --vocab_size=300" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 290


@pytest.fixture
def network(monkeypatch):
    """network(content): what any address gives, bytes or an exception."""

    def give(content) -> None:
        def urlopen(url, timeout):
            if isinstance(content, Exception):
                raise content
            return io.BytesIO(content)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    return give


def test_tiny_shakespeare_is_checked(tmp_path, network, monkeypatch, capsys):
    argv = ["shakespeare", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    network(OSError("no route"))
    with pytest.raises(ValueError, match="tiny Shakespeare cannot be downloaded.*no route"):
        prepare.main(argv)
    play = make_text(100).encode()
    network(play)
    with pytest.raises(ValueError, match="is not tiny Shakespeare"):
        prepare.main(argv)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(play).hexdigest())
    prepare.main(argv)
    network(OSError("no route"))
    prepare.main(argv)  # what never changes need not be asked for again
    assert "already prepared" in capsys.readouterr().out


def test_progress_says_what_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pipeline.Progress("counting words", 8_000_000) as progress:
        progress.last -= 1
        progress(2_000_000)
    said = capsys.readouterr().err
    assert said.index("counting words") < said.index("counting words: 2 of 8 MB")
