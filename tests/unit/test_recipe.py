"""[recipe]: the objective sets defaults, explicit keys win, and reading twice changes nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from keel.errors import InvalidField
from keel.objectives import DEFAULTS
from keel.spec import RecipeSpec, RunSpec, parse_spec

SWITCHES = (
    "eps_low", "eps_high", "is_cap", "importance_sampling", "clip", "divergence_threshold",
    "length_norm", "std_norm", "is_filter_low", "is_filter_high",
)  # fmt: skip


def spec_with(**recipe: object) -> RunSpec:
    return parse_spec(
        {"name": "r", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 1} | recipe}
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, (0.2, 0.27, 5.0, True, True, None, False, False, None, None)),
        ({"objective": "minirl"}, (0.2, 0.27, 5.0, True, True, None, False, False, None, None)),
        ({"objective": "grpo"}, (0.2, 0.2, None, False, True, None, True, True, None, None)),
        ({"objective": "cispo"}, (1.0, 4.0, None, False, True, None, False, True, None, None)),
        ({"objective": "dppo"}, (0.2, 0.27, None, True, True, 0.15, False, False, None, None)),
        (
            {"objective": "dppo", "divergence": "kl", "is_filter": "sequence"},
            (0.2, 0.27, None, True, True, 0.05, False, False, 0.999, 1.001),
        ),
        (
            {"is_filter": "icepop", "is_filter_high": 3},
            (0.2, 0.27, 5.0, True, True, None, False, False, 0.5, 3.0),
        ),
        # explicit keys win, null included
        (
            {"objective": "grpo", "eps_high": 0.28, "std_norm": False, "length_norm": False},
            (0.2, 0.28, None, False, True, None, False, False, None, None),
        ),
        (
            {"objective": "grpo", "importance_sampling": True, "is_cap": 2},
            (0.2, 0.2, 2.0, True, True, None, True, True, None, None),
        ),
        ({"is_cap": None}, (0.2, 0.27, None, True, True, None, False, False, None, None)),
        (
            {"objective": "dppo", "is_cap": 5, "divergence_threshold": None},
            (0.2, 0.27, 5.0, True, True, 0.15, False, False, None, None),
        ),
    ],
)
def test_defaults_follow_the_objective_and_explicit_keys_win(recipe, expected):
    resolved = spec_with(**recipe).recipe
    assert tuple(getattr(resolved, key) for key in SWITCHES) == expected


@pytest.mark.parametrize(
    ("recipe", "field", "says"),
    [
        ({"objective": "ppo"}, "recipe.objective", "'minirl', 'grpo', 'cispo' or 'dppo'"),
        ({"objective": ["grpo"]}, "recipe.objective", "'minirl', 'grpo', 'cispo' or 'dppo'"),
        ({"divergence": "kl"}, "recipe.divergence", "minirl does not use it"),
        (
            {"objective": "grpo", "divergence_threshold": 0.1},
            "recipe.divergence_threshold",
            "grpo does not use it",
        ),
        ({"objective": "dppo", "divergence": "js"}, "recipe.divergence", "'tv' or 'kl'"),
        ({"objective": "dppo", "divergence": {}}, "recipe.divergence", "'tv' or 'kl'"),
        ({"objective": "dppo", "eps_high": 0.3}, "recipe.eps_high", "dppo does not use it"),
        ({"objective": "cispo", "is_cap": 5}, "recipe.is_cap", "eps_high bounds the weight"),
        ({"objective": "grpo", "is_cap": 5}, "recipe.is_cap", "set importance_sampling"),
        ({"eps_low": 1}, "recipe.eps_low", "less than 1"),
        ({"objective": "cispo", "eps_low": 1.5}, "recipe.eps_low", "less than or equal to 1"),
        ({"is_filter": "kpop"}, "recipe.is_filter", "'none', 'icepop' or 'sequence'"),
        ({"is_filter": 3}, "recipe.is_filter", "'none', 'icepop' or 'sequence'"),
        ({"is_filter_low": 0.5}, "recipe.is_filter_low", 'set is_filter to "icepop"'),
        ({"is_filter_high": 2}, "recipe.is_filter_high", 'set is_filter to "icepop"'),
        ({"is_filter": "icepop", "is_filter_low": 2}, "recipe.is_filter_low", "at most 1"),
        ({"is_filter": "icepop", "is_filter_high": 0.9}, "recipe.is_filter_high", "at least 1"),
        (
            {"is_filter": "sequence", "is_filter_low": 1, "is_filter_high": 1},
            "recipe.is_filter_high",
            "above is_filter_low = 1.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_key(recipe, field, says):
    with pytest.raises(InvalidField) as caught:
        spec_with(**recipe)
    assert caught.value.field == field
    assert says in caught.value.valid


@settings(max_examples=100, deadline=None)
@given(
    objective=st.sampled_from(sorted(DEFAULTS)),
    explicit=st.fixed_dictionaries(
        {},
        optional={
            "clip": st.booleans(),
            "importance_sampling": st.just(True),
            "length_norm": st.booleans(),
            "std_norm": st.booleans(),
            "is_filter": st.sampled_from(["none", "icepop", "sequence"]),
        },
    ),
)
def test_reading_a_spec_again_changes_nothing(objective, explicit):
    """The client sends what is set; records hold everything. Both come back equal."""
    spec = spec_with(objective=objective, **explicit)
    for exclude_unset in (True, False):
        again = parse_spec(spec.model_dump(mode="json", exclude_unset=exclude_unset))
        assert again == spec
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    sent = spec.model_dump(exclude_unset=True)["recipe"]
    assert explicit.items() <= sent.items()
    assert DEFAULTS[objective].keys() <= sent.keys()


def test_minirl_sends_no_more_than_before():
    assert spec_with().model_dump(exclude_unset=True)["recipe"] == {"steps": 1}
    assert RecipeSpec(steps=1) == spec_with().recipe
