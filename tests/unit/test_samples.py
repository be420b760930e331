"""Samples: what is chosen, what is told of a sequence, and how it comes out of Redis."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis
import tiny_moe
import torch
from rediskit import start_redis
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from keel.queue import run_key, samples_key
from keel.samples import Sample, fields_by_step, parse_samples, sample_field
from keel_trainer.algo.replay import compare_routes
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import collate
from keel_trainer.samples import (
    MOST_TOKENS,
    Sampler,
    Shown,
    choose,
    interest,
    sampled_laps,
    see,
    token_texts,
)
from keel_trainer.sequences import TrainSequence
from keel_trainer.store import RunStore, connect


def group(rewards: str, slot: int = 0) -> list[TrainSequence]:
    """One sequence a character: its reward, or x for an invalid one."""
    return [
        replace(
            tiny_moe.sequence(
                [1, 2, 3, 4], 2, reward=float(r) if r != "x" else np.nan, valid=r != "x"
            ),
            slot=slot,
            sample=sample,
        )
        for sample, r in enumerate(rewards)
    ]


def test_laps_are_few_evenly_spaced_and_with_the_last() -> None:
    assert sampled_laps(1) == {0}
    assert sampled_laps(50) == set(range(50))
    for laps in (51, 99, 160, 4001):
        chosen = sorted(sampled_laps(laps))
        assert (len(chosen), chosen[0], chosen[-1]) == (50, 0, laps - 1)
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("groups", "slot", "samples"),
    [
        (["0000", "1011", "0101"], 1, [0, 1, 2, 3]),  # the first whose rewards differ
        (["0001000", "1"], 0, [0, 3, 5, 6]),  # the right one, and wrong ones
        (["", "xxxx", "11x1"], 2, [0, 1, 2, 3]),
        (["", "0x1x000"], 1, [0, 2, 5, 6]),
        (["", "xxxxxx"], 1, [0, 1, 2, 3]),  # nothing valid in the whole mini-batch
        (["", ""], None, []),
    ],
)
def test_right_and_wrong_responses_to_one_prompt_are_preferred(
    groups: list[str], slot: int | None, samples: list[int]
) -> None:
    made = [group(rewards, slot) for slot, rewards in enumerate(groups)]
    valid = sum(s.valid for g in made for s in g)
    advantages = [float(i) for i in range(sum(map(len, made)))]
    shown = choose(made, advantages, [range(0, min(3, valid)), range(min(3, valid), valid)])
    assert {one.sequence.slot for one in shown} == ({slot} if shown else set())
    assert [one.sequence.sample for one in shown] == samples
    everything = [s for g in made for s in g]
    kept = [s for s in everything if s.valid]
    for one in shown:
        assert one.advantage == [s is one.sequence for s in everything].index(True)
        if one.sequence.valid:
            at = [s is one.sequence for s in kept].index(True)
            assert one.place == ((0, at) if at < 3 else (1, at - 3))
        else:
            assert one.place is None
    assert interest(shown) == max(interest([Shown(s, 0.0, None) for s in g]) for g in made), (
        "what is picked teaches as much as the group it is of"
    )


def test_what_is_seen_is_the_pass_at_the_positions_that_predict(tmp_path: Path) -> None:
    backend = TorchBackend.from_pretrained(tiny_moe.save_model(tmp_path / "model"))
    sequences = tiny_moe.random_sequences(6)
    cuts = [range(0, 4), range(4, 6)]
    shown = [Shown(sequences[i], 0.0, place) for i, place in ((1, (0, 1)), (5, (1, 1)))]
    for index, cut in enumerate(cuts):
        micro = collate(sequences[cut.start : cut.stop])
        out = backend.score(micro, temperature=1.0, routes_NTLK=micro.engine_routes_NTLK)
        see(shown, index, micro, out.logprobs_NT, out.natural_NTLK)
        assert micro.engine_routes_NTLK is not None
        assert out.natural_NTLK is not None
        for one in shown:
            if one.place is None or one.place[0] != index:
                continue
            row, sequence = one.place[1], one.sequence
            assert one.proximal_logprobs_R is not None
            assert one.experts_differ_R is not None
            in_row = torch.zeros_like(micro.mask_NT)
            in_row[row] = micro.mask_NT[row]
            counts = compare_routes(micro.engine_routes_NTLK, out.natural_NTLK, in_row)
            assert one.experts_differ_R.sum() == counts.pairs - counts.pairs_equal > 0
            assert (one.experts_differ_R == 0).sum() == counts.tokens_equal
            assert one.proximal_logprobs_R.tolist() == out.logprobs_NT[in_row].tolist()
            assert len(one.proximal_logprobs_R) == sequence.response_length


def byte_level() -> Tokenizer:
    """A token a byte: characters beyond ASCII are of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece: decoding drops the space that the first token begins with."""
    words = ["▁two", "▁and", "▁three", "!", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def test_texts_of_tokens_join_to_the_text_of_all() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("naïve 😀 x").ids
    texts = token_texts(tokenizer, ids)
    assert texts == [*"na", "", "ï", *"ve ", "", "", "", "😀", " ", "x"]
    assert token_texts(metaspace(), [0, 1, 2, 3, 4]) == ["two", " and", " three", "!", "<end>"]
    draw = random.Random(0)
    for _ in range(50):  # bytes that are no text at all
        ids = [draw.randrange(256) for _ in range(draw.randrange(60))]
        assert len(token_texts(tokenizer, ids)) == len(ids)
    valid = "x" * 5 + "\N{REPLACEMENT CHARACTER}" * 4 + "end"
    assert "".join(token_texts(tokenizer, tokenizer.encode(valid).ids)) == valid


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_redis(tmp_path_factory.mktemp("redis"))


def sampler(redis_url: str, folder: Path, run: str) -> tuple[Sampler, redis.Redis]:
    byte_level().save(str(folder / "tokenizer.json"))
    client = connect(redis_url)
    client.hset(run_key(run), "spec", "{}")
    return Sampler(RunStore(client, run, 1), folder, 3), client


def read(client: redis.Redis, run: str, off_policiness: int = 2) -> dict[int, list[Sample]]:
    values: dict[bytes, bytes] = client.hgetall(samples_key(run))  # type: ignore[assignment]
    steps = fields_by_step(values, off_policiness=off_policiness)
    return {
        step: parse_samples([values[f.encode()] for f in fields]) for step, fields in steps.items()
    }


def test_a_lap_s_samples_are_of_its_step_that_teaches_most(redis_url: str, tmp_path: Path) -> None:
    writer, client = sampler(redis_url, tmp_path, "r")
    dull = choose([group("00")], [0, 0], [range(2)])
    good = choose([group("01", 7)], [-0.5, 0.5], [range(2)])
    writer.write(0, 0, {1: dull, 2: good})
    writer.write(0, 0, {1: dull, 2: good})
    writer.write(0, 1, {3: good, 4: good})
    found = read(client, "r")
    assert {step: [(s.lap, s.sample) for s in samples] for step, samples in found.items()} == {
        2: [(0, 0), (0, 1)],
        3: [(1, 0), (1, 1)],
    }
    # a new attempt samples lap 1 anew: what the old one showed of it is no more, of lap 0 it is
    writer.write(1, 1, {3: dull, 4: good})
    assert {step: samples[0].attempt for step, samples in read(client, "r").items()} == {2: 0, 4: 1}
    writer.write(1, 2, {5: []})  # a lap of VOID slots
    assert read(client, "r").keys() == {2, 4}


def test_a_sample_tells_what_is_known_and_null_where_nothing_is(
    redis_url: str, tmp_path: Path
) -> None:
    writer, client = sampler(redis_url, tmp_path, "told")
    ids = [ord(c) - ord("!") for c in "12*3=36"]
    valid = replace(
        tiny_moe.sequence(ids, 5, rollout_logprobs=np.array([-0.25, -1.0]), reward=1.0),
        reward_parts={"exact": 1.0, "format": float("nan")},
        policy_versions_R=np.array([3, 4]),
    )
    shown = Shown(valid, 0.75, (0, 0), np.array([-0.5, -1.0000004], np.float32), np.array([0, 2]))
    invalid = replace(
        tiny_moe.sequence(ids, 5, rollout_logprobs=np.array([np.nan, -1.0]), valid=False),
        sample=1,
        reward=float("inf"),
    )
    long_ids = np.zeros(MOST_TOKENS + 60, np.int32)
    long = replace(tiny_moe.sequence(long_ids, 50), sample=2)
    writer.write(0, 9, {19: [shown, Shown(invalid, 0.0, None), Shown(long, 0.0, (0, 1))]})
    first, second, third = read(client, "told")[19]
    assert json.loads(first.model_dump_json()) == {
        "attempt": 0,
        "step": 19,
        "lap": 9,
        "slot": 0,
        "sample": 0,
        "policy_version": 4,
        "reward": 1.0,
        "reward_parts": {"exact": 1.0, "format": None},
        "advantage": 0.75,
        "truncated": False,
        "valid": True,
        "invalid_reason": "",
        "prompt": "12*3=",
        "response": "36",
        "tokens": ["3", "6"],
        "rollout_logprobs": [-0.25, -1.0],
        "proximal_logprobs": [-0.5, -1.0],
        "experts_differ": [0, 2],
    }
    assert (second.valid, second.reward, second.rollout_logprobs) == (False, None, [None, -1.0])
    assert second.invalid_reason == "a test says so"
    assert second.proximal_logprobs is None
    assert second.experts_differ is None
    assert (len(third.response), len(third.tokens)) == (MOST_TOKENS + 10, MOST_TOKENS)
    raw = client.hget(samples_key("told"), sample_field(0, 19, 2))
    assert len(raw) < 20 * MOST_TOKENS  # type: ignore[arg-type]


def test_lists_of_other_lengths_are_no_sample() -> None:
    values = {
        **dict.fromkeys(("attempt", "step", "lap", "slot", "sample", "policy_version"), 1),
        **{"reward": 1, "reward_parts": {}, "advantage": 0, "truncated": False, "valid": True},
        **{"invalid_reason": "", "prompt": "", "response": "ab", "tokens": ["a", "b"]},
        **{"rollout_logprobs": [-1, -1], "proximal_logprobs": [-1], "experts_differ": None},
    }
    with pytest.raises(ValueError, match="2 entries"):
        Sample.model_validate(values)
