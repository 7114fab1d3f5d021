"""Text as it is compared: a string of symbols that know which character they came from.

    NFKD, lower case     Ｂad, 𝐛𝐚𝐝, ⓑⓐⓓ, bád → bad         compatible forms, without accents
    nothing invisible    b\\u200bad → bad                    joiners, directions, control characters
    spaces and dashes    very-bad, very   bad → very bad    one space for any run of them

A symbol may then be read as one that looks like it (as in Unicode's UTS 39), a digit as a letter.
"""

import re
import unicodedata
from collections import defaultdict
from functools import lru_cache

# letters that look like a Latin one, in lower case, also where only the capitals look alike (B, В)
ALIKE = dict(
    a="аαɑᴀ", b="вьβʙɓƅ", c="сϲᴄ", d="ԁɗđᴅ", e="еεɛҽᴇ", f="ƒғꜰϝ", g="ɡցɢԍɠ", h="һнηʜհħ", i="іιıɪɩӏ",
    j="јϳᴊȷ", k="кκᴋƙқ", l="ӏłʟɫǀ", m="мμᴍɱ", n="ոηνɴŋƞ", o="оοσօᴏøө", p="рρᴘƥ", q="ԛզɋ", r="гʀɾ",
    s="ѕꜱʂ", t="тτᴛŧƭ", u="υսᴜʋ", v="νѵᴠ", w="ԝωᴡѡɯ", x="хχҳ", y="уγυүұʏƴ", z="ᴢƶʐζ",
)  # fmt: skip
SIGNS = dict(a="4@", b="8", c="¢", e="3€", i="1!|", l="1|", o="0", s="5$", t="7")
SIGN = frozenset("".join(SIGNS.values()))
READ_AS: dict[str, set[str]] = defaultdict(set)  # what else a symbol may stand for
for latin, others in ALIKE.items():
    number = ord(latin) - ord("a")
    for other in others + chr(0x1F150 + number) + chr(0x1F170 + number):  # white on black
        READ_AS[other].add(latin)
        READ_AS[latin].add(other)
    for sign in SIGNS.get(latin, ""):
        READ_AS[sign].add(latin)

SPACES = "._·•~\u2800"  # as good as a space or dash between words, and between letters spelled out
NOTHING = "\u0640\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f"  # letters that fill a gap
# Southeast Asia, Tibet, China, Japan and Korea: words stand without a space between them, or
# (Korean) with endings that are written to them
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u2e80-\ua4cf\ua960-\ua97f"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff\U00016fe0-\U0001b2ff\U00020000-\U0003ffff]"
)


@lru_cache(1 << 16)
def fold(character: str) -> str:
    """The symbols of one character, whatever stands beside it."""
    lower = unicodedata.normalize("NFKD", character).casefold()
    symbols = ""
    for symbol in unicodedata.normalize("NFKD", lower):
        kind = unicodedata.category(symbol)
        if symbol.isspace() or kind in ("Zs", "Pd") or symbol in SPACES:
            symbols += " "
        elif kind not in ("Cf", "Cc") and symbol not in NOTHING:
            symbols += symbol
    return symbols


@lru_cache(1 << 16)
def is_mark(symbol: str) -> bool:
    return unicodedata.category(symbol)[0] == "M"


def stays(mark: str, last: str) -> bool:
    """Whether it is behind a symbol of its block of 256; to 8, Europe to Arabic, none does."""
    return last != "" and ord(last) >> 8 == ord(mark) >> 8 > 8


def normal(text: str) -> tuple[str, list[int]]:
    """The symbols of a text, and for each the place of the character that it came from.

    Accents are left out, but not the vowels of India and Southeast Asia and the sound marks of
    kana, without which words are other words: such a mark stays behind a letter of its own block.
    """
    symbols, places, last = [], [], ""
    for place, character in enumerate(text):
        for symbol in fold(character):
            if symbol == " " == last:
                continue
            if symbol > "\u02ff" and is_mark(symbol) and not stays(symbol, last):
                continue
            symbols.append(symbol)
            places.append(place)
            last = symbol
    return "".join(symbols), places


def leans(symbol: str) -> bool:
    """Whether it is part of the character before it: a mark, or a Korean vowel or final."""
    return is_mark(symbol) or "\u1160" <= symbol <= "\u11ff"


@lru_cache(1 << 16)
def joined(before: str, after: str) -> bool:
    """Whether two neighbours belong together, so that no entry begins or ends between them."""
    words = ((s.isalnum() or is_mark(s)) and not UNSPACED.match(s) for s in (before, after))
    return leans(after) or all(words)


def spelled(form: str) -> str:
    """b a d: an entry of three letters or more, or of two characters in scripts without spaces."""
    letters: list[str] = []
    for symbol in form.replace(" ", ""):
        if letters and leans(symbol):
            letters[-1] += symbol
        else:
            letters.append(symbol)
    enough = len(letters) > 2 or UNSPACED.match(letters[-1])
    enough = enough and not re.search(r"\d", form)  # 1 2 3 is a list
    return " ".join(letters) if enough else form
