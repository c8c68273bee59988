"""JSON schemas as their authors mean them, and such that a grammar can follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
_MERGING = {"$ref", "allOf", "anyOf", "oneOf", "if"}
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}


def closed(schema: Schema) -> Schema:
    """Return a schema in which objects have the properties that are listed, and no others.

    What follows it follows the given one too. Nothing is closed in a schema that merges parts into one
    object, because each part would rule out the properties of the others.
    """
    return schema if any(map(_is_merging, _parts(schema))) else _changed(schema, _without_others)


def without_patterns(schema: Schema, is_usable: Callable[[str], bool]) -> Schema:
    """Leave those patterns of strings out that cannot be used."""

    def change(part: Schema) -> Schema:
        pattern = part.get("pattern")
        if not isinstance(pattern, str) or is_usable(pattern):
            return part
        return {key: value for key, value in part.items() if key != "pattern"}

    return _changed(schema, change)


def _parts(schema: Schema) -> list[Schema]:
    """Return every part of a schema that is a schema."""
    parts: list[Schema] = []

    def note(part: Schema) -> Schema:
        parts.append(part)
        return part

    _changed(schema, note)
    return parts


def _changed(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Change every part of a schema that is a schema, the innermost first."""
    if not isinstance(schema, Mapping):
        return schema  # True or False
    made = dict(schema)
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            made[key] = {name: _changed(part, change) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [_changed(part, change) for part in value]
        elif key in _SINGLE:
            made[key] = _changed(value, change)
    return change(made)


def _is_merging(part: Schema) -> bool:
    all_of = part.get("allOf")
    return ("properties" in part and not _MERGING.isdisjoint(part)) or (
        isinstance(all_of, list) and len(all_of) > 1
    )


def _without_others(part: Schema) -> Schema:
    names = part.get("properties")
    if not isinstance(names, Mapping) or not _OPEN.isdisjoint(part):
        return part
    if not set(part.get("required", ())) <= set(names):
        return part
    return {**part, "additionalProperties": False}
