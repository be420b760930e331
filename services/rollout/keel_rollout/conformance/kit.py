"""What the rows share: the engine, the reference, and which version is served now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.conformance.client import EVALUATION, EngineClient, Sampled, Version
from keel_rollout.conformance.reference import (
    DTYPES,
    PLACE_FACTOR,
    Floats,
    Model,
    Reference,
    gap_numbers,
    gaps,
    limits,
)
from keel_rollout.conformance.verdicts import NotRun, Number, Unmet

GREEDY, COOLER = 0.0, 0.7
TEMPERATURES = (1.0, COOLER, GREEDY)
RESPONSE_TOKENS = 20
FIT_TOKENS = 8
LONG_TOKENS, LONG_SAMPLES = 128, 8
FREED_TRIES = 40
"""How often it is asked whether what was left is freed, 50 ms apart."""
TRIES = 6
"""How often a generation is caught half-way before the row gives up."""


class Batch:
    """Sequences sampled at one temperature while `reference` was served."""

    def __init__(self, sequences: list[Sampled], temperature: float, reference: Reference) -> None:
        self.sequences, self.reference = sequences, reference
        self.temperature = temperature or 1.0
        """Of the log-probs: greedy ones are at 1."""

    @property
    def everything(self) -> list[list[int]]:
        """Prompt and response of each."""
        return [s.everything for s in self.sequences]

    @property
    def logprobs(self) -> list[Floats]:
        """What the engine said, [response] of each."""
        return [np.array(s.logprobs, np.float32) for s in self.sequences]

    def expected(self, **options: Any) -> list[Floats]:
        """What the reference says of the same tokens; options as of `Reference.logprobs`."""
        found = self.reference.logprobs(self.everything, self.temperature, **options)
        return [f[len(s.prompt) - 1 :] for f, s in zip(found, self.sequences, strict=True)]

    @cached_property
    def plain(self) -> list[Floats]:
        """The float32 reference, routed by itself."""
        return self.expected()

    @cached_property
    def rounded(self) -> list[Floats]:
        """The reference rounded to the engine's dtype."""
        return self.plain if self.reference.dtype == "float32" else self.expected(rounded=True)

    def noise(self) -> Floats:
        """|d log p| of the reference rounded to the engine's dtype, all tokens."""
        return gaps(self.rounded, self.plain)

    def limit(self) -> float:
        """The most that mean |d log p| may be."""
        return limits(self.reference.dtype, self.noise())[1]

    def numbers(self) -> list[Number]:
        """Median and mean gap to the reference."""
        found = gaps(self.logprobs, self.plain)
        return gap_numbers(self.reference.dtype, found, self.noise())

    def worst_place(self) -> Number:
        """The response position whose median gap over the sequences is largest."""
        medians = []
        for place in range(min(len(s.tokens) for s in self.sequences)):
            pairs = zip(self.logprobs, self.plain, strict=True)
            medians.append(np.median([abs(ours[place] - ref[place]) for ours, ref in pairs]))
        limit = limits(self.reference.dtype, self.noise())[0]
        return Number("worst position", float(np.max(medians)), PLACE_FACTOR * limit)


