"""What the docs site adds to Markdown: two kinds of code fences.

```math     LaTeX, drawn by the browser from MathML: no script, no font, nothing fetched.
```source   "path.py: name": that function, class or constant, as it stands in the tree.

Neither can be stale: a formula that does not parse and a name that is gone end the build.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(math|source)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its fences replaced; called by the site builder before rendering."""
    return _FENCE.sub(
        lambda fence: {"math": _math, "source": _source}[fence[1]](fence[2]), markdown
    )


def _math(latex: str) -> str:
    drawn = convert(latex, display="block")
    if "\\" in drawn:  # the converter lets commands through that it does not know
        raise ValueError(f"a command in this formula is not known: {latex}")
    return f'<div class="math">{drawn}</div>'


def _source(place: str) -> str:
    path, _, name = place.partition(": ")
    code = definition((ROOT / path).read_text(encoding="utf-8"), name)
    return f'```python title="{place}"\n{code}\n```'


def definition(module: str, name: str) -> str:
    """The source of the top-level `name` in a module's text. LookupError: there is none."""
    for node in ast.parse(module).body:
        match node:
            case ast.FunctionDef(name=found, decorator_list=above):
                pass
            case ast.ClassDef(name=found, decorator_list=above):
                pass
            case (
                ast.Assign(targets=[ast.Name(id=found)]) | ast.AnnAssign(target=ast.Name(id=found))
            ):
                above = []
            case _:
                continue
        if found == name:
            first = min([node.lineno, *(decorator.lineno for decorator in above)])
            return "\n".join(module.splitlines()[first - 1 : node.end_lineno])
    raise LookupError(f"no function, class or constant {name!r} at the top level")
