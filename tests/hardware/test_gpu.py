"""What only an NVIDIA GPU can show: the contract of both adapters on it, and a whole deploy.

python -m pytest -m hardware tests/hardware/test_gpu.py -v
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from contract import TargetContract

from edgeprune.profile import Profile, load_profile
from edgeprune.target import examine_target

ROOT = Path(__file__).parents[2]
COMMAND = "python -m pytest -m hardware tests/hardware/test_gpu.py -v"

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    pytest.skip(f"no NVIDIA driver; on a machine with a GPU: {COMMAND}", allow_module_level=True)


def problems(name: str) -> list[str]:
    """Return why a profile cannot be used on this machine."""
    findings = examine_target(load_profile(name))
    return [f"{each.subject}: {each.found}; {each.mend}" for each in findings if each.severity == "problem"]


def needs(name: str) -> pytest.MarkDecorator:
    """Skip where the profile cannot be used, saying what is missing and the command that runs this where it can."""
    missing = problems(name)
    return pytest.mark.skipif(bool(missing), reason=f"{'; '.join(missing)}; on a machine with a GPU: {COMMAND}")


pytestmark = pytest.mark.hardware
EXACT = {"precision": "fp32"}
"""The contract compares to 1e-4 of ONNX Runtime."""


@needs("nvidia-gpu")
class TestTensorRtOnAGpu(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return load_profile("nvidia-gpu", EXACT)


@needs("nvidia-gpu-torch")
class TestTorchOnAGpu(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return load_profile("nvidia-gpu-torch", EXACT)


@needs("nvidia-gpu-torch")
class TestAotInductorOnAGpu(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return load_profile("nvidia-gpu-torch", EXACT | {"options": {"compiler": "aot_inductor"}})


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [pytest.param(each, marks=needs(each)) for each in ("nvidia-gpu", "nvidia-gpu-torch")])
def test_the_embedded_example_is_deployed_to_the_gpu(name: str, tmp_path: Path) -> None:
    """Trained, pruned, timed on the GPU, fine-tuned, packed; the bundle's manifest says on which GPU."""
    command = [sys.executable, "-m", "edgeprune", "deploy", "--config", str(ROOT / "examples/fashion/edgeprune.toml")]
    done = subprocess.run(
        [*command, "--target", name, "--budget", "0.9x", "--out", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["status"] == "ok"
    assert '"gpu"' in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="pip install nvidia-ml-py")
@needs("nvidia-gpu-torch")
def test_the_driver_tells_clocks_temperature_and_throttling() -> None:
    """What a measurement's conditions are made of; None where this GPU does not tell."""
    from edgeprune.targets._cuda_driver import Driver
    from edgeprune.targets._nvml import Gpu

    seen = Gpu(Driver(0).facts()["bus_id"]).read()
    assert seen["sm_mhz"] > 0
    assert seen["temperature_c"] > 0
    assert seen["throttling"] is not None
