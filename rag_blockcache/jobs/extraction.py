"""Text out of files: plain text, Markdown, HTML, PDF, and lines of ready passages."""

from __future__ import annotations

import codecs
import io
import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.passages import Passage

_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|caption|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "h[1-6]|header|hr|li|main|nav|ol|p|pre|section|summary|table|tbody|tfoot|thead|tr|ul"
)
_UNSEEN = ["script", "style", "noscript", "template", "head"]
_MAX_CONTROLS = 0.05  # of all characters; text has next to none, other data a tenth or more
_BYTE_ORDER_MARKS = {  # the longer first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extract:
    """What was found in a file.

    Attributes:
        title: From the file's own heading or title; empty where it has none.
        parts: The text, in one part, or a part for each page.
        has_pages: Whether the parts are pages.
        passages: Ready passages, to be kept as they are.
        refusals: Why some of the file could not be used.
    """

    title: str = ""
    parts: tuple[str, ...] = ()
    has_pages: bool = False
    passages: tuple[Passage, ...] = ()
    refusals: tuple[str, ...] = ()


def decoded(data: bytes, name: str) -> str:
    """Decode text: by its byte order mark, as UTF-8, or else as Western European, with a log line.

    Raises:
        InvalidInputError: If it is not text.
    """
    encoding = next((known for mark, known in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise InvalidInputError(
                f"it begins as {encoding} and goes on as something else ({error})"
            ) from error
        text = _western(data)
        logger.warning("%s is not UTF-8; read as Latin-1", name)
    controls = sum(character < " " and character not in "\t\n\r\f\v\x1b" for character in text)
    if "\x00" in text or controls > _MAX_CONTROLS * len(text):
        raise InvalidInputError("it holds binary data, not text; convert it, or give it its own suffix")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _western(data: bytes) -> str:
    try:
        return data.decode("cp1252")  # Latin-1, with quotation marks where that has control characters
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _plain(data: bytes, name: str) -> Extract:
    return Extract(parts=(decoded(data, name),))


def _markdown(data: bytes, name: str) -> Extract:
    text = decoded(data, name)
    return Extract(_heading(text), (text,))


def _heading(text: str) -> str:
    """The first heading outside of code and front matter."""
    is_code, before = False, ""
    for line in re.sub(r"\A---\n.*?\n(---|\.\.\.)\n", "", text, flags=re.DOTALL).split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            is_code = not is_code
        elif not is_code:
            if found := re.match(r" {0,3}#{1,6}\s+(.+?)\s*#*\s*$", line):
                return found[1]
            if before.strip() and re.match(r" {0,3}(=+|-{2,})\s*$", line):
                return before.strip()
        before = "" if is_code else line
    return ""


def _html(data: bytes, name: str) -> Extract:
    try:
        import bs4
        from bs4.element import NavigableString
    except ImportError as error:
        raise _missing("beautifulsoup4", ".html") from error
    is_marked = data.startswith(tuple(_BYTE_ORDER_MARKS))
    if not is_marked and b"\x00" in data:
        raise InvalidInputError("it holds binary data, not text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has opinions on XHTML, and on text that looks like a file name
        soup = bs4.BeautifulSoup(_decoded_html(data, name), "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(_UNSEEN):
        tag.decompose()
    for string in soup.find_all(string=True):
        if type(string) is NavigableString and not string.find_parent("pre"):
            string.replace_with(re.sub(r"\s+", " ", string))
    for tag in soup("br"):
        tag.replace_with("\n")
    for tag in soup(["td", "th"]):
        tag.insert_after(" ")
    for tag in soup(lambda tag: _BLOCKS.fullmatch(tag.name) is not None):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    text = re.sub(r"[^\S\n]+\n", "\n", soup.get_text())
    return Extract(title, (re.sub(r"\n{3,}", "\n\n", text).strip("\n"),))


def _decoded_html(data: bytes, name: str) -> str | bytes:
    """Text that is marked or UTF-8; otherwise bytes, whose encoding stands in the document."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        if not data.startswith(tuple(_BYTE_ORDER_MARKS)):
            return data
    return decoded(data, name)


def _pdf(data: bytes, name: str) -> Extract:
    try:
        import pypdf
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise _missing("pypdf", ".pdf") from error
    damage = (DependencyError, PyPdfError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InvalidInputError("it needs a password; save it without one")
        pages = tuple(_storable(page.extract_text()) for page in reader.pages)
        title = str(reader.metadata.title or "") if reader.metadata else ""
    except InvalidInputError:
        raise
    except damage as error:  # pypdf trusts what files say of themselves
        raise InvalidInputError(f"it is not a sound PDF ({type(error).__name__}: {error})") from error
    if not any(page.strip() for page in pages):
        raise InvalidInputError("it holds no text, only images perhaps; run text recognition on it first")
    return Extract(" ".join(_storable(title).split()), pages, has_pages=True)


def _storable(text: str) -> str:
    """Fonts without a proper table of characters give NUL and half characters; neither is text."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def _lines(data: bytes, name: str) -> Extract:
    passages, refusals = [], []
    for number, line in enumerate(decoded(data, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            passages.append(_ready_passage(json.loads(line)))
        except (ValueError, RecursionError) as error:  # JSON's errors, and those of passages
            refusals.append(f"line {number}: {error}")
    return Extract(passages=tuple(passages), refusals=tuple(refusals))


def _ready_passage(record: Any) -> Passage:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InvalidInputError('it needs an object with at least {"text": "..."}')
    own = record.pop("metadata", None) or {}
    if not isinstance(own, dict):
        raise InvalidInputError(f"metadata is {type(own).__name__}; it needs an object")
    text, title = record.pop("text"), record.pop("title", None) or ""
    passage_id = record.get("id")  # it stays in the metadata, for an index that gives names of its own
    return Passage(
        text,
        title=title,
        passage_id="" if passage_id is None else str(passage_id),
        metadata={**record, **own},
    )


def _missing(package: str, suffix: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{suffix} files need {package}, which is not installed; pip install 'rag_blockcache[documents]'"
    )


EXTRACTORS: dict[str, Callable[[bytes, str], Extract]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".jsonl": _lines,
}
