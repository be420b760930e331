"""JSONL files: what is read, what is refused in which words, how rows are split and shuffled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel import dataset as module
from keel.dataset import Dataset, check_head, shuffled
from keel.errors import DatasetError
from keel.rows import Kind

CHAT = [{"role": "user", "content": "2+3?"}]


def write(path: Path, *rows: Any, end: str = "\n") -> Path:
    """Rows as lines; bytes and text as they are."""
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    data = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(data) + end.encode())
    return path


def opened(path: Path, *, kind: Kind = "problems", answers: str = "verifier math") -> Dataset:
    return Dataset.open("task.dataset", path, kind=kind, answers=answers)


def refusal(path: Path, **how: Any) -> str:
    with pytest.raises(DatasetError) as raised:
        opened(path, **how)
    return str(raised.value).removeprefix(f"task.dataset: {path}: ")


def test_text_chat_numbers_ids_and_further_fields(tmp_path: Path) -> None:
    """A BOM, blank lines, CRLF and a last line without its newline are no faults."""
    path = write(
        tmp_path / "d.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"prompt": "2+3=", "answer": 5}).encode() + b"\r",
        "",
        {"prompt": CHAT, "answer": "5", "id": "a", "level": 2, "tests": ["x"]},
        "   ",
        {"prompt": "caf\u00e9 \U0001f600", "answer": 0.5, "id": 7, "response": "kept"},
        end="",
    )
    rows = opened(path)
    first, second, third = (rows.row(number) for number in range(3))
    assert [rows.line(number) for number in range(3)] == [1, 3, 5]
    assert (first.prompt, first.answer, first.id, first.fields) == ("2+3=", "5", "", {})
    assert (second.prompt, second.fields) == (CHAT, {"level": 2, "tests": ["x"]})
    assert (third.prompt, third.answer, third.id) == ("caf\u00e9 \U0001f600", "0.5", "7")
    assert third.fields == {"response": "kept"}
    assert rows.shapes == {(): 0, ("user",): 1}


GOOD = {"prompt": "p", "answer": "a"}
ONE = "1 of 2 lines cannot be used: line 2, "
TOLD = ". One bad line refuses the file; nothing was trained"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{'prompt': 1}", "line: \"{'prompt': 1}\" is not valid; valid: a JSON object on one line"),
        ("[1, 2]", "line: [1, 2] is not valid; valid: a JSON object with a prompt"),
        ('{"answer": "a"}', "prompt: missing is not valid; valid: text, or a list of chat"),
        (
            '{"prompt": "p"}',
            "answer: missing is not valid; valid: text or a number, which verifier",
        ),
        ('{"prompt": "p", "answer": null}', "answer: null is not valid; valid: text or a number"),
        ('{"prompt": "p", "answer": [1]}', "answer: [1] is not valid; valid: text or a number"),
        ('{"prompt": "p", "answer": true}', "answer: True is not valid; valid: text or a number"),
        ('{"prompt": "p", "answer": ""}', "answer: '' is not valid; valid: text that is not empty"),
        ('{"prompt": "p", "answer": 1e400}', "answer: inf is not valid; valid: text or a number"),
        ('{"prompt": 3, "answer": 1}', "prompt: 3 is not valid; valid: text, or a list of chat"),
        ('{"prompt": " ", "answer": 1}', "prompt: ' ' is not valid; valid: text that is not"),
        ('{"prompt": [], "answer": 1}', "prompt: [] is not valid; valid: at least one chat"),
        ('{"prompt": ["x"], "answer": 1}', "prompt[0]: 'x' is not valid; valid: an object with"),
        (
            '{"prompt": [{"role": "bot", "content": "x"}], "answer": 1}',
            "prompt[0].role: 'bot' is not valid; valid: system, developer, user, assistant, tool",
        ),
        (
            '{"prompt": [{"role": "user", "content": 1}], "answer": 1}',
            "prompt[0].content: 1 is not valid; valid: text",
        ),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}',
            "prompt[0].role: 'assistant' is not valid; valid: user or tool",
        ),
        ('{"prompt": "p", "answer": NaN}', "line: NaN is not valid; valid: numbers that JSON has"),
        ('{"prompt": "p", "answer": -Infinity}', "line: -Infinity is not valid; valid: numbers"),
        ('{"prompt": "\\ud800", "answer": 1}', "prompt: '\\ud800' is not valid; valid: Unicode"),
        ('{"prompt": "p", "answer": 1, "id": 1.5}', "id: 1.5 is not valid; valid: text or a whole"),
        (b'{"prompt": "caf\xe9", "answer": 1}', "byte 16: 0xe9 is not valid; valid: UTF-8"),
        ("[" * 100_000, "line: '[[[["),
        ('{"prompt": "p", "answer": ' + "1" * 5000 + "}", 'line: \'{"prompt": "p", '),
    ],
)
def test_a_bad_line_is_named_with_field_value_and_remedy(
    tmp_path: Path, line: str | bytes, fault: str
) -> None:
    told = refusal(write(tmp_path / "d.jsonl", GOOD, line))
    assert told.startswith(ONE + fault)
    assert told.endswith(TOLD)
    assert told.count("line 2") == 1


def test_a_file_cut_off_within_its_last_line(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "d.jsonl", GOOD, '{"prompt": "p", "ans', end=""))
    assert told.startswith(ONE + 'line: \'{"prompt": "p", "ans\' is not valid')
    assert "the file ends within this line, it was cut off" in told


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": name} for name in ("a", "b", "a", "1")]
    told = refusal(write(tmp_path / "d.jsonl", *rows, {**GOOD, "id": 1}))
    assert told.startswith(
        "2 of 5 lines cannot be used: line 3, id: 'a' is not valid; valid: an id of its own; "
        "line 1 has it; line 5, id: '1' is not valid; valid: an id of its own; line 4 has it"
    )


def test_the_first_five_of_many_faults_are_named_and_all_are_counted(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "d.jsonl", *[{"prompt": ""}] * 9, GOOD))
    assert told.startswith("9 of 10 lines cannot be used: line 1, prompt: ''")
    assert "line 5, prompt" in told
    assert "line 6, prompt" not in told
    assert "; and 4 more" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file; valid: a JSON object on each line"),
        (b"\n  \n\n", "only blank lines; valid: a JSON object on each line"),
    ],
)
def test_nothing_in_it(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    assert refusal(path) == told


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl").startswith("there is no such file; valid: a JSONL file")
    assert refusal(tmp_path) == "a folder; valid: a JSONL file"


def test_a_line_beyond_the_limit_is_refused_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_BYTES", 1000)
    long = {"prompt": "x" * 5000, "answer": 1}
    told = refusal(write(tmp_path / "d.jsonl", GOOD, long, GOOD, {"prompt": ""}))
    size = len(json.dumps(long)) + 1
    assert told.startswith(
        f"2 of 4 lines cannot be used: line 2, line: {size:,} bytes are not valid; valid: up to "
        "1,000; line 4, prompt"
    )


def test_demonstrations_have_responses(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": CHAT, "response": "5"})
    assert opened(path, kind="demonstrations").row(0).response == "5"
    told = refusal(write(path, {"prompt": "p", "answer": "a"}), kind="demonstrations")
    assert "line 1, response: missing is not valid; valid: the text to imitate" in told


def test_answers_may_lack_where_nothing_needs_them(tmp_path: Path) -> None:
    assert opened(write(tmp_path / "d.jsonl", {"prompt": "p"}), answers="").row(0).answer == ""


def test_the_quick_look_reads_a_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[GOOD] * 20, {"prompt": ""})
    check_head("task.dataset", path, lines=20)
    with pytest.raises(DatasetError, match="1 of 21 lines cannot be used: line 21"):
        check_head("task.dataset", path, lines=21)


def test_a_file_written_to_is_noticed_and_one_replaced_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"prompt": f"p{i}"} for i in range(9)])
    rows = opened(path, answers="")
    write(tmp_path / "new", {"prompt": "other"}).replace(path)
    assert rows.row(8).prompt == "p8"
    again = opened(path, answers="")
    with path.open("ab") as file:
        file.write(b'{"prompt": "more"}\n')
    with pytest.raises(DatasetError, match="it was changed while the run goes on"):
        again.row(0)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + {i * i}?"} for i in range(count)]


def test_a_row_added_moves_none_across_the_split(tmp_path: Path) -> None:
    """Of 4,000 prompts 200 are expected at 0.05, with a standard deviation of 14."""
    few = opened(write(tmp_path / "few", *prompts(2000)), answers="")
    more = opened(write(tmp_path / "more", *prompts(4000)), answers="")
    train_few, held_few = few.split(0.05)
    train_more, held_more = more.split(0.05)
    assert set(train_few) <= set(train_more)
    assert set(held_few) <= set(held_more)
    assert 140 < len(held_more) < 260
    assert len(train_more) + len(held_more) == 4000


def test_rows_of_one_prompt_stay_together(tmp_path: Path) -> None:
    rows = opened(write(tmp_path / "d", *prompts(100) * 3), answers="")
    train, held = rows.split(0.1)
    assert {n % 100 for n in train.tolist()}.isdisjoint({n % 100 for n in held.tolist()})
    assert set(Counter(n % 100 for n in held.tolist()).values()) == {3}


def test_at_least_one_prompt_is_held_out_and_at_most_1000_rows(tmp_path: Path) -> None:
    rows = opened(write(tmp_path / "d", *prompts(5000)), answers="")
    assert [len(part) for part in rows.split(1e-9)] == [4999, 1]
    assert [len(part) for part in rows.split(0.5)] == [4000, 1000]
    assert [len(part) for part in rows.split(0)] == [5000, 0]


def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    rows = opened(write(tmp_path / "d", *prompts(1) * 4), answers="")
    with pytest.raises(
        DatasetError, match="leaves nothing to train on: it has 4 rows of 1 prompts"
    ):
        rows.split(0.05)


def test_every_row_comes_once_an_epoch_in_another_order() -> None:
    epochs = [[shuffled(11, epoch * 100 + i, 100) for i in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [shuffled(12, i, 100) for i in range(100)]


def test_the_order_is_pinned() -> None:
    """It must be the same on every machine and for ever: resumed runs stand on it."""
    first, second = ([shuffled(0, i + 10 * epoch, 10) for i in range(10)] for epoch in range(2))
    assert first == [6, 5, 2, 4, 3, 9, 8, 0, 7, 1]
    assert second == [7, 3, 5, 8, 1, 4, 0, 2, 9, 6]


def test_places_fall_evenly() -> None:
    """Row 0's place in 2,000 epochs of 50: mean 24.5, standard error 0.32."""
    places = [
        next(i for i in range(50) if shuffled(5, epoch * 50 + i, 50) == 0) for epoch in range(2000)
    ]
    assert abs(np.mean(places) - 24.5) < 1.5
    assert len(set(places)) == 50


def test_50_megabytes_in_bounded_memory(tmp_path: Path) -> None:
    """500 rows of 100 kB: the text would be 50 MB and more; peak memory grows by less than 25."""
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        for i in range(500):
            file.write(json.dumps({"prompt": f"{i} " + "x" * 100_000, "answer": i}) + "\n")
    assert path.stat().st_size > 50e6
    script = (
        "import resource, sys; from pathlib import Path; from keel.dataset import Dataset\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); rows = Dataset.open('f', Path(sys.argv[1]), answers='a')\n"
        "assert len(rows) == 500 and rows.row(499).answer == '499'; print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert int(done.stdout) < 25_000, done.stderr
