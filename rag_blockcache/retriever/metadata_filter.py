"""Conditions on the metadata of passages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from rag_blockcache.errors import InvalidInputError

Where: TypeAlias = Mapping[str, Any] | Callable[[Mapping[str, Any]], bool]


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
