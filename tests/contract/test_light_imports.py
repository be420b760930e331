"""What must stay light stays light: every module imported in a fresh process loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
heavy = {{"torch", "transformers", "vllm", "megatron"}} & set(sys.modules)
sys.exit(f"{package} loads {{sorted(heavy)}}" if heavy else 0)
"""


@pytest.mark.parametrize("package", ["keel", "keel_gateway", "keel_rollout.collector"])
def test_loads_no_torch(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(package=package)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    ["keel_rollout.servicer", "keel_rollout.engine_main", "keel_trainer.main"],
)
def test_service_fronts_load_no_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_contract_needs_no_redis() -> None:
    script = _SCRIPT.format(package="keel").replace('"vllm"', '"redis"')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
