"""Chat templates of every kind render every reasonable chat, and what they have no place for is shown too."""

from __future__ import annotations

import json
import re

import pytest
from conftest import CHAT_TEMPLATE
from tokenizers_made_here import INST_TEMPLATE, LLAMA3_TEMPLATE, byte_level

from rag_blockcache.chat_template import ChatTemplate, Marks
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.tool_call_reader import parse_tool_calls
from rag_blockcache.tool_calls import HERMES, CallForm

# Templates like those of well-known models, written here

_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_IF_SAID = "{% if message.content %}\n{{ message.content }}{% endif %}"
QWEN = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ message.content }}\n</tool_response><|im_end|>\n"
    "{% elif message.role == 'system' and loop.first %}"
    "{% elif message.tool_calls %}<|im_start|>assistant"
    f"{_IF_SAID}"
    "{% for call in message.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    f"{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_PROMPT}"
)
LLAMA31 = (  # one call at most, which hides what is said beside it
    "{{ bos_token }}{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}<|im_start|>assistant\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>\n'
    "{% elif message.role == 'tool' %}<|im_start|>ipython\n{{ message.content | tojson }}<|im_end|>\n"
    f"{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_PROMPT}"
)
MISTRAL = (  # strict about turns, about ids, and about the system
    "{{ bos_token }}{% set ns = namespace(index=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% if ns.index % 2 %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if tools and message == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ message.content }}[/INST]"
    "{% elif message.tool_calls %}[TOOL_CALLS][{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids need nine letters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, '
    '"id": "{{ call.id }}"}{{ ", " if not loop.last }}{% endfor %}]{{ eos_token }}'
    "{% elif message.role == 'tool' %}"
    "{% if message.tool_call_id | length != 9 %}{{ raise_exception('ids need nine letters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif message.role == 'assistant' %}{% if ns.index % 2 == 0 %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% set ns.index = ns.index + 1 %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system, strict turns, another name for the assistant
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}<|im_start|>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SILENT_SYSTEM = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
FIRST_SYSTEM = (
    "{% for m in messages[1:] if m.role == 'system' %}{{ raise_exception('begin with system') }}{% endfor %}"
)
JSON_ARGUMENTS = QWEN.replace("call.function.arguments | tojson", "call.function.arguments")
JSON_ONLY = JSON_ARGUMENTS.replace("{{ call.function.arguments }}", "{{ '' + call.function.arguments }}")
FOREIGN = QWEN.replace("<tool_call>", "<|call|>").replace("</tool_call>", "<|/call|>")
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama3": LLAMA3_TEMPLATE,
    "inst": INST_TEMPLATE,
    "qwen": QWEN,
    "llama31": LLAMA31,
    "mistral": MISTRAL,
    "tools with the last message": MISTRAL.replace("message == asked[-1]", "loop.last"),
    "gemma": GEMMA,
    "silent system": SILENT_SYSTEM,
    "first system": FIRST_SYSTEM + CHAT_TEMPLATE,
    "json arguments": JSON_ARGUMENTS,
    "json only": JSON_ONLY,
    "unseen calls": QWEN.replace("elif message.tool_calls", "elif message.content is none"),
    "content beside calls": QWEN.replace(_IF_SAID, "!{{ '' + message.content }}"),
    "foreign calls": FOREIGN,
    "base": None,
}


def parameters(*names):
    properties = {name: {"type": "string"} for name in names}
    return {"type": "object", "properties": properties, "required": list(names)}


def tool(name, *names):
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters(*names)}
    return {"type": "function", "function": function}


TOOLS = [tool("look_up", "word"), tool("now")]


def user(content, **others):
    return {"role": "user", "content": content, **others}


def assistant(content, *names, **others):
    calls = [
        {
            "type": "function",
            "id": f"call-{name}",
            "function": {"name": name, "arguments": {"word": "mill"} if name == "look_up" else {}},
        }
        for name in names
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **others}


def system(content):
    return {"role": "system", "content": content}


def result(content, name="look_up", **others):
    return {"role": "tool", "content": content, "tool_call_id": f"call-{name}", **others}


