"""The table of CPUs, and networks in half precision."""

import dataclasses

import pytest
from families import prepared

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tvm_on_host import gap, host_cpu

from edgeprune.errors import ProfileError
from edgeprune.targets._tvm.cpus import CPUS, cpu_of, native

HALF_TOLERANCE = 5e-3


@pytest.mark.parametrize(("arch", "name"), CPUS)
def test_llvm_knows_every_cpu_and_whether_it_computes_in_half(arch: str, name: str) -> None:
    import tvm

    cpu = cpu_of(arch, name)
    target = tvm.target.Target(cpu.target())
    features = set(tvm.target.codegen.llvm_get_cpu_features(target))
    assert tvm.target.codegen.llvm_is_valid_cpu(cpu.mcpu, cpu.triple)
    assert cpu.half == ("fullfp16" in features)
    assert {512: "avx512f", 256: "avx2", 128: "neon" if arch == "aarch64" else "sse2"}[cpu.bits] in features


def test_half_precision_doubles_the_lanes() -> None:
    assert cpu_of("aarch64", "cortex-a76").lanes == 4
    assert cpu_of("aarch64", "cortex-a76", "fp16").lanes == 8


@pytest.mark.parametrize(
    ("arch", "name", "precision"),
    [
        ("aarch64", "cortex-a72", "fp16"),
        ("x86_64", "avx2", "fp16"),
        ("aarch64", "cortex-a76", "int8"),
        ("aarch64", "cortex-m4", "fp32"),
        ("riscv64", "generic", "fp32"),
        ("aarch64", "native", "fp32"),
    ],
)
def test_what_cannot_be_had_is_the_profiles_fault(arch: str, name: str, precision: str) -> None:
    with pytest.raises(ProfileError):
        cpu_of(arch, name, precision)


def test_this_machine_is_found() -> None:
    assert native().lanes in (4, 8, 16)


@pytest.mark.parametrize("name", ["vit", "groupnorm"])
def test_half_precision_is_near_single(name: str) -> None:
    """On x86, where LLVM rounds each result as an Arm CPU does; inputs and outputs stay float32."""
    assert gap(prepared(name).graph, dataclasses.replace(host_cpu(), dtype="float16")) < HALF_TOLERANCE
