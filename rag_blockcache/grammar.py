"""JSON values and calls of tools as rules of a grammar, in the Lark dialect of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rag_blockcache.json_schema import Schema

# Values are written as ``json.dumps`` does; a small model that may put white space anywhere does not stop.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call: what stands around the name of a tool and its arguments in JSON.

    Attributes:
        before: In front of the name.
        middle: From the name to the arguments.
        after: Behind the arguments.
        between: From one call to ``before`` of the next; None where a model makes only one.
    """

    before: str
    middle: str
    after: str
    between: str | None = None


HERMES = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")


def grammar(
    answer: Schema | None,
    tools: Mapping[str, Schema],
    form: CallForm,
    special: Mapping[str, int],
    *,
    is_one_call: bool,
    is_space_first: bool,
) -> str:
    """Return the grammar of an answer in JSON, of calls, or of either.

    Args:
        answer: Schema of an answer; None if there must be a call.
        tools: Schemas of the arguments of the tools that can be called, by name; may be empty.
        form: How a call is written.
        special: Ids of special tokens by their text, which the form may hold.
        is_one_call: Whether there is exactly one call, or one at least.
        is_space_first: Whether a space may stand first, as behind a control token of SentencePiece.
    """
    kinds, rules = [], []
    if answer is not None:
        kinds.append("answer")
        rules.append(f"answer: {_value(answer)}")
    if tools:
        has_more = not is_one_call and form.between is not None
        more = f" ({_literal(form.between or '', special)} call)*" if has_more else ""
        kinds.append("calls")
        rules += [f"calls: call{more}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        rules += [f"call_{i}: {_call(name, tools[name], form, special)}" for i, name in enumerate(tools)]
    space = '" "? ' if is_space_first else ""
    return "\n".join(["%llguidance {}", f"start: {space}({' | '.join(kinds)})", *rules])


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
