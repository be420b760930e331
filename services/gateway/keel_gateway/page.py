"""HTML pages that need no network and ask for none: a template of assets/, everything inlined."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

NONE = "-"
"""Stands for a number that there is not."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""The browser itself keeps the page off the network."""


def render(template: str, **values: Any) -> str:
    """The page. All text is escaped, also in the JSON that scripts read; a missing value raises."""
    return _environment().get_template(template).render(values)


def write_page(path: Path, html: str) -> None:
    """Writes a page, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def number(value: float | None, form: str) -> str:
    """A number for people."""
    return NONE if value is None else format(value, form)


def moment(time: datetime) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("keel_gateway", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals |= {"asset": _asset, "content_policy": CONTENT_POLICY}
    return environment


@cache
def _asset(name: str) -> Markup:
    """A style or script of ours (or plotly's), as it is."""
    text = files("keel_gateway").joinpath("assets", name).read_text(encoding="utf-8")
    return Markup(text)
