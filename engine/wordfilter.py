"""A list of words that must not come in or go out: WordFilter finds them, Gate holds them back.

Text is compared in a normal form, a string of symbols that know where they came from:

    NFKD, lower case     Ｂad, 𝐛𝐚𝐝, ⓑⓐⓓ, bád → bad         compatible forms, without accents
    nothing invisible    b\\u200bad → bad                    joiners, directions, control characters
    spaces and dashes    very-bad, very   bad → very bad    one space for any run of them

and a symbol may be read as one that looks like it (Unicode's UTS 39), or a digit as a letter: b4d.
Words of alphabets count where they stand alone ("ass" is not in "class"), those of scripts that are
written without spaces anywhere. docs/filter.md has what is caught, and what is not.
"""

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

# letters that look like a Latin one, in lower case, also where only the capitals look alike (B, В)
ALIKE = dict(
    a="аαɑᴀ", b="вьβʙɓƅ", c="сϲᴄ", d="ԁɗđᴅ", e="еεɛҽᴇ", f="ƒғꜰϝ", g="ɡցɢԍɠ", h="һнηʜհħ", i="іιıɪɩӏ",
    j="јϳᴊȷ", k="кκᴋƙқ", l="ӏłʟɫǀ", m="мμᴍɱ", n="ոηνɴŋƞ", o="оοσօᴏøө", p="рρᴘƥ", q="ԛզɋ", r="гʀɾ",
    s="ѕꜱʂ", t="тτᴛŧƭ", u="υսᴜʋ", v="νѵᴠ", w="ԝωᴡѡɯ", x="хχҳ", y="уγυүұʏƴ", z="ᴢƶʐζ",
)  # fmt: skip
SIGNS = dict(a="4@", b="8", c="¢", e="3€", i="1!|", l="1|", o="0", s="5$", t="7")
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
STAR = "*"  # what masks are made of; no space, so that they spell nothing
# Southeast Asia, Tibet, China, Japan and Korea: words stand without a space between them, or
# (Korean) with endings that are written to them
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u2e80-\ua4cf\ua960-\ua97f"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff\U00016fe0-\U0001b2ff\U00020000-\U0003ffff]"
)
MOST = 100_000  # steps of the automaton that are remembered, about 10 MB


# --- the normal form


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
    return " ".join(letters) if enough and not form.isdigit() else form


# --- the list


class Node(dict):
    """A beginning of entries: the next symbol, and the node of what is then one longer."""

    def __init__(self, depth: int):
        self.depth = depth
        self.entry = ""  # as the list has it, if one ends here
        self.form = ""  # the same in normal form


class State(dict):
    """The beginnings that a text may end with: the next symbol, and the state that follows.

    Of a trie and one text these are the states of Aho and Corasick (doi:10.1145/360825.360855),
    which they find by links. Here each is made when it is first met, since one text is many: 1
    may be i or l. So a symbol costs one look into a dictionary, however long the list is.
    """

    def __init__(self, words: "WordFilter", nodes: Iterable[Node]):
        self.words = words
        self.nodes = sorted(nodes, key=lambda node: -node.depth)
        self.ended = [node for node in self.nodes if node.entry]

    def __missing__(self, symbol: str) -> "State":
        letters = {symbol, *READ_AS.get(symbol, ())}
        nodes = (*self.nodes, self.words.trie)
        state = self.words.state([node[s] for node in nodes for s in letters if s in node])
        self[symbol] = state
        return state


