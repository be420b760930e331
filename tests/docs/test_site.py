"""The docs site: whole, and in need of nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FETCHED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
"""Elements that make a browser fetch something, and where they say what."""


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = ["build", "--strict", "-f", str(source / "mkdocs.yml"), "-d", str(site)]
    return subprocess.run(
        [sys.executable, "-m", "properdocs", *command], capture_output=True, text=True, cwd=source
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    done = build(ROOT, built)
    assert done.returncode == 0, done.stderr
    return built


class Fetches(HTMLParser):
    """What a browser would fetch for a page, and the styles in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return  # only said, never fetched
        if tag in FETCHED and given.get(FETCHED[tag]):
            self.found.append(given[FETCHED[tag]] or "")


def fetched(html: str) -> list[str]:
    parser = Fetches()
    parser.feed(html)
    return [*parser.found, *re.findall(r"(?:@import|url\()\s*['\"]?([^'\")\s]+)", html)]


def elsewhere(references: list[str]) -> list[str]:
    return [r for r in references if re.match(r"(https?:)?//", r)]


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 10
    for page in pages:
        found = fetched(page.read_text(encoding="utf-8"))
        assert len(found) >= 3, "style sheets and scripts: has the theme changed its elements?"
        assert elsewhere(found) == [], page.name
        for reference in found:
            if not reference.startswith(("data:", "#")):
                start = site if reference.startswith("/") else page.parent  # "/": only in 404.html
                assert (start / reference.partition("?")[0].lstrip("/")).exists(), reference
    for sheet in site.rglob("*.css"):
        assert elsewhere(fetched(sheet.read_text(encoding="utf-8"))) == [], sheet.name


def test_what_is_looked_for_would_be_found() -> None:
    page = """<link href="https://a.example/a.css" rel="stylesheet"><script src=//b.example/b.js>
    </script><style>@import "https://c.example/d.css"; i {background: url(http://e.example/f)}
    </style><a href="https://f.example/">only a link</a>"""
    assert len(elsewhere(fetched(page))) == 4


def test_formulas_and_code_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "paper-and-code.html").read_text(encoding="utf-8")
    assert page.count("<math ") >= 5
    # the code is that of the source file, in full
    shown = unescape(re.sub(r"<[^>]+>", "", page))
    source = (ROOT / "services/trainer/keel_trainer/algo/objective.py").read_text(encoding="utf-8")
    assert source[source.index("def clip_masks(") : source.index("return high_T, low_T")] in shown


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("[gone](nowhere.md)\n", "nowhere.md"),
        ("[gone](#no-such-heading)\n", "no-such-heading"),
        ("```source\nscripts/site_hooks.py: no_such_name\n```\n", "no_such_name"),
        ("```math\n\\left( x\n```\n", "Left"),
        ("```math\n\\nosuch\n```\n", "nosuch"),
    ],
)
def test_a_page_that_is_not_whole_fails_the_build(
    tmp_path: Path, page: str, complaint: str
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{page}", encoding="utf-8")
    (tmp_path / "scripts").mkdir()
    for name in ("mkdocs.yml", "scripts/site_hooks.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.partition("\nnav:")[0] + "\n", encoding="utf-8")
    (tmp_path / "docs" / "assets").mkdir()
    for asset in (ROOT / "docs" / "assets").iterdir():
        (tmp_path / "docs" / "assets" / asset.name).write_bytes(asset.read_bytes())
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert complaint in done.stderr


def test_no_page_is_left_out_of_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in index or page.stem == "index", page.name


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link]
    assert inside
    assert [link for link in inside if not (ROOT / link).exists()] == []
