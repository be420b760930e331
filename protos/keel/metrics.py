"""Metric rows: their columns, and how they lie in Redis.

Rows live in a hash (`keel.queue.metrics_key`) under (attempt, step), so that a row written again
replaces itself. The trainer writes a row a step, from step 1; the collector writes evaluations
under a key of their own, step 0 being version 0. Readers see both merged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

COLUMNS: dict[str, str] = {
    "step": "optimizer step, from 1; 0 for the evaluation of version 0",
    "lap": "the paper's global step, from 0",
    "policy_version": "version that this step's lap was sampled from",
    "reward/mean": "mean reward of the mini-batch's valid responses",
    "mismatch/k1": "mean(log mu_old - log pi_old): train-inference discrepancy, nats",
    "mismatch/k3": "mean(e^d - d - 1), d = log pi_old - log mu_old: the same, never negative",
    "mismatch/logprob_abs_mean": "mean |log pi_old - log mu_old|",
    "mismatch/logprob_abs_max": "max |log pi_old - log mu_old|",
    "mismatch/f2": "share of tokens with max(pi_old/mu_old, mu_old/pi_old) > 2",
    "staleness/k1": "mean(log pi_old - log pi_theta), nats",
    "staleness/k3": "mean(e^d - d - 1), d = log pi_theta - log pi_old",
    "staleness/ratio_max": "max pi_theta / pi_old",
    "is/mean": "mean of the objective's weight before truncation; MiniRL's is pi_theta / mu_old",
    "is/max": "largest weight before truncation",
    "is/ess": "effective sample size as a share: 1 / mean((w / mean w)^2)",
    "is/truncated": "share of tokens whose weight was truncated",
    "clip/high": "share of tokens that the objective's mask drops with A > 0",
    "clip/low": "share of tokens that the objective's mask drops with A < 0",
    "entropy": "mean entropy over the full vocabulary, nats",
    "grad_norm": "gradient norm before clipping",
    "routing/pair_disagree": "share of (token, layer) pairs with other experts, engine and trainer",
    "routing/token_disagree": "share of tokens with any differing layer",
    "routing/overlap": "mean share of common experts of a pair",
    "replay/rows_requested": "(token, layer) pairs whose experts were prescribed in updates",
    "replay/rows_obeyed": "of these, pairs dispatched to exactly the prescribed experts",
    "response/length_mean": "mean response length, tokens",
    "response/truncated": "share of responses that reached max_tokens",
    "groups/zero_advantage": "share of groups whose responses all got the same reward",
    "groups/void": "VOID slots of the mini-batch",
    "version_lag/mean": "mean of (trainer's version - token's version)",
    "version_lag/max": "max of the same",
    "time/generate_s": "seconds of generation, the lap's divided by N",
    "time/score_s": "seconds of decoding and scoring this mini-batch",
    "time/update_s": "seconds of this step's update",
    "time/publish_s": "seconds of publishing, the lap's divided by N",
    "time/checkpoint_s": "seconds of ledger, checkpoint and acknowledgement since the "
    "lap before began, divided by N",
    "time/wait_s": "seconds the trainer waited for groups, the lap's divided by N",
    "tokens/prompt": "prompt tokens of the mini-batch",
    "tokens/response": "response tokens of the mini-batch",
    "tokens/trained": "response tokens of valid sequences",
    "accuracy/eval": "mean reward on the first held-out set (its avg@K), after this step",
}
"""Every column that each run has, with its meaning and unit."""

FAMILIES: dict[str, str] = {
    "reward/part/": "mean over valid responses of one verifier's value, before weighting",
    "eval/": "one held-out set, after this step: eval/SET/avg@K, the mean reward of K responses a "
    "prompt; eval/SET/pass@K, the share of prompts with a right one among them",
    "is/dropped/": "share of tokens that recipe.is_filter drops, by its name: icepop or sequence",
    "engine/groups/": "groups trained on that one engine sampled, by its address",
    "engine/k3/": "mismatch/k3 of the tokens that one engine sampled, nats: which engine is off",
    "routing/layer/": "routing/pair_disagree of one MoE layer, by its global layer number",
}
"""Columns whose names depend on the run: what they begin with, and what they mean."""


def meaning(column: str) -> str | None:
    """What a column says; None if there is no such column.

    Example:
        meaning("reward/part/format") == FAMILIES["reward/part/"]
    """
    if column in COLUMNS:
        return COLUMNS[column]
    return next((says for family, says in FAMILIES.items() if column.startswith(family)), None)


def row_field(attempt: int, step: int) -> str:
    """Hash field of the trainer's row."""
    return f"{attempt}:{step}"


def evaluation_field(attempt: int, step: int) -> str:
    """Hash field of the collector's evaluation after `step`."""
    return f"{attempt}:{step}:evaluation"


def whole(row: Row) -> bool:
    """The trainer's row of a step will not grow: it writes a row again when its lap is published.

    An evaluation comes under a field of its own.
    """
    return "time/publish_s" in row


def encode_row(row: Mapping[str, float | int | None]) -> str:
    """A row as JSON. What is not finite becomes null, since JSON has no NaN."""
    unknown = [column for column in row if meaning(column) is None]
    assert not unknown, f"not metric columns: {unknown}"
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
    )


def fields_after(step: int, last: int, attempt: int) -> list[str]:
    """Hash fields of all rows in (step, last], evaluations included, later attempts last."""
    return [
        name(number, at)
        for at in range(step + 1, last + 1)
        for number in range(attempt + 1)
        for name in (row_field, evaluation_field)
    ]


def merge_rows(values: Iterable[bytes | None]) -> Sequence[Row]:
    """Rows by step, ascending: later values replace earlier ones, column by column."""
    rows: dict[int, Row] = {}
    for value in values:
        if value is not None:
            row = json.loads(value)
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]
