"""What `recipe.objective` makes of the switches that a job leaves out, and which fit together.

The objective sets defaults; explicit keys win. A spec is resolved once, when it is first read, so a
stored spec shows every value that is used, and reading it again changes nothing.
docs/objectives.md says where each default comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel.spec_recipe import RecipeSpec

DEFAULTS: dict[str, dict[str, Any]] = {
    "minirl": {},
    "grpo": {
        "eps_high": 0.2,
        "is_cap": None,
        "importance_sampling": False,
        "length_norm": True,
        "std_norm": True,
    },
    "cispo": {
        "eps_low": 1.0,
        "eps_high": 4.0,
        "is_cap": None,
        "importance_sampling": False,
        "std_norm": True,
    },
    "dppo": {"is_cap": None},
}
"""Where an objective's defaults differ from those of the fields, which are MiniRL's."""

DIVERGENCE_THRESHOLDS = {"tv": 0.15, "kl": 0.05}
FILTER_BOUNDS = {"icepop": (0.5, 5.0), "sequence": (0.999, 1.001)}

SWITCHES = (
    "eps_low",
    "eps_high",
    "is_cap",
    "importance_sampling",
    "clip",
    "divergence",
    "divergence_threshold",
    "length_norm",
    "std_norm",
    "is_filter",
    "is_filter_low",
    "is_filter_high",
)
"""The keys of [recipe] that an objective gives their meaning."""

_UNUSED = {
    "minirl": ("divergence", "divergence_threshold"),
    "grpo": ("divergence", "divergence_threshold"),
    "cispo": ("divergence", "divergence_threshold"),
    "dppo": ("eps_low", "eps_high"),
}


def resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of [recipe] as given, and those that objective and filter decide, filled in.

    Example:
        resolve({"objective": "dppo", "divergence": "kl"})
        -> {"objective": "dppo", "divergence": "kl", "is_cap": None, "divergence_threshold": 0.05}
    """
    resolved = _of(DEFAULTS, given.get("objective", "minirl"), {}) | dict(given)
    # null means the default too, here: neither a threshold nor a bound can be missing
    if given.get("objective") == "dppo" and resolved.get("divergence_threshold") is None:
        threshold = _of(DIVERGENCE_THRESHOLDS, given.get("divergence", "tv"), None)
        resolved["divergence_threshold"] = threshold
    bounds = _of(FILTER_BOUNDS, given.get("is_filter"), ())
    for key, bound in zip(("is_filter_low", "is_filter_high"), bounds, strict=False):
        if resolved.get(key) is None:
            resolved[key] = bound
    return resolved


def _of(table: Mapping[str, Any], key: object, default: Any) -> Any:
    """The table's entry; a key of any wrong type is left for the schema to complain about."""
    return table.get(key, default) if isinstance(key, str) else default


def misfits(recipe: RecipeSpec) -> Iterator[tuple[str, object, str]]:
    """Switches that say nothing or too much under the others: (key, value, what would be valid)."""
    objective = recipe.objective
    for key in _UNUSED[objective]:
        value = getattr(recipe, key)
        if value != type(recipe).model_fields[key].default:
            yield key, value, f"leave it out: objective {objective} does not use it"
    if recipe.eps_low >= 1 and objective != "cispo":
        yield "eps_low", recipe.eps_low, "less than 1; 1 is no lower bound, for cispo alone"
    if recipe.is_cap is not None:
        if objective == "cispo":
            yield "is_cap", recipe.is_cap, "leave it out: eps_high bounds the weight of cispo"
        elif objective == "grpo" and not recipe.importance_sampling:
            yield (
                "is_cap",
                recipe.is_cap,
                "leave it out, or set importance_sampling: it caps pi_old / mu_old, which grpo "
                "does not use by itself",
            )
    yield from _filter_misfits(recipe)


def _filter_misfits(recipe: RecipeSpec) -> Iterator[tuple[str, object, str]]:
    low, high = recipe.is_filter_low, recipe.is_filter_high
    if recipe.is_filter == "none":
        for key, bound in (("is_filter_low", low), ("is_filter_high", high)):
            if bound is not None:
                yield key, bound, 'leave it out, or set is_filter to "icepop" or "sequence"'
        return
    assert low is not None, "resolve fills it in"
    assert high is not None, "resolve fills it in"
    if low > 1:
        yield "is_filter_low", low, "at most 1: engine and trainer agreeing must pass"
    if high < 1:
        yield "is_filter_high", high, "at least 1: engine and trainer agreeing must pass"
    if low == high:
        yield "is_filter_high", high, f"above is_filter_low = {low}"