CHATS = {
    "question": [user("a")],
    "system": [system("s"), user("a")],
    "turns": [system("s"), user("a"), assistant("b"), user("c")],
    "two of the user": [user("a"), user("b")],
    "two of the assistant": [user("a"), assistant("b"), assistant("c"), user("d")],
    "greeting": [assistant("a"), user("b")],
    "system and greeting": [system("s"), assistant("a"), user("b")],
    "assistant last": [user("a"), assistant("b")],
    "system only": [system("s")],
    "system in the middle": [user("a"), assistant("b"), system("s"), user("c")],
    "system last": [system("s"), user("a"), assistant("b"), system("t")],
    "two of the system": [system("s"), system("t"), user("a")],
    "names": [user("a", name="Ada"), assistant("b", name="Bob"), user("c", name="Ada")],
    "no content": [user("a"), assistant(None), user("b")],
}
TOOL_CHATS = {
    "question": [user("a")],
    "system": [system("s"), user("a")],
    "called": [user("a"), assistant(None, "look_up"), result("r")],
    "called with empty content": [user("a"), assistant("", "look_up"), result("r", name="look_up")],
    "said and called": [system("s"), user("a"), assistant("b", "look_up"), result("r")],
    "called twice": [user("a"), assistant(None, "look_up", "now"), result("r"), result("q", "now")],
    "in another order": [user("a"), assistant("b", "look_up", "now"), result("q", "now"), result("r")],
    "again": [user("a"), assistant(None, "look_up"), result("r"), assistant("b", "now"), result("q", "now")],
    "answered": [user("a"), assistant(None, "look_up"), result("r"), assistant("b"), user("c")],
    "no result": [user("a"), assistant(None, "look_up"), user("b")],
    "result without id": [user("a"), assistant(None, "look_up"), {"role": "tool", "content": "r"}],
}


def marked(messages):
    """Put marks into the place of contents, as prompts do."""
    marks = Marks()
    return [{**message, "content": message["content"] and marks.add("")} for message in messages]


def render(template, messages, **options):
    return ChatTemplate(byte_level(TEMPLATES.get(template, template))).render(messages, **options)


def native(template, messages, **options):
    tokenizer = byte_level(TEMPLATES.get(template, template))
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def marks_in(rendered, messages):
    """Return the order in which contents stand in a rendering."""
    places = {m["content"]: rendered.index(m["content"]) for m in messages if m["content"]}
    return sorted(places, key=places.__getitem__)


# Roles


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_chat_is_rendered_whole_and_in_order(template, chat):
    messages = marked(chat)
    rendered = render(template, messages)
    assert marks_in(rendered, messages) == [m["content"] for m in messages if m["content"]]
    assert all(rendered.count(m["content"]) == 1 for m in messages if m["content"])
    assert "None" not in rendered


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("chatml", "two of the user"),
        ("chatml", "two of the assistant"),
        ("chatml", "system in the middle"),
        ("llama3", "system last"),
        ("mistral", "turns"),
        ("gemma", "assistant last"),
        ("qwen", "greeting"),
        ("qwen", "names"),
    ],
)
def test_a_template_has_its_way_with_chats_that_it_takes(template, chat):
    messages = CHATS[chat][1:] if (template, chat) == ("mistral", "turns") else CHATS[chat]
    assert render(template, messages) == native(template, messages)


def test_neighbours_of_one_role_are_merged_where_turns_must_alternate():
    chat = CHATS["two of the assistant"]
    merged = [user("a"), assistant("b\n\nc"), user("d")]
    for template in ("gemma", "mistral"):
        assert render(template, chat) == native(template, merged)


@pytest.mark.parametrize("template", ["gemma", "mistral", "silent system"])
def test_what_the_system_says_goes_to_the_user_where_it_has_no_place(template):
    told = [system("Be brief."), user("a"), assistant("b"), system("Be kind."), user("c")]
    expected = [user("Be brief.\n\na"), assistant("b"), user("Be kind.\n\nc")]
    assert render(template, told) == native(template, expected)


def test_what_the_system_says_first_keeps_its_place_where_only_later_ones_are_refused():
    chat = [system("s"), user("a"), assistant("b"), system("t")]
    expected = native("first system", [*chat[:-1], user("t")])
    assert render("first system", chat) == expected


def test_a_message_of_the_user_stands_before_a_greeting_where_it_must():
    assert render("gemma", CHATS["greeting"]) == native("gemma", [user(""), *CHATS["greeting"]])


def test_a_tokenizer_without_a_template_gets_texts_one_below_the_other():
    assert render("base", [system("s"), user("a")]) == "s\n\na\nAnswer:"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("gemma", [user("a"), {"role": "narrator", "content": "b"}, assistant("c")], "must alternate"),
        ("{{ messages[0].role }}", [user("a"), user("b")], r"leaves out what message 1 says, of role 'user'"),
        ("{{ messages[0].content.parts() }}", [user("a")], "has no attribute"),
        ("{{ raise_exception('got ' ~ messages | length) }}", [user("a"), user("b"), user("c")], "got 3"),
        ("{{ 1 // 0 }}", [user("a")], "refuses these messages"),
        ("chatml", [{"content": "a"}], "has no role"),
    ],
)
def test_what_cannot_be_rendered_is_an_input_error(template, messages, reason):
    with pytest.raises(InvalidInputError, match=reason):
        render(template, messages)


