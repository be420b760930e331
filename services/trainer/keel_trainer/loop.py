"""The loop: cold start, then laps of collect, score, update, publish, checkpoint, acknowledge.

    groups --> mini-batch i: [advantages] -> [scoring pass: pi_old, e^pi_old]     i = 0 .. N-1
                                                  |
    weights <-- publish v+1 <-- [N steps of the objective, routes as the replay plan says]

Scoring happens in slot order while later groups are still being generated. The weights stay those
of version v until the last group of the lap is scored.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import redis

from keel.blobs import BlobStore
from keel.errors import IntegrityError, InvalidField, KeelError
from keel.ledger import Line, Opened, Outcome, Used
from keel.record import Desired, Phase, RunRecord
from keel.spec import RunSpec
from keel.types.v1 import sequence_pb2
from keel_trainer import steps
from keel_trainer.algo.replay import ReplayPlan, replay_plan
from keel_trainer.artifact import prepare_artifact, save_model
from keel_trainer.backends.base import Backend
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.checkpoint import Progress
from keel_trainer.consumer import SlotReader
from keel_trainer.durable import Durable, used
from keel_trainer.publish import Publisher
from keel_trainer.samples import Sampler
from keel_trainer.sequences import TrainSequence
from keel_trainer.storage import insist
from keel_trainer.store import RunStore
from keel_trainer.version import SharedWeights, Version, probe_tokens

log = logging.getLogger(__name__)

COLD_START_CHECKPOINT_EVERY = 128
"""Supervised steps between checkpoints: they free the collector, at most 256 entries ahead."""

COLD_START_LOG_EVERY = 50

_PAUSE_POLL_S = 0.5


class CancelledError(Exception):
    """Its user has cancelled the run."""


class CollectorError(KeelError):
    """The collector cannot go on; the message is the collector's."""


