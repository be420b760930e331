"""Prompts, seeds and cohorts follow from their place; text and tokens translate both ways."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from collector_peers import make_artifact, make_spec

from keel.codec import to_ndarray
from keel.errors import ModelError
from keel.presets import END
from keel.spec import RunSpec
from keel_rollout.collector.data import RunData
from keel_rollout.collector.main import main
from keel_rollout.collector.plan import Plan
from keel_rollout.collector.text import TextCodec


@pytest.fixture
def text(tmp_path: Path) -> TextCodec:
    return TextCodec.from_artifact(make_artifact(tmp_path / "base"))


def make_plan(text: TextCodec, spec: RunSpec) -> Plan:
    return Plan("r", spec, RunData(spec), text)


def test_places_have_seeds_of_their_own(text: TextCodec) -> None:
    """2 attempts x 3 laps x 8 slots: 48 seeds, none twice, and the same from another plan."""
    spec = make_spec()
    places = [(attempt, lap) for attempt in range(2) for lap in range(3)]
    one, other = (
        [slot for place in places for slot in make_plan(text, spec).lap_slots(*place)]
        for _ in range(2)
    )
    assert len({slot.seed for slot in one}) == 48
    assert [(s.seed, s.problem) for s in one] == [(s.seed, s.problem) for s in other]
    assert len({slot.problem for slot in one}) > 40


def test_another_seed_of_the_run_gives_other_prompts(text: TextCodec) -> None:
    plans = [make_plan(text, make_spec().model_copy(update={"seed": seed})) for seed in (1, 2)]
    first, second = ([slot.problem for slot in plan.lap_slots(0, 0)] for plan in plans)
    assert first != second


def test_cohorts_hold_256_sequences_in_slot_order(text: TextCodec) -> None:
    """24 groups of 16: 16 and 8; one slot less shifts nothing but the last cohort's size."""
    spec = make_spec(rollout={"group_size": 16}, recipe={"groups_per_minibatch": 12})
    plan = make_plan(text, spec)
    slots = plan.lap_slots(0, 5)
    whole, less = plan.lap_cohorts(0, 5, slots), plan.lap_cohorts(0, 5, slots[:-1])
    assert [cohort.id for cohort in whole] == ["0/5/train/0", "0/5/train/1"]
    assert [s.id.slot for cohort in whole for s in cohort.slots] == list(range(24))
    assert [[len(c.slots) for c in cohorts] for cohorts in (whole, less)] == [[16, 8], [16, 7]]


def test_the_evaluation_set_is_the_same_at_every_version(text: TextCodec) -> None:
    spec = make_spec(evaluation={"every": 2, "samples": 300})
    plan = make_plan(text, spec)
    (held_out,) = RunData(spec).sets
    early, late = (plan.evaluation_slots(held_out, *place) for place in ((0, 0), (1, 9)))
    assert [slot.problem for slot in early] == [slot.problem for slot in late]
    assert not {s.seed for s in early} & {s.seed for s in late}
    cohorts = plan.evaluation_cohorts(held_out, 1, 9, late)
    assert [(c.id, len(c.slots)) for c in cohorts] == [
        ("1/9/evaluation/0", 256),
        ("1/9/evaluation/1", 44),
    ]


def test_demonstrations_are_a_function_of_the_step(text: TextCodec) -> None:
    plan = make_plan(text, make_spec(cold_start={"steps": 4, "batch_size": 8}))
    one, again, other = (plan.demonstrations(0, step) for step in (3, 3, 2))
    assert one == again
    assert one.demonstrations != other.demonstrations
    assert (one.id.lap, one.id.slot, len(one.demonstrations.demonstrations)) == (3, 0, 8)
    for demonstration in one.demonstrations.demonstrations:
        tokens_T = to_ndarray(demonstration.token_ids, "t", dtypes=("int32",), shape=(None,))
        prompt = text.response_text(tokens_T[: demonstration.prompt_length])
        response = text.response_text(tokens_T[demonstration.prompt_length :])
        assert prompt.endswith("=")
        assert response.endswith(END)
        assert "=" in response


def test_text_becomes_tokens_and_back(text: TextCodec) -> None:
    """The alphabet starts at id 2; the end token is 1, padding 0."""
    assert text.end_ids == (1,)
    assert text.prompt_ids("10*9=").tolist() == [3, 2, 14, 11, 16]
    assert text.response_ids("=90" + END).tolist() == [16, 11, 2, 1]
    assert text.response_text(np.array([16, 11, 2, 1], np.int32)) == "=90<end>"
    assert text.response_text(np.array([16, 11, 2], np.int32)) == "=90"
    assert text.response_text(np.array([16, 0, 2, 1], np.int32)) == "=<pad>0<end>"


def make_foreign(folder: Path, eos: object) -> Path:
    """A model folder whose tokenizer does not know Keel's END."""
    make_artifact(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(END, "<|im_end|>"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.mark.parametrize(("eos", "end_ids"), [(1, (1,)), ([1, 0], (1, 0))])
def test_another_models_end_token_stands_for_end(
    tmp_path: Path, eos: object, end_ids: tuple[int, ...]
) -> None:
    foreign = TextCodec.from_artifact(make_foreign(tmp_path / "m", eos))
    assert foreign.end_ids == end_ids
    assert foreign.response_ids("=6" + END).tolist() == [16, 8, 1]
    assert foreign.response_text(np.array([16, 8, end_ids[-1]], np.int32)) == "=6<end>"


def test_a_folder_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        TextCodec.from_artifact(make_foreign(tmp_path / "m", None))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--verifier-workers", "0"], "'0' is not valid; valid: 1 and above"),
        (["--log-level", "loud"], "'loud' is not valid; valid: DEBUG ... ERROR"),
        (["--queue-bytes", "much"], "'much' is not valid; valid: bytes, such as"),
        (["--inline-limit", "1.5 parsec"], "'1.5 parsec' is not valid; valid: bytes, such as"),
        (["--blobs", "nowhere://x"], "'nowhere://x' is not valid: Protocol not known: nowhere"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_jobs_of_the_built_in_task_keep_their_bits(text: TextCodec) -> None:
    """Prompts, seeds, cohorts and demonstrations, as they were before there were data files."""
    spec = make_spec(cold_start={"steps": 3}, evaluation={"every": 2, "samples": 300})
    plan = make_plan(text, spec)
    (held_out,) = RunData(spec).sets
    digest = hashlib.sha256()
    for attempt in range(2):
        for lap in range(3):
            slots = plan.lap_slots(attempt, lap)
            evaluated = plan.evaluation_slots(held_out, attempt, lap)
            for slot in [*slots, *evaluated]:
                digest.update(slot.prompt_ids_P.tobytes() + str(slot.seed).encode())
                digest.update(slot.id.SerializeToString(deterministic=True))
            cohorts = plan.lap_cohorts(attempt, lap, slots)
            for cohort in cohorts + plan.evaluation_cohorts(held_out, attempt, lap, evaluated):
                digest.update(f"{cohort.id} {len(cohort.slots)}".encode())
            demonstrations = plan.demonstrations(attempt, lap)
            digest.update(demonstrations.SerializeToString(deterministic=True))
    assert digest.hexdigest() == "3b5b8323ec53923455f3927eda18ad246174e7eb720fe11336b4033a6325cbfd"
