"""What a search for faster schedules may choose, and that every choice computes the same."""

import random
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tuning_nets import conv, heavy, product
from tvm_on_host import feeds_of, host_cpu, model_of

from edgeprune.targets._tvm.cache import library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.host import OnHost
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.records import Record, Trial
from edgeprune.targets._tvm.schedule import Choice, scheduled
from edgeprune.targets._tvm.space import choices, draw, traces
from edgeprune.targets._tvm.tensorir import tvm_ffi

MODELS = [conv(), conv(group=32), conv(kernel=1), product()]
CPUS = [host_cpu(), cpu_of("aarch64", "cortex-a72"), cpu_of("aarch64", "cortex-a76", "fp16")]


@pytest.mark.parametrize("cpu", CPUS, ids=lambda each: f"{each.name} {each.dtype}")
@pytest.mark.parametrize("model", MODELS, ids=["dense", "depthwise", "pointwise", "product"])
def test_every_choice_is_a_schedule_that_its_trace_gives_again(model: onnx.ModelProto, cpu: Cpu) -> None:
    program = lower(model, cpu)
    name = heavy(program)
    kernel = program.kernels[name]
    found = [each for each, _ in choices(kernel, cpu)]
    assert found
    assert Choice(tile=kernel.plan.tile) not in found
    assert len(set(found)) == len(found)
    drawn = random.Random(0).sample(found, min(10, len(found)))
    texts = traces(name, kernel, cpu, drawn)
    assert len(texts) == len(drawn)
    for text, again in zip(texts, traces(name, kernel, cpu, drawn), strict=True):
        one, other = (scheduled(replace(kernel, trace=each), cpu) for each in (text, again))
        assert tvm_ffi.structural_equal(one, other)
    assert len({tvm_ffi.structural_hash(scheduled(replace(kernel, trace=text), cpu)) for text in texts}) > 1


def test_a_tile_leaves_registers_for_what_it_reads() -> None:
    cpu = cpu_of("aarch64", "cortex-a72")
    program = lower(conv(channels=64, side=24), cpu)
    for each, weight in choices(program.kernels[heavy(program)], cpu):
        pixels = each.tile.rows * each.tile.pixels
        assert (each.tile.blocks + 1) * pixels + each.tile.blocks <= 32
        assert weight > 0


def test_a_kernel_without_a_tile_leaves_no_choice() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    program = lower(model_of(nodes, {"x": (4, 16)}, ["y"]), host_cpu())
    assert all(choices(each, host_cpu()) == [] for each in program.kernels.values() if each.plan.kind == "map")


@pytest.mark.parametrize("model", MODELS, ids=["dense", "depthwise", "pointwise", "product"])
def test_another_schedule_answers_the_same(model: onnx.ModelProto) -> None:
    cpu = host_cpu()
    program, feeds = lower(model, cpu), feeds_of(model)
    plain = OnHost(program, {name: library(name, each, cpu, 0)[name] for name, each in program.kernels.items()})
    [wanted] = plain.outputs(feeds).values()
    name = heavy(program)
    kernel = program.kernels[name]
    drawn = random.Random(1).sample([each for each, _ in choices(kernel, cpu)], 4)
    for trace in traces(name, kernel, cpu, drawn):
        kernels = {**program.kernels, name: replace(kernel, trace=trace)}
        other = OnHost(program, {own: library(own, each, cpu, 0)[own] for own, each in kernels.items()})
        [seen] = other.outputs(feeds).values()
        np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_drawn_twice_and_the_same_is_drawn_again() -> None:
    program = lower(conv(), host_cpu())
    options = choices(program.kernels[heavy(program)], host_cpu())
    first = draw(options, Record(), 8, "seed")
    assert first == draw(options, Record(), 8, "seed")
    known = Record(trials=tuple(Trial(choice=each, ratio=1.0) for each in first))
    rest = draw(options, known, 10_000, "seed")
    assert len(first) == 8
    assert sorted(map(str, [*first, *rest])) == sorted(str(each) for each, _ in options)
