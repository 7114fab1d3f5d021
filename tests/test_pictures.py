"""Pictures as text: what is written down is what is drawn, and PNG files that others can read."""

import json
import struct
import zlib

import numpy as np
import pytest

import images
import prepare
import sample
import tasks
from dataset import Dataset
from engine import pictures
from engine.tables import Reading, document


def decoded(png: bytes) -> np.ndarray:
    """An 8-bit grey PNG without filters, read by hand: chunks, their checksums, lines."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + data
        )
        found[name], at = data, at + 12 + size
    assert list(found) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", found[b"IHDR"])
    assert (depth, colour, rest) == (8, 0, [0, 0, 0])
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


@pytest.mark.parametrize("greys", [2, 17, 64])
def test_each_grey_is_a_letter_and_comes_back(greys):
    levels = np.arange(greys).reshape(1, -1) / (greys - 1)
    text = pictures.letters(levels, greys)
    assert len(set(text)) == greys and text[0] == "A" and text[-1] == "/"
    back = pictures.pixels(text, greys, 1)
    np.testing.assert_array_equal(np.rint(back * (greys - 1)), np.rint(levels * (greys - 1)))


def test_what_is_no_letter_or_lacks_is_black():
    assert pictures.pixels("/?", 2, 2).tolist() == [[1, 0], [0, 0]]
    assert pictures.pixels("/////", 2, 2).tolist() == [[1, 1], [1, 1]]


def test_the_size_of_a_picture():
    assert pictures.size("A" * 64) == (8, 8) and pictures.size("A" * 6, 3) == (3, 2)
    for width in (0, 4):
        with pytest.raises(ValueError, match="give --width"):
            pictures.size("A" * 6, width)


def test_a_grid_as_png():
    black, white = np.zeros((2, 3)), np.ones((2, 3))
    dots = decoded(pictures.png(pictures.grid([black, white, white], 2)))
    assert dots.shape == ((2 * 3 + 1) * pictures.ZOOM, (2 * 4 + 1) * pictures.ZOOM)
    small = dots[:: pictures.ZOOM, :: pictures.ZOOM]
    assert small[1:3, 1:4].max() == 0 and small[1:3, 5:8].min() == 255
    assert small[4:6, 1:4].min() == 255 and {*small[0]} == {128} == {*small[4:6, 5:8].ravel()}


def test_one_label_may_stand_in_all_splits():
    rows = [document(pictures.row("digits", "7", text), Reading()) for text in ("AA", "AB")]
    assert rows[0].prompt() != rows[1].prompt()
    plain = [document(tasks.row("sums", "7", text), Reading()) for text in ("AA", "AB")]
    assert plain[0].prompt() == plain[1].prompt()


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    rng = np.random.default_rng(0)
    for label, light in (("dark", 0), ("light", 200)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(30):
            pixels = (light + rng.integers(0, 55, (2, 3))).astype(np.uint8)
            image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_is_learned_from_and_drawn(folder, train, tmp_path, capsys):
    out = tmp_path / "data"
    argv = [str(folder), "--images=8", "--tokenizer=bytes", "--val=0.2", "--test=0.2"]
    prepare.main([*argv, f"--out={out}"])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["kind"] == "rows" and meta["splits"]["train"]["tasks"].keys() == {"pictures"}
    for name in ("train", "val", "test"):
        for ids in Dataset(str(out)).split(name).rows():
            _, (asked, said) = Dataset(str(out)).tokenizer.decode_row(ids)
            bright = pictures.pixels(said["content"], 3, 2).mean()
            assert (bright > 0.5) == (asked["content"] == "light") and len(said["content"]) == 6
    run = train("run", "--steps=60", "--eval_every=30", "--lr=0.02", data=out)
    png = tmp_path / "grid.png"
    sample.main([str(run), f"--grid={png}", "--prompt=dark light", "--width=3", "--num_samples=4"])
    small = decoded(png.read_bytes())[:: pictures.ZOOM, :: pictures.ZOOM]
    assert small.shape == (2 * 3 + 1, 4 * 4 + 1)
    assert small[1:3].mean() + 30 < small[4:6].mean()  # a line of dark ones above the light ones
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    capsys.readouterr()
    images.main([str(run), "--width=3", "--draw=5"])
    said = capsys.readouterr().out
    assert "bits per dimension" in said and "recognised" in said and "nearest other" in said


def test_pictures_of_another_size_and_damaged_ones_are_named(folder, tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / "light" / "odd.png")
    (folder / "light" / "torn.png").write_bytes(b"\x89PNG")
    argv = [str(folder), "--images=8", "--tokenizer=bytes", f"--out={tmp_path / 'data'}"]
    with pytest.raises(ValueError) as error:
        prepare.main(argv)
    said = str(error.value)
    assert "odd.png: it has 3 x 3 pixels, and the first one 3 x 2" in said and "torn.png" in said
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no picture in"):
        prepare.main([str(tmp_path / "none"), *argv[1:]])


def test_the_bits_of_histograms_and_bigrams_by_hand():
    """Black and white side by side, as everywhere: only the place says it all."""
    learned = np.tile([[0.0, 1.0], [0.0, 1.0]], (500, 1, 1))
    found = images.floors(learned, learned[:1])
    assert found["a histogram"] == pytest.approx(1, abs=1e-3)
    assert found["a histogram of each place"] < 0.01
    left, above = (found[name] for name in found if "bigram" in name)
    # on the left always black; above, black twice of three times over black, white over white
    assert left == pytest.approx(1, abs=0.01) and above == pytest.approx(0.689, abs=0.01)


def test_rows_that_are_no_pictures_are_refused(train, tmp_path):
    rows = [tasks.row("talk", f"say {i}", "A" * (i % 7 + 1)) for i in range(60)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "data"
    argv = ["--tokenizer=bytes", "--val=0.2", "--test=0.2", f"--out={out}"]
    prepare.main([str(tmp_path / "talk.jsonl"), *argv])
    run = train("run", data=out)
    with pytest.raises(ValueError, match="no pictures of one size"):
        images.main([str(run)])
    with pytest.raises(ValueError, match="grid="):
        sample.main([str(run), "--grid=x.png", "--chat"])


def test_the_digits_are_drawn_and_recognised():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    digits = tasks.find("digits")
    rows = {name: list(digits.rows(name, 0, 0.1, 0.2)) for name in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == 1797
    shown = {name: {row["messages"][1]["content"] for row in some} for name, some in rows.items()}
    assert not shown["train"] & shown["test"] and not shown["val"] & shown["test"]
    some = [[m["content"] for m in row["messages"]] for row in rows["test"][:100]]
    assert {len(text) for _, text in some} == {64}
    assert np.mean([digits.right(label, text) for label, text in some]) > 0.95
    assert not any(digits.right(str((int(label) + 1) % 10), text) for label, text in some[:20])
    assert not digits.right("0", "A") and not digits.right("0", "?" * 64)
