# The vLLM engine on NVIDIA GPUs: vLLM's own image, pinned, with keel-engine on top.
# Never built nor run: no GPU was at hand, and the image could not be fetched.
FROM vllm/vllm-openai:v0.33.0

WORKDIR /keel
COPY protos protos
COPY services/rollout services/rollout
# not the extra [vllm], which is vLLM for CPUs: torch, transformers and vllm are the image's own
RUN python3 -m pip install --no-cache-dir ./protos ./services/rollout \
    && python3 -c "from importlib.metadata import version; assert version('vllm') == '0.33.0'"

# vLLM, Triton and torch write their caches there
RUN useradd --uid 10001 --create-home keel
USER 10001
ENV HOME=/home/keel HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1

EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python3", "-c", "import grpc; from grpc_health.v1 import health_pb2, health_pb2_grpc as h; assert h.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(health_pb2.HealthCheckRequest(), timeout=4).status == 1"]
ENTRYPOINT ["keel-engine", "--kind", "vllm", "--device", "cuda"]
CMD ["--listen", "0.0.0.0:50051"]
