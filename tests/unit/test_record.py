"""The run record survives Redis, and says what is wrong with it."""

from __future__ import annotations

import pytest

from keel.errors import WireError
from keel.record import Desired, Phase, RunRecord, pack_fields
from keel.spec import parse_spec

SPEC = parse_spec({"name": "r", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 1}})


def raw(record: RunRecord, **fields: object) -> dict[bytes, bytes]:
    """As HGETALL gives it."""
    values = record.to_hash() | pack_fields(**fields)
    return {key.encode(): value.encode() for key, value in values.items()}


def test_every_field_comes_back() -> None:
    record = RunRecord("r", SPEC, 1.5, engines=("a:1", "b:2"), trainer="t:3", fencing_token=7)
    assert RunRecord.from_hash("r", raw(record)) == record
    written = RunRecord.from_hash(
        "r",
        raw(
            record,
            phase=Phase.TRAINING,
            desired=Desired.PAUSED,
            policy_version=3,
            step=12,
            paused=True,
            artifact="/base",
            error="none yet",
        ),
    )
    assert (written.phase, written.desired) == (Phase.TRAINING, Desired.PAUSED)
    assert (written.policy_version, written.step, written.paused) == (3, 12, True)
    assert not RunRecord.from_hash("r", raw(written, paused=False)).paused
    assert (written.artifact, written.error) == ("/base", "none yet")


def test_what_a_newer_writer_added_is_passed_over() -> None:
    record = RunRecord("r", SPEC, 1.5)
    assert RunRecord.from_hash("r", raw(record) | {b"from_tomorrow": b"1"}) == record


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({b"spec": None}, "no spec"),
        ({b"created_s": None}, "no created_s"),
        ({b"phase": b"SLEEPING"}, "SLEEPING"),
        ({b"step": b"many"}, "many"),
        ({b"spec": b"{"}, "run record 'r'"),
        ({b"spec": b"{}"}, "name: 'missing'"),
    ],
)
def test_a_broken_record_is_a_wire_error(change: dict[bytes, bytes | None], word: str) -> None:
    values = raw(RunRecord("r", SPEC, 1.5))
    broken = {key: change.get(key, value) for key, value in values.items()}
    with pytest.raises(WireError, match=word):
        RunRecord.from_hash("r", {k: v for k, v in broken.items() if v is not None})
