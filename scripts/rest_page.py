"""Writes docs/openapi.json and docs/rest-reference.md. `--check` fails if they differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from keel_gateway.app import create_app
from keel_gateway.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """# REST reference

Every route of the gateway, what it takes and what it answers with. The same for programs:
[openapi.json](openapi.json), which a running gateway also serves at `/openapi.json`. How to use
them: [REST](rest.md).

*Generated from the application by `scripts/rest_page.py`; do not edit.*
"""

ELSEWHERE = {"RunSpec": "run-schema.md"}
"""Schemas with a page of their own; what only they use is there too."""

Schema = dict[str, Any]


def openapi() -> Schema:
    """What /openapi.json serves."""
    return create_app(
        Settings(host="127.0.0.1", port=8080, redis_url="redis://127.0.0.1")
    ).openapi()


def page(api: Schema) -> str:
    """The whole page: routes, then the schemas that they use."""
    parts = [HEAD, "## Routes\n"]
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            parts += _route(method, path, route)
    parts += ["## Schemas\n"]
    schemas = api["components"]["schemas"]
    for name in sorted(_reachable(api["paths"], schemas)):
        parts += _schema(name, schemas[name])
    return "\n".join(parts)


def _route(method: str, path: str, route: Schema) -> list[str]:
    lines = [f"### `{method.upper()} {path}`\n", f"**{route['summary']}**\n"]
    if route.get("description"):
        lines += [f"{route['description'].strip()}\n"]
    if route.get("parameters"):
        lines += [
            "| parameter | in | type | default | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        for parameter in route["parameters"]:
            schema = parameter["schema"]
            default = "required" if parameter["required"] else _default(schema)
            said = _cell(parameter.get("description") or schema.get("description") or "")
            cells = [f"`{parameter['name']}`", parameter["in"], _type(schema), default, said]
            lines += [f"| {' | '.join(cells)} |"]
        lines += [""]
    if "requestBody" in route:
        bodies = (
            f"`{kind}`: {_body(body)}" for kind, body in route["requestBody"]["content"].items()
        )
        lines += [f"Body: {'; '.join(bodies)}.\n"]
    lines += ["| status | answer |", "| --- | --- |"]
    for status, answer in route["responses"].items():
        kinds = (f"{_body(body)} as `{kind}`" for kind, body in answer.get("content", {}).items())
        lines += [f"| {status} | {'; '.join([_cell(answer['description']).rstrip('.'), *kinds])} |"]
    return [*lines, ""]


def _schema(name: str, schema: Schema) -> list[str]:
    lines = [f"### {name}\n", f"{schema.get('description', '').strip()}\n"]
    if "enum" in schema:
        return [*lines, f"One of {', '.join(f'`{value}`' for value in schema['enum'])}.\n"]
    lines += ["| key | type | meaning |", "| --- | --- | --- |"]
    for key, value in schema.get("properties", {}).items():
        lines += [f"| `{key}` | {_type(value)} | {_cell(value.get('description', ''))} |"]
    return [*lines, ""]


def _body(body: Schema) -> str:
    return _type(body["schema"]) if body.get("schema") else "anything"


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}]({ELSEWHERE.get(name, '#' + name.lower())})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_type(option) for option in schema[key])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_inner(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_inner(schema['additionalProperties'])}"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", ">="), ("maximum", "<="), ("maxLength", "length <="))
        if key in schema
    ]
    form = f" ({schema['format']})" if "format" in schema else ""
    return " ".join([kind + form, ", ".join(bounds)]).strip()


def _inner(schema: Schema) -> str:
    return f"({_type(schema)})" if "anyOf" in schema else _type(schema)


def _default(schema: Schema) -> str:
    return f"`{json.dumps(schema['default'])}`" if schema.get("default") is not None else ""


def _cell(text: str) -> str:
    """The first paragraph as one line of a table; the list of metric columns has a page."""
    line = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
    return line.replace("Columns:", "Columns: [metrics](metrics.md).")


def _reachable(start: Any, schemas: Schema) -> set[str]:
    """Names of schemas that something refers to, without those that have a page of their own."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        match waiting.pop():
            case {"$ref": str(reference)}:
                name = reference.rpartition("/")[2]
                if name not in found and name not in ELSEWHERE:
                    found.add(name)
                    waiting.append(schemas[name])
            case dict(inner):
                waiting += inner.values()
            case list(inner):
                waiting += inner
    return found


if __name__ == "__main__":
    api = openapi()
    wanted = {
        DOCS / "openapi.json": json.dumps(api, indent=1, ensure_ascii=False) + "\n",
        DOCS / "rest-reference.md": page(api),
    }
    if sys.argv[1:] == ["--check"]:
        for file, text in wanted.items():
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                sys.exit(f"docs/{file.name} is not what the gateway says: run make docs")
    else:
        for file, text in wanted.items():
            file.write_text(text, encoding="utf-8")
