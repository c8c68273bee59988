"""JSON values and calls of tools as rules of a grammar, in the Lark dialect of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from rag_blockcache.json_schema import Schema
from rag_blockcache.tool_calls import CallForm

# Values are written as ``json.dumps`` does; a small model that may put white space anywhere does not stop.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}


def grammar(
    answer: Schema | None,
    tools: Mapping[str, Schema],
    form: CallForm,
    special: Mapping[str, int],
    *,
    is_space_first: bool,
) -> str:
    """Return the grammar of an answer in JSON, of a call, or of either.

    Args:
        answer: Schema of an answer; None if there must be a call.
        tools: Schemas of the arguments of the tools that can be called, by name; may be empty.
        form: How a call is written.
        special: Ids of special tokens by their text, which the form may hold.
        is_space_first: Whether a space may stand first, as behind a control token of SentencePiece.
    """
    rules = [] if answer is None else [_value(answer)]
    rules += [_call(name, schema, form, special) for name, schema in tools.items()]
    names = [f"rule_{index}" for index in range(len(rules))]
    space = '" "? ' if is_space_first else ""
    start = f"start: {space}({' | '.join(names)})"
    named = [f"{name}: {rule}" for name, rule in zip(names, rules, strict=True)]
    return "\n".join(["%llguidance {}", start, *named])


def _call(name: str, schema: Schema, form: CallForm, special: Mapping[str, int]) -> str:
    before = _literal(form.before + json.dumps(name)[1:-1] + form.middle, special)
    return f"{before} {_value({'type': 'object', **schema})} {_literal(form.after, special)}"


def _value(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}"


def _literal(text: str, special: Mapping[str, int]) -> str:
    """Write text for a grammar; special tokens are none, and stand in it by their ids."""
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    parts = re.split(f"({names})", text) if names else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