@dataclass(slots=True)
class TrainingRun:
    """One run in training."""

    record: RunRecord
    store: RunStore
    folder: Path
    artifact: Path
    backend: Backend
    publisher: Publisher
    durable: Durable
    demos: SlotReader
    groups: SlotReader
    plan: ReplayPlan
    sampler: Sampler
    device: str
    cold_start_step: int
    """Supervised steps done."""
    step: int
    """Optimizer steps of the recipe done."""
    newest_version: int = -1
    """Highest version that the run ever made, before a crash too. The groups of every lap below it
    are in the stream, or covered by a checkpoint: they are not made again."""

    @classmethod
    def open(
        cls,
        store: RunStore,
        reading: redis.Redis,
        folder: Path,
        *,
        device: str,
        weights: Path | None = None,
        blobs: BlobStore | None = None,
    ) -> TrainingRun:
        """The run as its newest checkpoint left it, or at its beginning.

        Args:
            reading: see `SlotReader`.
            weights: see `SharedWeights`; None: weights go by stream.
            blobs: where the collector puts what is too large for the queue.
        """
        record = store.read()
        spec, recipe = record.spec, record.spec.recipe
        started_s = record.started_s or time.time()
        store.write(phase=Phase.PREPARING, error="", trouble="", started_s=started_s, paused=False)
        artifact = insist(
            "the base artifact",
            lambda: prepare_artifact(spec, folder / "base"),
            tell=store.tell,
            check=store.read,
        )
        backend = TorchBackend.from_pretrained(
            artifact,
            dtype=spec.model.dtype,
            device=device,
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            grad_clip=recipe.grad_clip,
        )
        if recipe.replay in ("R2", "R3") and not backend.info.is_moe:
            raise InvalidField(
                "recipe.replay",
                recipe.replay,
                f"auto or none: {spec.model.path} is dense, it has no experts to replay",
            )
        plan = replay_plan(
            recipe.replay, off_policiness=recipe.off_policiness, moe=backend.info.is_moe
        )
        durable = Durable(store, reading, folder, spec=spec, attempt=record.attempt, blobs=blobs)
        progress = durable.progress
        if durable.state is not None:
            backend.load_state_dict(durable.state)
            durable.state = None
            log.info("resuming after step %d", progress.step)
        probe = probe_tokens(backend.info.vocab_size)
        store.write(folder=folder, artifact=artifact)
        return cls(
            record=record,
            store=store,
            folder=folder,
            artifact=artifact,
            backend=backend,
            publisher=Publisher(
                record,
                artifact,
                backend.info,
                probe,
                progress.first_gaps,
                read=store.read,
                write=store.write,
                needs_routes=plan.needs_engine_routes,
                shared=SharedWeights(weights, record.run) if weights else None,
            ),
            durable=durable,
            demos=durable.demos,
            groups=durable.groups,
            plan=plan,
            sampler=Sampler(store, artifact, spec.laps),
            device=device,
            cold_start_step=progress.cold_start_step,
            step=progress.step,
            newest_version=store.newest_version(),
        )

    @property
    def spec(self) -> RunSpec:
        """The run's spec."""
        return self.record.spec

    @property
    def version(self) -> int:
        """Policy version of the weights, at a lap boundary."""
        return self.step // self.spec.recipe.off_policiness

    def train(self) -> None:
        """Trains to the end, or raises: CancelledError, or what went wrong."""
        try:
            self._train()
        finally:
            self.publisher.close()

    def _train(self) -> None:
        recipe = self.spec.recipe
        self._enter(
            Opened(
                step=self.step,
                cold_start_step=self.cold_start_step,
                off_policiness=recipe.off_policiness,
                groups_per_minibatch=recipe.groups_per_minibatch,
                token=self.store.token,
                at_s=time.time(),
            )
        )
        self.durable.list_checkpoints()
        self._cold_start()
        self._publish()
        self.store.write(phase=Phase.TRAINING)
        while self.step < self.spec.recipe.steps:
            self._wait_while_paused()
            self._lap()
        self.store.write(phase=Phase.FINISHING)
        while not self._evaluated():
            self._check()
            time.sleep(_PAUSE_POLL_S)
        template = self.spec.model.chat_template
        model = self.durable.insist(
            "the final model",
            lambda: save_model(
                self.backend, self.artifact, self.folder / "model", chat_template=template
            ),
            self._check_record,
        )
        self.store.write(model=model)

    def _lap(self) -> None:
        """N optimizer steps on one lap of groups; one new version."""
        recipe = self.spec.recipe
        lap, waited_before = self.version, self.groups.waited_s
        durable_s = self.durable.spent_s()
        collected = [self._collect(lap, i) for i in range(recipe.off_policiness)]
        if all(line.outcome == "dead" for _, lines in collected for line in lines):
            raise IntegrityError(
                f"no group of lap {lap} could be read: all {self.spec.slots_per_lap} are dead "
                f"letters (keel dead-letters {self.record.run})"
            )
        minibatches = [minibatch for minibatch, _ in collected]
        # groups count from the lap's first request: the last one spans the lap
        generate_s = max(minibatch.generate_s for minibatch in minibatches)
        rows = []
        for minibatch, lines in collected:
            row = steps.update(self.backend, minibatch, self.plan, recipe, step=self.step)
            self.step += 1
            row |= {
                "step": self.step,
                "lap": lap,
                "policy_version": lap,
                "time/generate_s": generate_s / recipe.off_policiness,
                "time/wait_s": (self.groups.waited_s - waited_before) / recipe.off_policiness,
                "time/checkpoint_s": durable_s / recipe.off_policiness,
            }
            rows.append(row)
            self._enter(*lines)
            self.store.write_row(self.record.attempt, self.step, row)
            self.store.write(step=max(self.step, self.record.step))
        began = time.perf_counter()
        self._publish()
        publish_s = time.perf_counter() - began
        written = range(self.step - len(rows) + 1, self.step + 1)
        for step, row in zip(written, rows, strict=True):
            row["time/publish_s"] = publish_s / recipe.off_policiness
            self.store.write_row(self.record.attempt, step, row)
        shown = {step: m.shown for step, m in zip(written, minibatches, strict=True)}
        self.sampler.write(self.record.attempt, lap, shown)
        every = self.spec.checkpoint.every
        if self.step == recipe.steps or (every and self.step % every == 0):
            self._checkpoint()

    def _collect(self, lap: int, index: int) -> tuple[steps.MiniBatch, list[Used]]:
        """Mini-batch `index` of a lap, scored under theta_old, and what the ledger says of it."""
        size = self.spec.recipe.groups_per_minibatch
        groups: list[steps.Group] = []
        lines: list[Used] = []
        for slot in range(index * size, (index + 1) * size):
            taken = self.groups.take(lap, slot, self._decode, self._check)
            group = taken.content or steps.Group.void(lap, slot, f"dead letter: {taken.reason}")
            outcome: Outcome = "trained" if group.trained else "void"
            lines.append(used("group", self.step + index + 1, taken, outcome))
            groups.append(group)
        minibatch = steps.MiniBatch.assemble(
            groups,
            self.spec,
            trainer_version=lap,
            device=self.device,
            show=lap in self.sampler.laps,
        )
        steps.score(self.backend, minibatch, self.plan)
        return minibatch, lines

    def _decode(self, envelope: sequence_pb2.Envelope) -> steps.Group:
        return steps.decode_group(
            envelope,
            self.spec,
            vocab_size=self.backend.info.vocab_size,
            routes=self.backend.info.route_shape,
            routes_needed=self.plan.needs_engine_routes,
        )

    def _cold_start(self) -> None:
        """Supervised steps on the collector's demonstrations; natural routes, as in any SFT."""
        cold = self.spec.cold_start
        if self.cold_start_step >= cold.steps:
            return
        self.store.write(phase=Phase.COLD_START)
        while self.cold_start_step < cold.steps:
            self._wait_while_paused()
            taken = self.demos.take(
                self.cold_start_step, 0, self._decode_demonstrations, self._check
            )
            loss = float("nan")
            if taken.content is not None:
                loss = steps.imitate(
                    self.backend,
                    taken.content,
                    rate=cold.learning_rate,
                    budget_tokens=self.spec.trainer.micro_batch_tokens,
                    device=self.device,
                )
            self._enter(used("demonstrations", self.cold_start_step + 1, taken, "trained"))
            self.cold_start_step += 1
            if self.cold_start_step % COLD_START_LOG_EVERY == 0:
                log.info("supervised step %d: %.3f nats a token", self.cold_start_step, loss)
            done = self.cold_start_step == cold.steps
            if done:
                self.backend.reset_optimizer()
            if done or self.cold_start_step % COLD_START_CHECKPOINT_EVERY == 0:
                self._checkpoint()
            done_before = self.record.cold_start_step
            self.store.write(cold_start_step=max(self.cold_start_step, done_before))

    def _decode_demonstrations(self, envelope: sequence_pb2.Envelope) -> list[TrainSequence]:
        return steps.decode_demonstrations(envelope, self.backend.info.vocab_size)

    def _publish(self) -> None:
        """Makes the engines serve the weights as they are, as version `self.version`; returns when
        one does.

        A version below the newest one, made again after a crash, has the same bits (or the run
        ends here) and is not sent: the groups sampled from it are all in the stream.
        """
        self.publisher.release()
        probe = probe_tokens(self.backend.info.vocab_size).tolist()
        version = Version.build(
            self.version, self.backend.weights(), self.backend.probe_logprobs(probe)
        )
        self.store.record_version(version.number, version.manifest.fingerprint)
        if version.number < self.newest_version:
            return
        self.newest_version = version.number
        self.publisher.publish(version, self._check_record)
        self.store.write(policy_version=version.number)

    def _checkpoint(self) -> None:
        self.durable.checkpoint(self._progress(), self.backend.state_dict, self._check_record)

    def _progress(self) -> Progress:
        return Progress(
            attempt=self.record.attempt,
            cold_start_step=self.cold_start_step,
            step=self.step,
            first_gaps=dict(self.publisher.first_gaps),
        )

    def _make_room(self, record: RunRecord) -> None:
        """Where the collector holds groups back. Whenever the trainer waits for groups, its weights
        are those of a lap boundary.
        """
        if record.queue_full:
            self.durable.make_room(self._progress(), self.backend.state_dict, self._check_record)

    def _enter(self, *lines: Line) -> None:
        self.durable.enter(*lines, check=self._check_record)

    def _check(self) -> None:
        """While waiting: makes room, and ends the run if it is to end, or can never go on."""
        self._make_room(self._check_record())
        in_cold_start = self.cold_start_step < self.spec.cold_start.steps
        reader = self.demos if in_cold_start else self.groups
        if reader.drained and self.newest_version >= (0 if in_cold_start else self.version + 1):
            raise IntegrityError(
                f"after step {self.step} the run made version {self.newest_version} once, and what "
                "it was trained on is neither in the stream nor covered by a checkpoint that can "
                "be read: it cannot go on; submit it anew"
            )

    def _check_record(self) -> RunRecord:
        record = self.store.read()
        if record.desired == Desired.CANCELLED:
            raise CancelledError
        if record.collector_error:
            raise CollectorError(record.collector_error)
        self.publisher.follow(record)
        return record

    def _wait_while_paused(self) -> None:
        record = self._check_record()
        self._make_room(record)
        if record.desired != Desired.PAUSED:
            return
        self.store.write(paused=True)
        log.info("paused after step %d", self.step)
        while self._check_record().desired == Desired.PAUSED:
            time.sleep(_PAUSE_POLL_S)
        self.store.write(paused=False)

    def _evaluated(self) -> bool:
        due = self.spec.evaluated_steps()
        return not due or self.store.evaluated(self.record.attempt, due[-1])
