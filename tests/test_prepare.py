"""prepare.py: all text arrives, cleaned, once, in one split; same input, same bytes."""

import gzip
import hashlib
import io
import json
import sys
from concurrent.futures import Future

import pytest
from conftest import make_text

import prepare
from dataset import Dataset
from engine import pipeline, sources, spool


def read(folder) -> dict[str, list[str]]:
    """The documents of each split, decoded."""
    data = Dataset(str(folder))
    end = data.tokenizer.end_of_text
    found = {}
    for name, files in data.files.items():
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


def test_same_input_same_bytes_whatever_the_workers(tmp_path, text_file):
    made = []
    for workers in (1, 2):
        out = tmp_path / f"workers{workers}"
        argv = [str(text_file), f"--out={out}", "--vocab_size=300", f"--workers={workers}"]
        prepare.main(argv)
        made.append(files_of(out))
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
    words = prepare.regex.findall(prepare.SPLIT, text)
    cut = [word for chunk in chunks for word in prepare.regex.findall(prepare.SPLIT, chunk[:-1])]
    assert len(chunks) > 3 and abs(len(cut) - len(words)) <= len(chunks)


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
    heads = [next(iter(text))[:300] for text in sources.documents("python", "", "text")]
    assert len(heads) > 300
    assert any("Command-line parsing library" in head for head in heads)  # argparse
    assert not any("Lib/test" in head for head in heads)
