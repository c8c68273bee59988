"""Conditions on the metadata of passages, and which passages meet them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.vector_index import Ids

_PART = 10_000  # passages whose metadata are read together

Where: TypeAlias = Mapping[str, Any] | Callable[[Mapping[str, Any]], bool]


class PassageFilter:
    """Chooses passages by their metadata and ids.

    Metadata are held in memory once somebody has filtered by them. A vector id stands for one passage as it
    was written, for ever, so that only what was added since the last time is read.

    Args:
        table: Has the passages.
        unfiltered_keys: Keys of metadata that no condition asks for; their values are not held.
    """

    def __init__(self, table: PassageTable, unfiltered_keys: Collection[str] = ()) -> None:
        self._table, self._unfiltered_keys = table, frozenset(unfiltered_keys)
        self._held: dict[int, dict[str, Any]] = {}
        self._generation = -1  # of the table, when all of it was held

    def chosen(self, where: Where | None, among: Sequence[str] | None = None) -> Callable[[], Ids | None]:
        """Check conditions, and return what finds the vectors of the passages that meet them.

        Args:
            where: See ``matching``.
            among: Ids of passages; None for all.

        Returns:
            To be called in a transaction; gives vector ids, ascending, or None for all.
        """
        condition = None if where is None else matching(where)
        names = None if among is None else as_names(among)

        def vector_ids() -> Ids | None:
            met = None if condition is None else self._matching(condition)
            if names is None:
                return met
            named = self._table.named_vectors(names)
            return named if met is None else np.intersect1d(named, met)

        return vector_ids

    def _matching(self, condition: Callable[[Mapping[str, Any]], bool]) -> Ids:
        self._refresh()
        return np.array([name for name, metadata in self._held.items() if condition(metadata)], np.int64)

    def _refresh(self) -> None:
        generation = self._table.setting("generation")
        if generation != self._generation:
            present = self._table.vector_ids().tolist()
            added = self._read([name for name in present if name not in self._held])
            self._held = {name: added[name] if name in added else self._held[name] for name in present}
            self._generation = generation

    def _read(self, vector_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Read metadata a part at a time, so that what is not held is not in memory all at once."""
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(vector_ids), _PART):
            for name, metadata in self._table.metadata(vector_ids[start : start + _PART]).items():
                found[name] = {key: metadata[key] for key in metadata if key not in self._unfiltered_keys}
        return found


def as_names(passage_ids: Sequence[str]) -> list[str]:
    """Return ids, each once.

    Raises:
        InvalidInputError: If a single string came in place of a sequence.
    """
    if isinstance(passage_ids, str):
        raise InvalidInputError("passage ids must be a sequence; wrap a single one in a list")
    return list(dict.fromkeys(passage_ids))


def matching(where: Where) -> Callable[[Mapping[str, Any]], bool]:
    """Make one test of metadata out of conditions.

    Args:
        where: A mapping from a key to what its value must be: one of a list, tuple or set; what
            a callable accepts; or else equal. A key that is missing never matches. Or one
            callable on all of the metadata.

    Raises:
        InvalidInputError: If it is neither a mapping with string keys nor a callable.
    """
    if callable(where):
        accepts = where
        return lambda metadata: bool(accepts(MappingProxyType(dict(metadata))))
    if not isinstance(where, Mapping) or not all(isinstance(key, str) for key in where):
        raise InvalidInputError(
            f"where is {where!r}; pass a mapping such as {{'lang': 'en', 'year': [2023, 2024]}} or a callable"
        )
    conditions = [(key, _condition(wanted)) for key, wanted in where.items()]
    return lambda metadata: all(key in metadata and test(metadata[key]) for key, test in conditions)


def _condition(wanted: Any) -> Callable[[Any], bool]:
    if callable(wanted):
        return lambda value: bool(wanted(value))
    if isinstance(wanted, list | tuple | set | frozenset):
        choices = list(wanted)  # a value may be a list, which no set can hold
        return lambda value: value in choices
    return lambda value: bool(value == wanted)
