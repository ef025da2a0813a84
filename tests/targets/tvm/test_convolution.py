"""Convolutions of every kind, against ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tvm_on_host import gap, model_of, normal

from edgeprune.targets._tvm.convolution import merged_groups, packed_weights
from edgeprune.targets._tvm.cpus import cpu_of

TOLERANCE = 1e-4


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Return the parameters of a convolution whose result has at least one pixel."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return {
        "groups": draw(st.sampled_from([1, 1, 2, 3, 8])),
        "inner": draw(st.integers(1, 20)),
        "outer": draw(st.integers(1, 20)),
        "kernel": kernel,
        "dilations": dilations,
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "pads": draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)),
        "size": [r + draw(st.integers(0, 12)) for r in reach],
        "bias": draw(st.booleans()),
        "first": draw(st.booleans()),
        "cpu": draw(st.sampled_from(["native", "avx2", "generic"])),
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=convolutions())
def test_any_convolution_answers_as_in_onnx_runtime(case: dict[str, Any]) -> None:
    """`first`: another convolution comes before, so that channels arrive in blocks."""
    groups, channels = case["groups"], case["groups"] * case["inner"]
    constants = {
        "w": normal(groups * case["outer"], case["inner"], *case["kernel"]),
        "v": normal(channels, 2, 1, 1, seed=1),
    }
    nodes = (
        [helper.make_node("Conv", ["x", "v"], ["a"]), helper.make_node("Relu", ["a"], ["b"])] if case["first"] else []
    )
    inputs = ["b" if case["first"] else "x", "w"]
    if case["bias"]:
        constants["bias"] = normal(groups * case["outer"], seed=2)
        inputs.append("bias")
    settings_of = {"strides": case["strides"], "dilations": case["dilations"], "pads": case["pads"], "group": groups}
    nodes += [helper.make_node("Conv", inputs, ["c"], **settings_of), helper.make_node("Relu", ["c"], ["y"])]
    if not case["first"]:
        constants.pop("v")
    shape = (1, 2 if case["first"] else channels, *case["size"])
    assert gap(model_of(nodes, {"x": shape}, ["y"], constants), cpu_of("x86_64", case["cpu"])) < TOLERANCE


def _two(op: str, weight: np.ndarray, shape: tuple[int, ...], channels: int, **attributes: Any) -> float:
    """Return the gap of an operator between two 1x1 convolutions, so that blocks come in and go out."""
    rank = len(shape) - 2
    outer = weight.shape[0] if op == "Conv" else weight.shape[1] * attributes.get("group", 1)
    constants = {"v": normal(channels, shape[1], *[1] * rank), "w": weight, "u": normal(5, outer, *[1] * rank)}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node(op, ["a", "w"], ["b"], **attributes),
        helper.make_node("LeakyRelu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "u"], ["y"]),
    ]
    return gap(model_of(nodes, {"x": shape}, ["y"], constants))


@pytest.mark.parametrize(("channels", "multiplier"), [(24, 1), (16, 2), (9, 3), (40, 1)])
def test_depthwise_with_and_without_a_multiplier(channels: int, multiplier: int) -> None:
    weight = normal(channels * multiplier, 1, 3, 3)
    assert _two("Conv", weight, (1, 3, 11, 13), channels, group=channels, pads=[1] * 4) < TOLERANCE


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_auto_pad(auto_pad: str, stride: int) -> None:
    weight = normal(16, 16, 4, 3)
    assert _two("Conv", weight, (1, 3, 10, 11), 16, auto_pad=auto_pad, strides=[stride] * 2) < TOLERANCE


@pytest.mark.parametrize(
    "settings_of",
    [
        {"strides": [2, 2]},
        {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 1]},
        {"strides": [2, 2], "group": 4, "dilations": [2, 1]},
        {"strides": [1, 1], "pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"strides": [2, 2], "output_shape": [13, 14]},
    ],
)
def test_transposed_convolutions(settings_of: dict[str, Any]) -> None:
    weight = normal(16, 24 // settings_of.get("group", 1), 3, 3)
    assert _two("ConvTranspose", weight, (1, 3, 6, 7), 16, **settings_of) < TOLERANCE


def test_a_transposed_depthwise_convolution() -> None:
    assert (
        _two("ConvTranspose", normal(20, 1, 4, 4), (1, 3, 6, 6), 20, group=20, strides=[2, 2], pads=[1] * 4) < TOLERANCE
    )


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_sequences(op: str) -> None:
    assert _two(op, normal(24, 24, 5), (1, 3, 33), 24, strides=[2], pads=[2, 2]) < TOLERANCE


def test_groups_narrower_than_a_register_are_merged_with_zeros_between() -> None:
    weight = np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)  # eight groups of one channel
    groups, merged = merged_groups(weight, 8, lanes=4)
    assert groups == 2
    assert np.array_equal(merged[:4, :, 0, 0], np.diag([1, 2, 3, 4]))
    assert np.array_equal(merged[4:, :, 0, 0], np.diag([5, 6, 7, 8]))


def test_groups_that_fill_registers_stay() -> None:
    weight = normal(16, 3, 1, 1)
    assert merged_groups(weight, 2, lanes=8) == (2, weight)


def test_weights_lie_in_the_order_the_tile_reads_them() -> None:
    weight = np.arange(8 * 2 * 3 * 3, dtype=np.float32).reshape(8, 2, 3, 3)
    packed = packed_weights(weight, lanes=2, inner=2, blocks=2)
    assert packed.shape == (2, 1, 3, 3, 2, 2, 2)
    for out in range(8):
        place = (out // 4, 0, 1, 2, 1, out % 4 // 2, out % 2)
        assert packed[place] == weight[out, 1, 1, 2]
