"""Calls of tools in what models write: every known form is found, and nothing else is."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.tool_call_reader import ToolCallReader, parse_tool_calls, text_without_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SPECIAL = ["<s>", "</s>", "<|im_end|>", "[TOOL_CALLS]", "<|python_tag|>"]
MILL = {"word": "mill", "limit": 3}
AS_JSON = json.dumps({"name": "look_up", "arguments": MILL})
AS_LLAMA = json.dumps({"name": "look_up", "parameters": MILL})
NOW = '{"name": "now", "arguments": {}}'

FORMS = {
    "hermes": f"<tool_call>\n{AS_JSON}\n</tool_call>",
    "hermes without space": f"<tool_call>{AS_JSON}</tool_call>",
    "hermes without its end": f"<tool_call>{AS_JSON}",
    "hermes before a special token": f"<tool_call>{AS_JSON}\n<|im_end|>",
    "hermes over lines": f"<tool_call>\n{json.dumps(json.loads(AS_JSON), indent=2)}\n</tool_call>",
    "hermes list": f"<tool_call>[{AS_JSON}]</tool_call>",
    "qwen3-coder": (
        "<tool_call>\n<function=look_up>\n<parameter=word>\nmill\n</parameter>\n<parameter=limit>\n3\n"
        "</parameter>\n</function>\n</tool_call>"
    ),
    "llama": AS_LLAMA,
    "llama with its tag": f"<|python_tag|>{AS_LLAMA}",
    "mistral": f"[TOOL_CALLS] [{AS_JSON}]",
    "mistral with ids": f'[TOOL_CALLS][{AS_JSON[:-1]}, "id": "abcdefghi"}}]</s>',
    "mistral by name": f"[TOOL_CALLS]look_up[ARGS]{json.dumps(MILL)}",
    "mistral by name and id": f"[TOOL_CALLS]look_up[CALL_ID]abcdefghi[ARGS]{json.dumps(MILL)}",
    "mistral by name alone": f"[TOOL_CALLS]look_up{json.dumps(MILL)}",
    "fenced": f"```json\n{AS_JSON}\n```",
    "fenced without a language": f"```\n{AS_LLAMA}\n```",
    "fenced list": f"```tool_call\n[{AS_JSON}]\n```",
    "bare": AS_JSON,
    "bare list": f"[{AS_JSON}]",
    "as openai has it": json.dumps(
        {"type": "function", "id": "a", "function": {"name": "look_up", "arguments": json.dumps(MILL)}}
    ),
}


def parse(text, tools=TOOLS):
    rest, calls = parse_tool_calls(text, tools, special_tokens=SPECIAL)
    return rest, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("written", FORMS.values(), ids=FORMS)
def test_every_form_is_read(written):
    assert parse(written) == ("", [("look_up", MILL)])
    assert parse(f"  \n{written}\n</s>") == ("", [("look_up", MILL)])


@pytest.mark.parametrize("name", ["hermes", "qwen3-coder", "llama with its tag", "mistral", "fenced"])
def test_text_around_calls_is_left(name):
    shown = f"I look it up.\n\n{FORMS[name]}\n"
    assert parse(shown) == ("I look it up.", [("look_up", MILL)])
    assert parse(f"{shown}\nDone.</s>") == ("I look it up.\n\nDone.", [("look_up", MILL)])


def test_texts_around_a_call_stay_apart():
    assert parse(f"a{FORMS['hermes']}b")[0] == "a\nb"
    assert parse(f"a {FORMS['hermes']}\n\nb")[0] == "a b"
    assert parse(f" {FORMS['hermes']} b")[0] == "b"


@pytest.mark.parametrize(
    "written",
    [
        f"<tool_call>{AS_JSON}</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
        f"<tool_call>[{AS_JSON}, {NOW}]</tool_call>",
        f"[TOOL_CALLS][{AS_JSON}, {NOW}]",
        f"[TOOL_CALLS]look_up[ARGS]{json.dumps(MILL)}[TOOL_CALLS]now[ARGS]{{}}",
        f"[{AS_JSON}, {NOW}]",
        f"{AS_JSON}; {NOW}",
        f"<|python_tag|>{AS_LLAMA}; {NOW}",
        f"{AS_JSON}\n{NOW}",
        f"```json\n{AS_JSON}\n```\n```json\n{NOW}\n```",
    ],
)
def test_several_calls_are_read(written):
    assert parse(written) == ("", [("look_up", MILL), ("now", {})])


def test_a_fence_may_be_open_at_the_end():
    assert parse(f"I see.\n```json\n{AS_JSON}\n") == ("I see.", [("look_up", MILL)])


def test_calls_have_ids_of_their_own():
    _, calls = parse_tool_calls(f"[{AS_JSON}, {NOW}, {NOW}]", TOOLS)
    ids = {call.tool_call_id for call in calls}
    assert len(ids) == 3
    assert all(len(name) == 9 and name.isalnum() for name in ids)


@pytest.mark.parametrize("tag", ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"])
def test_a_call_that_is_marked_may_be_of_an_unknown_tool(tag):
    assert parse(f'{tag}{{"name": "fly", "arguments": {{}}}}') == ("", [("fly", {})])
    assert parse(f'{tag}{{"name": "fly"}}') == ("", [("fly", {})])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "fly", "arguments": {}}',
        '[{"name": "look_up", "arguments": {}}, {"name": "fly", "arguments": {}}]',
        '```json\n{"name": "fly", "arguments": {}}\n```',
        '{"name": "look_up"}',
        '{"name": ["look_up"], "arguments": {}}',
        f"As in {AS_JSON}.",
        f"```json\n{AS_JSON}\n# a comment\n```",
        "[1] says so.",
        "[]",
        '{"answer": "42"}',
        "{curly} things",
        "```python\nprint({})\n```\nso.",
        "``` ```",
    ],
)
def test_what_could_be_ordinary_text_is_text(text):
    assert parse(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "look_up", "arguments": {"word": "mill"}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"word": "mi',
        "<tool_call>{'name': 'look_up', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "look_up", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": "mill"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>look_up(mill)</tool_call>",
        "<tool_call><function=look_up><parameter=word>mill",
        "<tool_call>",
        "<tool_call> <func",
        "<tool_cal",
        "a <tool_call>[]</tool_call>",
        "```json",
        "```json\n" + AS_JSON[:-1],
        AS_JSON[:-1],
        "<tool_call>" + "[" * 100_000 + "]" * 100_000,
        '<tool_call>{"name": "now", "arguments": {"n": ' + "9" * 5000 + "}}",
    ],
)
def test_what_is_malformed_is_text(text):
    assert parse(text) == (text, [])
    found = parse(f"{text} {FORMS['hermes']}")
    assert found == (text, [("look_up", MILL)]) or text.count("{") > text.count("}")


def test_a_mistral_mark_without_a_call_is_left_out_as_the_special_token_that_it_is():
    assert parse("[TOOL_CALLS]look_up[ARGS]nothing") == ("look_up[ARGS]nothing", [])
    assert parse("[TOOL_CALLS]look_up[ARGS]") == ("look_up[ARGS]", [])
    assert parse("[TOOL_CALLS] and so on") == (" and so on", [])
    assert parse('[TOOL_CALLS]look_up[ARGS]{"word": }') == ('look_up[ARGS]{"word": }', [])


def test_strings_in_arguments_may_hold_anything():
    arguments = {"word": 'a "</tool_call>" } ] \\ ``` é\n\t日', "limit": None, "more": [{"a": [1.5, True]}]}
    for name, call in (("hermes", {"name": "look_up", "arguments": arguments}), ("fenced", None)):
        written = json.dumps(call or {"name": "look_up", "arguments": arguments}, ensure_ascii=False)
        shown = FORMS[name].replace(AS_JSON, written)
        assert parse(shown) == ("", [("look_up", arguments)])
        assert "".join(streamed(f"{shown}\nDone.")) == "Done."
    with_line_break = '<tool_call>{"name": "look_up", "arguments": {"word": "a\nb"}}</tool_call>'
    assert parse(with_line_break) == ("", [("look_up", {"word": "a\nb"})])


def test_values_of_qwen3_coder_have_the_types_of_the_schema():
    written = (
        "<tool_call><function=look_up><parameter=word>3</parameter><parameter=limit>3</parameter>"
        '<parameter=other>{"a": null}</parameter><parameter=free>two\nlines</parameter>'
        "<parameter=none>null</parameter></function></tool_call>"
    )
    arguments = {"word": "3", "limit": 3, "other": {"a": None}, "free": "two\nlines", "none": None}
    assert parse(written) == ("", [("look_up", arguments)])


def test_special_tokens_are_no_text_and_other_text_stays_as_it_is():
    assert parse("<s> a \n<|im_end|></s>") == (" a \n", [])
    assert parse_tool_calls("<s> a", TOOLS) == ("<s> a", [])
    assert parse("") == ("", [])


@pytest.mark.parametrize(
    "tools", [[{"function": {}}], [{"name": ""}], [{"name": 3}], [*TOOLS, {"name": "now"}]]
)
def test_tools_need_names_of_their_own(tools):
    with pytest.raises(InvalidInputError, match="name of its own"):
        parse("a", tools)


# As it comes


def streamed(pieces):
    return list(text_without_calls(pieces, TOOLS, special_tokens=SPECIAL))


_PARTS = st.sampled_from(
    [
        *FORMS.values(),
        *SPECIAL,
        "<tool_call>",
        "</tool_call>",
        "```",
        "```json\n",
        "[TOOL_CALLS]look_up",
        "[ARGS]",
        AS_JSON[:20],
        AS_JSON[20:],
        NOW,
        "{",
        "}",
        "[",
        '"',
        "\\",
        ";",
        " ",
        "\n",
        "a",
        "é b",
        "<",
        "<function=look_up>",
        "</function>",
    ]
)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(_PARTS, max_size=6), cuts=st.lists(st.integers(0, 300), max_size=12))
@example(parts=[AS_JSON, ";", NOW, "a"], cuts=list(range(200)))
@example(parts=["a ", FORMS["hermes"], "\n", "b", " ", NOW], cuts=list(range(200)))
def test_pieces_put_together_are_what_is_left_of_the_whole(parts, cuts):
    text = "".join(parts)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    reader = ToolCallReader(TOOLS, special_tokens=SPECIAL)
    shown = "".join([*map(reader.read, pieces), reader.close()])
    assert (shown, [(call.name, call.arguments) for call in reader.calls]) == parse(text)
    assert "".join(streamed(pieces)) == shown


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_call():
    assert streamed(["Ada ", "wrote", " it.", "</s>"]) == ["Ada", " wrote", " it."]
    assert streamed(["a <", "tool_", "box> b"]) == ["a", " <tool_box> b"]
    assert streamed(['{"', 'answer"', ": 1}"]) == ['{"answer"', ": 1}"]
    assert streamed(["[", "1", "] so"]) == ["[1", "] so"]
    assert streamed(["``", "`py", "\nx", "\n```"]) == ["```py\nx", "\n```"]


@pytest.mark.parametrize("written", FORMS.values(), ids=FORMS)
def test_nothing_of_a_call_is_passed_on(written):
    assert streamed(written) == []
    behind = [] if "without its end" in written else [" So."]
    if written[0] in "<`":
        assert streamed(["I see. ", *written, *behind]) == ["I see.", *(" So." for _ in behind)]
