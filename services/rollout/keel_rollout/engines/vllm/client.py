"""One running vLLM: AsyncLLM, and the few places where its own client is not exact enough.

- `RequestOutputCollector` merges outputs that wait for their reader, and in doing so drops the
  routes of a last one. Here outputs are handed over as they come.
- A pause returns before every output that came earlier has been handed over. `freeze` waits.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import vllm.v1.engine.async_llm as async_llm
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from keel_rollout.engines.base import GroupRequest
from keel_rollout.engines.vllm import processes
from keel_rollout.engines.vllm.scheduler import PROBE

_COUNT = itertools.count()


class _Outputs(RequestOutputCollector):
    """Hands outputs over at once; keeps them until it is told to whom."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept: list[Any] = []
        self._sink: Callable[[Any], None] = self._kept.append

    def put(self, output: Any) -> None:
        self._sink(output)

    def connect(self, sink: Callable[[Any], None]) -> None:
        for output in self._kept:
            sink(output)
        self._sink = sink


async_llm.RequestOutputCollector = _Outputs


class Client:
    """vLLM with one model. Made in any thread; everything else belongs to the event loop."""

    def __init__(self, config: Any) -> None:
        before = processes.children()
        try:
            self._llm = async_llm.AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        finally:
            self._processes = processes.started(before)
        core = self._llm.engine_core
        self._queue, self._get = core.outputs_queue, core.get_output_async
        self._handled = False
        core.get_output_async = self._next_outputs

    async def _next_outputs(self) -> Any:
        """vLLM's output handler asks for more only once it has handed the last over."""
        self._handled = True
        try:
            return await self._get()
        finally:
            self._handled = False

    @property
    def dead(self) -> bool:
        """Whether a process of vLLM has ended."""
        return self._llm.errored

    @property
    def unfinished(self) -> int:
        """Sequences that vLLM has and has not finished."""
        return self._llm.output_processor.get_num_unfinished_requests()

    async def submit(self, request: GroupRequest, seed: int, sink: Callable[[Any], None]) -> str:
        """Starts a group; sample i gets seed + i. Returns the name to abort it by."""
        params = SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            seed=seed,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return await self._add(f"keel-{next(_COUNT)}", request.prompt_P, params, sink)

    async def _add(
        self, name: str, tokens_T: npt.NDArray, params: SamplingParams, sink: Callable[[Any], None]
    ) -> str:
        prompt = {"prompt_token_ids": tokens_T.tolist()}
        outputs: Any = await self._llm.add_request(name, prompt, params)
        outputs.connect(sink)
        return outputs.request_id

    async def abort(self, handle: str) -> None:
        """Ends a group; its sink gets the last outputs, with routes, before this returns."""
        await self._llm.abort(handle, internal=True)

    async def freeze(self) -> None:
        """Stops between two tokens; on return every token that was sampled has been handed over."""
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        if self._llm.output_handler is None:  # nothing was ever submitted
            return
        while not (self._handled and self._queue.empty()) and not self.dead:
            await asyncio.sleep(0.001)

    async def thaw(self) -> None:
        """Goes on."""
        await self._llm.resume_generation()

    async def update(self, tensors: Mapping[str, Any]) -> None:
        """Loads a version that `shared` describes; what is frozen gets new caches."""
        await self._llm.start_weight_update()
        await self._llm.update_weights(async_llm.WeightTransferUpdateRequest(dict(tensors)))
        await self._llm.finish_weight_update()
        await self._llm.reset_prefix_cache(reset_running_requests=True)

    async def probe(self, tokens_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-probs [T - 1] at temperature 1, routed live; frozen requests stay frozen."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def sink(output: Any) -> None:
            if done.done():
                return
            if isinstance(output, Exception):
                done.set_exception(output)
            elif output.finished:
                done.set_result(output)

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        await self._add(f"{PROBE}{next(_COUNT)}", tokens_T, params, sink)
        entries = (await done).prompt_logprobs[1:]
        tokens = tokens_T[1:].tolist()
        return np.array(
            [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)], np.float32
        )

    def shutdown(self) -> None:
        """Ends vLLM's processes. Blocks for a second: there is nothing to be saved."""
        memory = [path for p in self._processes for path in processes.segments(p.pid)]
        try:
            self._llm.shutdown(timeout=1)
        finally:
            processes.end(self._processes, memory)
            processes.clear_scratch(keep=True)