class Kit:
    """One engine under trial.

    Args:
        client: of a run that may take the engine.
        can: its abilities.
        model: versions A and B, and the files.
        dtype: what the engine is to compute in.
        shared: the storage that it shares with this machine; None: unknown.
    """

    def __init__(
        self,
        client: EngineClient,
        can: pb.EngineAbilities,
        model: Model,
        dtype: str,
        shared: Path | None,
    ) -> None:
        self.client, self.can, self.model, self.shared = client, can, model, shared
        self.precision = pb.EnginePrecision(
            dtype=DTYPES[dtype],
            quantize=pb.QUANTIZATION_NONE,
        )
        self.loaded: pb.ModelSignature | None = None
        self.served: Version | None = None
        """As far as the kit knows; None: to be sent again."""
        self.reference = model.a
        """What `served` computes."""
        self.newest = -1
        self.stage = ""
        self.failed: set[str] = set()
        """Names of rows that have failed."""
        self.long_s: float | None = None
        self._batches: dict[tuple[str, float], Batch] = {}
        self._seeds = iter(range(1000, 10**9))

    @property
    def routes(self) -> bool:
        """The engine claims routes, and the model has some."""
        return self.can.routes and self.model.sparse

    def other(self) -> Reference:
        """The reference that is not served."""
        return self.model.b if self.reference is self.model.a else self.model.a

    # -- versions ----------------------------------------------------------------------------

    async def load(self) -> pb.ModelSignature:
        """LoadModel; what was served before is unknown from here on."""
        self.served = None
        self.loaded = await self.client.load(self.model.files, self.precision)
        answer = await self.client.version()
        if answer.HasField("policy_version"):
            self.newest = max(self.newest, answer.policy_version)
        return self.loaded

    def next_version(self, reference: Reference, **options: Any) -> Version:
        """A reference's weights under the next number."""
        self.newest += 1
        return Version.build(self.newest, reference.tensors(), **options)

    async def publish(self, reference: Reference, **options: Any) -> Version:
        """Sends a reference's weights under a new number."""
        if self.loaded is None:
            await self.load()
        version = self.next_version(reference, **options)
        self.served = None
        await self.client.update(version, self.shared)
        self.served, self.reference = version, reference
        return version

    async def serve(self, reference: Reference) -> Version:
        """Has `reference` served; sends it only if something else is."""
        if self.served is None or self.reference is not reference:
            return await self.publish(reference)
        return self.served

    async def serving(self) -> Version:
        """Whatever is served; version A if nothing is."""
        return await self.serve(self.reference)

    async def probed(self, tokens: Sequence[int]) -> Floats:
        """The probe of what is served, which the same version again gives without any update."""
        version = await self.serving()
        await self.client.begin(version.manifest)
        return await self.client.finish(version.manifest, tokens)

    # -- sampling ----------------------------------------------------------------------------

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random tokens, as many as fit beside a response."""
        length = max(1, min(length, self.model.max_tokens // 2))
        generator = np.random.default_rng([length, seed])
        return [int(t) for t in generator.integers(0, self.model.vocab_size, length)]

    def tokens(self, wanted: int) -> int:
        """Response tokens that fit beside the longest prompt of the kit."""
        return max(1, min(wanted, self.model.max_tokens // 2))

    def samples(self, wanted: int) -> int:
        """Sequences of one request."""
        return max(1, min(wanted, self.can.max_group_size))

    async def batch(self, temperature: float) -> Batch:
        """This stage's sequences at one of TEMPERATURES, sampled once for all of them together."""
        await self.serving()
        if (self.stage, temperature) not in self._batches:
            found = await asyncio.gather(*(self._sample(t) for t in TEMPERATURES))
            self._batches |= {(self.stage, t): b for t, b in zip(TEMPERATURES, found, strict=True)}
        return self._batches[self.stage, temperature]

    async def _sample(self, temperature: float) -> Batch:
        """Four prompts of 1 to 17 tokens."""
        version = await self.serving()
        greedy = temperature == GREEDY
        calls = [
            self.client.generate(
                self.prompt(length),
                samples=self.samples(1 if greedy else 4),
                slot=slot,
                seed=next(self._seeds),
                temperature=temperature,
                max_tokens=self.tokens(RESPONSE_TOKENS),
                purpose=EVALUATION if greedy else pb.PURPOSE_TRAINING,
                with_routes=self.routes and not greedy,
                version=version.manifest.policy_version,
            )
            for slot, length in enumerate((1, 4, 9, 17))
        ]
        groups = await asyncio.gather(*calls)
        return Batch([s for group in groups for s in group], temperature, self.reference)

    async def fits(self) -> list[Number]:
        """A short generation's gap to what is served by the kit's reckoning."""
        version = await self.serving()
        group = await self.client.generate(
            self.prompt(5),
            samples=self.samples(4),
            max_tokens=self.tokens(FIT_TOKENS),
            seed=next(self._seeds),
            version=version.manifest.policy_version,
        )
        return Batch(group, 1.0, self.reference).numbers()

    # -- generations caught half-way ----------------------------------------------------------

    def long_request(self, **options: Any) -> pb.GenerateRequest:
        """A group that takes a while."""
        options = {"with_routes": self.routes, "seed": next(self._seeds), **options}
        return self.client.request(
            self.prompt(3),
            samples=self.samples(LONG_SAMPLES),
            max_tokens=self.tokens(LONG_TOKENS),
            **options,
        )

    async def long_seconds(self) -> float:
        """How long that group takes undisturbed, measured once, after a warm-up."""
        if self.long_s is None:
            await self.serving()
            warm = self.long_request()
            warm.sampling.max_tokens = 2
            await self.client.collect(warm)
            begin_s = time.perf_counter()
            await self.client.collect(self.long_request())
            self.long_s = time.perf_counter() - begin_s
        return self.long_s

    @asynccontextmanager
    async def half_way(self, share: float) -> AsyncIterator[asyncio.Task[list[Sampled]]]:
        """A long group, started and left alone for a share of the time that it takes."""
        seconds = await self.long_seconds()
        running = asyncio.ensure_future(self.client.collect(self.long_request()))
        try:
            await asyncio.sleep(share * seconds)
            yield running
        finally:
            if not running.done():
                running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def freed(self, hang_up: Callable[[pb.GenerateRequest, float], Awaitable[None]]) -> str:
        """A request as long as the model takes is begun and left by its caller; Unmet if the engine
        goes on with it.

        Args:
            hang_up: sends the request and leaves it after so many seconds.
        """
        seconds = await self.long_seconds()
        request = self.long_request()
        room = self.model.max_tokens - len(self.prompt(3))
        request.sampling.max_tokens = min(room, 4 * LONG_TOKENS)
        whole_s = seconds * request.sampling.max_tokens / self.tokens(LONG_TOKENS)
        await hang_up(request, 0.1 * whole_s)
        for _ in range(FREED_TRIES):
            # while paused nothing that was left can come to its end by itself
            left = await self.client.pause(pb.PAUSE_MODE_KEEP)
            await asyncio.sleep(0.05 if left else 0)
            await self.client.resume()
            if left == 0:
                return f"freed after about a tenth of {whole_s:.2f} s"
        raise Unmet(
            f"{left} sequences in flight, their caller gone long ago", "they are freed at once"
        )


def too_fast() -> NotRun:
    """Nothing could be caught half-way."""
    return NotRun(
        f"in {TRIES} tries the engine was never caught half-way through {LONG_TOKENS} tokens"
    )
