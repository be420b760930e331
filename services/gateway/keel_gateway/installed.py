"""What is installed, held against what the distributions ask for and what was tested together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTIONS = ("keel-rl", "keel-gateway", "keel-rollout[torch]", "keel-trainer")
"""What `keel up` and `keel run` need on one machine."""
CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
"""Of a checkout; an installed wheel has none."""


def lacks(distribution: str) -> list[str]:
    """What a distribution, with its extras, asks for and does not find; itself, if it is missing.

    Example:
        lacks("keel-rollout[torch]") == ["transformers<6,>=5.19 (4.57.0 is installed)"]
    """
    wanted = Requirement(distribution)
    try:
        texts = requires(wanted.name) or []
    except PackageNotFoundError:
        return [f"{wanted.name} (not installed)"]
    found = []
    for text in texts:
        asked = Requirement(text)
        extras = wanted.extras or {""}
        if asked.marker and not any(asked.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            there = version(asked.name)
        except PackageNotFoundError:
            found.append(f"{asked.name}{asked.specifier} (not installed)")
            continue
        if not asked.specifier.contains(there, prereleases=True):
            found.append(f"{asked.name}{asked.specifier} ({there} is installed)")
    return found


def untested(constraints: Path = CONSTRAINTS) -> list[str] | None:
    """Installed packages of another version than the one tested; None without a constraints file.

    Example:
        ["rich 14.0.0 (tested: 15.0.0)"]
    """
    if not constraints.is_file():
        return None
    found = []
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, equals, tested = line.partition("#")[0].strip().partition("==")
        if not equals:
            continue
        try:
            there = version(name)
        except PackageNotFoundError:  # a tool that this environment does without
            continue
        if Version(there).public != Version(tested).public:
            found.append(f"{name} {there} (tested: {tested})")
    return found
