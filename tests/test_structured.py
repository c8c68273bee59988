"""Answers within a grammar: any model writes JSON that follows a schema, and calls that can be read."""

from __future__ import annotations

import gc
import json
import logging
import sys

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import TEMPLATES, TOOLS
from tokenizers_made_here import byte_level, metaspace
from transformers import LogitsProcessorList

from rag_blockcache import structured
from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.json_schema import closed, without_patterns
from rag_blockcache.structured import constraint, joined
from rag_blockcache.tool_call_reader import parse_tool_calls

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
}
SHORT_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "maxLength": 6}},
                "required": ["word"],
            },
        },
    }
    for name in ("look_up", "look_down")
]
END = 2  # of the tokenizers made here


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def write(processor, tokenizer, seed=0, *, max_new_tokens=600, vocab_size=None):
    """Let a model without a mind write; return its tokens, the end included."""
    generator = torch.Generator().manual_seed(seed)
    end = tokenizer.eos_token_id
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(max_new_tokens):
        scores = processor(ids, torch.randn(1, vocab_size or len(tokenizer), generator=generator))
        token = int(scores.argmax())
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
        if token == end:
            return ids[0, 3:].tolist()
    raise AssertionError(f"no end after {tokenizer.decode(ids[0, 3:])!r}")


def text(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True)


# Schemas


