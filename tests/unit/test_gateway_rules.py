"""The gateway's pure parts: settings, transitions, admission, leases."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from gateway_peers import SPEC, abilities

from keel.errors import InvalidField, StateError
from keel.presets import PRESETS
from keel.record import Desired, Phase, RunRecord
from keel.rollout.v1 import rollout_service_pb2 as rollout
from keel.spec import RunSpec, parse_spec
from keel_gateway import transitions
from keel_gateway.admission import engines_lack, model_lacks, needs_routes
from keel_gateway.leases import Grant, holders, plan
from keel_gateway.registry import Engine, Peer
from keel_gateway.settings import parse_settings


def spec_with(**sections: dict[str, Any]) -> RunSpec:
    return parse_spec(SPEC | {k: SPEC.get(k, {}) | v for k, v in sections.items()})


def engine(address: str, *, problem: str = "", **changes: Any) -> Engine:
    said = rollout.GetCapabilitiesResponse(can=abilities(**changes))
    return Engine(address, healthy=not problem, problem=problem, capabilities=said)


def known(**changes: Any) -> dict[str, rollout.GetCapabilitiesResponse]:
    return {"a:1": rollout.GetCapabilitiesResponse(can=abilities(**changes))}


def record(run: str, **fields: Any) -> RunRecord:
    return RunRecord(run, parse_spec(SPEC), created_s=time.time(), **fields)


LEASE: dict[str, Any] = {"trainer": "t:1", "engines": ("e:1",), "fencing_token": 7}
GRANT: dict[str, Any] = LEASE | {"engines": {"e:1": "torch"}}


class TestSettings:
    def test_flags_win_over_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEEL_ENGINES", "x:1")
        monkeypatch.setenv("KEEL_TRAINERS", "trainer.local:3")
        settings = parse_settings(["--engines", "a:1, b:2", "--listen", "127.0.0.1:0"])
        assert (settings.host, settings.port) == ("127.0.0.1", 0)
        assert settings.engines == ("a:1", "b:2")
        assert settings.trainers == ("trainer.local:3",)

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            (["--listen", "0.0.0.0:8080"], "--listen"),
            (["--listen", "[::]:8080"], "--listen"),
            (["--listen", "8080"], "--listen"),
            (["--listen", "127.0.0.1:99999"], "--listen"),
            (["--redis", "127.0.0.1:6379"], "--redis"),
            (["--engines", "a:1,b"], "--engines"),
            (["--engines", "a:0"], "--engines"),
            (["--trainers", "a:1,a:1"], "--trainers"),
        ],
    )
    def test_a_wrong_value_is_named(self, arguments: list[str], field: str) -> None:
        with pytest.raises(InvalidField) as caught:
            parse_settings(arguments)
        assert caught.value.field == field

    def test_other_machines_only_on_request(self) -> None:
        assert parse_settings(["--listen", "0.0.0.0:8080", "--allow-remote"]).host == "0.0.0.0"
        assert parse_settings(["--listen", "[::1]:8080"]).host == "::1"

    def test_help_teaches(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parse_settings(["--help"])
        told = capsys.readouterr().out
        assert "KEEL_ENGINES" in told
        assert "Only one gateway" in told


class TestTransitions:
    def test_grant_only_to_a_run_that_waits(self) -> None:
        granted = transitions.grant(record("r"), **GRANT)
        assert (granted.trainer, granted.engines, granted.fencing_token) == ("t:1", ("e:1",), 7)
        for taken in (
            granted,
            record("r", phase=Phase.TRAINING),
            record("r", desired=Desired.CANCELLED),
            record("r", desired=Desired.PAUSED),
        ):
            with pytest.raises(StateError):
                transitions.grant(taken, **GRANT)

    @pytest.mark.parametrize(
        ("phase", "lease", "phase_after"),
        [
            (Phase.QUEUED, {}, Phase.CANCELLED),
            (Phase.QUEUED, LEASE, Phase.QUEUED),
            (Phase.TRAINING, LEASE, Phase.TRAINING),
            (Phase.FINISHING, LEASE, Phase.FINISHING),
            (Phase.CANCELLED, {}, Phase.CANCELLED),
        ],
    )
    def test_cancel(self, phase: Phase, lease: dict[str, Any], phase_after: Phase) -> None:
        before = record("r", phase=phase, **lease)
        after = transitions.cancel(before, now_s=5.0)
        assert after.phase is phase_after
        assert transitions.cancel(after, now_s=6.0) == after  # idempotent
        if phase is not Phase.CANCELLED:
            assert after.desired is Desired.CANCELLED
            assert after.finished_s == (5.0 if phase_after is Phase.CANCELLED else None)

    @pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED])
    def test_what_has_ended_cannot_be_cancelled(self, phase: Phase) -> None:
        with pytest.raises(StateError, match=str(phase)):
            transitions.cancel(record("r", phase=phase), now_s=5.0)

    @pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.COLD_START, Phase.TRAINING])
    def test_pause_and_resume(self, phase: Phase) -> None:
        running = record("r", phase=phase, **LEASE)
        paused = transitions.pause(running)
        assert paused == replace(running, desired=Desired.PAUSED)
        assert transitions.pause(paused) == paused
        assert transitions.resume(paused) == running
        assert transitions.resume(running) == running
        assert transitions.cancel(paused, now_s=5.0).desired is Desired.CANCELLED

    @pytest.mark.parametrize("change", [transitions.pause, transitions.resume])
    def test_what_has_ended_or_is_to_end_is_not_paused(self, change: Any) -> None:
        for phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED):
            with pytest.raises(StateError, match=f"has ended .{phase}"):
                change(record("r", phase=phase))
        with pytest.raises(StateError, match="was cancelled"):
            change(record("r", phase=Phase.TRAINING, desired=Desired.CANCELLED, **LEASE))

    def test_the_gateway_ends_only_what_no_trainer_took(self) -> None:
        wanted = record("r", desired=Desired.CANCELLED, **LEASE)
        assert transitions.abandon(wanted, now_s=5.0).phase is Phase.CANCELLED
        refused = transitions.refuse(record("r", **LEASE), error="no", now_s=5.0)
        assert (refused.phase, refused.error) == (Phase.FAILED, "no")
        running = record("r", desired=Desired.CANCELLED, phase=Phase.PREPARING, **LEASE)
        with pytest.raises(StateError):
            transitions.abandon(running, now_s=5.0)
        with pytest.raises(StateError):
            transitions.refuse(running, error="no", now_s=5.0)

    def test_what_its_trainer_took_ends_when_that_trainer_is_gone_and_it_is_cancelled(self) -> None:
        running = record("r", phase=Phase.TRAINING, **LEASE)
        wanted = transitions.cancel(running, now_s=4.0)
        ended = transitions.abandon(wanted, now_s=5.0, orphan=True)
        assert (ended.phase, ended.finished_s) == (Phase.CANCELLED, 5.0)
        for kept in (running, ended):
            with pytest.raises(StateError):
                transitions.abandon(kept, now_s=6.0, orphan=True)


class TestAdmission:
    def test_a_capable_engine_is_enough(self) -> None:
        engines = known(routes=False) | {"b:2": known()["a:1"]}
        assert engines_lack(spec_with(), engines) == []

    def test_nothing_known_judges_nothing(self) -> None:
        assert engines_lack(spec_with(), {}) == []

    @pytest.mark.parametrize(
        ("sections", "can", "field"),
        [
            ({}, {"kind": "vllm"}, "engine.kind"),
            ({"engine": {"dtype": "float16"}}, {}, "engine.dtype"),
            (
                {"engine": {"quantize": "fp8"}},
                {"quantizations": [rollout.QUANTIZATION_NONE]},
                "engine.quantize",
            ),
            ({}, {"architectures": ["OlmoeForCausalLM"]}, "model.path"),
            ({"recipe": {"replay": "R3"}}, {"routes": False}, "recipe.replay"),
            ({"recipe": {"replay": "auto"}}, {"routes": False}, "recipe.replay"),
            ({"rollout": {"group_size": 65}}, {}, "rollout.group_size"),
            # 8 groups a lap x 8 responses are one cohort of 64 sequences
            ({}, {"max_cohort_sequences": 63}, "rollout.group_size"),
        ],
    )
    def test_what_is_lacking_is_named(
        self, sections: dict[str, dict[str, Any]], can: dict[str, Any], field: str
    ) -> None:
        lacks = engines_lack(spec_with(**sections), known(**can))
        assert [lack.field for lack in lacks] == [field]
        assert lacks[0].valid.startswith("a:1 takes ")

    def test_each_engine_is_named(self) -> None:
        engines = known(kind="vllm") | {"b:2": known(kind="sglang")["a:1"]}
        (lack,) = engines_lack(spec_with(), engines)
        assert (lack.value, lack.valid) == ("torch", "a:1 takes 'vllm'; b:2 takes 'sglang'")

    def test_limits_are_inclusive(self) -> None:
        exact = known(max_cohort_sequences=64, max_group_size=8)
        assert engines_lack(spec_with(), exact) == []
        assert engines_lack(spec_with(), known(deterministic=False, max_cohort_sequences=0)) == []

    @pytest.mark.parametrize(
        ("replay", "off_policiness", "needed"),
        [
            ("auto", 1, False),
            ("auto", 2, False),
            ("auto", 4, True),
            ("auto", 8, True),
            ("R3", 1, True),
            ("R2", 8, False),
            ("none", 8, False),
        ],
    )
    def test_routes_are_needed_for_r3(self, replay: str, off_policiness: int, needed: bool) -> None:
        recipe = {"replay": replay, "off_policiness": off_policiness}
        spec = spec_with(recipe=recipe, evaluation={"every": 0})
        assert needs_routes(spec) is needed

    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_family_of_experts_is_known(self, preset: str) -> None:
        """`auto` at N = 4 needs routes of each sparse preset, and of the dense one none."""
        dense = preset == "tiny-qwen3"
        spec = spec_with(model={"path": f"preset:{preset}"}, recipe={"off_policiness": 4})
        assert needs_routes(spec) is not dense
        assert model_lacks(spec) == []
        r3 = spec_with(model={"path": f"preset:{preset}"}, recipe={"replay": "R3"})
        assert [lack.field for lack in model_lacks(r3)] == (["recipe.replay"] if dense else [])

    def test_of_a_folder_only_explicit_replay_is_judged(self) -> None:
        folder = {"path": "/models/dense"}
        assert not needs_routes(spec_with(model=folder))
        assert needs_routes(spec_with(model=folder, recipe={"replay": "R3"}))
        assert engines_lack(spec_with(model=folder), known(architectures=["Other"])) == []

    def test_a_response_must_leave_room_for_a_prompt(self) -> None:
        assert model_lacks(spec_with(rollout={"max_tokens": 511})) == []
        (lack,) = model_lacks(spec_with(rollout={"max_tokens": 512}))
        assert lack.field == "rollout.max_tokens"
        assert model_lacks(spec_with(model={"path": "/m"}, rollout={"max_tokens": 9999})) == []


class TestLeases:
    def test_exclusive_and_in_order(self) -> None:
        records = [record("first"), record("second"), record("third")]
        trainers = {f"t:{i}": Peer(f"t:{i}", healthy=True, problem="") for i in (1, 2)}
        engines = {f"e:{i}": engine(f"e:{i}") for i in (1, 2)}
        planned = plan(records, trainers, engines)
        assert planned.grants == [
            Grant("first", "t:1", {"e:1": "torch"}),
            Grant("second", "t:2", {"e:2": "torch"}),
        ]
        assert "t:1 is leased to first" in planned.waiting["third"]
        assert "e:2 is leased to second" in planned.waiting["third"]

    def test_a_lease_lasts_until_the_run_has_ended(self) -> None:
        trainers = {"t:1": Peer("t:1", healthy=True, problem="")}
        engines = {"e:1": engine("e:1")}
        holder = record("first", phase=Phase.TRAINING, **LEASE)
        assert holders([holder]) == {"t:1": "first", "e:1": "first"}
        assert plan([holder, record("second")], trainers, engines).grants == []
        assert plan([record("second")], trainers, engines).grants != []

    def test_only_what_is_healthy_and_fits(self) -> None:
        trainers = {"t:1": Peer("t:1", healthy=True, problem="")}
        engines = {
            "e:1": engine("e:1", problem="does not answer"),
            "e:2": engine("e:2", routes=False),
            "e:3": Engine("e:3", healthy=True, problem=""),
        }
        waiting = plan([record("r")], trainers, engines).waiting["r"]
        assert "e:1 does not answer" in waiting
        assert "e:2 cannot do recipe.replay: 'auto'" in waiting
        assert "e:3 has not said yet" in waiting
        assert "trainer" not in waiting
        engines["e:4"] = engine("e:4")
        assert plan([record("r")], trainers, engines).grants == [
            Grant("r", "t:1", {"e:4": "torch"})
        ]

    def test_one_that_cannot_be_served_holds_up_nobody(self) -> None:
        trainers = {"t:1": Peer("t:1", healthy=True, problem="")}
        half = RunRecord("half", spec_with(engine={"dtype": "float16"}), created_s=1.0)
        planned = plan([half, record("next")], trainers, {"e:1": engine("e:1")})
        assert [grant.run for grant in planned.grants] == ["next"]
        assert "engine.dtype" in planned.waiting["half"]

    def test_nothing_configured_is_said(self) -> None:
        waiting = plan([record("r")], {}, {}).waiting["r"]
        assert "KEEL_TRAINERS" in waiting
        assert "KEEL_ENGINES" in waiting

    def test_a_cancelled_run_gets_nothing(self) -> None:
        trainers = {"t:1": Peer("t:1", healthy=True, problem="")}
        planned = plan([record("r", desired=Desired.CANCELLED)], trainers, {"e:1": engine("e:1")})
        assert planned.grants == []
        assert planned.waiting == {}
