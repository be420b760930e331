"""Engines of a run: how many, of which kinds, which leave and what comes in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from gateway_peers import SPEC, abilities
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from keel.errors import StateError
from keel.fleet import EngineState
from keel.record import Desired, Phase, RunRecord
from keel.rollout.v1 import rollout_service_pb2 as rollout
from keel.spec import RunSpec, parse_spec
from keel_gateway import fleet_view, transitions
from keel_gateway.admission import engines_lack
from keel_gateway.leases import Grant, plan
from keel_gateway.registry import Engine, Peer

TRAINERS = {f"t:{i}": Peer(f"t:{i}", healthy=True, problem="") for i in range(3)}
BOTH = ["torch", "vllm"]


def spec(kind: Any = "torch", count: int | None = None, **asked: Any) -> RunSpec:
    asked |= {"kind": kind} | ({} if count is None else {"count": count})
    return parse_spec(SPEC | {"engine": asked})


def engine(address: str, kind: str = "torch", **changes: Any) -> Engine:
    said = rollout.GetCapabilitiesResponse(can=abilities(kind=kind, **changes))
    return Engine(address, healthy=True, problem="", capabilities=said)


def house(**kinds: str) -> dict[str, Engine]:
    """Engines by name and kind."""
    return {name: engine(name, kind) for name, kind in kinds.items()}


def waiting(run: str, asked: RunSpec, **fields: Any) -> RunRecord:
    return RunRecord(run, asked, created_s=1.0, **fields)


def running(run: str, asked: RunSpec, *engines: str, **fields: Any) -> RunRecord:
    kinds = {name: "vllm" if name in "de" else "torch" for name in engines}
    lease: dict[str, Any] = {"trainer": "t:0", "engines": engines, "engine_kinds": kinds}
    lease |= {"engine_token": 5}
    lease |= {"phase": Phase.TRAINING, "policy_version": 3}
    return waiting(run, asked, **lease | fields)


class TestGrants:
    @pytest.mark.parametrize(
        ("kind", "count", "leased"),
        [
            ("torch", 1, ("a",)),
            ("torch", 3, ("a", "b", "c")),
            ("vllm", 1, ("d",)),
            (BOTH, None, ("a", "d")),
            (["vllm", "torch"], None, ("d", "a")),
            (BOTH, 3, ("a", "d", "b")),
            (BOTH, 4, ("a", "d", "b", "e")),
            (BOTH, 5, ("a", "d", "b", "e", "c")),
        ],
    )
    def test_kinds_are_spread_evenly(
        self, kind: Any, count: int | None, leased: tuple[str, ...]
    ) -> None:
        engines = house(a="torch", b="torch", c="torch", d="vllm", e="vllm")
        planned = plan([waiting("r", spec(kind, count))], TRAINERS, engines)
        (grant,) = planned.grants
        assert (grant.run, grant.trainer) == ("r", "t:0")
        assert tuple(grant.engines) == leased
        assert all(engines[a].capabilities.can.kind == k for a, k in grant.engines.items())  # type: ignore[union-attr]
        assert planned.waiting == {}

    def test_a_kind_that_is_short_is_named(self) -> None:
        engines = house(a="torch", b="torch", c="vllm")
        holder = running("first", spec("vllm"), "c")
        planned = plan([holder, waiting("r", spec(BOTH))], TRAINERS, engines)
        assert planned.grants == []
        assert planned.waiting["r"] == (
            "waits for 1 of 2 engines, none of kind vllm: c is leased to first"
        )

    def test_all_at_once_or_none(self) -> None:
        planned = plan([waiting("r", spec("torch", 3))], TRAINERS, house(a="torch", b="torch"))
        assert planned.grants == []
        assert planned.waiting["r"].startswith("waits for 1 of 3 engines")

    def test_every_engine_must_suit(self) -> None:
        engines = house(a="torch") | {"b": engine("b", "vllm", dtypes=[])}
        planned = plan([waiting("r", spec(BOTH))], TRAINERS, engines)
        assert planned.grants == []
        assert "b cannot do engine.dtype" in planned.waiting["r"]

    def test_a_drained_engine_is_not_leased(self) -> None:
        engines = house(a="torch", b="torch")
        (grant,) = plan([waiting("r", spec())], TRAINERS, engines, {"a"}).grants
        assert grant.engines == {"b": "torch"}
        planned = plan([waiting("r", spec())], TRAINERS, engines, {"a", "b"})
        assert planned.grants == []
        assert "a is drained (keel engines undrain a)" in planned.waiting["r"]


class TestTopUp:
    def test_a_missing_kind_comes_first(self) -> None:
        engines = house(a="torch", b="torch", c="vllm")
        (grant,) = plan([running("r", spec(BOTH, 2), "a")], TRAINERS, engines).grants
        assert grant == Grant("r", "", {"c": "vllm"})

    def test_its_place_is_kept_but_no_other(self) -> None:
        """Of three, one vllm at least: a second torch may come, a third may not."""
        engines = house(a="torch", b="torch", c="torch")
        planned = plan([running("r", spec(BOTH, 3), "a")], TRAINERS, engines)
        assert planned.grants == [Grant("r", "", {"b": "torch"})]
        assert planned.waiting["r"] == "waits for 1 of 3 engines, none of kind vllm"
        planned = plan([running("r", spec(BOTH, 3), "a", "b")], TRAINERS, engines)
        assert planned.grants == []

    def test_only_as_many_as_it_asks_for(self) -> None:
        engines = house(a="torch", b="torch", c="torch")
        full = running("r", spec("torch", 2), "a", "b")
        assert plan([full], TRAINERS, engines).grants == []
        # one that drains still counts
        assert plan([replace(full, draining=("a",))], TRAINERS, engines, {"a"}).grants == []

    @pytest.mark.parametrize("desired", [Desired.PAUSED, Desired.CANCELLED])
    def test_not_while_it_stands_still(self, desired: Desired) -> None:
        still = running("r", spec(), desired=desired)
        assert plan([still], TRAINERS, house(a="torch")).grants == []

    def test_a_run_without_an_engine_says_what_it_waits_for(self) -> None:
        planned = plan([running("r", spec())], TRAINERS, house(a="torch"), {"a"})
        assert planned.waiting["r"].startswith("waits for engine: a is drained")

    def test_in_the_order_of_submission(self) -> None:
        records = [running("first", spec()), waiting("second", spec())]
        planned = plan(records, TRAINERS, house(a="torch"))
        assert planned.grants == [Grant("first", "", {"a": "torch"})]
        assert "a is leased to first" in planned.waiting["second"]


class TestLapse:
    """Who has been silent for longer than a lease lasts, and who takes the place."""

    def test_a_silent_trainer_is_replaced_by_one_that_is_free(self) -> None:
        forsaken = running("r", spec(), "a")
        trainers = TRAINERS | {"t:0": Peer("t:0", problem="does not answer")}
        assert plan([forsaken], trainers, house(a="torch")).grants == [], "its lease lasts"
        planned = plan([forsaken], trainers, house(a="torch"), lapsed={"t:0"})
        assert planned.grants == [Grant("r", "t:1", {})]
        assert planned.waiting == {}

    def test_with_no_other_trainer_free_it_waits_and_says_so(self) -> None:
        trainers = {"t:0": Peer("t:0", problem="does not answer"), "t:1": TRAINERS["t:1"]}
        records = [running("r", spec(), "a"), running("other", spec(), "b", trainer="t:1")]
        planned = plan(records, trainers, house(a="torch", b="torch"), lapsed={"t:0"})
        assert planned.grants == []
        assert planned.waiting == {"r": "no other trainer is free: t:1 is leased to other"}
        trainers["t:1"] = Peer("t:1", problem="does not answer")
        planned = plan(records[:1], trainers, house(a="torch"), lapsed={"t:0", "t:1"})
        assert planned.waiting == {"r": "no other trainer is free: t:1 does not answer"}

    def test_a_forsaken_run_comes_before_those_that_were_submitted_later(self) -> None:
        trainers = {"t:0": Peer("t:0", problem="does not answer"), "t:1": TRAINERS["t:1"]}
        records = [running("r", spec(), "a"), waiting("later", spec())]
        planned = plan(records, trainers, house(a="torch", b="torch"), lapsed={"t:0"})
        assert planned.grants == [Grant("r", "t:1", {})]
        assert "t:1 is leased to r" in planned.waiting["later"]

    def test_a_silent_engine_is_replaced_by_one_that_suits(self) -> None:
        engines = house(a="torch", b="torch", d="vllm")
        engines["a"].healthy = False
        alone = running("r", spec(), "a")
        assert plan([alone], TRAINERS, engines).grants == [], "its lease lasts"
        (grant,) = plan([alone], TRAINERS, engines, lapsed={"a"}).grants
        assert grant == Grant("r", "", {"b": "torch"}, lost=("a",))
        after = grant.apply(replace(alone, proved={"a": 3}), token=9)
        assert (after.engines, after.engine_token, after.proved) == (("b",), 9, {})
        planned = plan([alone], TRAINERS, engines, {"b"}, lapsed={"a"})
        assert planned.grants == []
        assert planned.waiting["r"].startswith("waits for engine: b is drained")

    def test_of_two_silent_ones_the_one_of_its_kind_leaves(self) -> None:
        engines = house(a="torch", d="vllm", e="vllm")
        engines["a"].healthy = engines["d"].healthy = False
        both = running("r", spec(BOTH), "a", "d")
        (grant,) = plan([both], TRAINERS, engines, lapsed={"a", "d"}).grants
        assert grant == Grant("r", "", {"e": "vllm"}, lost=("d",))

    def test_a_place_that_is_free_is_filled_before_one_that_is_lost(self) -> None:
        engines = house(a="torch", b="torch")
        engines["a"].healthy = False
        short = running("r", spec("torch", 2), "a")
        (grant,) = plan([short], TRAINERS, engines, lapsed={"a"}).grants
        assert grant == Grant("r", "", {"b": "torch"}, lost=())

    def test_hand_over(self) -> None:
        before = running("r", spec(), "a", fencing_token=5, proved={"a": 3}, artifact="/base")
        after = transitions.hand_over(before, trainer="t:1", fencing_token=9)
        assert after == replace(before, trainer="t:1", fencing_token=9, engine_token=9)
        for fields in ({"desired": Desired.PAUSED}, {"phase": Phase.FAILED}, {"trainer": ""}):
            with pytest.raises(StateError, match="wants no other trainer"):
                transitions.hand_over(replace(before, **fields), trainer="t:1", fencing_token=9)
        with pytest.raises(
            StateError, match="wants no other trainer"
        ):  # the pass before has done it
            transitions.hand_over(after, trainer="t:1", fencing_token=10)


class TestTransitions:
    def test_join(self) -> None:
        before = running(
            *("r", spec("torch", 2), "a"),
            proved={"a": 3, "b": 3},
            stale={"b": "gap"},
            drained=("b",),
        )
        after = transitions.join(before, engines={"b": "vllm"}, engine_token=9)
        assert (after.engines, after.engine_token) == (("a", "b"), 9)
        assert after.engine_kinds == {"a": "torch", "b": "vllm"}
        assert (after.fencing_token, after.trainer) == (before.fencing_token, before.trainer)
        # of another lease: it has proved nothing in this one
        assert (after.proved, after.stale, after.drained) == ({"a": 3}, {}, ())
        with pytest.raises(StateError, match="2 of 2 engines"):
            transitions.join(after, engines={"c": "torch"}, engine_token=10)

    @pytest.mark.parametrize(
        "fields",
        [{"desired": Desired.PAUSED}, {"phase": Phase.FAILED}, {"trainer": ""}],
        ids=["paused", "over", "waits"],
    )
    def test_join_only_what_goes_on(self, fields: dict[str, Any]) -> None:
        with pytest.raises(StateError, match="wants no more engines"):
            transitions.join(running("r", spec(), **fields), engines={"b": "vllm"}, engine_token=9)

    def test_drain_and_back(self) -> None:
        before = running("r", spec("torch", 2), "a", "b")
        draining = transitions.drain(before, wanted={"b", "elsewhere"})
        assert draining == replace(before, draining=("b",))
        assert transitions.drain(draining, wanted={"b"}) == draining
        empty = replace(draining, drained=("b",))
        assert transitions.drain(empty, wanted={"b"}) == empty
        # a collector that has not seen it taken back will not write again that b is empty
        back = transitions.drain(empty, wanted=set())
        assert back == replace(before, drained=("b",))
        assert transitions.leave(back) == back
        assert transitions.drain(back, wanted={"b"}) == empty

    def test_leave(self) -> None:
        draining = running(
            "r", spec("torch", 2), "a", "b", draining=("b",), proved={"a": 3, "b": 3}
        )
        assert transitions.leave(draining) == draining, "it may have groups"
        assert transitions.leave(draining, lost={"a"}) == draining, "who does not drain stays"
        for gone in (
            transitions.leave(replace(draining, drained=("b",))),
            transitions.leave(draining, lost={"b"}),
            transitions.leave(replace(draining, policy_version=None)),
        ):
            assert (gone.engines, gone.draining, gone.drained) == (("a",), (), ())
            assert gone.proved == {"a": 3}
        over = replace(draining, drained=("b",), phase=Phase.SUCCEEDED)
        assert transitions.leave(transitions.drain(over, wanted=set())) == over


class Fleet(RuleBasedStateMachine):
    """Passes of the scheduler over runs, and trainers and engines that come, go, die for a moment
    or for good; engines are drained too.
    """

    def __init__(self) -> None:
        super().__init__()
        kinds = {"a": "torch", "b": "torch", "c": "torch", "d": "vllm", "e": "vllm"}
        self.engines = house(**kinds)
        self.trainers = {f"t:{i}": Peer(f"t:{i}", healthy=True, problem="") for i in range(3)}
        self.lapsed: set[str] = set()
        self.records: dict[str, RunRecord] = {}
        self.drained: set[str] = set()
        self.token = 0
        self.seen: dict[str, int] = {}
        """By engine: the highest token that its runs had."""

    def _runs(self) -> list[RunRecord]:
        return [record for record in self.records.values() if not record.phase.final]

    @precondition(lambda self: len(self.records) < 6)
    @rule(kind=st.sampled_from(["torch", "vllm", BOTH]), more=st.integers(0, 2))
    def submit(self, kind: Any, more: int) -> None:
        run = f"r{len(self.records)}"
        least = len(kind) if isinstance(kind, list) else 1
        self.records[run] = waiting(run, spec(kind, least + more))

    @rule(data=st.data(), phase=st.sampled_from([Phase.TRAINING, Phase.SUCCEEDED]))
    def trainer(self, data: st.DataObject, phase: Phase) -> None:
        leased = [record for record in self._runs() if record.trainer]
        if leased:
            record = data.draw(st.sampled_from(leased))
            proved = dict.fromkeys(record.engines, 0)
            changed = replace(record, phase=phase, policy_version=0, proved=proved)
            self.records[record.run] = changed

    @rule(data=st.data())
    def collector(self, data: st.DataObject) -> None:
        """Finds some of those that drain empty, perhaps with a look at the record as it was."""
        for record in self._runs():
            empty = data.draw(st.sets(st.sampled_from([*record.draining, ""]))) - {""}
            self.records[record.run] = replace(record, drained=tuple(sorted(empty)))

    @rule(address=st.sampled_from("abcde"), wanted=st.booleans())
    def operator(self, address: str, wanted: bool) -> None:
        (self.drained.add if wanted else self.drained.discard)(address)

    @rule(
        address=st.sampled_from([*"abcde", "t:0", "t:1", "t:2"]),
        silent=st.booleans(),
        long=st.booleans(),
    )
    def death(self, address: str, silent: bool, long: bool) -> None:
        one = self.engines.get(address) or self.trainers[address]
        one.silent, one.healthy = silent, not silent
        one.problem = "does not answer" if silent else ""
        (self.lapsed.add if silent and long else self.lapsed.discard)(address)

    @rule()
    def scheduler(self) -> None:
        lost = {address for address, one in self.engines.items() if one.silent}
        for record in self._runs():
            drained = transitions.drain(record, wanted=self.drained)
            after = transitions.leave(drained, lost=lost)
            assert set(after.draining) <= self.drained
            assert set(record.engines) - set(after.engines) <= self.drained, "nobody else leaves"
            self.records[record.run] = after
        arguments = (self.trainers, self.engines, self.drained, self.lapsed)
        for grant in plan(self._runs(), *arguments).grants:
            assert not set(grant.engines) & (self.drained | lost)
            assert set(grant.lost) <= self.lapsed
            self.token += 1
            before = self.records[grant.run]
            after = grant.apply(before, token=self.token)
            assert after.engine_token > before.engine_token
            assert len(after.engines) >= len(before.engines)
            if before.trainer != after.trainer:
                assert after.fencing_token == self.token
                assert not before.trainer or before.trainer in self.lapsed
                assert self.trainers[after.trainer].healthy
            assert not set(grant.engines) & after.proved.keys()
            assert all(self.seen.get(a, 0) < after.engine_token for a in grant.engines)
            self.seen |= dict.fromkeys(after.engines, after.engine_token)
            if not before.trainer:
                kinds = {self.engines[a].capabilities.can.kind for a in after.engines}  # type: ignore[union-attr]
                assert kinds == {after.engine_kinds[a] for a in after.engines}
                assert kinds == set(after.spec.engine.kinds)
                assert len(after.engines) == after.spec.engine.engines
            self.records[grant.run] = after
        held = {record.trainer for record in self._runs()}
        if any(peer.healthy and address not in held for address, peer in self.trainers.items()):
            assert not held & self.lapsed, "a run keeps a trainer that is gone, and one is free"

    @invariant()
    def leases_are_exclusive_and_within_what_is_asked(self) -> None:
        trainers = [record.trainer for record in self._runs() if record.trainer]
        assert len(set(trainers)) == len(trainers)
        leased = [address for record in self._runs() for address in record.engines]
        assert len(set(leased)) == len(leased)
        for record in self._runs():
            assert len(record.engines) <= record.spec.engine.engines
            assert set(record.draining) <= set(record.engines)


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class TestAdmission:
    def known(self, **kinds: str) -> dict[str, rollout.GetCapabilitiesResponse]:
        return {name: one.capabilities for name, one in house(**kinds).items() if one.capabilities}

    def test_each_kind_must_be_there(self) -> None:
        assert engines_lack(spec(BOTH), self.known(a="torch", b="vllm")) == []
        (lack,) = engines_lack(spec(BOTH), self.known(a="torch", b="torch"))
        assert (lack.field, lack.value) == ("engine.kind", "vllm")
        assert lack.valid == "a takes 'torch'; b takes 'torch'"

    def test_one_that_is_still_starting_may_be_of_the_kind(self) -> None:
        assert engines_lack(spec(BOTH), self.known(a="torch"), unknown=1) == []
        assert engines_lack(spec("vllm"), self.known(a="torch"), unknown=1) == []
        (lack,) = engines_lack(spec("torch", dtype="float16"), self.known(a="torch"), unknown=1)
        assert lack.field == "engine.dtype"

    def test_as_many_as_are_asked_for(self) -> None:
        engines = self.known(a="torch", b="torch", c="vllm")
        assert engines_lack(spec("torch", 2), engines) == []
        (lack,) = engines_lack(spec("torch", 3), engines)
        assert (lack.field, lack.value) == ("engine.count", 3)
        assert lack.valid.startswith("at most 2")
        assert engines_lack(spec("torch", 3), engines, unknown=1) == []


class TestView:
    def test_states_and_what_is_told_of_them(self) -> None:
        engines = house(a="torch", b="torch", c="torch", d="torch")
        engines["c"].silent, engines["c"].problem = True, "does not answer (UNAVAILABLE)"
        record = running(
            *("r", spec("torch", 5), "a", "b", "c", "d"),
            proved={"a": 3, "c": 3},
            stale={"b": "median gap 0.3 nats"},
        )
        assert fleet_view.states(record, engines) == {
            "a": EngineState.READY,
            "b": EngineState.STALE,
            "c": EngineState.LOST,
            "d": EngineState.JOINING,
        }
        assert fleet_view.trouble(record, engines, {"d"}, "waits for 1 of 5 engines: x") == (
            "1 of 5 engines READY: b is STALE (median gap 0.3 nats); c is LOST (does not answer "
            "(UNAVAILABLE)); d is JOINING; waits for 1 of 5 engines: x"
        )
        over = replace(record, phase=Phase.SUCCEEDED)
        assert fleet_view.states(over, engines) == {}

    def test_a_version_that_is_being_published_is_no_trouble(self) -> None:
        record = running("r", spec("torch", 2), "a", "b", proved={"a": 3})
        assert fleet_view.trouble(record, house(a="torch", b="torch"), (), "") == ""

    def test_outside_of_a_run(self) -> None:
        (one,) = house(a="torch").values()
        assert fleet_view.state_in_run(one, None, ()) == "FREE"
        assert fleet_view.state_in_run(one, None, {"a"}) == "DRAINED"
        one.silent = True
        assert fleet_view.state_in_run(one, None, ()) == "LOST"
        assert fleet_view.state_in_run(one, None, {"a"}) == "DRAINED"
