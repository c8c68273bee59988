"""What made an index, on record in its table, and whether what is in use now fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rag_blockcache.errors import IndexMismatchError, StoreError
from rag_blockcache.retriever.embedder import Embedder, Vectors
from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.training import untrained_template

TABLE_FILE = "passages.sqlite"

_NEAR = 0.15  # distance of unit vectors: devices and dtypes differ by less, other models by far more


def prepared(directory: Path) -> Path:
    """Create the directory of an index, readable by its owner only, unless it is there.

    Raises:
        StoreError: If it cannot be created, or holds an index of something else.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be a directory ({error.strerror}); choose another one"
        ) from error
    if any(directory.glob("*.faiss")) and not (directory / TABLE_FILE).exists():
        raise StoreError(
            f"{directory} holds a FAISS file without {TABLE_FILE}, so its passages are unknown; restore that "
            "file too, or index the documents into another directory"
        )
    return directory


def check_opening(table: PassageTable, embedder: Embedder | None, index_factory: str | None) -> None:
    """Refuse what differs from the record by its name alone, before any model is loaded.

    A local path may be a copy of any model, so that only its vectors tell.

    Raises:
        IndexMismatchError: If index_factory or the embedder's name on the hub is another one.
    """
    known_factory = table.setting("index_factory")
    if None not in (known_factory, index_factory) and known_factory != index_factory:
        raise IndexMismatchError(
            f"{table.path} was made with index_factory {known_factory!r}, not {index_factory!r}; leave the "
            "option out, or index into another directory"
        )
    known, name = table.setting("embedder"), "" if embedder is None else embedder.name
    if _is_hub_name(known) and _is_hub_name(name) and Path(known).name != Path(name).name:
        raise IndexMismatchError(
            f"{table.path} was made with embedder {known}, not {name}; leave the option out, or index the "
            "documents again into another directory"
        )


def recorded_embedder(table: PassageTable, device: str | None) -> Embedder | None:
    """Return the embedder on record, if it can be had by its name."""
    name = table.setting("embedder")
    return None if name is None or name.startswith("callable ") else Embedder(name, device=device)


def check_vectors(table: PassageTable, dimension: int) -> None:
    """Refuse vectors of another dimension than those in the index.

    Raises:
        IndexMismatchError: If ``dimension`` is another one.
    """
    known = table.setting("dimension")
    if known is not None and known != dimension:
        raise IndexMismatchError(
            f"{table.path} holds vectors of {known} dimensions, these have {dimension}; use the embedder "
            f"that made it ({table.setting('embedder') or 'unnamed'}), or index into another directory"
        )


def check_embedder(table: PassageTable, embedder: Embedder) -> None:
    """Embed the text on record again, and compare: names may lie, vectors do not.

    Raises:
        IndexMismatchError: If the vector is not the one that the index was made with.
    """
    text, stored = table.setting("probe_text"), table.setting("probe")
    if text is None:
        return
    vector = embedder.embed([text])[0]
    check_vectors(table, len(vector))
    if np.linalg.norm(vector - np.frombuffer(stored, np.float32)) > _NEAR:
        raise IndexMismatchError(
            f"{table.path} was made with another embedder ({table.setting('embedder')}), not with "
            f"{embedder.name}, which places the same text elsewhere; use that one, or index the documents "
            "again into another directory"
        )


def record_origin(
    table: PassageTable,
    vectors: Vectors,
    *,
    index_factory: str,
    embedder: Embedder | None,
    probe_text: str | None,
) -> None:
    """Put on record what makes this index, as far as that is not yet there.

    Args:
        table: Of the index, in a transaction that writes.
        vectors: About to be put in.
        index_factory: FAISS factory string.
        embedder: What is in use; None for ready vectors only.
        probe_text: The text behind the first vector, if ``embedder`` made it.

    Raises:
        IndexMismatchError: If the vectors have another dimension than those in the index.
        InvalidInputError: If FAISS cannot make such an index for them.
    """
    check_vectors(table, vectors.shape[1])
    if table.setting("dimension") is None:
        template = untrained_template(index_factory, vectors.shape[1])
        table.record(dimension=vectors.shape[1], normalisation="l2", index_factory=index_factory)
        if template is not None:  # otherwise recorded when it is trained
            table.record(template=template)
    if embedder is not None and (table.setting("embedder") is None):
        table.record(embedder=embedder.name)
    if embedder is not None and probe_text is not None and table.setting("probe_text") is None:
        table.record(embedder=embedder.name, probe_text=probe_text, probe=vectors[0].tobytes())


def _is_hub_name(name: str | None) -> bool:
    return bool(name) and not str(name).startswith(("callable ", "/", ".")) and not Path(str(name)).is_dir()
