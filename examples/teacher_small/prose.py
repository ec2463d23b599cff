"""Extract English paragraphs from HTML, manual pages and plain text, and drop repeated ones."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from durable_files import write_text

DOCUMENT_SEPARATOR = "\n\x00\n"
# Longer files (a dictionary, a book on one page) are split into several documents, so that shuffling mixes them.
LONGEST_DOCUMENT = 200_000

_UNREAD_ELEMENTS = re.compile(
    r"<(script|style|head|nav|footer|header|pre|svg|programlisting|screen|synopsis)\b[^>]*>.*?</\1\s*>|<!--.*?-->",
    re.DOTALL | re.IGNORECASE,
)
_BLOCK_TAGS = re.compile(
    r"</?(?:p|li|dd|dt|dl|ul|ol|div|td|th|tr|table|h[1-6]|blockquote|section|article|body"
    r"|para|simpara|title|listitem|term|item|entry|row|note|tip|warning|caption|figure)\b[^>]*>",
    re.IGNORECASE,
)
_LINE_BREAKS = re.compile(r"<br\b[^>]*>", re.IGNORECASE)
_TAGS = re.compile(r"<[^>]*>")
_SPACES = re.compile(r"\s+")
_NO_LETTERS = re.compile(r"[\W\d_]+")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\ufeff\ufffd]")

_ROFF_COMMENT = re.compile(r"^[.']\\\".*\n?", re.MULTILINE)
_ROFF_BREAK = re.compile(
    r"^\.\s*(?:SH|SS|PP|P|LP|TP|IP|HP|TQ|Pp|Sh|Ss|It|Bl|El|Bd|Ed|sp|nf|fi|RS|RE|EX|EE)\b.*$", re.MULTILINE
)
_ROFF_FONT = re.compile(
    r"^\.\s*(BR|BI|IR|RB|RI|IB|B|I|SM|SB|Nm|Fl|Ar|Xr|Fn|Va|Pa|Cm|Em|Sy)[ \t]+(.*)$", re.MULTILINE
)
_ROFF_REQUEST = re.compile(r"^[.'].*\n?", re.MULTILINE)
_ROFF_ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')
_ROFF_ESCAPES = (
    (re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]"), "'"),
    (re.compile(r"\\\((?:dq|lq|rq)|\\\[(?:dq|lq|rq)\]|\\\*\((?:lq|rq)"), '"'),
    (re.compile(r"\\\(e[mn]|\\\[e[mn]\]"), " - "),
    (re.compile(r"\\e|\\\(rs"), "\\\\"),
    (re.compile(r"\\\(..|\\\*\(..|\\\*.|\\\[[^\]]*\]|\\[&|^/,%:~ ]"), ""),
)

_COMMON_WORDS_TEXT = """
    the of and to in a is that for it as was with be by on not he his but at are this have from or
    had an they which one you were all her she there would their we him been has when who will no
    more if out so said what up its about than into them can only other time new some could these
    may then do first any my now such like our over me even most made after also did many before
    must through back where much your way well down should because each just those how too little
    good very make world still see own men work long get here between both life being under never
    day same another know while last might us great old
"""
COMMON_WORDS = frozenset(_COMMON_WORDS_TEXT.split())


def html_text(source: str) -> str:
    """Text of an HTML, DocBook or Mallard page: blank lines between blocks, without code and navigation."""
    source = _UNREAD_ELEMENTS.sub("\n", source)
    source = _SPACES.sub(" ", source)
    source = _LINE_BREAKS.sub("\n", _BLOCK_TAGS.sub("\n\n", source))  # two breaks in a row give a blank line
    return html.unescape(_TAGS.sub("", source))


def _roff_font_line(match: re.Match[str]) -> str:
    arguments = [quoted or plain for quoted, plain in _ROFF_ARGUMENT.findall(match[2])]
    # Two-letter man macros alternate fonts within one word: `.BR open (2)` reads "open(2)".
    return ("" if match[1] in {"BR", "BI", "IR", "RB", "RI", "IB"} else " ").join(arguments)


def manual_page_text(source: str) -> str:
    """Text of a man(7) or mdoc(7) page, without layout requests."""
    source = _ROFF_COMMENT.sub("", source)
    source = _ROFF_BREAK.sub("\n", source)
    source = _ROFF_FONT.sub(_roff_font_line, source)
    source = _ROFF_REQUEST.sub("", source)
    for pattern, replacement in _ROFF_ESCAPES:
        source = pattern.sub(replacement, source)
    return source


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English prose: mostly letters, mostly ASCII, enough common words."""
    if len(paragraph) < 60:
        return False
    words = paragraph.split(" ")
    if len(words) < 12:
        return False
    letters = sum(map(str.isalpha, paragraph)) + len(words) - 1
    if letters < 0.86 * len(paragraph):
        return False
    if not paragraph.isascii() and sum(character > "\x7f" for character in paragraph) > 0.05 * len(paragraph):
        return False
    common = sum(word.strip(".,;:()").lower() in COMMON_WORDS for word in words)
    return common >= 0.22 * len(words)


def clean_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of `text`, which blank lines separate, each as one line in NFC without control characters."""
    for block in _BLANK_LINES.split(text):
        paragraph = _SPACES.sub(" ", _CONTROL.sub("", block)).strip()
        if paragraph:
            yield paragraph if paragraph.isascii() else unicodedata.normalize("NFC", paragraph)


class ParagraphFilter:
    """Passes each paragraph the first time it occurs. Stores a 16-byte digest per paragraph.

    Compares letters only, so that a page as Markdown and as HTML, or boilerplate with other numbers, counts once.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def unseen(self, paragraphs: Iterable[str]) -> Iterator[str]:
        for paragraph in paragraphs:
            letters = _NO_LETTERS.sub("", paragraph).lower()
            digest = hashlib.blake2b(letters.encode(), digest_size=16).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                yield paragraph


def as_documents(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs with blank lines into documents of at most LONGEST_DOCUMENT characters."""
    document: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if document and length + len(paragraph) > LONGEST_DOCUMENT:
            yield "\n\n".join(document)
            document, length = [], 0
        document.append(paragraph)
        length += len(paragraph) + 2
    if document:
        yield "\n\n".join(document)


def write_documents(path: Path, documents: Iterable[str]) -> None:
    write_text(path, DOCUMENT_SEPARATOR.join(documents) + "\n")


def read_documents(path: Path) -> list[str]:
    return [document.strip() for document in path.read_text().split(DOCUMENT_SEPARATOR) if document.strip()]