def meets(value, schema):
    """Return whether a value follows a schema of the kinds that are used here."""
    if "anyOf" in schema:
        return any(meets(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        names, needed = schema["properties"], schema["required"]
        return (
            isinstance(value, dict)
            and set(needed) <= set(value) <= set(names)
            and all(meets(value[name], names[name]) for name in value)
        )
    if kind == "array":
        bounds = schema["minItems"], schema["maxItems"]
        return (
            isinstance(value, list)
            and bounds[0] <= len(value) <= bounds[1]
            and all(meets(item, schema["items"]) for item in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


_LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 500),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.sampled_from(["a", 'b "c"', 3, None, "é日"]), min_size=1, unique=True).map(
        lambda values: {"enum": values}
    ),
)


def _objects(parts):
    named = st.dictionaries(st.sampled_from(["a", "b c", "é", 'd"e', "properties"]), parts, max_size=3)
    return named.flatmap(
        lambda names: st.sets(st.sampled_from(sorted(names)) if names else st.nothing()).map(
            lambda needed: {"type": "object", "properties": names, "required": sorted(needed)}
        )
    )


_SCHEMAS = st.recursive(
    _LEAVES,
    lambda parts: st.one_of(
        _objects(parts),
        st.builds(
            lambda items, few, more: {
                "type": "array",
                "items": items,
                "minItems": few,
                "maxItems": few + more,
            },
            parts,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(parts, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
    ),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 1000))
def test_any_model_writes_what_any_schema_asks_for(schema, seed, tokenizer):
    written = text(tokenizer, write(constraint(tokenizer, response_schema=schema), tokenizer, seed))
    value = json.loads(written)
    assert meets(value, schema)
    if "\\" not in written:  # with no other white space, though zero may have a sign
        assert written.replace("-0", "0") == json.dumps(value, ensure_ascii=False).replace("-0", "0")


@pytest.mark.parametrize("make", [metaspace, lambda: metaspace(unigram=True), lambda: byte_level(bos=True)])
@pytest.mark.parametrize("seed", range(5))
def test_tokenizers_of_other_kinds_write_it_too(make, seed):
    made = make()
    written = write(constraint(made, response_schema=PERSON), made, seed)
    assert meets(json.loads(text(made, written)), PERSON)


def test_a_space_may_stand_first_where_the_tokenizer_puts_one():
    made = metaspace()
    scores = constraint(made, response_schema=PERSON)(torch.tensor([[5]]), torch.zeros(1, len(made)))
    assert scores[0, made.convert_tokens_to_ids("\u2581")] == 0


def test_an_answer_ends_only_where_its_grammar_does(tokenizer):
    processor = constraint(tokenizer, response_schema=PERSON)
    wanted = [*tokenizer('{"name": "Ada", "age": 36, "mood": "good"}').input_ids, END]
    for num_tokens in range(len(wanted)):
        ids = torch.tensor([[5, 6, *wanted[:num_tokens]]])
        scores = processor(ids, torch.zeros(1, len(tokenizer)))
        is_end = num_tokens == len(wanted) - 1
        assert scores[0, wanted[num_tokens]] == 0
        assert torch.isinf(scores[0, END]) == (not is_end)
        assert not is_end or torch.isfinite(scores).sum() == 1


def test_every_token_that_ends_an_answer_may_end_it(tokenizer):
    processor = constraint(tokenizer, response_schema={"enum": [1]}, eos_token_ids=[2, 4, 4])
    processor(torch.tensor([[5]]), torch.zeros(1, len(tokenizer)))
    scores = processor(torch.tensor([[5, *tokenizer("1").input_ids]]), torch.zeros(1, len(tokenizer)))
    assert torch.isfinite(scores[0]).nonzero()[:, 0].tolist() == [2, 4]


def test_scores_of_no_token_are_never_chosen(tokenizer):
    written = write(constraint(tokenizer, response_schema=PERSON), tokenizer, vocab_size=len(tokenizer) + 700)
    assert max(written) < len(tokenizer)


def test_special_tokens_are_no_part_of_strings(tokenizer):
    processor = constraint(tokenizer, response_schema={"type": "string"})
    processor(torch.tensor([[5]]), torch.zeros(1, len(tokenizer)))
    scores = processor(torch.tensor([[5, *tokenizer('"a').input_ids]]), torch.zeros(1, len(tokenizer)))
    assert torch.isinf(scores[0, :5]).all()


# Calls


@pytest.mark.parametrize("choice", ["required", "look_down"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_any_model_makes_a_call_that_must_be_made(template, choice):
    control = ("<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[TOOL_RESULTS]")
    made = byte_level(TEMPLATES[template], control)
    names = set()
    for seed in range(8):
        written = write(constraint(made, tools=SHORT_TOOLS, tool_choice=choice), made, seed)
        shown = made.decode(written)
        left, calls = parse_tool_calls(shown, SHORT_TOOLS, special_tokens=made.all_special_tokens)
        assert (left, len(calls)) == ("", 1)
        assert meets(calls[0].arguments, closed(SHORT_TOOLS[0]["function"]["parameters"]))
        names.add(calls[0].name)
        if template == "mistral":
            assert written[0] == made.convert_tokens_to_ids("[TOOL_CALLS]")
        elif template in ("llama31", "chatml"):
            assert shown.startswith('{"name": ' if template == "llama31" else "<tool_call>\n")
    assert names == ({"look_up", "look_down"} if choice == "required" else {"look_down"})


def test_a_tool_without_parameters_is_called_without_arguments(tokenizer):
    tools = [*SHORT_TOOLS, {"name": "now"}]
    written = write(constraint(tokenizer, tools=tools, tool_choice="now"), tokenizer)
    assert text(tokenizer, written) == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def test_an_answer_with_a_schema_leaves_room_for_a_call(tokenizer):
    kinds = set()
    for seed in range(12):
        processor = constraint(tokenizer, response_schema=PERSON, tools=SHORT_TOOLS)
        written = text(tokenizer, write(processor, tokenizer, seed))
        left, calls = parse_tool_calls(written, SHORT_TOOLS)
        kinds.add(bool(calls))
        assert left == "" if calls else meets(json.loads(left), PERSON)
    assert kinds == {True, False}


@pytest.mark.parametrize("seed", range(6))
def test_a_call_that_must_be_made_is_made_whatever_the_schema_of_answers(seed, tokenizer):
    processor = constraint(tokenizer, response_schema=PERSON, tools=SHORT_TOOLS, tool_choice="required")
    written = text(tokenizer, write(processor, tokenizer, seed))
    assert len(parse_tool_calls(written, SHORT_TOOLS)[1]) == 1


@pytest.mark.parametrize("tools", [(), SHORT_TOOLS])
def test_without_a_schema_anything_may_be_written_unless_a_tool_must_be_called(tools, tokenizer):
    assert constraint(tokenizer, tools=tools) is None
    assert constraint(tokenizer, tools=tools, tool_choice="none") is None
    processor = constraint(tokenizer, tools=tools, tool_choice="none", response_schema={"enum": [1]})
    assert text(tokenizer, write(processor, tokenizer)) == "1"


# Rows


@pytest.fixture(scope="module")
def network():
    return architectures.build("Llama", {"num_hidden_layers": 1, "max_position_embeddings": 512})


def generate(network, processor, prompts, **options):
    """Return the new tokens of each row."""
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": 200, "pad_token_id": 0, "eos_token_id": END, "do_sample": False, **options}
    processors = LogitsProcessorList([] if processor is None else [processor])
    sequences = network.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **options
    )
    return [row[ids.shape[1] :].tolist() for row in sequences]


PROMPTS = [[65, 66, 67, 68], [70, 71, 72, 73], [80, 81, 82, 83]]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20, "top_p": 0.9}])
def test_rows_of_a_batch_go_on_each_in_its_own_grammar(options, network, tokenizer):
    torch.manual_seed(0)
    made = [
        constraint(tokenizer, response_schema=PERSON),
        None,
        constraint(tokenizer, tools=SHORT_TOOLS, tool_choice="look_up"),
    ]
    rows = generate(network, joined(made), PROMPTS, **options)
    assert meets(json.loads(text(tokenizer, rows[0])), PERSON)
    assert parse_tool_calls(text(tokenizer, rows[2]), [])[1][0].name == "look_up"
    if not options:
        assert rows[1][:20] == generate(network, None, PROMPTS[1:2], max_new_tokens=20)[0]
        for index in (0, 2):
            alone = joined([made[index]])
            [expected] = generate(network, alone, PROMPTS[index : index + 1])
            assert rows[index][: len(expected)] == expected