# Tools


@pytest.mark.parametrize("chat", TOOL_CHATS.values(), ids=TOOL_CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_tools_their_calls_and_results_are_always_shown(template, chat):
    messages = marked(chat)
    rendered = render(template, messages, tools=TOOLS)
    assert all(rendered.count(m["content"]) == 1 for m in messages if m["content"])
    assert json.dumps(TOOLS[0], ensure_ascii=False) in rendered
    assert "None" not in rendered
    called = [call["function"]["name"] for message in chat for call in message.get("tool_calls", ())]
    places = [rendered.rindex(f'"name": "{name}"') for name in called]
    assert places == sorted(places)
    assert rendered.count('{"word": "mill"}') == called.count("look_up")


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_are_written_such_that_they_are_read_again(template):
    messages = marked(TOOL_CHATS["called twice"])
    rendered = render(template, messages, tools=TOOLS)
    written = rendered.split(messages[0]["content"])[1].split(messages[-1]["content"])[0]
    written = re.sub(r"^.*?(assistant|model|\[/INST\])(<\|end_header_id\|>)?", "", written, flags=re.DOTALL)
    first = re.sub("<.im_start.>ipython.*?assistant", "", written, flags=re.DOTALL)
    _, calls = parse_tool_calls(first, TOOLS, special_tokens=["<|im_end|>", "<|im_start|>"])
    assert [(call.name, call.arguments) for call in calls] == [("look_up", {"word": "mill"}), ("now", {})]


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("qwen", "said and called"),
        ("qwen", "called twice"),
        ("qwen", "answered"),
        ("llama31", "called"),
        ("llama31", "again"),
    ],
)
def test_a_template_that_knows_tools_has_its_way_with_them(template, chat):
    messages = TOOL_CHATS[chat][:3]
    assert render(template, messages, tools=TOOLS) == native(template, messages, tools=TOOLS)


def test_a_message_that_only_calls_tools_says_nothing():
    rendered = render("content beside calls", TOOL_CHATS["called"], tools=TOOLS)
    expected = [user("a"), assistant("", "look_up"), result("r")]
    assert rendered == native("content beside calls", expected, tools=TOOLS)


def test_arguments_are_given_as_the_template_takes_them():
    for given in ({"word": "mill"}, '{"word": "mill"}'):
        call = {"type": "function", "id": "a", "function": {"name": "look_up", "arguments": given}}
        messages = [user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}, result("r")]
        written = '<tool_call>\n{"name": "look_up", "arguments": {"word": "mill"}}\n</tool_call>'
        for template in ("qwen", "json arguments", "json only", "unseen calls", "chatml"):
            assert written in render(template, messages), template


def test_a_template_with_rules_for_calls_gets_one_by_one_with_ids_as_it_likes():
    rendered = render("llama31", TOOL_CHATS["in another order"], tools=TOOLS)
    apart = [
        user("a"),
        assistant("b"),
        assistant("", "look_up"),
        result("r"),
        assistant("", "now"),
        result("q", "now"),
    ]
    assert rendered == native("llama31", apart, tools=TOOLS)
    unasked = result("s", "never called")
    rendered = render("llama31", [*TOOL_CHATS["in another order"], unasked], tools=TOOLS)
    assert rendered == native("llama31", [*apart, unasked], tools=TOOLS)


@pytest.mark.parametrize("has_ids", [True, False])
def test_a_template_with_rules_for_ids_gets_short_ones_that_fit_together(has_ids):
    asked = [user("a"), assistant(None, "look_up", "now"), result("r"), result("q", "now")]
    again = [assistant(None, "look_up"), result("s"), assistant("b"), user("c"), user("d")]
    chat = json.loads(json.dumps([*asked, *again]))
    if not has_ids:
        for message in chat:
            message.pop("tool_call_id", None)
            for call in message.get("tool_calls", ()):
                call.pop("id")
    called = '{"name": "look_up", "arguments": {"word": "mill"}, "id": "call00000"}'
    other = '{"name": "now", "arguments": {}, "id": "call00001"}'
    assert render("mistral", chat) == (
        f"<s>[INST]a[/INST][TOOL_CALLS][{called}, {other}]</s>"
        '[TOOL_RESULTS]{"content": r, "call_id": "call00000"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": q, "call_id": "call00001"}[/TOOL_RESULTS]'
        f"[TOOL_CALLS][{called.replace('00000', '00002')}]</s>"
        '[TOOL_RESULTS]{"content": s, "call_id": "call00002"}[/TOOL_RESULTS]'
        "b</s>[INST]c\n\nd[/INST]"
    )


