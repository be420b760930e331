"""Chat templates: the same text as transformers makes of them; the tokens that end a turn."""

# templates stand as they do in the wild
# ruff: noqa: E501
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collector_peers import make_artifact, make_tokenizer
from transformers import PreTrainedTokenizerFast

from keel.errors import DatasetError, InvalidField, ModelError
from keel.presets import END
from keel_rollout.collector.chat import ChatTemplate, TemplateFault
from keel_rollout.collector.tasks.base import Problem
from keel_rollout.collector.text import TextCodec

CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is defined else '' %}
        {%- if '</think>' in message.content %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning and loop.index0 > ns.last - 2 %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- elif message.role == "tool" %}
        {{- '<tool_response>' + message.content | tojson + '</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""

LOOPS = """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
  {{ message.role | upper }}: {{ message | tojson(indent=2) }}
{% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{{ dict(a=1).a }}{{ dict.fromkeys(['x']) | length }}{{ eos_token }}
"""

USER = {"role": "user", "content": "  What is 1/2 < 3 & caf\u00e9?\n"}
SYSTEM = {"role": "system", "content": "Be <brief>."}
TURN = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes", "thinking": "so"}
CHATS = {
    "one question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, TURN, {"role": "user", "content": "Sure?"}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": END, "pad_token": "<pad>"}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL, LOOPS])
def test_it_renders_what_transformers_renders(template: str, chat: str) -> None:
    """transformers gives Llama's date; here the template takes the one that it keeps for this."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **SPECIAL)
    expected = theirs.apply_chat_template(
        CHATS[chat],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
        **({"date_string": "26 Jul 2024"} if template == LLAMA_3 else {}),
    )
    assert len(expected) > 30
    assert ChatTemplate(template, SPECIAL).render(CHATS[chat]) == expected


def test_a_template_that_asks_for_the_date_unasked_is_refused() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    with pytest.raises(
        TemplateFault, match=r"'strftime_now' is undefined .Keel has none: a prompt"
    ):
        template.render([USER])


def test_what_a_template_raises_is_told() -> None:
    with pytest.raises(TemplateFault, match="roles must alternate"):
        ChatTemplate(MISTRAL, SPECIAL).render([USER, USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__init__.__globals__ }}",
    ],
)
def test_a_template_does_not_reach_into_python(source: str) -> None:
    with pytest.raises(TemplateFault):
        ChatTemplate(source, {}).render([USER])


def test_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(InvalidField, match=r"model.chat_template: .* a Jinja template .line 2:"):
        ChatTemplate("{{ x }}\n{% if %}", {})


def artifact(folder: Path, **files: Any) -> Path:
    make_artifact(folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = ".jinja" if name == "chat_template" else ".json"
        (folder / f"{name}{suffix}").write_text(text)
    return folder


def rendered(folder: Path, given: str | None = None) -> str | None:
    template = ChatTemplate.from_artifact(folder, given)
    return template and template.render([USER])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    """The job's own first, then chat_template.jinja, then tokenizer_config.json; text or path."""
    config = {"chat_template": "{{ 'config' }}", "eos_token": {"content": "<e>", "lstrip": False}}
    folder = artifact(tmp_path / "a", tokenizer_config=config)
    assert rendered(folder) == "config"
    assert rendered(folder, "{{ eos_token }}") == "<e>"
    artifact(folder, chat_template="{{ 'file' }}")
    assert rendered(folder) == "file"
    own = tmp_path / "own.jinja"
    own.write_text("{{ 'own' }}")
    assert rendered(folder, str(own)) == "own"
    assert rendered(artifact(tmp_path / "b")) is None
    with pytest.raises(
        InvalidField, match=r"model.chat_template: .* a file that the collector can"
    ):
        rendered(folder, str(tmp_path / "no.jinja"))


def test_several_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "{{ 'r' }}"}, {"name": "default", "template": "{{ 'd' }}"}]
    folder = artifact(tmp_path / "a", tokenizer_config={"chat_template": named})
    assert rendered(folder) == "d"
    artifact(folder, tokenizer_config={"chat_template": named[:1]})
    with pytest.raises(ModelError, match="has the chat templates rag and none of them is the"):
        rendered(folder)


@pytest.mark.parametrize(
    ("files", "end_ids"),
    [
        ({"tokenizer_config": {"eos_token": "7"}}, (1, 9)),
        ({"generation_config": {"eos_token_id": [1, 5, 6]}}, (1, 5, 6)),
        ({"config": {"eos_token_id": 4}, "generation_config": {"eos_token_id": 5}}, (1, 4, 5)),
    ],
)
def test_every_token_that_ends_a_turn_stops_a_response(
    tmp_path: Path, files: dict[str, Any], end_ids: tuple[int, ...]
) -> None:
    """END has id 1, "7" has 9."""
    assert TextCodec.from_artifact(artifact(tmp_path / "a", **files)).end_ids == end_ids


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    text = TextCodec.from_artifact(artifact(tmp_path / "a"))
    with pytest.raises(
        ModelError, match=r"model.chat_template: missing, and task.dataset: /d: line"
    ):
        text.check(Problem([USER], where="task.dataset: /d: line 1"))


def test_roles_that_the_template_refuses_name_their_line(tmp_path: Path) -> None:
    text = TextCodec.from_artifact(artifact(tmp_path / "a"), MISTRAL)
    text.check(Problem([USER], where="task.dataset: /d: line 1"))
    with pytest.raises(DatasetError) as raised:
        text.check(Problem([USER, USER], where="task.dataset: /d: line 2"))
    assert str(raised.value) == (
        "task.dataset: /d: line 2: the chat template does not take roles user, user: After the "
        "optional system message, roles must alternate"
    )


def test_people_read_no_special_tokens(tmp_path: Path) -> None:
    text = TextCodec.from_artifact(artifact(tmp_path / "a"))
    ids_R = np.array([16, 0, 2, 1], np.int32)
    assert (text.response_text(ids_R), text.clean_text(ids_R)) == ("=<pad>0<end>", "=0")
    assert (text.finished(ids_R), text.finished(ids_R[:-1])) == (True, False)