def test_one_constraint_holds_for_all_rows(network, tokenizer):
    rows = generate(network, constraint(tokenizer, response_schema=PERSON), PROMPTS)
    assert all(meets(json.loads(text(tokenizer, row)), PERSON) for row in rows)


def test_without_constraints_nothing_is_joined():
    assert joined([None, None]) is None
    assert joined([]) is None


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_stay_in_the_grammar_of_their_prompt(num_beams, network, tokenizer):
    both = joined(
        [constraint(tokenizer, response_schema=schema) for schema in (PERSON, {"enum": ["abc", 12]})]
    )
    first, second = generate(network, both, PROMPTS[:2], num_beams=num_beams)
    assert meets(json.loads(text(tokenizer, first)), PERSON)
    assert json.loads(text(tokenizer, second)) in ("abc", 12)


@pytest.mark.parametrize("num_guessed", [1, 4, 10])
def test_guessed_tokens_change_nothing(num_guessed, network, tokenizer):
    # The prompt holds what will be written, half right, so that guesses are taken and given up.
    schema = {"type": "array", "items": {"enum": [True, False]}, "minItems": 12, "maxItems": 12}
    shown = tokenizer(f"{json.dumps([True, False] * 3 + [False, True])}, true, 12]").input_ids
    [plain] = generate(network, constraint(tokenizer, response_schema=schema), [shown])
    made = constraint(tokenizer, response_schema=schema)
    [guessed] = generate(network, made, [shown], prompt_lookup_num_tokens=num_guessed)
    assert guessed == plain
    assert len(json.loads(text(tokenizer, plain))) == 12


