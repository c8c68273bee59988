"""LlamaIndex's metadata filters, as conditions on the metadata of passages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import ge, gt, le, lt
from typing import Any, TypeAlias

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from rag_blockcache.errors import InvalidInputError

Condition: TypeAlias = Callable[[Mapping[str, Any]], bool]

# What is held, then what is asked for. What cannot be compared does not match.
_TESTS: dict[FilterOperator, Callable[[Any, Any], Any]] = {
    FilterOperator.EQ: lambda held, wanted: held == wanted,
    FilterOperator.NE: lambda held, wanted: held != wanted,
    FilterOperator.GT: gt,
    FilterOperator.GTE: ge,
    FilterOperator.LT: lt,
    FilterOperator.LTE: le,
    FilterOperator.IN: lambda held, wanted: held in wanted,
    FilterOperator.NIN: lambda held, wanted: held not in wanted,
    FilterOperator.ANY: lambda held, wanted: any(each in held for each in wanted),
    FilterOperator.ALL: lambda held, wanted: all(each in held for each in wanted),
    FilterOperator.CONTAINS: lambda held, wanted: wanted in held,
    FilterOperator.TEXT_MATCH: lambda held, wanted: wanted in _text(held),
    FilterOperator.TEXT_MATCH_INSENSITIVE: lambda held, wanted: wanted.lower() in _text(held).lower(),
}
_MATCH_WHAT_IS_NOT_THERE = (FilterOperator.NE, FilterOperator.NIN)


def as_condition(filters: MetadataFilters) -> Condition:
    """Return what tells whether metadata meet filters, which may be nested.

    Raises:
        InvalidInputError: If an operator, or how filters are joined, is not known here.
    """
    conditions = [
        as_condition(each) if isinstance(each, MetadataFilters) else _condition(each)
        for each in filters.filters
    ]
    joined = filters.condition or FilterCondition.AND
    if joined == FilterCondition.AND:
        return lambda metadata: all(meets(metadata) for meets in conditions)
    if joined == FilterCondition.OR:
        return lambda metadata: any(meets(metadata) for meets in conditions)
    if joined == FilterCondition.NOT:
        return lambda metadata: not any(meets(metadata) for meets in conditions)
    raise InvalidInputError(f"filters are joined by {joined!r}; use and, or, not")


def _condition(wanted: MetadataFilter) -> Condition:
    if wanted.operator == FilterOperator.IS_EMPTY:
        return lambda metadata: metadata.get(wanted.key) in (None, "", [])
    test = _TESTS.get(wanted.operator)
    if test is None:
        known = ", ".join(repr(operator.value) for operator in [*_TESTS, FilterOperator.IS_EMPTY])
        raise InvalidInputError(f"a filter uses the operator {wanted.operator!r}; known are {known}")

    def meets(metadata: Mapping[str, Any]) -> bool:
        held = metadata.get(wanted.key)
        if held is None:
            return wanted.operator in _MATCH_WHAT_IS_NOT_THERE
        try:
            return bool(test(held, wanted.value))
        except TypeError:  # a number against a text, say
            return False

    return meets


def _text(held: Any) -> str:
    if not isinstance(held, str):
        raise TypeError
    return held
