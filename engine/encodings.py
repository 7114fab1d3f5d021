"""Which encoding bytes are in, said only where it can be told: a wrong guess destroys text."""

import codecs
import difflib
import unicodedata
from encodings.aliases import aliases

MARKS = {  # those of UTF-32 first: they begin like those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = bytes({*range(32), 127} - {*b"\t\n\r\f\b\x1b"})  # hardly ever in text; colours are
HIGH = bytes(range(128, 256))
SAMPLE = 1 << 16  # bytes that a guess looks at
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
# the commonest characters of Chinese make a fifth of any text, and hardly ever of other languages
# that give valid GB18030 by accident
CHINESE = set("的一是不了在人有我他这个们中来上大为和国地到说道你着去时子里，。、：？！“”")
# what stands in the languages of Western Europe; the other characters of cp1252, such as ³ or þ,
# are what letters of Polish, Turkish or Russian encodings look like
WESTERN = set("àâäáãåæçéèêëíîïñóôöøúùûüÿœßÀÂÄÁÃÅÆÇÉÈÊËÍÎÏÑÓÔÖØÚÙÛÜŒ«»“”„‘’–—…°£€§¡¿\xa0©®™•·")


def of_mark(data: bytes) -> str | None:
    """The encoding that a byte-order mark at the beginning tells; UTF-8 needs none."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), None)


def looks_binary(data: bytes) -> bool:
    """Whether more than one byte in twenty is a control character: valid UTF-8, but no text."""
    return len(data) - len(data.translate(None, CONTROL)) > len(data) // 20


def advice(data: bytes, given: bool, line: int = 0) -> str:
    """What to say about `data`, which is not UTF-8; at `line` begins a line with such a byte.

    `given`: an encoding was named, and is not the right one either.
    """
    name = guess(data, line)
    if name == "binary":
        return "seems to be binary, no text"
    if name == "utf-8":
        return "not UTF-8, or only in parts: it seems to be damaged"
    if not name:
        return "not UTF-8, and what it is cannot be told: name its --encoding if you know it"
    remedy = "convert it" if given else f"add --encoding={name}"
    return f"not UTF-8, but seems to be {name.upper()}: {remedy}"


def complaint(e: UnicodeDecodeError, chosen: str, given: bool) -> str:
    """What to say about bytes that are not in encoding `chosen`, which was named or assumed."""
    if chosen != "utf-8":
        return f"neither UTF-8 nor {chosen}" if given else f"not {chosen}, as its mark says"
    if e.reason == "unexpected end of data":
        return "not UTF-8: it ends inside a character"
    line = e.object.rfind(b"\n", 0, e.start) + 1  # a character begins here, in any encoding
    return advice(e.object, given, line)


def decoded(line: bytes, encoding: str) -> str:
    """The text of a line that is in UTF-8 or, if it is not, in `encoding`. Raises ValueError."""
    for name in ("utf-8-sig", encoding):
        try:
            return line.decode(name)
        except UnicodeDecodeError as e:
            error = e
    raise ValueError(complaint(error, encoding, encoding != "utf-8"))


def contradiction(data: bytes, chosen: str) -> str | None:
    """What `data` seems to be, if that is another text than encoding `chosen` makes of it.

    A setting that suits one file of a folder must not turn the others into nonsense.
    """
    name = guess(data)
    if name in (None, "cp1252", chosen):  # some languages look like cp1252
        return None
    data = data[:SAMPLE]
    return name if name == "binary" or decode(data, name) != decode(data, chosen) else None


def guess(data: bytes, line: int = 0) -> str | None:
    """The name of a codec, "utf-8" if most of it is, "binary", or None: it cannot be told."""
    if data.count(0) > len(data) // 500 or looks_binary(data):  # of wide characters, or no text
        texts = {name: decode(data[:SAMPLE], name) for name in WIDE}
        # the wrong order of bytes makes Chinese of English, and may be valid; it has no spaces
        texts = {name: sum(map(str.isascii, text)) for name, text in texts.items() if is_text(text)}
        return max(texts, key=texts.get) if any(texts.values()) else "binary"
    high = len(data) - len(data.translate(None, HIGH))
    understood = data.decode(errors="ignore").encode()
    if 2 * (len(understood) - len(understood.translate(None, HIGH))) > high:
        return "utf-8"
    data = data[line : line + SAMPLE]
    text = decode(data, "gb18030")
    foreign = [c for c in text if not c.isascii()]
    simplified = sum(map(is_gb2312, foreign))
    common = sum(c in CHINESE for c in foreign)
    if is_text(text) and simplified >= 0.9 * len(foreign) and common >= 0.08 * len(foreign):
        return "gb18030"
    text = decode(data, "cp1252")
    foreign = {c for c in text if not c.isascii()}
    if WESTERN.issuperset(foreign) and 4 * sum(map(text.count, foreign)) <= len(text):
        return "cp1252" if text else None
    return None


def decode(data: bytes, name: str) -> str:
    """The text of `data`, or nothing if it is not in that encoding."""
    try:
        return codecs.getincrementaldecoder(name)().decode(data)
    except UnicodeError:  # also that of UTF-16 that wants a mark
        return ""


def is_text(text: str) -> bool:
    """Whether no control character and nothing that Unicode leaves open stands in `text`."""
    text = text.translate(dict.fromkeys(b"\t\n\r\f\b\x1b"))
    return text != "" and not any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in text)


def is_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
        return not "\u3040" <= character <= "\u30ff"  # kana is in it, and in no Chinese text
    except UnicodeEncodeError:
        return False


def find(name: str) -> str:
    """Python's own name of the text encoding `name`. Raises ValueError if there is none."""
    try:
        codec = codecs.lookup(name)
        if codec._is_text_encoding:
            return codec.name.removesuffix("-sig")  # a mark is taken away in any case
    except (LookupError, ValueError):
        pass
    near = difflib.get_close_matches(name.lower(), [*aliases, *aliases.values()], n=1)
    hint = f"did you mean {near[0]}?" if near else "utf-8, gb18030 and cp1252 are some"
    raise ValueError(f"encoding={name!r} is none that Python knows: {hint}")
