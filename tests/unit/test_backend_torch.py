"""The torch backend: replay, gradients, masters, exact state, and the folders it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_moe
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
)

from keel.errors import IntegrityError, ModelError
from keel_trainer.algo.objective import minirl_loss, sft_loss
from keel_trainer.backends.base import Backend
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import MicroBatch, collate
from keel_trainer.diagnostics import merge, metrics, replay_stats
from keel_trainer.router_seam import RouterSeam


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_moe.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def backend(folder) -> TorchBackend:
    return TorchBackend.from_pretrained(folder)


@pytest.fixture(scope="module")
def micro() -> MicroBatch:
    rng = np.random.default_rng(1)
    return collate(tiny_moe.random_sequences(12), rng.standard_normal(12))


def loss_of(micro: MicroBatch, proximal=None, **switches):
    switches.setdefault("denominator", 20.0)

    def loss_fn(policy_NT):
        return minirl_loss(
            policy_NT,
            proximal,
            micro.rollout_logprobs_NT,
            micro.advantages_NT,
            micro.mask_NT,
            **switches,
        )

    return loss_fn


def gradients(backend: TorchBackend) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in backend.model.named_parameters()}


def disjoint_from(natural: torch.Tensor) -> torch.Tensor:
    """K distinct experts that the router did not choose, for every (position, layer)."""
    taken = torch.zeros(*natural.shape[:-1], tiny_moe.EXPERTS)
    taken.scatter_(-1, natural.long(), 1.0)
    return taken.argsort(dim=-1, stable=True)[..., : tiny_moe.TOP_K].to(natural.dtype)


def test_it_is_a_backend_and_says_what_it_loaded(backend):
    checked: Backend = backend
    assert checked.info.model_type == "qwen3_moe"
    assert checked.info.moe_layer_numbers == (0, 1)
    assert (checked.info.num_experts, checked.info.top_k) == (16, 2)
    assert (checked.info.vocab_size, checked.info.max_positions) == (64, 512)
    assert checked.info.parameters == 905_984
    assert checked.info.route_shape.moe_layers == 2


def test_scores_are_log_softmax_over_temperature_at_response_tokens(backend, micro):
    logits = backend.model(input_ids=micro.input_ids_NT).logits.detach()
    expected = (logits / 0.7).log_softmax(-1).gather(-1, micro.targets_NT[..., None]).squeeze(-1)
    scored = backend.score(micro, temperature=0.7).logprobs_NT
    torch.testing.assert_close(scored, expected.masked_fill(~micro.mask_NT, 0), atol=1e-6, rtol=0)
    assert scored.dtype == torch.float32


def test_first_update_under_r2_equals_the_scoring_pass_bit_for_bit(backend, micro):
    """And so does the unreplayed forward: natural routes replayed change no bit."""
    scored = backend.score(micro, temperature=0.9)
    natural = backend.update(micro, loss_of(micro), temperature=0.9)
    unreplayed = gradients(backend)
    backend.model.zero_grad()
    replayed = backend.update(
        micro, loss_of(micro), temperature=0.9, routes_NTLK=scored.natural_NTLK
    )
    assert torch.equal(natural.policy_logprobs_NT, scored.logprobs_NT)
    assert torch.equal(replayed.policy_logprobs_NT, scored.logprobs_NT)
    assert torch.equal(replayed.natural_NTLK, scored.natural_NTLK)
    for name, gradient in gradients(backend).items():
        torch.testing.assert_close(gradient, unreplayed[name], rtol=1e-5, atol=1e-8)


def test_the_order_of_replayed_ids_changes_no_bit(backend, micro):
    routes = micro.engine_routes_NTLK
    one = backend.score(micro, temperature=1.0, routes_NTLK=routes)
    two = backend.score(micro, temperature=1.0, routes_NTLK=routes.flip(-1))
    assert torch.equal(one.logprobs_NT, two.logprobs_NT)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def test_obedience_is_proved_with_routes_disjoint_from_the_natural_ones(backend, micro):
    routes = disjoint_from(backend.score(micro, temperature=1.0).natural_NTLK)
    output = backend.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes)
    row = metrics(replay_stats(routes, output.dispatched_NTLK, micro.routes_mask_NT))
    real = int(micro.fed_mask_NT.sum())
    assert row["replay/rows_requested"] == row["replay/rows_obeyed"] == real * 2 > 0


def test_a_planted_backend_that_ignores_replay_scores_0(folder, micro):
    class Disobedient(TorchBackend):
        def update(self, micro, loss_fn, *, temperature, routes_NTLK=None):
            return super().update(micro, loss_fn, temperature=temperature)

    planted = Disobedient.from_pretrained(folder)
    natural = planted.score(micro, temperature=1.0).natural_NTLK
    routes = disjoint_from(natural)
    output = planted.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes)
    row = metrics(replay_stats(routes, output.dispatched_NTLK, micro.routes_mask_NT))
    assert row["replay/rows_requested"] > 0
    assert row["replay/rows_obeyed"] == 0


def test_padding_and_invalid_sequences_keep_natural_routes(backend):
    sequences = tiny_moe.random_sequences(4)
    sequences[1] = tiny_moe.sequence(sequences[1].token_ids_T, 3, valid=False)
    micro = collate(sequences)
    output = backend.update(
        micro, loss_of(micro), temperature=1.0, routes_NTLK=micro.engine_routes_NTLK
    )
    elsewhere = ~micro.routes_mask_NT
    assert elsewhere[1].all()
    dispatched, natural = output.dispatched_NTLK[elsewhere], output.natural_NTLK[elsewhere]
    assert torch.equal(dispatched, natural)
    assert (dispatched[..., 0] != dispatched[..., 1]).all()


def test_gradient_checkpointing_replays_the_same_routes_and_records_once(folder, micro, backend):
    checkpointed = TorchBackend.from_pretrained(folder, gradient_checkpointing=True)
    routes = micro.engine_routes_NTLK
    outputs = [
        b.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes)
        for b in (backend, checkpointed)
    ]
    assert torch.equal(outputs[0].policy_logprobs_NT, outputs[1].policy_logprobs_NT)
    assert torch.equal(outputs[0].dispatched_NTLK, outputs[1].dispatched_NTLK)
    plain = gradients(backend)
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("routed", [False, True])
def test_split_permutation_and_padding_change_nothing_beyond_rounding(backend, routed):
    sequences = tiny_moe.random_sequences(10, seed=3)
    advantages = np.random.default_rng(0).standard_normal(10)

    def run(order, cuts):
        backend.model.zero_grad()
        stats, logprobs = [], {}
        for part in np.split(order, cuts):
            micro = collate([sequences[i] for i in part], advantages[part])
            output = backend.update(
                micro,
                loss_of(micro, is_cap=None),
                temperature=1.0,
                routes_NTLK=micro.engine_routes_NTLK if routed else None,
            )
            stats.append(output.stats)
            for row, index in enumerate(part):
                logprobs[int(index)] = output.policy_logprobs_NT[row][micro.mask_NT[row]]
        return gradients(backend), metrics(merge(stats)), logprobs

    whole, row, logprobs = run(np.arange(10), [])
    other, other_row, other_logprobs = run(np.random.default_rng(7).permutation(10), [1, 2, 6])
    for name in whole:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-4, atol=2e-6)
    for index in logprobs:
        torch.testing.assert_close(other_logprobs[index], logprobs[index], rtol=0, atol=1e-5)
    for key, value in row.items():
        assert other_row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_entropy_is_over_the_full_vocabulary(backend, micro):
    output = backend.update(micro, loss_of(micro), temperature=0.5)
    logprobs = (backend.model(input_ids=micro.input_ids_NT).logits / 0.5).log_softmax(-1).detach()
    expected = -(logprobs.exp() * logprobs).sum(-1).masked_fill(~micro.mask_NT, 0)
    torch.testing.assert_close(output.entropy_NT, expected, atol=1e-5, rtol=0)


def test_a_step_is_adamw_with_clipping_and_returns_the_norm_before_it(folder, micro):
    backend = TorchBackend.from_pretrained(
        folder, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_clip=0.01
    )
    reference = AutoModelForCausalLM.from_pretrained(folder)
    backend.update(micro, loss_of(micro, denominator=1.0), temperature=1.0)
    for parameter, ours in zip(reference.parameters(), backend.model.parameters(), strict=True):
        parameter.grad = ours.grad.clone()
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    adamw.step()
    assert backend.step(1e-3) == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.01
    for parameter, ours in zip(reference.parameters(), backend.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter, rtol=1e-6, atol=1e-8)
        assert ours.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing(backend, micro):
    backend.update(micro, loss_of(micro), temperature=1.0)
    backend.step(1e-3)
    before = backend.state_dict()
    backend.update(micro, lambda policy: (policy.sum() * float("nan"), {}), temperature=1.0)
    assert not np.isfinite(backend.step(1e-3))
    after = backend.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def train(backend: TorchBackend, laps: range) -> None:
    for lap in laps:
        micro = collate(tiny_moe.random_sequences(6, seed=lap), np.linspace(-1, 1, 6))
        backend.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=micro.engine_routes_NTLK)
        backend.step(1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact(folder, dtype):
    straight = TorchBackend.from_pretrained(folder, dtype=dtype)
    train(straight, range(3))
    saved = straight.state_dict()
    train(straight, range(3, 6))

    resumed = TorchBackend.from_pretrained(folder, dtype=dtype)
    resumed.load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), saved["rng/cpu"])
    train(resumed, range(3, 6))
    want, got = straight.state_dict(), resumed.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    for (name, a), (_, b) in zip(straight.weights(), resumed.weights(), strict=True):
        assert torch.equal(a, b), name


def test_going_back_before_the_first_step_forgets_the_moments(backend):
    start = backend.state_dict()
    train(backend, range(2))
    first = backend.state_dict()
    backend.load_state_dict(start)
    train(backend, range(2))
    second = backend.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def spoil_shape(state):
    state["master/lm_head.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_shape,
        lambda state: state.pop("master/lm_head.weight"),
        lambda state: state.pop("exp_avg/lm_head.weight"),
        lambda state: state.pop("rng/cpu"),
        lambda state: state.update({"master/other": torch.zeros(1)}),
    ],
)
def test_a_state_of_another_model_is_refused(backend, spoil):
    train(backend, range(1))
    state = backend.state_dict()
    spoil(state)
    with pytest.raises(IntegrityError, match="training state"):
        backend.load_state_dict(state)


def test_bfloat16_steps_on_float32_masters(folder):
    """At a learning rate of 1e-5, a step is less than half a bf16 ULP of most weights: bf16 alone
    would lose it, the masters keep all of it and the model gets it rounded.
    """
    backend = TorchBackend.from_pretrained(folder, dtype="bfloat16")
    start = backend.state_dict()["master/lm_head.weight"]
    before = dict(backend.weights())["lm_head.weight"].clone()
    train(backend, range(1))
    state = backend.state_dict()
    master, now = state["master/lm_head.weight"], dict(backend.weights())["lm_head.weight"]
    assert master.dtype == torch.float32
    assert now.dtype == torch.bfloat16
    assert torch.equal(now, master.bfloat16())
    backend.load_state_dict(state | {"master/lm_head.weight": start.clone()})
    micro = collate(tiny_moe.random_sequences(6, seed=9), np.linspace(-1, 1, 6))
    backend.update(micro, loss_of(micro), temperature=1.0)
    backend.step(1e-5)
    moved = backend.state_dict()["master/lm_head.weight"] != start
    kept_bits = dict(backend.weights())["lm_head.weight"] == before
    assert moved.float().mean() > 0.9
    assert kept_bits.float().mean() > 0.5


def test_bfloat16_gradients_add_up_in_float32(folder):
    backend = TorchBackend.from_pretrained(folder, dtype="bfloat16")
    micros = [collate(tiny_moe.random_sequences(3, seed=s), [1.0, -1.0, 0.5]) for s in range(3)]
    single = []
    for micro in micros:
        backend.update(micro, loss_of(micro), temperature=1.0)
        single.append(backend._optimizer._masters["lm_head.weight"].grad.clone())
        backend._optimizer._masters["lm_head.weight"].grad = None
    for micro in micros:
        backend.update(micro, loss_of(micro), temperature=1.0)
    total = backend._optimizer._masters["lm_head.weight"].grad
    assert total.dtype == torch.float32
    assert torch.equal(total, single[0] + single[1] + single[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_reloads_to_the_same_log_probs_and_names(folder, tmp_path, dtype):
    backend = TorchBackend.from_pretrained(folder, dtype=dtype)
    train(backend, range(2))
    backend.save_pretrained(tmp_path)
    again = TorchBackend.from_pretrained(tmp_path, dtype=dtype)
    tokens = list(range(20))
    assert again.probe_logprobs(tokens) == backend.probe_logprobs(tokens)
    on_disk = load_file(tmp_path / "model.safetensors")
    sent = dict(backend.weights())
    assert sent.keys() == on_disk.keys()
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in sent
    for name, tensor in on_disk.items():
        assert torch.equal(tensor, sent[name]), name


def test_a_tied_weight_is_sent_once(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_moe.config(tie_word_embeddings=True))
    backend = TorchBackend(model)
    backend.save_pretrained(tmp_path)
    assert dict(backend.weights()).keys() == load_file(tmp_path / "model.safetensors").keys()


def test_probe_equals_a_plain_forward(backend):
    tokens = torch.arange(3, 17)
    logits = backend.model(input_ids=tokens[None]).logits[0, :-1].detach()
    expected = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
    assert backend.probe_logprobs(tokens.tolist()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_sft_lowers_the_loss_and_never_replays(backend):
    micro = collate(tiny_moe.random_sequences(8))
    losses = []
    for _ in range(10):
        output = backend.update(
            micro,
            lambda policy: sft_loss(policy, micro.mask_NT, denominator=float(micro.tokens)),
            temperature=1.0,
        )
        assert torch.equal(output.dispatched_NTLK, output.natural_NTLK)
        backend.step(1e-3)
        losses.append(output.loss)
    assert losses[-1] < losses[0] - 0.5


def test_same_inputs_same_bits(folder):
    states = []
    for _ in range(2):
        backend = TorchBackend.from_pretrained(folder)
        train(backend, range(3))
        states.append(backend.state_dict())
    keys = [key for key in states[0] if not key.startswith("rng/")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in keys)


def test_a_batch_without_a_valid_token_gives_zeros(backend):
    micro = collate([tiny_moe.sequence([1, 2, 3], 1, valid=False)])
    assert not backend.score(micro, temperature=1.0).logprobs_NT.any()
    output = backend.update(micro, loss_of(micro), temperature=1.0)
    assert output.loss == 0
    assert all(not gradient.any() for gradient in gradients(backend).values())


def test_a_dense_model_trains_and_has_no_routes(micro):
    torch.manual_seed(0)
    backend = TorchBackend(AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=16)))
    assert not backend.info.is_moe
    assert backend.info.route_shape is None
    output = backend.update(micro, loss_of(micro), temperature=1.0)
    assert output.natural_NTLK is None
    assert output.dispatched_NTLK is None
    assert backend.step(1e-3) > 0


def test_a_dense_folder_loads(tmp_path):
    config = Qwen3Config(**SMALL, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert TorchBackend.from_pretrained(tmp_path).info.model_type == "qwen3"


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no config"):
        TorchBackend.from_pretrained(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="cannot load"):
        TorchBackend.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="float16"):
        TorchBackend.from_pretrained(tmp_path, dtype="float16")


def test_a_router_with_another_rule_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)

    class TanhTopKRouter(type(model.model.layers[0].mlp.gate)):
        def forward(self, hidden_SH):
            logits_SE = hidden_SH @ self.weight.T
            scores_SK, ids_SK = logits_SE.tanh().topk(self.top_k)
            return logits_SE, scores_SK, ids_SK

    for layer in model.model.layers:
        layer.mlp.gate = TanhTopKRouter(model.config).requires_grad_()
        torch.nn.init.normal_(layer.mlp.gate.weight)
    with pytest.raises(ModelError, match="TanhTopKRouter"):
        RouterSeam(model)


def test_r3_lowers_the_mismatch_on_the_same_sequences(folder):
    """An engine that went through e4m3: k3 of pi_old against mu, with its routes and without."""
    backend = TorchBackend.from_pretrained(folder)
    rng = np.random.default_rng(0)
    prompts = torch.from_numpy(rng.integers(0, 64, (64, 4)))
    # a little training makes the policy sharp enough for an expert to matter
    tiny_moe.cold_start(
        backend,
        [tiny_moe.sequence(np.cumsum(rng.integers(0, 9, 16)) % 64, 4) for _ in range(512)],
        steps=60,
    )
    micro = collate(tiny_moe.Engine(backend).sample(prompts, 12, seed=1))
    rows = {}
    for mode, routes in (("none", None), ("R3", micro.engine_routes_NTLK)):
        scored = backend.score(micro, temperature=1.0, routes_NTLK=routes)
        _, stats = minirl_loss(
            scored.logprobs_NT,
            None,
            micro.rollout_logprobs_NT,
            micro.advantages_NT,
            micro.mask_NT,
            denominator=1.0,
        )
        rows[mode] = metrics(stats)
    assert rows["none"]["mismatch/k3"] > 0
    assert rows["R3"]["mismatch/k3"] < 0.8 * rows["none"]["mismatch/k3"]
