"""The pictures of docs/learn show what the code computes today, in labels that need no language."""

import hashlib
import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT

import lessons
from lessons import first_run, live, pictures, specimen
from tasks import repeat

SVG = "{http://www.w3.org/2000/svg}"
NAMES = sorted(pictures.PICTURES)
REDRAW = "python -m lessons.pictures"


def near(old, new, where: str) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(new, dict):
        assert old.keys() == new.keys(), where
        for key in new:
            near(old[key], new[key], f"{where}.{key}")
    elif isinstance(new, list):
        assert len(old) == len(new), where
        for i, pair in enumerate(zip(old, new, strict=True)):
            near(*pair, f"{where}[{i}]")
    elif isinstance(new, float):
        assert old == pytest.approx(new, rel=0.02, abs=1e-3), f"{where}: {REDRAW}"
    elif where.startswith("attention.percent"):
        assert abs(old - new) <= 1, f"{where}: {REDRAW}"
    else:
        assert old == new, f"{where}: {REDRAW}"


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_has_the_numbers_of_today(name):
    torch.set_num_threads(1)
    near(
        pictures.kept(pictures.FOLDER / f"{name}.svg"),
        pictures.rounded(pictures.PICTURES[name]()),
        name,
    )


def texts(svg: str) -> list[str]:
    return [x.text for x in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_drawn_anew_from_its_numbers_alone(name):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from lessons import drawing

    path = pictures.FOLDER / f"{name}.svg"
    stored, data = path.read_text(encoding="utf-8"), pictures.kept(path)
    again = drawing.picture(name, data)
    assert drawing.picture(name, data) == again  # the same bytes each time
    assert texts(again) == texts(stored), REDRAW  # as other fonts and versions have them, too
    assert json.loads(ElementTree.fromstring(again).find(f"{SVG}metadata").text) == data


def test_pictures_are_small_opaque_alone_and_without_sentences():
    assert {path.stem for path in pictures.FOLDER.glob("*.svg")} == {*NAMES}
    for name in NAMES:
        path = pictures.FOLDER / f"{name}.svg"
        svg = path.read_text(encoding="utf-8")
        assert len(svg.encode()) < 60_000, name
        root = ElementTree.fromstring(svg)
        ground = next(root.iter(f"{SVG}path"))  # white, and as large as the picture
        assert "#ffffff" in ground.get("style")
        width, height = root.get("viewBox").split()[2:]
        assert ground.get("d").startswith(f"M0 {height}L{width} {height}L{width} 0")
        assert not re.search(r"<script|<image|href=\"(?!#)", svg), name
        words = [text for text in texts(svg) if re.search(r"[a-z]{3,} [a-z]{3,}", text)]
        assert not words, f"{name} has words that someone would have to translate: {words}"


def test_each_picture_stands_on_the_page_of_its_chapter():
    for number in range(len(lessons.CHAPTERS)):
        text = lessons.page(number).read_text(encoding="utf-8")
        shown = re.findall(r"^!\[.+\]\(pictures/(\w+)\.svg\)$", text, re.MULTILINE)
        assert {*shown} == {f.__name__ for f in pictures.CHAPTERS.get(number, ())}, number


def test_the_curve_is_that_of_the_run_that_made_the_specimen():
    state = json.loads((specimen.FOLDER / "state.json").read_text(encoding="utf-8"))
    written = (pictures.FOLDER / "specimen.jsonl").read_bytes()
    assert hashlib.sha256(written).hexdigest() == state["metrics"]["sha256"]
    logged = [row["lr"] for row in map(json.loads, written.splitlines()) if "lr" in row]
    assert pictures.rates()["rate"] == pytest.approx(logged)


def test_the_numbers_say_what_the_pages_say_of_them():
    """What a reader should see in a picture is there."""
    kept = {name: pictures.kept(pictures.FOLDER / f"{name}.svg") for name in NAMES}
    bar = kept["surprise"]["tokens"].index(repeat.BAR)
    nats = kept["surprise"]["nats"]
    assert min(nats[:bar]) > math.log(26) - 0.1 and max(nats[bar + 1 :]) < 0.01
    for heads in kept["attention"]["percent"]:
        for head in heads:
            assert all(95 <= sum(row) <= 105 for row in head)
            assert not any(sum(row[i + 1 :]) for i, row in enumerate(head))  # behind the mask
    assert sum(kept["cache"]["without"]) == 45 and sum(kept["cache"]["with_cache"]) == 11
    assert all(max(scores) == scores[0] for scores in kept["rotary"]["scores"].values())
    before, after = kept["muon"]["before"], kept["muon"]["after"]
    assert before[0] / before[29] > 100 and after[0] / after[29] < 2
    last = len(kept["lens"]["said"]) - 1
    tokens, said = kept["lens"]["tokens"], kept["lens"]["said"]
    assert [said[last][i] for i in range(6, 11)] == tokens[7:] and said[0][6:11] != tokens[7:]


def test_the_script_redraws_what_is_asked_for_and_refuses_what_is_not_there(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(ValueError, match="no picture 'rotery': there are surprise, block"):
        pictures.main(["rotery"])
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main(["chances"])
    assert [path.name for path in tmp_path.iterdir()] == ["chances.svg"]
    assert capsys.readouterr().out.startswith("wrote chances.svg: ")
    assert (ROOT / "docs" / "learn" / "pictures" / "chances.svg").is_file()


def test_the_page_is_made_of_the_specimen_and_small_and_alone():
    page = live.PAGE.read_text(encoding="utf-8")
    assert page == live.content(), "python -m lessons.pictures page"
    assert len(page) < 300_000
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page
    c = specimen.load()[0].config  # page.html knows these parts, and no others
    parts = (c.position, c.norm, c.mlp, c.mask, c.tied, c.bias, c.rope_factor, c.n_kv_head)
    assert parts == ("rotary", "rms", "relu2", "causal", False, False, 1, c.n_head)
    assert c.embed_norm and c.qk_norm and c.norm_weight


def test_the_first_picture_is_drawn_from_a_run_and_again_from_what_it_keeps(
    train, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    stored = first_run.PICTURE.read_text(encoding="utf-8")
    assert texts(first_run.drawn(pictures.kept(first_run.PICTURE))) == texts(stored)
    assert len(stored) < 20_000 and not re.search(r"<script|<image|href=\"(?!#)", stored)
    monkeypatch.setattr(first_run, "PICTURE", tmp_path / "first.svg")
    monkeypatch.setattr(first_run, "ROOT", tmp_path)
    run = train("run")
    first_run.main([str(run)])
    drawn, data = first_run.PICTURE.read_text(encoding="utf-8"), pictures.kept(first_run.PICTURE)
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    bits = [row["val_bpb"] for row in rows if "val_bpb" in row]
    assert data["evaluated"] == [
        [4, pytest.approx(bits[0], 1e-3)],
        [8, pytest.approx(bits[1], 1e-3)],
    ]
    # bytes: 257 equally likely tokens before the first step, a little more than one for each byte
    assert data["step"] == [*range(9)] and 8 < data["bits"][0] < 8.5
    assert [*data["packed"]] == ["gzip -9", "xz -9e"] and [*data["texts"]] == ["0", "4", "8"]
    assert {"step 0", "step 4", "step 8", f"{bits[1]:.3f}"} < {*texts(drawn)}
    first_run.main([])
    assert first_run.PICTURE.read_text(encoding="utf-8") == drawn
    with pytest.raises(ValueError, match="name one run"):
        first_run.main(["a", "b"])
    first_run.main([str(train("once", "--eval_every=8"))])
    assert {"step 0", "step 8"} < {*texts(first_run.PICTURE.read_text(encoding="utf-8"))}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no row with bits per byte"):
        first_run.main([str(tmp_path / "none")])
