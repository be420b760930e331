"""Every architecture in the trainer: replay by its own rule, against experts forced by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from architectures import DENSE, MOE_LAYERS, SPARSE, forced, forced_gradients, tiny_model
from safetensors.torch import load_file

from keel.errors import ModelError
from keel_trainer.algo.objective import minirl_loss
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import MicroBatch, collate
from keel_trainer.diagnostics import metrics, replay_stats
from keel_trainer.router_seam import GateRule, RouterSeam, ask, find_routers, gate_weights

PROBE = list(range(2, 40))


@pytest.fixture(scope="module")
def micro() -> MicroBatch:
    return collate(tiny_moe.random_sequences(12), np.random.default_rng(1).standard_normal(12))


def loss_of(micro: MicroBatch) -> Any:
    def loss_fn(policy_NT: torch.Tensor) -> Any:
        return minirl_loss(
            policy_NT,
            None,
            micro.rollout_logprobs_NT,
            micro.advantages_NT,
            micro.mask_NT,
            denominator=20.0,
        )

    return loss_fn


def disjoint_from(natural_NTLK: torch.Tensor) -> torch.Tensor:
    """2 distinct experts of 16 that the router did not choose, for every (position, layer)."""
    taken = torch.zeros(*natural_NTLK.shape[:-1], 16)
    taken.scatter_(-1, natural_NTLK.long(), 1.0)
    return taken.argsort(dim=-1, stable=True)[..., 5:7].to(natural_NTLK.dtype)


def logprobs_of(model: Any, micro: MicroBatch) -> torch.Tensor:
    """By a plain forward, 0 where no response token is."""
    logits_NTV = model(input_ids=micro.input_ids_NT, use_cache=False).logits
    logprobs_NTV = logits_NTV.log_softmax(-1)
    logprobs_NT = logprobs_NTV.gather(-1, micro.targets_NT[..., None]).squeeze(-1)
    return logprobs_NT.masked_fill(~micro.mask_NT, 0)


@pytest.mark.parametrize("name", SPARSE)
def test_replay_equals_forced_experts_with_every_gradient(name: str, micro: MicroBatch) -> None:
    """Routes disjoint from the natural ones; log-probs to 1e-5, gradients to 1e-5 of the largest;
    every router learns; every prescribed pair is obeyed.
    """
    model = tiny_model(SPARSE[name])
    backend = TorchBackend(model)
    natural_NTLK = backend.score(micro, temperature=1.0).natural_NTLK
    assert natural_NTLK is not None
    routes_NTLK = disjoint_from(natural_NTLK)

    # padding keeps natural routes under replay, and cannot reach a real position
    reference = forced(model, SPARSE[name], routes_NTLK)
    expected_NT = logprobs_of(reference, micro)
    loss, _ = loss_of(micro)(expected_NT)
    loss.backward()

    output = backend.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes_NTLK)
    assert output.dispatched_NTLK is not None
    torch.testing.assert_close(output.policy_logprobs_NT, expected_NT.detach(), atol=1e-5, rtol=0)
    row = metrics(replay_stats(routes_NTLK, output.dispatched_NTLK, micro.routes_mask_NT))
    real = int(micro.fed_mask_NT.sum())
    assert row["replay/rows_requested"] == row["replay/rows_obeyed"] == 2 * real > 0
    theirs = forced_gradients(reference)
    for parameter, own in model.named_parameters():
        largest = theirs[parameter].abs().max()
        assert largest > 0, parameter
        torch.testing.assert_close(own.grad, theirs[parameter], atol=1e-5 * largest, rtol=0)
    # the reference is another forward than the natural one
    assert (expected_NT - logprobs_of(model, micro)).abs().max() > 0.01


@pytest.mark.parametrize("name", SPARSE)
def test_natural_routes_replayed_change_no_bit(name: str, micro: MicroBatch) -> None:
    """Whatever order the router or the wire gave the ids; a plain forward agrees to 1e-6."""
    model = tiny_model(SPARSE[name])
    backend = TorchBackend(model)
    scored = backend.score(micro, temperature=1.0)
    assert scored.natural_NTLK is not None
    for routes_NTLK in (scored.natural_NTLK, scored.natural_NTLK.flip(-1)):
        again = backend.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes_NTLK)
        assert torch.equal(again.policy_logprobs_NT, scored.logprobs_NT)
    with torch.no_grad():
        plain_NT = logprobs_of(model, micro)
    torch.testing.assert_close(scored.logprobs_NT, plain_NT, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek-v3"])
def test_recomputed_layers_route_alike_and_without_noise(name: str, micro: MicroBatch) -> None:
    """Checkpointing needs train mode, where Mixtral would jitter what its router sees."""
    config = SPARSE[name] | ({"router_jitter_noise": 0.5} if name == "mixtral" else {})
    routes_NTLK = micro.engine_routes_NTLK
    outputs, gradients = [], []
    for checkpointing in (False, True):
        model = tiny_model(config)
        backend = TorchBackend(model, gradient_checkpointing=checkpointing)
        outputs.append(
            backend.update(micro, loss_of(micro), temperature=1.0, routes_NTLK=routes_NTLK)
        )
        gradients.append({key: own.grad for key, own in model.named_parameters()})
    assert torch.equal(outputs[0].policy_logprobs_NT, outputs[1].policy_logprobs_NT)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", SPARSE | DENSE)
def test_a_backend_says_what_it_found(name: str) -> None:
    backend = TorchBackend(tiny_model((SPARSE | DENSE)[name]))
    info = backend.info
    assert info.moe_layer_numbers == MOE_LAYERS.get(name, ())
    assert (info.num_experts, info.top_k) == ((16, 2) if name in SPARSE else (0, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPARSE | DENSE)
def test_weights_are_the_checkpoint_and_survive_it(
    name: str, dtype: str, tmp_path: Path, micro: MicroBatch
) -> None:
    """After a step: names and bits as on disk; loaded again, the same log-probs to the last bit."""
    tiny_model((SPARSE | DENSE)[name]).save_pretrained(tmp_path / "base")
    backend = TorchBackend.from_pretrained(tmp_path / "base", dtype=dtype)
    backend.update(micro, loss_of(micro), temperature=1.0)
    assert backend.step(1e-3) > 0
    backend.save_pretrained(tmp_path / "trained")
    on_disk = load_file(tmp_path / "trained" / "model.safetensors")
    sent = dict(backend.weights())
    assert sent.keys() == on_disk.keys() == load_file(tmp_path / "base/model.safetensors").keys()
    for tensor in on_disk:
        assert torch.equal(sent[tensor], on_disk[tensor]), tensor
    again = TorchBackend.from_pretrained(tmp_path / "trained", dtype=dtype)
    assert again.probe_logprobs(PROBE) == backend.probe_logprobs(PROBE)


def test_the_selection_bias_is_sent_in_float32_and_never_trained(
    tmp_path: Path, micro: MicroBatch
) -> None:
    tiny_model(SPARSE["deepseek-v3"]).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    backend = TorchBackend.from_pretrained(tmp_path, dtype="bfloat16")
    backend.update(micro, loss_of(micro), temperature=1.0)
    backend.step(1e-2)
    after = dict(backend.weights())
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name in biases:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name])
        assert after[name].abs().max() > 0.1
    router = "model.layers.1.mlp.gate.weight"
    assert not torch.equal(after[router], before[router].bfloat16())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("qwen3-moe", GateRule("softmax", True, 1.0)),
        ("qwen3-moe-open", GateRule("softmax", False, 1.0)),
        ("mixtral", GateRule("softmax", True, 1.0)),
        ("olmoe", GateRule("softmax", False, 1.0)),
        ("deepseek-v3", GateRule("sigmoid", True, 2.5)),
        ("deepseek-v3-lora", GateRule("sigmoid", False, 2.5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_found_by_asking_even_where_weights_are_zero(
    name: str, rule: GateRule, dtype: torch.dtype
) -> None:
    """With zero weights all rules that renormalise coincide; asking brings weights of its own."""
    routers = find_routers(tiny_model(SPARSE[name]).to(dtype))
    assert len(routers) == 2
    for place, router in routers.items():
        before = {key: value.clone() for key, value in router.state_dict().items()}
        assert ask(place, router).rule == rule
        for key, value in router.state_dict().items():
            assert torch.equal(value, before[key])
        torch.nn.init.zeros_(router.weight)
        assert ask(place, router).rule == rule


def test_weights_of_experts_whose_scores_vanish_are_finite() -> None:
    """exp(-200) is 0 in float32: a replayed set may have no probability at all."""
    logits_SE = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    weights_SK, _ = gate_weights(
        logits_SE, torch.tensor([[1, 2]]), GateRule("softmax", True, 1.0), torch.float32
    )
    assert torch.equal(weights_SK, torch.zeros(1, 2))


class SelectionTopKRouter(torch.nn.Module):
    """Weighs by what it selects with: the bias enters the weights, unlike DeepSeek's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(16, 8))
        self.bias = torch.nn.Buffer(torch.zeros(16))

    def forward(self, hidden_SH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_SE = hidden_SH @ self.weight.T
        weights_SK, ids_SK = (logits_SE.sigmoid() + self.bias).topk(2)
        return logits_SE, weights_SK, ids_SK


class Nameless(torch.nn.Linear):
    """A router that only its block knows to be one."""


def block_with(router: torch.nn.Module) -> torch.nn.Module:
    block = torch.nn.Module()
    block.gate, block.experts = router, torch.nn.Linear(8, 8)
    return torch.nn.Sequential(block)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            block_with(SelectionTopKRouter()),
            ["0.gate", "SelectionTopKRouter", "a rule that replay"],
        ),
        (block_with(Nameless(8, 16)), ["Sequential: 0", "cannot be replayed", "TopKRouter"]),
        (torch.nn.Sequential(SelectionTopKRouter()), ["cannot be replayed", "`experts`"]),
    ],
)
def test_an_unknown_router_is_refused_by_name(model: torch.nn.Module, words: list[str]) -> None:
    """A wrong rule; experts whose router has no known type; a router without experts."""
    with pytest.raises(ModelError) as refusal:
        RouterSeam(model)
    assert all(word in str(refusal.value) for word in words), refusal.value
