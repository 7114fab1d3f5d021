"""Two languages, one text: what a Chinese page shares with the English page that it renders.

    ## Why                        04.md
    ## 为什么                      04.zh.md: the same sections, in the same order, each with
    <!-- en: 1a2b3c4d -->         the digest of the English section that it renders

Code, numbers, pictures and links are equal, and the words between them Chinese, those of comments
behind a line of code included; only learn.py is told the language. Who changes English changes its
digest, and `differences` tells. Who has brought the Chinese up to date then writes what the digest
is now: python learn.py 4 --digests. docs/learn/glossary.zh.md has the terms.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path

import lessons

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
DIGEST = re.compile(r"^<!-- en: (\w*) -->\n", re.MULTILINE)
PICTURE = re.compile(r"!\[.*?\]\((.*?)\)")
LINK = re.compile(r"\]\(([^)]*)\)")
COMMENT = re.compile(r"(?<=\S)  # (.*)$", re.MULTILINE)  # behind a line of code
CODE = re.compile(r"`([^`]+)`")
LEARN = re.compile(r"^(python learn\.py \d+)(?!.* --language)", re.MULTILINE)
NUMBER = re.compile(r"(?<![A-Za-z0-9])[0-9]+(?:[.,][0-9]+)*(?:\.[a-z]\b)?")  # 0.5; 4.a; not AVX2
MILLIONS = re.compile(r"([0-9.]+) (?:million|M)\b")  # 2.3 million is 230 万 in Chinese
YI = re.compile(r"([0-9.]+) 亿")  # 163 million, 16,300 万, is 1.63 亿
WRITTEN = r"#L\d+-L\d+|^\| `\w+` \|.*±.*$"  # by --links and --ablations, in both languages

# what a Chinese page must not have, outside code: a pattern, and what it should be
HAN = "[\u4e00-\u9fff]"
FORBIDDEN = {
    "变压器|变换器": "Transformer",
    "令牌|代币": "词元",
    "掩膜|遮罩|蒙版": "掩码",
    "检查站|存档点": "检查点",
    rf"{HAN}[A-Za-z0-9`]|[A-Za-z0-9`%]{HAN}": "a space between Chinese and Latin",
    rf"{HAN}[,;:?!]|{HAN}\.(?![\w/])": "，；：？！。",
    r"[。，：；？！）”]⟧[\w`]|[\w`]⟦[（“]": "a space beside **, or it is not bold",
}


def pairs() -> list[tuple[Path, Path]]:
    """Every English page and its Chinese one, which may not exist; of other pages than README, the
    chapters and the glossary, those that have one."""
    readmes = [lessons.ROOT / "README.md", lessons.ROOT / "engine" / "README.md"]
    docs = sorted((lessons.ROOT / "docs").glob("*.md"))
    docs = [path for path in docs if path.with_suffix(".zh.md").exists()]
    chapters = sorted(lessons.PAGES.glob("[0-9][0-9].md"))
    english = [*readmes, *docs, *chapters, lessons.PAGES / "glossary.md"]
    return [(path, path.with_suffix(".zh.md")) for path in english]


def sections(text: str) -> list[str]:
    """A page, cut before each heading."""
    parts, fenced = [""], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            parts.append("")
        parts[-1] += line
    return [part for part in parts if part.strip()]


def title(section: str) -> str:
    return section.partition("\n")[0]


def digest(section: str) -> str:
    text = re.sub(WRITTEN, "", section, flags=re.MULTILINE).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def stamped(english: str, chinese: str) -> str:
    """The Chinese page with the digests of the English sections, and their code blocks where it has
    as many. Raises ValueError if it has other sections."""
    here, there = sections(chinese), sections(english)
    if len(here) != len(there):
        raise ValueError(f"{len(there)} sections in English, {len(here)} in Chinese")
    done = []
    for ours, theirs in zip(here, there, strict=True):
        head, _, rest = DIGEST.sub("", with_code(ours, theirs)).partition("\n")
        done.append(f"{head}\n<!-- en: {digest(theirs)} -->\n{rest}")
    return "".join(done)


def with_code(ours: str, theirs: str) -> str:
    code = FENCED.findall(spoken(theirs))
    if len(code) != len(FENCED.findall(ours)):
        return ours  # `differences` will say so
    return FENCED.sub(lambda mine: with_comments(mine[0], code.pop(0)), ours)


def with_comments(ours: str, theirs: str) -> str:
    """The English code, each line with the comment that it has in the Chinese code, if any."""
    lines = {bare(line): line for line in ours.splitlines()}
    return "\n".join(lines.get(bare(line), line) for line in theirs.splitlines())


def bare(code: str) -> str:
    """Code whose comments have no words, but their numbers."""
    return COMMENT.sub(lambda words: f"  # {sorted(NUMBER.findall(words[1]))}", code)


def spoken(section: str) -> str:
    """An English section whose commands are those of a Chinese page."""
    return FENCED.sub(lambda code: LEARN.sub(r"\1 --language=zh", code[0]), section)


def shared(section: str) -> dict[str, object]:
    """What is the same in both languages, by its name."""
    prose = FENCED.sub("", DIGEST.sub("", section))
    prose = MILLIONS.sub(lambda m: f"{100 * float(m[1]):,.0f} 万", prose)
    prose = YI.sub(lambda m: f"{10_000 * float(m[1]):,.0f} 万", prose)
    links = [re.sub(r"#(?!L\d).*", "", to.replace(".zh.md", ".md")) for to in LINK.findall(prose)]
    words = LINK.sub("]", prose)
    quoted = [" ".join(code.split()) for code in CODE.findall(words)]
    lines = CODE.sub("", words).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    rest = "\n".join(line for line in lines if not line.startswith("|"))
    return {
        "level": len(title(section)) - len(title(section).lstrip("#")),
        "code blocks": [bare(code) for code in FENCED.findall(section)],
        "pictures": PICTURE.findall(prose),
        "links": Counter(links),
        "tables": [(row.count("|"), *sorted(NUMBER.findall(row))) for row in rows],
        "numbers": Counter(NUMBER.findall(rest)),
        "quoted": {q.replace(" --language=zh", "").replace(".zh.md", ".md") for q in quoted},
    }


def differences(english: str, chinese: str) -> list[str]:
    """In what a Chinese page is not the English one, a sentence each; nothing if all is well."""
    there, here = sections(english), sections(chinese)
    levels = [[shared(section)["level"] for section in page] for page in (there, here)]
    if levels[0] != levels[1]:
        return [f"other sections: levels {levels[0]} in English, {levels[1]} in Chinese"]
    found = []
    for theirs, ours in zip(there, here, strict=True):
        left, right = shared(spoken(theirs)), shared(ours)
        right["quoted"] &= left["quoted"]  # the Chinese may quote more
        found += [
            f"{title(ours)}: other {kind}: {unlike(left[kind], right[kind])}"
            for kind in left
            if left[kind] != right[kind]
        ]
        if DIGEST.findall(ours) != [digest(theirs)]:
            found.append(f"{title(theirs)} has changed: render it, then learn.py PAGE --digests")
        for pattern, better in FORBIDDEN.items():
            wrong = re.finditer(pattern, plain(ours))
            found += [f"{title(ours)}: {f[0]!r}: {better}" for f in wrong]
    return found


def plain(section: str) -> str:
    """The words of a section, without code, pictures and where links lead. Bold is ⟦bold⟧."""
    text = FENCED.sub(lambda code: "\n".join(COMMENT.findall(code[0])), DIGEST.sub("", section))
    text = LINK.sub("]", PICTURE.sub("", text))
    return re.sub(r"\*\*(.+?)\*\*", r"⟦\1⟧", CODE.sub("`·`", text), flags=re.DOTALL)


def unlike(left, right) -> str:
    """What only one of the two has."""
    if isinstance(left, list):
        return f"{[x for x in left if x not in right]} / {[x for x in right if x not in left]}"
    if isinstance(left, int):
        return f"{left} / {right}"
    return f"{left - right} / {right - left}"
