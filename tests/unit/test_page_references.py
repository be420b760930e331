"""What the pages say of the code by name is there: every `file.py: name`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "services/trainer/keel_trainer"
PAGES = sorted([ROOT / "README.md", TRAINER / "algo/README.md", *ROOT.glob("docs/*.md")])
# inside backticks, or a line of a ```source block; several names may follow one file
REFERENCE = re.compile(r"(?:`|^)([\w./-]+\.py): ([\w.]+(?:, [\w.]+)*)(?:`|$)", re.MULTILINE)


def _references() -> list[tuple[Path, str, str]]:
    return [
        (page, file, name)
        for page in PAGES
        for file, names in REFERENCE.findall(page.read_text())
        for name in names.split(", ")
    ]


def _resolves(page: Path, file: str, name: str) -> bool:
    # from the page's folder (algo/README.md), the root (docs) or the trainer (README's table)
    tried = (folder / file for folder in (page.parent, ROOT, TRAINER))
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        return False
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = next((node for node in body if part in _defined(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


@pytest.mark.parametrize(("page", "file", "name"), _references(), ids=lambda one: str(one)[-40:])
def test_a_name_that_a_page_gives_is_in_the_code(page: Path, file: str, name: str) -> None:
    assert _resolves(page, file, name), f"{page.relative_to(ROOT)} names {file}: {name}"


def test_references_are_found_and_a_wrong_one_is_seen() -> None:
    pages = {page for page, _, _ in _references()}
    assert {
        ROOT / "README.md",
        TRAINER / "algo/README.md",
        ROOT / "docs/paper-and-code.md",
    } <= pages
    assert _resolves(ROOT / "README.md", "algo/objective.py", "stats_of")
    assert not _resolves(ROOT / "README.md", "algo/objective.py", "_stats")
    assert not _resolves(ROOT / "README.md", "algo/no_such_file.py", "stats_of")
