"""Documents: files and folders in, texts with a title and a content hash out; then passages.

What cannot be read is handed over as well, with the reason, and stops nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.jobs.extraction import EXTRACTORS, Extract
from rag_blockcache.jobs.splitting import PassageSplitter
from rag_blockcache.passages import Passage

__all__ = ["Document", "PassageSplitter", "UnreadableDocument", "read_documents", "split_document"]

IsWanted = Callable[[str, str], bool]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A file, as it was read.

    Attributes:
        document_id: Absolute path, symbolic links left as they are.
        content_hash: Of the bytes of the file, 32 hexadecimal digits.
        extract: Title, text and ready passages.
    """

    document_id: str
    content_hash: str
    extract: Extract

    @property
    def title(self) -> str:
        """The document's own title or first heading; empty where it has none."""
        return self.extract.title

    @property
    def text(self) -> str:
        """All of the text, pages and ready passages one below the other."""
        return "\n\n".join([*self.extract.parts, *(passage.text for passage in self.extract.passages)])


@dataclass(frozen=True)
class UnreadableDocument:
    """A file, folder or line that could not be read.

    Attributes:
        document_id: Absolute path.
        reason: Why, and what may help.
    """

    document_id: str
    reason: str


@overload
def read_documents(
    paths: Iterable[Path | str], *, is_wanted: IsWanted | None = None
) -> Iterator[Document | UnreadableDocument]: ...


@overload
def read_documents(
    paths: Iterable[Path | str], *, on_failure: Callable[[str, str], None], is_wanted: IsWanted | None = None
) -> Iterator[Document]: ...


def read_documents(
    paths: Iterable[Path | str],
    *,
    on_failure: Callable[[str, str], None] | None = None,
    is_wanted: IsWanted | None = None,
) -> Iterator[Document | UnreadableDocument]:
    """Read files, and those in folders and their folders, sorted, each once.

    Read are .txt, .md, .html, .htm, .pdf, and .jsonl with a ready passage a line: an object with
    ``text`` and perhaps ``title``, ``id``, ``metadata``; whatever else it holds counts as metadata.
    In folders, hidden files and other kinds are passed over.

    Args:
        paths: Files and folders.
        on_failure: Called with path and reason of what cannot be read, which then is not yielded.
        is_wanted: Called with id and content hash of each file before its text is extracted, which
            for a PDF takes long; those for which it says no are passed over. None takes all.

    Returns:
        An iterator of documents, read one at a time, and of what could not be read. A ``.jsonl``
        file with bad lines comes with the good ones, and is followed by a report of each bad line.

    Raises:
        InvalidInputError: At once, if a path does not exist, or names a file of another kind.
    """
    if isinstance(paths, str | Path):
        raise InvalidInputError("paths must be a sequence; wrap a single path in a list")
    roots = [Path(os.path.abspath(path)) for path in paths]
    for root in roots:
        _check(root)
    found = _read(roots, is_wanted or (lambda document_id, content_hash: True))
    return found if on_failure is None else _without_failures(found, on_failure)


def split_document(document: Document, splitter: PassageSplitter) -> list[Passage]:
    """Cut a document into passages; ready ones are kept whole.

    Each carries the title, and as metadata the ``source`` (the document's id), its ``index`` in the
    document from 0, and the ``page`` from 1 where there are pages. No passage goes over a page's end.
    """
    extract, source = document.extract, document.document_id
    if extract.passages:
        return [
            replace(passage, metadata={"source": source, "index": index, **passage.metadata})
            for index, passage in enumerate(extract.passages)
        ]
    is_markdown = source.lower().endswith(".md")
    pieces = [
        (piece, {"page": number} if extract.has_pages else {})
        for number, part in enumerate(extract.parts, 1)
        for piece in splitter.split(part, is_markdown=is_markdown)
    ]
    return [
        Passage(piece, title=extract.title, metadata={"source": source, "index": index, **page})
        for index, (piece, page) in enumerate(pieces)
    ]


def _check(root: Path) -> None:
    if not root.exists():
        raise InvalidInputError(f"{root} does not exist; check the path")
    if not root.is_dir() and root.suffix.lower() not in EXTRACTORS:
        raise InvalidInputError(
            f"{root} is of a kind that cannot be read; these can: {', '.join(EXTRACTORS)}"
        )


def _read(roots: Sequence[Path], is_wanted: IsWanted) -> Iterator[Document | UnreadableDocument]:
    seen: set[Path] = set()
    others: Counter[str] = Counter()
    for root in roots:
        for found in _files(root, others) if root.is_dir() else [root]:
            if isinstance(found, UnreadableDocument):
                yield found
            elif found not in seen:
                seen.add(found)
                yield from _documents(found, is_wanted)
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common())
        logger.info("passed over %d files of other kinds: %s", others.total(), kinds)


def _files(folder: Path, others: Counter[str]) -> Iterator[Path | UnreadableDocument]:
    """Yield the files below a folder, sorted; count those of other kinds."""
    failures: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=failures.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or not (path.is_file() or path.is_symlink()):
                continue
            if path.suffix.lower() in EXTRACTORS:
                yield path
            else:
                others[path.suffix.lower()] += 1
    for error in failures:
        yield UnreadableDocument(str(error.filename), f"the folder cannot be read ({error.strerror})")


def _documents(path: Path, is_wanted: IsWanted) -> Iterator[Document | UnreadableDocument]:
    """Read one file, if it is wanted: a document, then what of it could not be used."""
    name = str(path)
    try:
        name.encode()
        data = path.read_bytes()
        content_hash = hashlib.blake2b(data, digest_size=16).hexdigest()
        if not is_wanted(name, content_hash):
            return
        extract = EXTRACTORS[path.suffix.lower()](data, name)
    except UnicodeEncodeError:
        printable = os.fsencode(path).decode("utf-8", "backslashreplace")
        yield UnreadableDocument(printable, "its name is not UTF-8; rename it")
    except OSError as error:
        yield UnreadableDocument(name, f"it cannot be read ({error.strerror or error})")
    except (InvalidInputError, MissingDependencyError) as error:
        yield UnreadableDocument(name, str(error))
    else:
        yield Document(name, content_hash, extract)
        for reason in extract.refusals:
            yield UnreadableDocument(name, reason)


def _without_failures(
    found: Iterator[Document | UnreadableDocument], on_failure: Callable[[str, str], None]
) -> Iterator[Document]:
    for document in found:
        if isinstance(document, UnreadableDocument):
            on_failure(document.document_id, document.reason)
        else:
            yield document
