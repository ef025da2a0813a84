"""Object code on disk: reused across processes, made again when damaged, bounded, and two layers cost two kernels."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tvm_on_host import host_cpu, model_of, normal

from edgeprune.errors import CompileError, DeviceLost, StorageFull
from edgeprune.targets._serve import RefusedError
from edgeprune.targets._tvm import cache
from edgeprune.targets._tvm.cache import KernelCache
from edgeprune.targets._tvm.cpus import cpu_of
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.program import Kernel, Program
from edgeprune.targets._tvm_rpc_worker import Worker

ELF = b"\x7fELF"


def _program(*widths: int) -> Program:
    nodes, constants, tensor, channels = [], {}, "x", 3
    for place, width in enumerate(widths):
        constants[f"w{place}"] = normal(width, channels, 1, 1, seed=place)
        nodes.append(helper.make_node("Conv", [tensor, f"w{place}"], [f"c{place}"]))
        tensor, channels = f"c{place}", width
    return lower(model_of(nodes, {"x": (1, 3, 4, 4)}, [tensor], constants), host_cpu())


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    program = _program(16, 32)
    first, second = KernelCache(folder=tmp_path), KernelCache(folder=tmp_path)
    made, found = first.objects(program, host_cpu()), second.objects(program, host_cpu())
    assert (first.compiled, first.reused, second.compiled, second.reused) == (2, 0, 0, 2)
    assert made == found
    assert all(each.startswith(ELF) and name.encode() in each for name, each in made.items())


def test_only_what_changed_is_compiled(tmp_path: Path) -> None:
    kernels = KernelCache(folder=tmp_path)
    kernels.objects(_program(16, 32, 48, 64, 16), host_cpu())
    before = kernels.compiled
    kernels.objects(_program(16, 32, 80, 64, 16), host_cpu())
    assert kernels.compiled - before == 2


@pytest.mark.parametrize("damage", [b"", b"not an object", None])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    program = _program(16)
    made = KernelCache(folder=tmp_path).objects(program, host_cpu())
    [entry] = tmp_path.glob("k*.o")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] if damage is None else damage)
    again = KernelCache(folder=tmp_path)
    assert again.objects(program, host_cpu()) == made
    assert again.compiled == 1
    assert entry.read_bytes() == whole


def test_names_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tvm_on_host import host_cpu, model_of, normal; from onnx import helper\n"
        "from edgeprune.targets._tvm.lower import lower\n"
        "nodes = [helper.make_node('Conv', ['x', 'w0'], ['c0'])]\n"
        "print(*lower(model_of(nodes, {'x': (1, 3, 4, 4)}, ['c0'], {'w0': normal(16, 3, 1, 1)}), host_cpu()).kernels)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert seen == list(_program(16).kernels)


def test_the_folder_is_kept_below_its_limit(tmp_path: Path) -> None:
    program = _program(16, 32, 48)
    sizes = [len(each) for each in KernelCache(folder=tmp_path / "whole").objects(program, host_cpu()).values()]
    bounded = KernelCache(folder=tmp_path / "part", limit_bytes=max(sizes) + min(sizes))
    bounded.objects(program, host_cpu())
    left = list((tmp_path / "part").iterdir())
    assert 1 <= len(left) < 3
    assert sum(each.stat().st_size for each in left) <= bounded.limit_bytes


def test_the_entry_used_longest_ago_goes_first(tmp_path: Path) -> None:
    program = _program(16, 32)
    kernels = KernelCache(folder=tmp_path)
    kernels.objects(program, host_cpu())
    old, new = sorted(tmp_path.glob("k*.o"))
    os.utime(old, ns=(1, 1))
    kernels.limit_bytes = sum(each.stat().st_size for each in (old, new))
    kernels.objects(_program(48), host_cpu())
    assert not old.exists()


def test_threads_may_share_a_cache(tmp_path: Path) -> None:
    programs = [_program(16, width) for width in (16, 32, 48, 64)]
    kernels = KernelCache(folder=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda each: kernels.objects(each, host_cpu()), programs))
    assert all(set(each) == set(program.kernels) for each, program in zip(made, programs, strict=True))


def test_a_folder_that_cannot_be_written_is_a_full_disk_and_no_candidates_fault(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(StorageFull, match="kernel cache"):
        KernelCache(folder=blocked).objects(_program(16), host_cpu())


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageFull, match="disk is full"):
        KernelCache(folder=tmp_path).objects(_program(16), host_cpu())
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_tvm_refuses_is_the_candidates_fault() -> None:
    kernel = next(iter(_program(16).kernels.values()))
    other = Kernel(func="no function", plan=kernel.plan)
    with pytest.raises(CompileError, match="kernel k0"):
        cache.object_of("k0", other, host_cpu())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("InternalError: std::bad_alloc")])
def test_a_machine_without_memory_is_no_candidates_fault(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def starve(*_: object) -> None:
        raise error

    [(name, kernel)] = _program(16).kernels.items()
    monkeypatch.setattr(cache, "library", starve)
    with pytest.raises(DeviceLost, match="out of memory"):
        cache.object_of(name, kernel, host_cpu())


def test_a_worker_without_memory_to_compile_in_blames_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object) -> None:
        raise DeviceLost("out of memory while compiling the kernel k0")

    monkeypatch.setattr("edgeprune.targets._tvm_rpc_compile.compiled", starve)
    with pytest.raises(RefusedError, match="out of memory") as caught:
        Worker({}).answer({"do": "compile", "model": {}}, {})
    assert caught.value.kind == "machine"


def test_no_room_for_temporary_files_is_no_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    [(name, kernel)] = _program(16).kernels.items()
    monkeypatch.setattr(cache, "library", fail)
    with pytest.raises(StorageFull, match="cannot be written"):
        cache.object_of(name, kernel, host_cpu())


def test_objects_are_made_for_the_cpu_of_the_board() -> None:
    cpu = cpu_of("aarch64", "cortex-a72")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    program = lower(model_of(nodes, {"x": (1, 3, 4, 4)}, ["y"], {"w": normal(8, 3, 1, 1)}), cpu)
    [(name, kernel)] = program.kernels.items()
    made = cache.object_of(name, kernel, cpu)
    assert made[18:20] == (183).to_bytes(2, "little")  # ELF's e_machine: EM_AARCH64
