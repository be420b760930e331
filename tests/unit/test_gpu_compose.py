"""docker-compose.gpu.yml says what its header promises. It cannot run here: no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_gpu_engine_is_pinned_on_loopback_unprivileged_and_watched() -> None:
    """One version of vLLM, by number, in every place; no port but on 127.0.0.1; not root."""
    text = (ROOT / "docker-compose.gpu.yml").read_text()
    (service,) = yaml.safe_load(text)["services"].values()
    assert "THIS HAS NOT RUN" in text
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"]
    assert not {"privileged", "network_mode", "volumes"} & service.keys()
    file = (ROOT / service["build"]["dockerfile"]).read_text()
    assert re.findall(r"^FROM (\S+)", file, re.MULTILINE) == ["vllm/vllm-openai:v0.33.0"]
    assert "== '0.33.0'" in file
    assert re.search(r"^USER [1-9]\d*$", file, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*HealthStub", file, re.MULTILINE)
    assert file.index("USER ") < file.index("ENTRYPOINT")
    for source in re.findall(r"^COPY (\S+)", file, re.MULTILINE):
        assert (ROOT / source / "pyproject.toml").is_file()
