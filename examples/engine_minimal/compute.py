"""What computes: the model in its versions, a group, and its sequences."""

import itertools
import json
import math
import struct
from types import SimpleNamespace

import grpc
import numpy as np
import torch
import transformers
import xxhash
from transformers.core_model_loading import revert_weight_conversion

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2 as seq
from keel.types.v1 import tensor_pb2 as ten
from keel.weights.v1 import manifest_pb2 as man

ARCHITECTURES = [
    *("Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
]
TORCH = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}  # by keel.types.v1.DType
FLUSH_TOKENS = 256
INVALID, STATE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
LOST = grpc.StatusCode.DATA_LOSS
transformers.utils.logging.disable_progress_bar()


class Refusal(Exception):
    """Becomes the status of a call."""


def need(holds, field, value, valid, code=INVALID):
    """Refuses by field, value, and what would be valid."""
    if not holds:
        raise Refusal(code, f"{field}: {value!r} is not valid; valid: {valid}")


def pack(array, dtype):
    """An array as it travels."""
    return ten.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def token_ids(tensor, field, loaded, least):
    """The ids in an int32 [T] tensor."""
    need(tensor.dtype == ten.D_TYPE_INT32, f"{field}.dtype", tensor.dtype, "D_TYPE_INT32")
    shape, longest = list(tensor.shape), loaded.max_sequence_tokens
    fits = len(shape) == 1 and least <= shape[0] <= longest
    need(fits, f"{field}.shape", shape, f"[T], T from {least} to {longest}")
    need(len(tensor.data) == 4 * shape[0], f"{field}.data", len(tensor.data), "4 bytes a token")
    ids = np.frombuffer(tensor.data, "<i4").tolist()
    for place, token in enumerate(ids):
        known = 0 <= token < loaded.vocab_size
        need(known, f"{field}[{place}]", token, f"0 to {loaded.vocab_size - 1}")
    return ids


def routers(net):
    """The modules that choose experts, by layer number: in transformers, SOMETHINGTopKRouter."""
    found = [(name, m) for name, m in net.named_modules() if type(m).__name__.endswith("Router")]
    return {next(int(part) for part in name.split(".") if part.isdigit()): m for name, m in found}


