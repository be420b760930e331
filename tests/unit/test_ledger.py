"""The audit of a ledger: crashes undo what no checkpoint covers, and nothing may go unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.errors import WireError
from keel.ledger import Checkpointed, Line, Opened, Used, audit, encode, parse, read

N, B, LAPS = 2, 3, 4


def opened(step: int = 0, cold_start_step: int = 0) -> Opened:
    return Opened(
        step=step,
        cold_start_step=cold_start_step,
        off_policiness=N,
        groups_per_minibatch=B,
        token=1,
        at_s=0.0,
    )


def group(step: int, slot: int, entry: str = "", xxh3: str = "") -> Used:
    lap = (step - 1) // N
    return Used(
        kind="group",
        step=step,
        attempt=0,
        lap=lap,
        slot=slot,
        entry=entry or f"{lap}-{slot}",
        xxh3=xxh3 or f"{lap:08x}{slot:08x}",
    )


def step(number: int) -> list[Line]:
    first = (number - 1) % N * B
    return [group(number, slot) for slot in range(first, first + B)]


def whole_run() -> list[Line]:
    return [opened(), *(line for number in range(1, N * LAPS + 1) for line in step(number))]


@given(st.data())
def test_a_run_killed_anywhere_adds_up_to_the_run(data: st.DataObject) -> None:
    """Each crash goes on from some checkpoint at a lap boundary at or before it."""
    lines: list[Line] = [opened()]
    at, again, crashes = 0, 0, data.draw(st.integers(0, 4))
    for _ in range(crashes):
        until = data.draw(st.integers(at, N * LAPS))
        lines += [line for number in range(at + 1, until + 1) for line in step(number)]
        covered = data.draw(st.sampled_from(range(0, until + 1, N)))
        at = covered
        lines.append(opened(covered))
    lines += [line for number in range(at + 1, N * LAPS + 1) for line in step(number)]
    result = audit(lines)
    assert result.problems == []
    assert (result.steps, result.trained, result.takeovers) == (N * LAPS, N * LAPS * B, crashes)
    used = [line for line in lines if isinstance(line, Used)]
    again = len(used) - N * LAPS * B
    assert result.again <= again
    assert (result.again > 0) == (again > 0)


@given(st.data())
def test_no_missing_and_no_repeated_line_goes_unseen(data: st.DataObject) -> None:
    lines = whole_run()
    index = data.draw(st.integers(1, len(lines) - 2))
    line = lines[index]
    assert isinstance(line, Used)
    assert audit([*lines[:index], *lines[index + 1 :]]).lost == [
        f"step {line.step}, slot {line.lap}/{line.slot} is missing"
    ]
    place = data.draw(st.integers(index + 1, len(lines)))
    assert audit([*lines[:place], line, *lines[place:]]).twice == [
        f"step {line.step}, slot {line.lap}/{line.slot} was used before"
    ]


def test_an_entry_in_two_slots_a_slot_in_another_step_and_other_bytes_are_seen() -> None:
    lines = whole_run()
    assert isinstance(lines[1], Used)
    entry = [*lines[:2], group(1, 1, entry=lines[1].entry), *lines[3:]]
    assert audit(entry).twice == ["step 1, slot 0/1 came from entry 0-0, which was used before"]
    moved = audit([*lines[:-1], group(8, 0)])
    assert (moved.lost, moved.twice) == (
        ["step 8, slot 3/5 is missing"],
        ["step 8, slot 3/0 was not due", "step 8, slot 3/0 was used before"],
    )
    changed = [opened(), *step(1), opened(), group(1, 0, xxh3="f" * 16), *step(1)[1:]]
    result = audit(changed)
    assert result.changed == [f"step 1, slot 0/0 had bytes {'0' * 16}, then {'f' * 16}"]
    assert (result.again, result.lost, result.twice) == (3, [], [])


def test_outcomes_and_supervised_steps_are_counted() -> None:
    demos = [
        Used(kind="demonstrations", step=s + 1, attempt=0, lap=s, slot=0, entry=f"d{s}", xxh3="0")
        for s in range(3)
    ]
    ending = [
        step(1)[0],
        group(1, 1).model_copy(update={"outcome": "void"}),
        group(1, 2).model_copy(update={"outcome": "dead", "xxh3": ""}),
    ]
    result = audit([opened(), *demos, opened(0, 2), demos[2], *ending])
    assert result.problems == []
    assert (result.cold_start_steps, result.steps) == (3, 1)
    assert (result.trained, result.void, result.dead, result.takeovers) == (1, 1, 1, 1)
    assert "supervised step 2 is missing" in audit([opened(), demos[0], demos[2]]).lost


@given(st.integers(0, 4000))
def test_a_torn_end_costs_the_torn_line_only(cut: int) -> None:
    lines = [opened(), *step(1), Checkpointed(step=1, cold_start_step=0)]
    data = encode(lines)
    got = list(parse(data[:cut]))
    assert got == lines[: len(got)]
    assert (
        len(encode(got))
        <= min(cut, len(data))
        < len(encode(lines[: len(got) + 1])) + (cut >= len(data))
    )


def test_what_is_no_ledger_says_where(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(encode([opened()]) + b'{"kind": "group", "step": 1}\n')
    with pytest.raises(WireError, match=r"ledger, line 2: group.attempt: Field required"):
        read(file)
    file.write_bytes(b"what\n")
    with pytest.raises(WireError, match="ledger, line 1"):
        read(file)


def test_a_checkpoint_beyond_what_was_used_and_a_missing_beginning_are_seen() -> None:
    beyond = [opened(), *step(1), *step(2), Checkpointed(step=4, cold_start_step=1)]
    lost = audit(beyond).lost
    assert lost[0] == "supervised step 1 is missing"
    assert lost[1:] == [f"step {3 + slot // B}, slot 1/{slot} is missing" for slot in range(2 * B)]
    assert audit(step(1)).lost == ["the line that says how the run began"]
    assert audit([]).problems == []