def test_results_have_the_names_of_their_calls_where_a_template_needs_ids():
    template = MISTRAL.replace('"call_id"', '"name": "{{ message.name }}", "call_id"')
    rendered = render(template, TOOL_CHATS["in another order"][:1] + TOOL_CHATS["called twice"][1:])
    assert '{"content": r, "name": "look_up", ' in rendered
    assert '{"content": q, "name": "now", ' in rendered


def test_a_template_that_shows_no_tools_gets_them_in_the_message_of_the_system():
    chat = [system("Be brief."), user("a"), assistant("b", "look_up", "now"), result("r"), result("q", "now")]
    rendered = render("chatml", chat, tools=TOOLS)
    first, asked, called, answered, _ = rendered.split("<|im_end|>\n")
    assert first.startswith("<|im_start|>system\nBe brief.\n\n")
    assert "<tools>\n" + "\n".join(json.dumps(tool) for tool in TOOLS) + "\n</tools>\n" in first
    assert asked == "<|im_start|>user\na"
    assert called == (
        '<|im_start|>assistant\nb\n<tool_call>\n{"name": "look_up", "arguments": {"word": "mill"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    assert answered == (
        "<|im_start|>user\n<tool_response>\nr\n</tool_response>\n<tool_response>\nq\n</tool_response>"
    )


def test_a_template_whose_calls_could_not_be_read_is_not_used_for_tools():
    rendered = render("foreign calls", TOOL_CHATS["called"], tools=TOOLS)
    assert "# Tools" in rendered
    assert "<tool_call>" in rendered
    assert "<|call|>" not in rendered


def test_a_template_for_tools_alone_is_used_where_there_are_tools():
    tokenizer = byte_level({"default": CHAT_TEMPLATE, "tool_use": QWEN})
    template = ChatTemplate(tokenizer)
    chat = TOOL_CHATS["called"]
    assert template.render(chat, tools=TOOLS) == native("qwen", chat, tools=TOOLS)
    assert template.render(chat[:1]) == native("chatml", chat[:1])
    assert HERMES.write("look_up", {"word": "mill"}) in template.render(chat)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("qwen", HERMES),
        ("chatml", HERMES),
        ("gemma", HERMES),
        ("foreign calls", HERMES),
        ("base", HERMES),
        ("llama31", CallForm('{"name": "', '", "parameters": ', "}")),
        ("mistral", CallForm('[TOOL_CALLS][{"name": "', '", "arguments": ', ', "id": "probe0001"}]')),
        (QWEN.replace(_PROMPT, _PROMPT.replace("nt\n", "nt\n<think>\n")), HERMES),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_the_form_of_calls_is_that_of_the_template(template, form):
    assert ChatTemplate(byte_level(TEMPLATES.get(template, template))).call_form == form


def test_a_template_is_asked_only_once_what_it_does_with_tools(monkeypatch):
    template = ChatTemplate(byte_level(QWEN))
    template.render(TOOL_CHATS["called"], tools=TOOLS)
    num_renderings = 0
    apply = template._apply

    def count(*given, **options):
        nonlocal num_renderings
        num_renderings += 1
        return apply(*given, **options)

    monkeypatch.setattr(template, "_apply", count)
    template.render(TOOL_CHATS["called"], tools=TOOLS)
    template.render(TOOL_CHATS["answered"], tools=TOOLS)
    assert num_renderings == 2


@pytest.mark.real_weights
def test_a_real_template_that_knows_no_tools_shows_them(smollm2_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    template = ChatTemplate(tokenizer)
    assert template.render(CHATS["two of the user"]) == tokenizer.apply_chat_template(
        CHATS["two of the user"], tokenize=False, add_generation_prompt=True
    )
    messages = marked(TOOL_CHATS["in another order"])
    rendered = template.render(messages, tools=TOOLS)
    assert marks_in(rendered, messages) == [m["content"] for m in messages if m["content"]]
    assert all(json.dumps(tool) in rendered for tool in TOOLS)
    assert HERMES.write("look_up", {"word": "mill"}) in rendered
