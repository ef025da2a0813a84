"""CPUs that kernels are made for: what TVM's code generator is told, and the size of their registers.

Sources: Arm's Software Optimization Guides of Cortex-A53 to A78 (latency and units of FMLA), LLVM's processor tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.errors import ProfileError

from .tiles import Registers

ARM, INTEL = "aarch64-linux-gnu", "x86_64-linux-gnu"


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A CPU, as far as kernels depend on it.

    Attributes:
        triple, mcpu, features: what LLVM is told.
        bits: width of one vector register.
        registers: how many there are, and what their use costs.
        half: whether it computes with float16.
        dtype: "float32" or "float16": what this network is computed with.
    """

    name: str
    triple: str
    mcpu: str
    bits: int
    registers: Registers
    features: tuple[str, ...] = ()
    half: bool = False
    dtype: str = "float32"

    @property
    def lanes(self) -> int:
        """Return elements of one vector register; channels are blocked by as many."""
        return self.bits // (16 if self.dtype == "float16" else 32)

    def target(self) -> dict[str, Any]:
        """Return the target as TVM 0.27 takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        return {**target, "mattr": list(self.features)} if self.features else target

    def with_precision(self, precision: str) -> "Cpu":
        """Return the CPU computing in "fp32" or "fp16".

        Raises:
            ProfileError: if it cannot.
        """
        if precision == "fp32":
            return replace(self, dtype="float32")
        if precision == "fp16" and self.half:
            return replace(self, dtype="float16")
        raise ProfileError(
            f"TVM cannot compute in {precision} on {self.name}",
            why="the CPU has no such arithmetic" if precision == "fp16" else "only fp32 and fp16 are known",
            next_step='write precision = "fp32" into the profile',
        )


NEON = Registers(count=32, latency=8, weight_cost=1.0, image_cost=0.25, by_element=True)
IN_ORDER = replace(NEON, latency=8, weight_cost=1.5)
ZMM = Registers(count=32, latency=8, weight_cost=0.5, image_cost=0.1)
YMM = replace(ZMM, count=16)


def _arm(name: str, *, half: bool, registers: Registers = NEON, mcpu: str = "", features: tuple[str, ...] = ()) -> Cpu:
    features = ("+neon", *features) if not mcpu and name == "generic" else features
    return Cpu(name=name, triple=ARM, mcpu=mcpu or name, bits=128, registers=registers, features=features, half=half)


def _intel(name: str, mcpu: str, bits: int, registers: Registers, features: tuple[str, ...] = ()) -> Cpu:
    return Cpu(name=name, triple=INTEL, mcpu=mcpu, bits=bits, registers=registers, features=features)


CPUS: Mapping[tuple[str, str], Cpu] = {
    ("aarch64", "generic"): _arm("generic", half=False),
    ("aarch64", "cortex-a53"): _arm("cortex-a53", half=False, registers=IN_ORDER),
    ("aarch64", "cortex-a57"): _arm("cortex-a57", half=False),
    ("aarch64", "cortex-a72"): _arm("cortex-a72", half=False),
    ("aarch64", "cortex-a55"): _arm("cortex-a55", half=True, registers=IN_ORDER),
    ("aarch64", "cortex-a76"): _arm("cortex-a76", half=True),
    ("aarch64", "cortex-a78"): _arm("cortex-a78", half=True),
    ("aarch64", "cortex-a78ae"): _arm("cortex-a78ae", half=True),
    ("aarch64", "carmel"): _arm("carmel", half=True),
    ("aarch64", "neoverse-v3ae"): _arm("neoverse-v3ae", half=True),
    ("x86_64", "generic"): _intel("generic", "x86-64", 128, YMM),
    ("x86_64", "avx2"): _intel("avx2", "x86-64-v3", 256, YMM),
    ("x86_64", "avx512"): _intel("avx512", "x86-64-v4", 512, ZMM, ("-prefer-256-bit",)),
}
"""By a profile's `arch` and `cpu`; x86_64 "native" is found by asking LLVM."""


def cpu_of(arch: str, name: str = "generic", precision: str = "fp32") -> Cpu:
    """Return the CPU that a profile names.

    Raises:
        ProfileError: if it is not in the table, or cannot compute in `precision`.
    """
    if (arch, name) == ("x86_64", "native"):
        return native().with_precision(precision)
    if (arch, name) not in CPUS:
        known = ", ".join(f"{each}" for kind, each in CPUS if kind == arch)
        raise ProfileError(
            f"no kernels are made for the CPU {name!r} of {arch!r}",
            next_step=f"write one of {known}, native"
            if arch == "x86_64"
            else f"write one of {known or 'aarch64, x86_64'}",
        )
    return CPUS[arch, name].with_precision(precision)


def native() -> Cpu:
    """Return the CPU of this machine; it must be an x86-64."""
    from .tensorir import tvm

    codegen, target = tvm.target.codegen, tvm.target.Target
    mcpu = str(codegen.llvm_get_system_cpu())
    features = set(codegen.llvm_get_cpu_features(target({"kind": "llvm", "mtriple": INTEL, "mcpu": mcpu})))
    if "avx512f" in features:
        return _intel("native", mcpu, 512, ZMM, ("-prefer-256-bit",))
    return _intel("native", mcpu, 256, YMM) if "avx2" in features else _intel("native", mcpu, 128, YMM)