def test_a_guess_that_breaks_the_grammar_is_given_up_and_not_followed(tokenizer):
    processor = constraint(tokenizer, response_schema={"enum": ["abc", "abd"]})
    free = torch.zeros(1, len(tokenizer))

    def allowed(*token_ids):
        return torch.isfinite(processor(torch.tensor([[5, *token_ids]]), free)[0]).nonzero()[:, 0].tolist()

    quote, a, b, c, d, x = (tokenizer(letter).input_ids[0] for letter in '"abcdx')
    assert allowed() == [quote]
    assert allowed(quote, a) == [b]
    assert len(allowed(quote, a, x)) == len(tokenizer)
    assert len(allowed(quote, a, x, x, x)) == len(tokenizer)
    assert sorted(allowed(quote, a, b)) == sorted([c, d])
    assert allowed(quote, a, b, c, quote) == [END]
    assert allowed(quote, a, b, c, quote, END) == [END]
    assert allowed(quote, a, b, c, quote, END, 0, 0) == [END]
    assert allowed(quote, a, b, d) == [quote]
    assert allowed() == [quote]


def test_where_others_leave_nothing_the_grammar_decides(network, tokenizer):
    schema = {"enum": [12]}
    [row] = generate(network, constraint(tokenizer, response_schema=schema), PROMPTS[:1], min_new_tokens=30)
    assert text(tokenizer, row[:3]) == "12"
    torch.manual_seed(0)
    never = [[tokenizer("1").input_ids[0]]]
    made = constraint(tokenizer, response_schema=schema)
    [row] = generate(network, made, PROMPTS[:1], bad_words_ids=never, do_sample=True)
    assert text(tokenizer, row) == "12"


def test_a_grammar_that_cannot_be_followed_any_further_is_an_input_error(tokenizer):
    made = constraint(tokenizer, response_schema=PERSON)
    made.matchers[0].consume_token(5)
    with pytest.raises(InvalidInputError, match="cannot be kept to its schema"):
        joined([made])(torch.tensor([[5]]), torch.zeros(1, len(tokenizer)))


# What is asked for


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"$ref": "#/$defs/nowhere"},
        {"enum": []},
    ],
)
def test_a_schema_that_cannot_be_followed_is_an_input_error(schema, tokenizer):
    with pytest.raises(InvalidInputError, match=r"schema .* cannot be followed"):
        constraint(tokenizer, response_schema=schema)
    tools = [{"name": "a", "parameters": {"properties": {"b": schema}, "required": ["b"]}}]
    with pytest.raises(InvalidInputError, match=r"schema .* cannot be followed"):
        constraint(tokenizer, tools=tools, tool_choice="a")


@pytest.mark.parametrize(
    ("tools", "choice", "known"),
    [(SHORT_TOOLS, "fly", r"\['look_down', 'look_up'\]"), ((), "required", r"\[\]"), ((), "fly", r"\[\]")],
)
def test_a_tool_that_is_not_there_cannot_be_chosen(tools, choice, known, tokenizer):
    with pytest.raises(InvalidInputError, match=f"tool_choice is '{choice}', but the tools are {known}"):
        constraint(tokenizer, tools=tools, tool_choice=choice)


def test_a_tokenizer_that_cannot_be_looked_through_is_an_input_error():
    class Slow:
        pass

    with pytest.raises(InvalidInputError, match=r"a Slow .*; use a fast one"):
        constraint(Slow(), response_schema=PERSON)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"rag_blockcache\[structured\]"):
        constraint(byte_level(), response_schema=PERSON)
    assert constraint(byte_level()) is None


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 3}, "uniqueItems"),
        ({"type": "string", "pattern": "^(?=a)b$", "maxLength": 4}, r"(?=a)b"),
        ({"type": "string", "format": "riddle", "maxLength": 4}, "riddle"),
    ],
)
def test_what_is_left_to_chance_is_said(schema, complaint, caplog):
    made = byte_level()
    with caplog.at_level(logging.WARNING, logger="rag_blockcache"):
        json.loads(text(made, write(constraint(made, response_schema=schema), made)))
    assert complaint in caplog.text


def test_a_pattern_is_followed(tokenizer):
    schema = {"type": "string", "pattern": "^[a-c]{3}-[0-9]$"}
    written = json.loads(text(tokenizer, write(constraint(tokenizer, response_schema=schema), tokenizer)))
    assert len(written) == 5
    assert set(written[:3]) <= set("abc")