class Model:
    """An architecture: its signature, the tensors that a version must have, and versions."""

    def __init__(self, files, precision):
        try:
            config = json.loads(files["config.json"])
            name = config["architectures"][0]
            need(name in ARCHITECTURES, "architectures", name, ARCHITECTURES)
            self.make, self.dtype = getattr(transformers, name), TORCH[precision.dtype]
            self.config = self.make.config_class.from_dict(config)
            with torch.device("meta"):
                net = self.make(self.config)
        except Refusal:
            raise
        except Exception as error:  # transformers judges a config by many types of its own
            need(
                False,
                "config.json",
                f"{type(error).__name__}: {error}",
                "that of a model, with architectures",
            )
        state = {k: v for k, v in net.state_dict().items() if k not in net.all_tied_weights_keys}
        state = revert_weight_conversion(net, state)  # one tensor an expert, as in checkpoints
        self.shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        noise = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
        plain = {key: value for key, value in config.items() if key not in noise}
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        tokenizer, gates = files.get("tokenizer.json"), routers(net)
        self.signature = pb.ModelSignature(
            architecture=name,
            config_xxh3=xxhash.xxh3_64_intdigest(canonical.encode()),
            tokenizer_xxh3=xxhash.xxh3_64_intdigest(tokenizer) if tokenizer is not None else 0,
            vocab_size=self.config.vocab_size,
            max_sequence_tokens=self.config.max_position_embeddings,
            moe_layers=list(gates),
            experts_per_token=max((gate.top_k for gate in gates.values()), default=0),
            num_experts=max((gate.num_experts for gate in gates.values()), default=0),
        )

    def check(self, manifest):
        """Refuses a manifest that is not a full version of this model."""
        need(not manifest.HasField("base_version"), "manifest.base_version", "set", "unset")
        stream = manifest.transport == man.WEIGHT_TRANSPORT_STREAM
        need(stream, "manifest.transport", manifest.transport, "WEIGHT_TRANSPORT_STREAM")
        names = [t.name for t in manifest.tensors]
        for name in names:
            need(name in self.shapes, "manifest.tensors.name", name, "a tensor of the model")
        whole = sorted(names) == sorted(self.shapes)
        lacks = sorted(self.shapes.keys() - {*names})[:1]
        need(whole, "manifest.tensors", f"without {lacks}", "every tensor of the model, once")
        digest = xxhash.xxh3_64()
        for t in sorted(manifest.tensors, key=lambda t: t.name):
            shape, extents = self.shapes[t.name], ",".join(map(str, t.shape))
            need(t.shape == shape, f"manifest.tensors[{t.name}].shape", list(t.shape), shape)
            need(t.dtype in TORCH, f"manifest.tensors[{t.name}].dtype", t.dtype, "a float type")
            digest.update(f"{t.name}|{t.dtype}|{extents}|{t.xxh3:016x}\n".encode())
        mark, found = manifest.fingerprint, digest.intdigest()
        need(mark == found, "manifest.fingerprint", mark, found, LOST)

    def version(self, manifest, staged):
        """A new model, made beside the one that is served: nothing can fail half-way."""
        tensors = {}
        for t in manifest.tensors:
            data, dtype = staged[t.name], TORCH[t.dtype]
            size = math.prod(t.shape) * dtype.itemsize
            need(len(data) == size, t.name, f"{len(data)} bytes", f"{size} bytes", STATE)
            hashed = xxhash.xxh3_64_intdigest(data)
            need(hashed == t.xxh3, f"xxh3 of {t.name}", hashed, t.xxh3, LOST)
            tensors[t.name] = torch.frombuffer(data, dtype=dtype).reshape(*t.shape)
        loading = {"config": self.config, "state_dict": tensors, "dtype": self.dtype}
        net = self.make.from_pretrained(None, **loading).eval()
        routes = []  # of the last pass, a tensor [tokens, K] for each MoE layer
        for gate in routers(net).values():
            gate.register_forward_hook(lambda _module, _inputs, output: routes.append(output[2]))
        return SimpleNamespace(
            net=net,
            routes=routes,
            experts=self.signature.num_experts,
            version=manifest.policy_version,
            mark=manifest.fingerprint,
        )


