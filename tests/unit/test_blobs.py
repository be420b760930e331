"""Blobs in a real folder, and in fsspec's memory file system: whole, durable, removed by slot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.blobs import BlobStore
from keel.errors import IntegrityError, NotFound, WireError
from keel.queue import SlotKey
from keel.types.v1 import sequence_pb2

SLOT = SlotKey(0, 3, 1)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    root = str(tmp_path / "blobs") if request.param == "folder" else f"memory://{tmp_path}"
    return BlobStore(root)


def test_what_was_put_is_got(store: BlobStore) -> None:
    ref = store.put("r", "groups", SLOT, b"first")
    assert (ref.size_bytes, ref.uri.startswith("r/groups-0-3-1-")) == (5, True)
    assert store.get(ref, run="r") == b"first"
    assert store.put("r", "groups", SLOT, b"first") == ref
    assert [len(names) for names in store.slots("r", "groups").values()] == [1]


def test_a_slot_loses_all_its_blobs_and_nothing_else(store: BlobStore) -> None:
    orphan = store.put("r", "groups", SLOT, b"without an entry")
    with_entry = store.put("r", "groups", SLOT, b"another try")
    kept = [
        store.put("r", "groups", SlotKey(0, 3, 11), b"x"),
        store.put("r", "demos", SLOT, b"x"),
        store.put("other", "groups", SLOT, b"x"),
    ]
    store.remove("r", "groups", {SLOT, SlotKey(9, 9, 9)})
    for ref in (orphan, with_entry):
        with pytest.raises(NotFound, match="is not in"):
            store.get(ref, run="r")
    assert [store.get(ref, run=ref.uri.split("/")[0]) for ref in kept] == [b"x"] * 3


def test_a_run_leaves_nothing(store: BlobStore) -> None:
    store.put("r", "groups", SLOT, b"x")
    assert store.runs() == ["r"]
    other = store.put("other", "groups", SLOT, b"x")
    assert store.runs() == ["other", "r"]
    store.remove_run("r")
    store.remove_run("r")
    assert store.runs() == ["other"]
    assert store.slots("r", "groups") == {}
    assert store.get(other, run="other") == b"x"


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    ref = store.put("r", "groups", SLOT, b"first")
    for damaged in (b"firsT", b"firs", b""):
        (tmp_path / ref.uri).write_bytes(damaged)
        with pytest.raises(IntegrityError, match="its entry says 5"):
            store.get(ref, run="r")


@given(
    st.text(max_size=80) | st.sampled_from(["r/../other/groups-0-3-1-" + "0" * 16, "/etc/passwd"])
)
def test_no_reference_leads_out_of_its_run(uri: str) -> None:
    store = BlobStore("memory://nowhere")
    with pytest.raises((WireError, NotFound)) as raised:
        store.get(sequence_pb2.BlobRef(uri=uri), run="r")
    assert isinstance(raised.value, WireError) or uri.startswith("r/")


@pytest.mark.parametrize("run", ["..", "a/b", "", ".r"])
def test_no_run_leads_out_of_the_store(run: str, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="run: "):
        BlobStore(str(tmp_path)).remove_run(run)


def test_a_full_disk_leaves_no_torn_blob(tmp_path: Path) -> None:
    """A file size limit stands for the disk: the write fails half-way, with OSError as there."""
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            BlobStore(str(tmp_path)).put("r", "groups", SLOT, bytes(5000))
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list((tmp_path / "r").iterdir()) == []