class WordFilter:
    """The entries of a list: a file of UTF-8 with one a line and # for comments, or strings.

    Raises ValueError for a list that is missing or empty, and an entry that says nothing.
    """

    def __init__(self, source: str | Path | Iterable[str]):
        named = isinstance(source, (str, Path))
        self.name = str(source) if named else "the list of words"
        if named and not Path(source).is_file():
            raise ValueError(f"no list of words {self.name!r}: a text file, one entry a line")
        data = Path(source).read_bytes() if named else "\n".join(source).encode()
        self.sha256 = hashlib.sha256(data).hexdigest()
        forms: dict[str, str] = {}
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            where = f"{self.name}, line {number}"
            try:
                entry = re.sub(r"(^|\s)#.*", "", line.decode()).strip()
            except UnicodeDecodeError as e:
                raise ValueError(f"{where} is not UTF-8: convert it") from e
            form = normal(entry)[0].strip()
            if entry and not form:
                raise ValueError(f"{where}: the entry {entry!r} has nothing to compare: remove it")
            if STAR in form:
                raise ValueError(f"{where}: {entry!r} has {STAR}, of which masks are made")
            if entry:
                forms.setdefault(form, entry)
        if not forms:
            raise ValueError(f"{self.name} has no entry: write one a line")
        self.trie = Node(0)
        for form, entry in ({spelled(form): forms[form] for form in forms} | forms).items():
            node = self.trie
            for symbol in form:
                node = node.setdefault(symbol, Node(node.depth + 1))
            node.entry, node.form = entry, form
        self.states: dict[frozenset[int], State] = {}
        self.remembered = 0

    def state(self, nodes: list[Node]) -> State:
        """The state of some nodes. Of too many, all are forgotten."""
        self.remembered += 1
        if self.remembered > MOST:
            self.states, self.remembered = {}, 0
        there = {id(node): node for node in nodes}
        return self.states.setdefault(frozenset(there), State(self, there.values()))

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, entry) of all that stand in a text, by their ends; they may overlap.

        Accents and invisible characters behind the last letter belong to it.
        """
        return self.search(text)[0]

    def clean(self, text: str) -> bool:
        return not self.find(text)

    def mask(self, text: str, star: str = STAR) -> str:
        characters = list(text)
        for start, end, _ in self.find(text):
            characters[start:end] = star * (end - start)
        return "".join(characters)

    def require_clean(self, text: str, what: str) -> None:
        """Raises ValueError if an entry stands in `text`, which is called `what`."""
        for _, _, entry in self.find(text):
            raise ValueError(f"{what} has {entry!r} in it, which {self.name} lists: leave it out")

    def search(self, text: str, before: str = "", more: bool = False):
        """What `find` gives, how much of `text` is certain, and the `before` of what comes then.

        `before` are symbols that came before the text. If `more` comes behind it, what may yet
        become an entry is not certain, and a word at the very end waits for what follows it.
        """
        symbols, places = normal(before + text)
        places = [place - len(before) for place in places] + [len(text)]

        def parted(i: int) -> bool:
            """Whether an entry may begin at symbol i, or end before it."""
            if i == len(symbols):
                return not more
            whole = i == 0 or places[i - 1] < places[i]  # ½ is three symbols
            return whole and not (i and joined(symbols[i - 1], symbols[i]))

        found, state = [], self.state([])
        for i, symbol in enumerate(symbols, start=1):
            state = state[symbol]
            for node in state.ended:  # the longest first
                start = i - node.depth
                own = start >= len(before) and spells(symbols[start:i], node.form)
                if own and parted(start) and parted(i):
                    found.append((places[start], places[i], node.entry))
        begun = [len(symbols) - node.depth for node in state.nodes] if more else []
        begun = [places[i] for i in begun if i >= len(before) and parted(i)]
        certain = min(begun, default=len(text))
        left = last = bisect_left(places, certain, hi=len(symbols))
        while last > 1 and is_mark(symbols[last - 1]):  # a mark says nothing without its letter
            last -= 1
        return found, certain, symbols[max(0, last - 1) : left]


def spells(written: str, form: str) -> bool:
    """Whether signs may be letters: 4ss is a word, but 455 a number, and n-i-1 is not nil."""
    letters, alone = written.replace(" ", ""), set(form[1::2]) == {" "}
    return written == form or (letters.isalpha() if alone else not letters.isdigit())


# --- while text is being written


class Gate:
    """Text in, piece by piece, and out what may leave; what may yet become an entry waits.

    With the `action` "stop" nothing leaves from the first hit on, and the gate is `done`; with
    "mask" hits leave as asterisks. `hit` is the first entry found. `before` is what the reader has
    seen, as a prompt: it does not leave again, but words may begin in it. Without a filter all
    leaves.
    """

    def __init__(self, words: WordFilter | None, action: str = "stop", before: str = ""):
        self.words, self.action = words, action
        self.hit, self.done = "", False
        self.seen = len(before)
        self.left = 0  # characters that have left, those of `before` included
        self.masked: list[tuple[int, int]] = []  # of those, and of what waits
        self.symbols = self.waiting = ""  # the last that left, in normal form; what has not
        self.feed(before)

    @property
    def released(self) -> int:
        """Characters of the text that have left, as they were or as asterisks."""
        return max(0, self.left - self.seen)

    def shows(self, start: int, end: int) -> bool:
        """Whether the characters from `start` to `end` of the text have left as they were."""
        start, end = start + self.seen, end + self.seen
        return end <= self.left and all(end <= s or e <= start for s, e in self.masked)

    def feed(self, text: str, more: bool = True) -> str:
        """What of the text may leave now."""
        if self.done:
            return ""
        text = self.waiting + text
        found, certain = [], len(text)
        if self.words:
            found, certain, self.symbols = self.words.search(text, self.symbols, more)
        self.hit = self.hit or (found[0][2] if found else "")
        self.done = not more
        if found and self.action == "stop":
            certain, self.done = found[0][0], True
            found = []
        self.masked += [(self.left + start, self.left + end) for start, end, _ in found]
        characters = list(text)
        for start, end in self.masked:
            start, end = max(0, start - self.left), max(0, end - self.left)
            characters[start:end] = STAR * (end - start)
        unseen = max(0, self.seen - self.left)
        self.left += certain
        self.waiting = text[certain:]
        return "".join(characters[unseen:certain])

    def end(self) -> str:
        """What still waits, when no more text comes."""
        return self.feed("", more=False)
