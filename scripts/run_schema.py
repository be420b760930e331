"""Writes docs/run-schema.md from keel.spec. `--check` fails if the committed page differs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from keel.spec import EvaluationSet, RunSpec, VerifierSpec

PAGE = Path(__file__).parents[1] / "docs" / "run-schema.md"

TABLES: dict[str, dict[str, type[BaseModel]]] = {
    "task": {"verifier": VerifierSpec},
    "evaluation": {"sets": EvaluationSet},
}
"""Lists of tables within a section."""

HEAD = """# The run schema

One schema, three uses: job file (TOML), body of `POST /v1/jobs` (JSON), the trainer's input.
Unknown keys are errors. Defaults are the paper's (arXiv 2512.01374) where it states them.

*Generated from `keel.spec` by `scripts/run_schema.py`; do not edit.*
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## Top level\n", *_table(_own_fields())]
    for name, field in RunSpec.model_fields.items():
        section = field.annotation
        if _is_section(field):
            assert section is not None
            _, _, what = (section.__doc__ or "").partition(": ")
            parts += [f"\n## [{name}]\n", f"{what[:1].upper()}{what[1:]}\n"]
            parts += _table(section.model_fields)  # type: ignore[attr-defined]
            for key, table in TABLES.get(name, {}).items():
                _, _, what = (table.__doc__ or "").partition(": ")
                parts += [f"\n### [[{name}.{key}]]\n", f"{what[:1].upper()}{what[1:]}\n"]
                parts += _table(table.model_fields)
    return "\n".join(parts) + "\n"


def _own_fields() -> dict[str, FieldInfo]:
    return {name: field for name, field in RunSpec.model_fields.items() if not _is_section(field)}


def _is_section(field: FieldInfo) -> bool:
    return hasattr(field.annotation, "model_fields")


def _table(fields: dict[str, FieldInfo]) -> list[str]:
    rows = ["| key | default | valid | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        default = "none"
        if field.is_required() or field.default is not None:
            default = "required" if field.is_required() else f"`{_toml(field.default)}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        meaning = re.sub(r"docs/([a-z-]+\.md)", r"[docs/\1](\1)", meaning)
        rows.append(f"| `{name}` | {default} | {_valid(field)} | {meaning} |")
    return rows


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return f"[{', '.join(map(str, value))}]"
        case _:
            return str(value)


def _valid(field: FieldInfo) -> str:
    """What the JSON schema says of the value."""
    schema = _schemas()[id(field)]
    options = schema.get("anyOf", [schema])
    return " or ".join(_one(option) for option in options)


def _one(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{_toml(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_toml(schema['const'])}`"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    if "pattern" in schema:
        bounds.append(f"`{schema['pattern']}`".replace("|", "\\|"))
    kind = {"array": "list", "null": "none"}.get(schema["type"], schema["type"])
    return " ".join([kind, ", ".join(bounds)]).strip()


def _schemas() -> dict[int, dict[str, Any]]:
    """JSON schema of every field, by the field's id."""
    whole = RunSpec.model_json_schema()
    found = {}
    for name, field in RunSpec.model_fields.items():
        if _is_section(field):
            assert field.annotation is not None
            definition = whole["$defs"][field.annotation.__name__]
            for key, inner in field.annotation.model_fields.items():  # type: ignore[attr-defined]
                found[id(inner)] = definition["properties"][key]
        else:
            found[id(field)] = whole["properties"][name]
    for tables in TABLES.values():
        for table in tables.values():
            properties = whole["$defs"][table.__name__]["properties"]
            found |= {id(inner): properties[key] for key, inner in table.model_fields.items()}
    return found


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/run-schema.md is not what keel.spec says: run make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")
