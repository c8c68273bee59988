"""Which documents there are, and which of them the manifest does not know as they are now."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.jobs.documents import Document, read_documents
from rag_blockcache.jobs.index_report import JobTally
from rag_blockcache.manifest import Change, Manifest, Shard, is_in_shard


class Scan:
    """One pass over the documents below some paths.

    Args:
        paths: Files and folders.
        manifest: What is known of them.
        shard: The part of the documents that counts.
        tally: Counts.
    """

    def __init__(
        self, paths: Sequence[Path | str], *, manifest: Manifest, shard: Shard | None, tally: JobTally
    ) -> None:
        self._paths, self._manifest, self._shard, self._tally = paths, manifest, shard, tally
        self._failed: set[str] = set()
        self._num_seen = 0
        self._change: Change = "new"  # of the document that was looked at last

    def outdated(self) -> Iterator[Document]:
        """Yield the documents of the shard that are new or changed; of the others, no text is extracted.

        Raises:
            InvalidInputError: If there is no document at all; so that a folder that is not mounted
                does not empty an index.
        """
        self._manifest.start_scan()
        documents = read_documents(self._paths, on_failure=self._fail, is_wanted=self._is_outdated)
        while (document := self._next(documents)) is not None:
            self._tally.counts[f"num_{self._change}_documents"] += 1
            yield document
        if not self._num_seen and not self._failed:
            raise InvalidInputError(
                f"there is no document below {', '.join(map(str, self._paths))}; name files or folders that "
                "hold .txt, .md, .html, .pdf or .jsonl; nothing was changed"
            )

    def _next(self, documents: Iterator[Document]) -> Document | None:
        with self._tally.timed("scan"):
            return next(documents, None)

    def _is_outdated(self, document_id: str, content_hash: str) -> bool:
        self._num_seen += 1
        self._tally.tell("scan", self._num_seen)
        if not is_in_shard(document_id, self._shard):
            return False
        self._change = self._manifest.classify(document_id, content_hash)
        if self._change == "unchanged":
            self._tally.counts["num_unchanged_documents"] += 1
        return self._change != "unchanged"

    def _fail(self, source: str, reason: str) -> None:
        self._failed.add(source)
        self._tally.fail_document(source, reason)

    def gone(self) -> list[str]:
        """Return the documents of the shard on record that were below the paths and are not any more.

        What could not be read is not gone.
        """
        roots = [os.path.abspath(path) for path in self._paths]
        return [
            document_id
            for document_id in self._manifest.gone(shard=self._shard)
            if _is_below(document_id, roots) and not _is_below(document_id, self._failed)
        ]


def _is_below(document_id: str, roots: Iterable[str]) -> bool:
    """Say whether a document is one of these files, or in one of these folders."""
    return any(document_id == root or document_id.startswith(root.rstrip("/") + "/") for root in roots)
