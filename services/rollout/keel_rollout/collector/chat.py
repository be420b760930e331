"""Chat messages to a prompt, by the model's chat template, as transformers renders it.

What differs, on purpose: `strftime_now` does not exist, since a prompt that holds today's date
would make a run depend on its day. Templates that ask whether it is defined (Llama 3.2) take their
fixed date; one that calls it unasked is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from keel.errors import InvalidField, KeelError, ModelError
from keel.spec import is_template

Message = Mapping[str, Any]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFault(KeelError):
    """The template does not take these messages; the message is the template's. Its job's owner
    can mend one of them."""


class ChatTemplate:
    """A compiled chat template.

    Example:
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "hi"}])
        -> "hi"
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            special_tokens: what the template sees as bos_token, eos_token and so on.

        Raises:
            InvalidField: it is no Jinja template.
        """
        self.source, self._special_tokens = source, special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidField(
                "model.chat_template", source, f"a Jinja template (line {error.lineno}: {error})"
            ) from error

    @classmethod
    def from_artifact(cls, folder: Path, given: str | None) -> Self | None:
        """The job's own template (text or path), else the model folder's, or None without one.

        Raises:
            InvalidField: the job's path cannot be read.
            ModelError: the folder has several templates, and none is the default.
        """
        config = _json(folder / "tokenizer_config.json")
        source = _template_of(folder, config) if given is None else _given(given)
        if source is None:
            return None
        named = _json(folder / "special_tokens_map.json") | config
        tokens = {name: _token(named.get(name)) for name in _SPECIAL}
        return cls(source, {name: token for name, token in tokens.items() if token is not None})

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, up to where the model's answer begins.

        Raises:
            TemplateFault: the template refuses them, or calls what is not there.
        """
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program, and fails like one
            why = f"{error}"
            if "strftime_now" in why:
                why += " (Keel has none: a prompt with today's date would not be the same tomorrow)"
            raise TemplateFault(why) from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # templates come with models, from anywhere: nothing that reaches into Python
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Dict:
    """The global `dict` without the class behind it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """The global `namespace` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: {name!r} is not allowed")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _with_reasoning(message: Message) -> Message:
    """Reasoning under the names that templates read, as transformers does."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _given(given: str) -> str:
    if is_template(given):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            "model.chat_template", given, f"a file that the collector can read ({error})"
        ) from error


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, an older form
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ModelError(
                f"artifact: {str(folder)!r} has the chat templates {', '.join(sorted(named))} and "
                "none of them is the default; valid: model.chat_template in the job"
            )
        return str(named["default"])
    return template


def _token(entry: Any) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data
