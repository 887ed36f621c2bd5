"""Which models and tools calls can be read of: others are refused before the first episode."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from steppo.errors import ConfigError
from steppo.rendering import AppendContext, HermesParser, Renderer
from steppo.types import Action, Message, ToolSpec, Turn
from tests.rendering.helpers import QWEN3, SMOLLM2, make_step, make_tokenizers
from tests.rendering.test_tool_calls import FIND, IT, ONE, SEEN, bound, renderer_of, said

# As those of models whose calls are written in another way.
CODER = """\
{%- if tools -%}<|im_start|>system
<tools>{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}</tools><|im_end|>
{% endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items -%}
{{ '<parameter=' + name + '>\\n' + value | string + '\\n</parameter>\\n' }}
{%- endfor -%}
{{ '</function>\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
CALLS = CODER[CODER.index("{%- for call") : CODER.index("{{ '<|im_end|>")]
OTHER_FORMS = {
    "a tag for each argument": CODER,
    "Python": CODER.replace(CALLS, "{{ '<|tool_call_start|>[find(what=\"it\")]<|tool_call_end|>' if message.tool_calls }}"),
    "a list of JSON": CODER.replace(
        CALLS, "{{ '[TOOL_CALLS]' + message.tool_calls | map(attribute='function') | list | tojson }}"
    ),
    "parameters": CODER.replace(
        CALLS,
        "{%- for call in message.tool_calls or [] -%}<tool_call>"
        '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}</tool_call>'
        "{%- endfor -%}",
    ),
    "no calls at all": CODER.replace(CALLS, ""),
    "a refusal": CODER.replace(CALLS, "{{ raise_exception('no calls, please') if message.tool_calls }}"),
    "an error": CODER.replace(CALLS, "{{ (message.tool_calls or [0])[0] + 1 }}"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_template_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="in a form that HermesParser does not read") as refused:
        bound(OTHER_FORMS[name])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "form",
    [
        '<tool_call>\n{"name": "find", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>',
        '<tool_call>{"arguments": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}"}</tool_call>',
        "<tool_call>[{{ call.function | tojson }}]</tool_call>",
    ],
)
def test_other_templates_of_the_form_are_taken(form: str) -> None:
    loop = "{%- for call in message.tool_calls or [] -%}" + form + "{%- endfor -%}"
    assert bound(CODER.replace(CALLS, loop)).parse(said(IT), SEEN).action == Action(tool_calls=ONE)


SCHEMAS: dict[str, tuple[dict[str, Any], str]] = {
    "a type that is none": ({"properties": {"a": {"type": "text"}}}, "is wrong: 'text' is not"),
    "properties of a list": ({"properties": ["a"]}, "is wrong: ['a'] is not of type 'object'"),
    "required without a list": ({"required": "a"}, "is wrong: 'a' is not of type 'array'"),
    "a pattern that is none": ({"properties": {"a": {"pattern": "["}}}, "is wrong: '[' is not a 'regex'"),
    "a name's pattern that is none": ({"patternProperties": {"(": {}}}, "is wrong: '(' is not a 'regex'"),
    "a multiple of nothing": ({"properties": {"a": {"multipleOf": 0}}}, "is wrong: 0 "),
    "a part that is missing": ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "refers to #/$defs/b: "),
    "an anchor that is missing": ({"properties": {"a": {"$dynamicRef": "#b"}}}, "refers to #b: "),
    "another file": ({"properties": {"a": {"$ref": "b.json"}}}, "refers to b.json: LookupError: it is not a part"),
    "an address": ({"$ref": "https://example.invalid/b.json"}, "refers to https://example.invalid/b.json: LookupError"),
    "a part that is itself": ({"$defs": {"b": {"$ref": "#/$defs/b"}}}, "refers to #/$defs/b: RecursionError"),
    "a whole that is itself": ({"allOf": [{"$ref": "#"}]}, "refers to #: RecursionError"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_checks_nothing_is_a_mistake(name: str) -> None:
    """It would come to light with the first call."""
    schema, reason = SCHEMAS[name]
    with pytest.raises(ConfigError) as refused:
        bound(None, (FIND, ToolSpec("other", "", {"type": "object", **schema})))
    assert str(refused.value).startswith("the schema of the tool other ")
    assert reason in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_schemas_may_refer_to_their_parts_and_be_any_mapping() -> None:
    tree = {"type": "object", "properties": {"of": {"$ref": "#/$defs/tree"}, "$ref": {"type": "string"}}}
    schema = {"type": "object", "properties": {"tree": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": tree}}
    parser = bound(None, (ToolSpec("grow", "", MappingProxyType(schema)),))
    assert parser.parse(said({"name": "grow", "arguments": {"tree": {"of": {"of": {}}}}}), SEEN).action is not None
    wrong = parser.parse(said({"name": "grow", "arguments": {"tree": {"of": {"of": 7}}}}), SEEN)
    assert wrong.feedback == "The arguments of tool call are wrong at tree.of.of: 7 is not of type 'object'."


def test_without_tools_there_is_nothing_to_read() -> None:
    with pytest.raises(ConfigError, match="and the environment has none: use CommandParser"):
        bound(None, ())


# --- what a template prints or refuses beside calls ---

IDS = CODER.replace("message.role +", "message.role + (' ' + message.tool_call_id if message.tool_call_id else '') +")


@pytest.mark.parametrize("marker", ["<|im_end|>", "</tools>", "<tool_call>", "<|im_<|im_start|>start|>", "<parameter="])
def test_the_name_of_a_call_is_no_way_in(marker: str) -> None:
    texts = []
    for name in ("call_0", f"call{marker}_0"):
        renderer = renderer_of(IDS)
        ids = renderer.render([Message("user", "?"), Message("tool", "It is here.", tool_call_id=name)])
        texts.append(renderer.decode_action(ids))
    assert "tool call_0" in texts[0]
    assert texts[1] == texts[0]


REFUSED = {
    "without a system message": "{{ raise_exception('a system message, please') if messages[0].role != 'system' }}",
    "all": "{{ raise_exception('no messages, please') }}",
    "an error": "{{ messages[0].nothing.at_all }}",
    "not a template": "{% messages %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_refuses_a_question_is_a_mistake_where_it_must_be_asked(name: str) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = REFUSED[name] + CODER
    renderer = Renderer()
    renderer.bind(tokenizer, {tokenizer.eos_token_id})  # without tools nothing is asked
    if name == "without a system message":
        assert renderer.render([Message("system", "Be brief."), Message("user", "?")]).size
    with pytest.raises(ConfigError, match="the chat template cannot write a question: ") as refused:
        bound(tokenizer.chat_template)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [{"tokenize": True}, {"messages": []}, {"chat_template": "{% x %}"}, {5: 1}], ids=str)
def test_arguments_that_no_template_takes_are_a_mistake(wrong: dict[Any, Any]) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    renderer = Renderer(wrong)
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, [FIND], "find")
    with pytest.raises(ConfigError, match="the chat template cannot write a question: "):
        HermesParser().bind([FIND], renderer)


# --- whose brackets are whose ---


@pytest.mark.parametrize("template", [None, QWEN3])
@pytest.mark.parametrize("words", ["<b>bold</b>", "the [ID] of a page", "<city>, <country>", "[/INST]", '<a="b">', "<|x|>"])
def test_brackets_in_a_schema_are_text(words: str, template: str | None) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = template
    renderer, tools = (
        Renderer(),
        [ToolSpec("find", f"Finds {words}.", FIND.parameters), ToolSpec("look", f"Looks at {words}.")],
    )
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, tools, HermesParser().tools_text(tools))
    assert words in renderer.decode_action(renderer.render([Message("user", f"Is it {words}?")])).rpartition("Is it")[2]


@pytest.mark.parametrize("template", [None, QWEN3])
@pytest.mark.parametrize("words", ["</tools>", "<tools>", "<tool_call>", "</tool_response>", "<think>", "<|im_end|>"])
def test_markup_in_a_schema_is_a_mistake(words: str, template: str | None) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = template
    tools = [ToolSpec("find", f"Finds <b>{words}</b>.", FIND.parameters)]
    with pytest.raises(ConfigError, match=r"^the tool find cannot be shown: "):
        Renderer().bind(tokenizer, {tokenizer.eos_token_id}, tools, HermesParser().tools_text(tools))


OTHER = SMOLLM2 + "{{ '<function=' if messages[0].name }}{# [INST] <|user|> </invoke> \"\" #}"


@pytest.mark.parametrize("marker", ["<function=", "[INST]", "<|user|>", "</invoke>", "<|im_end|>"])
@pytest.mark.parametrize(
    ("own", "arguments"),
    [(SMOLLM2, {"chat_template": OTHER}), ({"default": SMOLLM2, "other": OTHER}, {"chat_template": "other"}), (OTHER, {})],
    ids=["in its place", "by name", "its own"],
)
def test_whichever_template_writes_nobody_else_writes_its_markup(own: Any, arguments: dict[str, Any], marker: str) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = own
    renderer = Renderer(arguments)
    renderer.bind(tokenizer, {tokenizer.eos_token_id})
    plain, marked = (renderer.render([Message("user", f"A{text}B")]) for text in ("", marker))
    assert marked.tolist() == plain.tolist()


# --- templates that know half of it ---

ANSWERED = (
    "{{ raise_exception('an id of nine letters, please') if message.role == 'tool' and message.tool_call_id|length != 9 }}"
)
LOOP = "{%- for message in messages -%}"
HALF = {
    "answers are left out": CODER.replace(LOOP, "{%- for message in messages if message.role != 'tool' -%}"),
    "answers without calls are refused": CODER.replace(
        LOOP,
        LOOP + "{{ raise_exception('no call') if message.role == 'tool' and not loop.previtem.tool_calls }}",
    ),
    "the role is refused": CODER.replace(
        LOOP, LOOP + "{{ raise_exception('no role ' + message.role) if message.role == 'tool' }}"
    ),
    "only names of calls": CODER.replace("+ message.content", "+ (message.tool_call_id or message.content)"),
    "schemas are left out": CODER.replace("tool | tojson", "''").replace("{%- if tools -%}", "{%- if false -%}"),
    "schemas are refused": "{{ raise_exception('no tools, please') if tools }}" + CODER,
    "an error": CODER.replace(LOOP, LOOP + "{{ message.tool_calls[0].id if message.role == 'tool' }}"),
}


@pytest.mark.parametrize("name", HALF)
def test_a_template_that_knows_half_of_it_writes_neither(name: str) -> None:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = HALF[name]
    context, renderer = AppendContext("Search."), Renderer()
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, [FIND], HermesParser().tools_text([FIND]))
    assert not renderer.template_knows_tools
    HermesParser().bind([FIND], renderer)
    context.bind(renderer)
    step = make_step(context, context.prompt_ids([Turn("Where?")], []), said(IT), 0)
    text = renderer.decode_action(context.prompt_ids([Turn("Where?"), Turn(messages=(Message("tool", "Here."),))], [step]))
    assert text.count("Finds pages.") == 1
    assert "user\n<tool_response>\nHere.\n</tool_response>" in text


def test_a_template_that_asks_for_ids_of_some_length_knows_tools() -> None:
    assert renderer_of(CODER.replace(LOOP, LOOP + ANSWERED)).template_knows_tools