@torch.inference_mode()
def probe(served, ids):
    """Log-probs [T - 1] of tokens 1..T-1 at temperature 1."""
    logprobs_TV = served.net(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


class Sequence:
    """One response: what was sampled, and how much of it was sent."""

    def __init__(self, sample, prompt):
        self.sample, self.prompt, self.tokens = sample, len(prompt), list(prompt)
        self.logprobs, self.versions = [], []  # of each response token
        self.routes = []  # [L, K] of each position that was fed
        self.sent, self.sent_rows = 0, 0
        self.reason = seq.FINISH_REASON_UNSPECIFIED

    def chunks(self):
        """What was not sent yet."""
        while self.sent < len(self.logprobs) or self.sent_rows < len(self.routes):
            chunk = pb.SequenceChunk(sample=self.sample)
            logprobs = self.logprobs[self.sent :][:FLUSH_TOKENS]
            tokens = self.tokens[self.prompt + self.sent :][:FLUSH_TOKENS]
            rows = self.routes[self.sent_rows :][:FLUSH_TOKENS]
            if tokens:
                chunk.token_ids.CopyFrom(pack(np.int32(tokens), ten.D_TYPE_INT32))
                chunk.rollout_logprobs.CopyFrom(pack(np.float32(logprobs), ten.D_TYPE_FLOAT32))
            if rows:
                dtype = ten.D_TYPE_UINT8 if rows[0].itemsize == 1 else ten.D_TYPE_UINT16
                chunk.routes.CopyFrom(pack(np.stack(rows), dtype))
            self.sent += len(tokens)
            self.sent_rows += len(rows)
            yield pb.GenerateResponse(chunk=chunk)

    def complete(self):
        """The end: lengths, the hash of all rows, and which version made which tokens."""
        end = pb.SequenceComplete(
            sample=self.sample,
            finish_reason=self.reason,
            response_tokens=len(self.logprobs),
            route_rows=len(self.routes),
            routes_valid=bool(self.routes),
        )
        if self.routes:
            end.routes_xxh3 = xxhash.xxh3_64_intdigest(np.stack(self.routes).tobytes())
        place = self.prompt
        for version, run in itertools.groupby(self.versions):
            begin, place = place, place + len(list(run))
            end.policy_versions.add(span=seq.Span(begin=begin, end=place), policy_version=version)
        return pb.GenerateResponse(complete=end)


class Group:
    """The responses to one prompt. What is alive has one length, so there is no padding."""

    def __init__(self, request, prompt):
        self.sampling, self.seed, self.routed = request.sampling, request.seed, request.with_routes
        self.sequences = [Sequence(sample, prompt) for sample in range(request.num_samples)]
        self.alive = list(self.sequences)
        self.version, self.cache = None, None

    @torch.inference_mode()
    def step(self, served):
        """One more token for everything alive, by the weights that are served."""
        if self.version != served.version:  # the first step, or other weights: no old cache
            self.version, self.cache = served.version, None
        fed = [s.tokens if self.cache is None else s.tokens[-1:] for s in self.alive]
        served.routes.clear()
        ids = torch.tensor(fed)
        out = served.net(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        how = self.sampling
        logprobs_NV = (out.logits[:, -1].float() / (how.temperature or 1)).log_softmax(-1)
        tokens_N1 = self.draw(logprobs_NV)
        logprobs_N = logprobs_NV.gather(-1, tokens_N1)[:, 0].tolist()
        if self.routed:
            dtype = np.uint8 if served.experts <= 256 else np.uint16
            rows = torch.stack(served.routes, 1).numpy().astype(dtype)  # [N * fed, L, K]
            rows = rows.reshape(len(fed), -1, *rows.shape[1:])
        for row, s in enumerate(self.alive):
            if self.routed:  # a prefix fed again, under new weights, keeps its old rows
                s.routes += list(rows[row, len(s.routes) - len(s.tokens) :])
            s.tokens.append(int(tokens_N1[row]))
            s.logprobs.append(logprobs_N[row])
            s.versions.append(served.version)
            if s.tokens[-1] in how.stop_token_ids:
                s.reason = seq.FINISH_REASON_STOP
            elif len(s.logprobs) == how.max_tokens:
                s.reason = seq.FINISH_REASON_LENGTH
        kept = [row for row, s in enumerate(self.alive) if not s.reason]
        if len(kept) < len(self.alive):
            self.alive = [self.alive[row] for row in kept]
            self.cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))

    def abort(self):
        """Ends what is alive."""
        for s in self.alive:
            s.reason = seq.FINISH_REASON_ABORTED
        self.alive = []

    def draw(self, logprobs_NV):
        """Tokens [N, 1]; each draw is a function of (seed, sample, position) alone."""
        how, mass_NV = self.sampling, logprobs_NV.double().exp()
        top_k = how.top_k if how.temperature else 1  # temperature 0: the likeliest
        top_p = how.top_p if how.HasField("top_p") else 1
        if top_k or top_p < 1:  # evaluation only
            sorted_NV, order_NV = mass_NV.sort(dim=-1, descending=True, stable=True)
            sorted_NV[:, top_k or sorted_NV.shape[1] :] = 0
            before_NV = sorted_NV.cumsum(-1) - sorted_NV
            sorted_NV[before_NV >= top_p * sorted_NV.sum(-1, keepdim=True)] = 0
            mass_NV = torch.zeros_like(mass_NV).scatter(-1, order_NV, sorted_NV)
        places = [struct.pack("<QII", self.seed, s.sample, len(s.tokens)) for s in self.alive]
        bits = [xxhash.xxh3_64_intdigest(place) >> 12 for place in places]
        uniform_N1 = torch.tensor(bits, dtype=torch.float64)[:, None] * 2.0**-52
        upto_NV = mass_NV.cumsum(-1)
        tokens_N1 = torch.searchsorted(upto_NV, uniform_N1 * upto_NV[:, -1:], right=True)
        return tokens_N1.clamp(max=mass_NV.shape[-1] - 1)  # where log-probs are not finite