def test_a_vocabulary_is_looked_through_once_and_a_grammar_made_once(monkeypatch):
    from llguidance import hf

    made, num_made = byte_level(), []
    original = hf.from_tokenizer
    monkeypatch.setattr(
        hf, "from_tokenizer", lambda *given, **options: num_made.append(1) or original(*given, **options)
    )
    first, second = (constraint(made, response_schema=PERSON) for _ in range(2))
    assert first.matchers[0] is second.matchers[0]
    constraint(made, response_schema={"enum": [1]})
    assert len(num_made) == 1
    assert text(made, write(first, made, 1)) == text(made, write(second, made, 1))


def test_what_is_known_of_a_tokenizer_goes_with_it():
    made = byte_level()
    constraint(made, response_schema=PERSON)
    gc.collect()
    num_known = len(structured._vocabularies)
    del made
    gc.collect()
    assert len(structured._vocabularies) == num_known - 1


# Schemas as they are meant


def test_objects_have_no_properties_but_those_listed():
    inner = {"properties": {"b": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {"a": inner, "properties": {"type": "array", "items": inner}},
        "$defs": {"c": {"anyOf": [inner, True, {"additionalProperties": inner}]}},
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {"a": shut, "properties": {"type": "array", "items": shut}},
        "$defs": {"c": {"anyOf": [shut, True, {"additionalProperties": shut}]}},
        "additionalProperties": False,
    }
    assert "additionalProperties" not in schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"required": ["a"]}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}},
        {"properties": {"a": {"properties": {"b": {}}, "if": {}}}},
    ],
)
def test_objects_that_are_open_or_put_together_stay_as_they_are(schema):
    assert closed(schema) == schema


def test_a_schema_that_is_put_together_can_still_be_followed(tokenizer):
    part = {"type": "object", "required": ["a"], "properties": {"a": {"enum": [1]}}}
    other = {"type": "object", "required": ["b"], "properties": {"b": {"enum": [2]}}}
    schema = {"allOf": [part, other], "maxProperties": 2}
    processor = constraint(tokenizer, response_schema=schema)
    wanted = tokenizer('{"a": 1, "b": 2}').input_ids
    for num_tokens, token in enumerate(wanted):
        scores = processor(torch.tensor([[5, *wanted[:num_tokens]]]), torch.zeros(1, len(tokenizer)))
        assert torch.isfinite(scores[0, token])


def test_patterns_are_left_out_wherever_they_stand():
    schema = {"properties": {"pattern": {"pattern": "a", "items": {"pattern": "b"}}}, "pattern": "b"}
    assert without_patterns(schema, lambda pattern: pattern == "a") == {
        "properties": {"pattern": {"pattern": "a", "items": {}}}
    }


# A model with a mind


@pytest.mark.real_weights
def test_a_real_model_answers_by_schema_and_calls_tools(smollm2_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rag_blockcache.chat_template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    network = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16)
    template = ChatTemplate(tokenizer)

    def answer(question, tools=(), **wanted):
        prompt = template.render([{"role": "user", "content": question}], tools=tools)
        processor = constraint(tokenizer, tools=tools, **wanted)
        [row] = generate(network, processor, [tokenizer(prompt).input_ids], max_new_tokens=80, pad_token_id=2)
        return tokenizer.decode(row)

    written = answer(
        "Ada is 36 years old and in a good mood. Extract her name, age and mood.", response_schema=PERSON
    )
    assert json.loads(written.removesuffix("<|im_end|>")) == {"name": "Ada", "age": 36, "mood": "good"}
    written = answer("Look up the word mill.", TOOLS, tool_choice="look_up")
    left, [call] = parse_tool_calls(written, TOOLS, special_tokens=tokenizer.all_special_tokens)
    assert (left, call.name, call.arguments) == ("", "look_up", {"word": "mill"})
