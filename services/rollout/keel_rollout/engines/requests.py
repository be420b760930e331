"""Requests checked against the contract, and what the engine can do and has loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from keel import codec
from keel.errors import InvalidField, LimitError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel_rollout.engines.base import CohortKey, GroupRequest


def checked_request(
    request: pb.GenerateRequest, can: pb.EngineAbilities, loaded: pb.ModelSignature
) -> GroupRequest:
    """The request as engines take it; raises InvalidField, WireError or LimitError by field."""
    prompt_P = checked_tokens(request.prompt_token_ids, "prompt_token_ids", loaded, least=1)
    sampling = request.sampling
    _check_sampling(sampling, request.purpose, loaded)
    total_tokens = len(prompt_P) + sampling.max_tokens
    if total_tokens > loaded.max_sequence_tokens:
        raise InvalidField(
            "prompt_token_ids and sampling.max_tokens",
            f"{len(prompt_P)} + {sampling.max_tokens} tokens",
            f"at most {loaded.max_sequence_tokens} together, which is what the model takes",
        )
    if request.num_samples == 0:
        raise InvalidField("num_samples", 0, f"1 to {can.max_group_size}")
    if request.num_samples > can.max_group_size:
        raise LimitError(
            f"num_samples: {request.num_samples} is over the limit; valid: 1 to "
            f"{can.max_group_size}"
        )
    if request.with_routes and not (can.routes and loaded.moe_layers):
        raise InvalidField(
            "with_routes", True, f"false: {loaded.architecture} as loaded here has no routes"
        )
    version = request.require_policy_version
    return GroupRequest(
        slot=request.id.slot,
        prompt_P=prompt_P,
        num_samples=request.num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        seed=request.seed,
        cohort=_cohort(request, can),
        with_routes=request.with_routes,
        require_policy_version=version if request.HasField("require_policy_version") else None,
    )


def checked_files(files: Iterable[pb.ModelFile]) -> dict[str, bytes]:
    """Contents of a model's files by base name, config.json among them."""
    contents: dict[str, bytes] = {}
    for file in files:
        if file.name in ("", ".", "..") or any(mark in file.name for mark in "/\\\0"):
            raise InvalidField("files.name", file.name, "a base name, no path")
        if file.name in contents:
            raise InvalidField("files.name", file.name, "each name once")
        contents[file.name] = file.data
    if "config.json" not in contents:
        raise InvalidField("files", sorted(contents), "config.json among them")
    return contents


def checked_tokens(
    tensor: tensor_pb2.Tensor, field: str, loaded: pb.ModelSignature, *, least: int
) -> npt.NDArray[np.int32]:
    """Token ids [T] of the model's vocabulary, `least` <= T <= what the model takes."""
    tokens_T = codec.to_ndarray(tensor, field, dtypes=("int32",), shape=(None,))
    if not least <= len(tokens_T) <= loaded.max_sequence_tokens:
        raise InvalidField(
            field, f"{len(tokens_T)} tokens", f"{least} to {loaded.max_sequence_tokens} tokens"
        )
    outside_T = (tokens_T < 0) | (tokens_T >= loaded.vocab_size)
    if outside_T.any():
        place = int(outside_T.argmax())
        raise InvalidField(
            f"{field}[{place}]", int(tokens_T[place]), f"0 to {loaded.vocab_size - 1}"
        )
    return tokens_T


def _check_sampling(
    sampling: sequence_pb2.SamplingParams, purpose: pb.Purpose, loaded: pb.ModelSignature
) -> None:
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if purpose not in (pb.PURPOSE_TRAINING, pb.PURPOSE_EVALUATION):
        raise InvalidField("purpose", purpose, "PURPOSE_TRAINING or PURPOSE_EVALUATION")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidField("sampling.temperature", sampling.temperature, "0 or more, finite")
    if not 0 < top_p <= 1:
        raise InvalidField("sampling.top_p", top_p, "more than 0, at most 1")
    if sampling.max_tokens == 0:
        raise InvalidField("sampling.max_tokens", 0, "1 or more")
    for token in sampling.stop_token_ids:
        if not 0 <= token < loaded.vocab_size:
            raise InvalidField("sampling.stop_token_ids", token, f"0 to {loaded.vocab_size - 1}")
    if purpose != pb.PURPOSE_TRAINING:
        return
    why = "truncation is for evaluation, as it would bias pi / mu"
    if top_p != 1:
        raise InvalidField("sampling.top_p", top_p, f"1 for training: {why}")
    if sampling.top_k != 0:
        raise InvalidField("sampling.top_k", sampling.top_k, f"0 for training: {why}")
    if sampling.temperature == 0:
        raise InvalidField(
            "sampling.temperature", 0, "more than 0 for training: greedy is for evaluation"
        )


def _cohort(request: pb.GenerateRequest, can: pb.EngineAbilities) -> CohortKey | None:
    if not request.HasField("cohort") or not can.deterministic:
        return None
    cohort = request.cohort
    if not cohort.id:
        raise InvalidField("cohort.id", "", "a name that is unique within the run")
    if cohort.size == 0:
        raise InvalidField("cohort.size", 0, "1 or more groups")
    if cohort.size * request.num_samples > can.max_cohort_sequences:
        raise LimitError(
            f"cohort.size: {cohort.size} groups of {request.num_samples} is over the limit; "
            f"valid: at most {can.max_cohort_sequences} sequences in all"
        )
    return CohortKey(cohort.id, cohort.size, cohort.try_number)
