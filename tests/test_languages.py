"""Every page has its Chinese twin, with equal code, numbers, links and pictures; no section of it
renders an English one that has changed since."""

import re

import pytest

import learn
import lessons
from lessons import languages

PAIRS = languages.pairs()


@pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda path: path.name)
def test_both_languages_say_the_same(english, chinese):
    assert chinese.exists(), f"{english.name} has no Chinese page"
    texts = [path.read_text(encoding="utf-8") for path in (english, chinese)]
    assert not languages.differences(*texts)
    letters = sum(map(len, re.findall(languages.HAN + "+", texts[1])))
    words = len(re.findall(r"[a-z]+", languages.FENCED.sub("", texts[0])))
    assert letters > words / 2  # it is a rendering, and no summary


def test_the_glossary_has_the_terms_once_and_none_that_is_forbidden():
    texts = [(lessons.PAGES / f"glossary{of}.md").read_text("utf-8") for of in ("", ".zh")]
    terms = re.findall(r"^\| ([^|]+?) · ([^|]+?) \| [^|]+ \|$", texts[1], re.MULTILINE)
    assert [term for term, _ in terms] == re.findall(r"^\| ([^|]+?) \| ", texts[0], re.M)[1:]
    assert len(terms) > 60
    english = [term.lower() for term, _ in terms]
    assert sorted(set(english)) == sorted(english)
    for pattern in languages.FORBIDDEN:
        assert not any(re.search(pattern, chinese) for _, chinese in terms), pattern


ENGLISH = """# 4 · Attention

See [`model.py: GPT`](../../model.py#L1-L9) and [why](00.md#why); weights are 0.25 and 0.50.

There are 1.3 million.

## Why

| left out | as it is |
|---|---|
| `no_mask` | 0.06 ± 0.02 |
| width | 32 |

![Masks](4.svg)

**4.a** `attend`:

```sh
python learn.py 4  # try
```
"""
CHINESE = """# 4 · 注意力
<!-- en:  -->

见 [`model.py: GPT`](../../model.py#L1-L9) 和[为什么](00.zh.md#为什么)；权重是 0.25 和 0.50。

共 130 万。

## 为什么
<!-- en:  -->

| 去掉的 | 原样 |
|---|---|
| `no_mask` | 0.06 ± 0.02 |
| 宽度 | 32 |

![掩码](4.svg)

**4.a** `attend`：

```sh
python learn.py 4  # try
```
"""


def test_a_change_in_one_language_alone_is_told_and_no_other():
    chinese = languages.stamped(ENGLISH, CHINESE)
    assert not languages.differences(ENGLISH, chinese)
    assert languages.stamped(ENGLISH, chinese) == chinese
    for other, told in {
        ENGLISH.replace("See", "Look at"): "Attention has changed",
        ENGLISH.replace("width", "the width"): "Why has changed",
        ENGLISH + "\n### More\n": "other sections",
    }.items():
        (said,) = languages.differences(other, chinese)
        assert told in said
    for there, here, told in [
        ("# try", "# 试试", ""),
        ("# try", "", "code blocks"),
        ("# try", "# 试 2 次", "code blocks"),
        ("# try", "# 试 try试", "a space"),
        ("4 --language=zh  #", "4  #", "code blocks"),
        ("0.25", "0.52", "numbers"),
        ("130 万", "13 万", "numbers"),
        ("4.a", "4.b", "numbers"),
        ("| 宽度 | 32", "| 宽度 | 64", "tables"),
        ("| 宽度 | 32 |", "| 宽度 32 |", "tables"),
        ("](4.svg)", "](5.svg)", "pictures"),
        ("00.zh.md", "01.zh.md", "links"),
        ("#L1-L9", "#L1-L8", "links"),
        ("`attend`", "`attand`", "quoted"),
        ("注意力", "变压器", "Transformer"),
        ("和 0.50", "和0.50", "a space"),
        ("；权重", "; 权重", ""),
        ("权重是", "**权重，**是", "not bold"),
        ("<!-- en", "<!-- zh", "has changed"),
    ]:
        assert there in chinese
        said = languages.differences(ENGLISH, chinese.replace(there, here))
        assert said == [] if not told else any(told in words for words in said), there
    # what a command writes into both languages makes no digest another
    moved = [
        text.replace("#L1-L9", "#L3-L11").replace("0.06", "0.07") for text in (ENGLISH, chinese)
    ]
    assert not languages.differences(*moved)


def test_the_command_writes_the_digests_and_names_what_had_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    monkeypatch.setattr(lessons, "PAGES", tmp_path)
    (tmp_path / "04.md").write_text(ENGLISH, encoding="utf-8")
    (tmp_path / "05.md").write_text(ENGLISH, encoding="utf-8")  # not rendered yet
    (tmp_path / "README.md").write_text(ENGLISH, encoding="utf-8")
    chinese = tmp_path / "04.zh.md"
    chinese.write_text(languages.stamped(ENGLISH.replace("Why", "How"), CHINESE), encoding="utf-8")
    for page in ("5", ""):
        with pytest.raises(ValueError, match=f"chapter='{page}' should be with --digests one of 4"):
            learn.main(["--digests", *filter(None, [page])])
    learn.main(["4", "--digests"])
    assert capsys.readouterr().out == "wrote 04.zh.md\n    ## Why\n"
    assert not languages.differences(ENGLISH, chinese.read_text(encoding="utf-8"))
    learn.main(["4", "--digests"])
    assert not capsys.readouterr().out
    # code that has changed is written, and comments stay Chinese beside code that has not
    said = chinese.read_text(encoding="utf-8").replace("# try", "# 试试")
    chinese.write_text(said, encoding="utf-8")
    for command, comment in (("4  # try\nls", "试试"), ("4 --answer=8  # try", "try")):
        code = ENGLISH.replace("4  # try", command)
        (tmp_path / "04.md").write_text(code, encoding="utf-8")
        learn.main(["4", "--digests"])
        said = chinese.read_text(encoding="utf-8")
        assert not languages.differences(code, said)
        assert f"# {comment}\n" in said
    chinese.write_text("# 4 · 注意力\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"was: 04\.zh\.md \(2 sections in English, 1 in"):
        learn.main(["4", "--digests"])
