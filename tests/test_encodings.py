"""An encoding is named where it can be told, and never where a guess would destroy text."""

import gzip
import random
import sys
from pathlib import Path

import pytest

from engine import encodings

CHINESE = "他说这是一本好书，我们都来读。\n你也去看看吧！\n" * 20
FRENCH = "Le garçon a mangé « à l'été » — naïve œuvre, déjà.\n" * 20
ENGLISH = "It was the best of times, it was the worst of times. " * 20  # and no line end
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
FOREIGN = [
    ("big5", "這是中文的書，我們在這裡讀了很多。\n"),
    ("euc-kr", "안녕하세요. 이것은 한국어 문장입니다. 우리는 오늘 학교에 갔다.\n"),
    ("euc-jp", "これは日本語の文章です。一人の大きい人が中国へ来た。\n"),
    ("shift-jis", "これは日本語の文章です。一人の大きい人が中国へ来た。\n"),
    ("cp1251", "Это русский текст, который мы читаем сегодня.\n"),
    ("koi8-r", "Это русский текст, который мы читаем сегодня.\n"),
    ("cp1250", "Zażółć gęślą jaźń, proszę państwa.\n"),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy.\n"),
    ("cp1253", "Αυτό είναι ένα ελληνικό κείμενο.\n"),
    ("cp1254", "Bugün öğretmenimiz ışık hakkında konuştu.\n"),
    ("mac-roman", "déjà vu\n"),
    ("cp850", "déjà vu, très bien\n"),
]


@pytest.mark.parametrize("text", [CHINESE, FRENCH, ENGLISH])
@pytest.mark.parametrize("name", WIDE)
def test_wide_characters_are_told_without_a_mark(name, text):
    assert encodings.guess(text.encode(name)) == name


@pytest.mark.parametrize("name", ["gb2312", "gbk", "gb18030"])
def test_chinese_is_told(name):
    assert encodings.guess(CHINESE.encode(name)) == "gb18030"
    assert encodings.guess(CHINESE.encode(name)[:-3]) == "gb18030"  # cut inside a character


@pytest.mark.parametrize("name", ["cp1252", "latin-1"])
def test_western_european_is_told(name):
    assert encodings.guess("Die Straße über den Fluss, déjà vu\n".encode(name)) == "cp1252"
    assert encodings.guess(FRENCH.encode("cp1252")) == "cp1252"


@pytest.mark.parametrize("name, text", FOREIGN)
def test_what_cannot_be_told_is_not_guessed(name, text):
    assert encodings.guess(text.encode(name) * 10) is None
    advice = encodings.advice(text.encode(name) * 10, given=False)
    assert "cannot be told" in advice and "iconv" not in advice


def test_utf8_with_a_damaged_byte_is_not_called_something_else():
    for text in (CHINESE, FRENCH):
        data = text.encode()
        assert encodings.guess(data[:90] + b"\xe9" + data[90:]) == "utf-8"


def test_binaries_are_no_text():
    program = Path(sys.executable).read_bytes()[: 1 << 20]
    noise = random.Random(0).randbytes(5000)
    for data in (program, noise, gzip.compress(noise[:500]), bytes(100)):
        assert encodings.guess(data) == "binary"


@pytest.mark.parametrize("controls, binary", [(5, False), (6, True), (40, True)])
def test_one_control_character_in_twenty_is_text_and_more_are_none(controls, binary):
    data = b"\x01" * controls + b"a" * (100 - controls)
    assert encodings.looks_binary(data) == binary


@pytest.mark.parametrize("name", ["utf-16", "utf-32", "utf-16-be"])
def test_a_mark_is_believed(name):
    data = ("\ufeff" * (name == "utf-16-be") + CHINESE).encode(name)
    assert data.decode(encodings.of_mark(data)) == CHINESE
    assert encodings.of_mark(CHINESE.encode()) is None


def test_an_unknown_encoding_is_answered_with_the_nearest():
    assert encodings.find("GBK") == "gbk" and encodings.find("UTF8") == "utf-8"
    with pytest.raises(ValueError, match="'gb18003'.*gb18030"):
        encodings.find("gb18003")
    for name in ("rot13", "hex", "no\0", "something else"):
        with pytest.raises(ValueError, match="is none that Python knows"):
            encodings.find(name)
