"""Every operator with a kernel, by itself and after a convolution, against ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tvm_on_host import feeds_of, gap, model_of, normal

from edgeprune.errors import CompileError
from edgeprune.targets._tvm.cpus import cpu_of
from edgeprune.targets._tvm.elementwise import ELEMENTWISE
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.operators import OPERATORS

TOLERANCE = 1e-4
IMAGE = (1, 3, 9, 11)
CHANNELS = 20  # no multiple of any register's lanes


def single(
    op: str,
    shape: tuple[int, ...],
    constants: dict[str, Any] | None = None,
    outputs: int = 1,
    opset: int = 18,
    **attributes: Any,
) -> float:
    """Return the gap of one operator of the input and constants."""
    names = [f"y{place}" for place in range(outputs)]
    node = helper.make_node(op, ["x", *(constants or {})], names, **attributes)
    return gap(model_of([node], {"x": shape}, names, constants, opset))


def after_conv(
    op: str, constants: dict[str, Any] | None = None, outputs: int = 1, opset: int = 18, **attributes: Any
) -> float:
    """Return the gap of an operator between two convolutions, so that it meets blocks of channels."""
    names = [f"b{place}" for place in range(outputs)]
    first = [helper.make_node("Conv", ["x", "v"], ["a"], pads=[1] * 4)]
    middle = [helper.make_node(op, ["a", *(constants or {})], names, **attributes)]
    made = model_of(
        [*first, *middle], {"x": IMAGE}, names, {"v": normal(CHANNELS, 3, 3, 3), **(constants or {})}, opset
    )
    widths = {each.name: each.type.tensor_type.shape.dim[1].dim_value for each in made.graph.output}
    last = [helper.make_node("Conv", [name, f"u{name}"], [f"y{name}"]) for name in names]
    weights = {f"u{name}": normal(8, widths[name], 1, 1) for name in names}
    every = {"v": normal(CHANNELS, 3, 3, 3), **(constants or {}), **weights}
    return gap(model_of([*first, *middle, *last], {"x": IMAGE}, [f"y{name}" for name in names], every, opset))


PLAIN = [
    "Relu", "Sigmoid", "Tanh", "Exp", "Erf", "Softplus", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu",
    "Neg", "Abs", "Floor", "Ceil", "Softsign", "ThresholdedRelu", "Mish",
]  # fmt: skip


@pytest.mark.parametrize("op", PLAIN)
def test_functions_of_one_element(op: str) -> None:
    assert after_conv(op) < TOLERANCE


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    assert after_conv("Gelu", opset=20, approximate=approximate) < TOLERANCE


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Reciprocal"])
def test_functions_of_positive_elements(op: str) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node(op, ["a"], ["y"])]
    assert gap(model_of(nodes, {"x": (2, 37)}, ["y"])) < TOLERANCE


def test_functions_keep_their_precision_over_their_range() -> None:
    wide = np.concatenate([np.linspace(-100, 88, 4001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)[None]
    for op in ("Exp", "Sigmoid", "Tanh", "Erf", "Softplus"):
        model = model_of([helper.make_node(op, ["x"], ["y"])], {"x": wide.shape}, ["y"])
        assert gap(model, feeds={"x": wide}) < 1e-6
    positive = np.geomspace(1e-30, 1e30, 2001, dtype=np.float32)[None]
    model = model_of([helper.make_node("Log", ["x"], ["y"])], {"x": positive.shape}, ["y"])
    assert gap(model, feeds={"x": positive}) < 1e-6


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu"])
@pytest.mark.parametrize(
    "shape", [(), (CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (11,), (1, 1, 9, 11), (1, CHANNELS, 9, 11)]
)
def test_functions_of_an_element_and_a_constant(op: str, shape: tuple[int, ...]) -> None:
    assert after_conv(op, {"c": np.abs(normal(*shape)) + np.float32(0.5)}) < TOLERANCE


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0, 1.7])
def test_powers(exponent: float) -> None:
    nodes = [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Pow", ["a", "p"], ["y"])]
    assert gap(model_of(nodes, {"x": (3, 21)}, ["y"], {"p": np.float32(exponent)})) < TOLERANCE


def test_a_square_of_negative_numbers() -> None:
    assert single("Pow", (3, 21), {"p": np.float32(2)}) < TOLERANCE


def test_clip_with_and_without_bounds() -> None:
    assert after_conv("Clip", {"low": np.float32(-0.3), "high": np.float32(0.9)}) < TOLERANCE
    assert after_conv("Clip", {"low": np.float32(0.1)}) < TOLERANCE


def test_two_values_are_combined_channel_by_channel() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["g"]),
        helper.make_node("Mul", ["a", "g"], ["b"]),
        helper.make_node("Mean", ["b", "a"], ["y"]),
    ]
    assert gap(model_of(nodes, {"x": IMAGE}, ["y"], {"v": normal(CHANNELS, 3, 1, 1)})) < TOLERANCE


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 4], "strides": [2, 3], "pads": [1, 0, 0, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]},
    {"kernel_shape": [2, 2], "dilations": [2, 3]},
]


@pytest.mark.parametrize("settings_of", POOLS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools(op: str, settings_of: dict[str, Any]) -> None:
    opset = 19 if op == "AveragePool" else 18
    assert after_conv(op, opset=opset, **settings_of) < TOLERANCE
    assert single(op, (2, 3, 10, 9), opset=opset, **settings_of) < TOLERANCE


@pytest.mark.parametrize("settings_of", POOLS[:6])
def test_average_pools_that_count_the_border(settings_of: dict[str, Any]) -> None:
    assert after_conv("AveragePool", opset=19, count_include_pad=1, **settings_of) < TOLERANCE


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools_of_sequences(op: str) -> None:
    assert single(op, (1, 6, 21), kernel_shape=[3], strides=[2], pads=[1, 1]) < TOLERANCE


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pools(op: str) -> None:
    assert after_conv(op) < TOLERANCE
    assert single(op, (2, 5, 17)) < TOLERANCE


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_a_window_beyond_the_image_is_refused(op: str) -> None:
    """ONNX's rule for `ceil_mode` gives such windows, PyTorch's and ONNX Runtime's do not."""
    node = helper.make_node(op, ["x"], ["y"], name="pool", kernel_shape=[1, 1], strides=[3, 3], ceil_mode=1)
    with pytest.raises(CompileError, match="beyond the image"):
        lower(model_of([node], {"x": (1, 3, 9, 9)}, ["y"]), cpu_of("x86_64", "avx2"))


MEANS = [
    ("ReduceMean", axes, keep) for axes, keep in (([2, 3], 1), ([2, 3], 0), ([1], 1), ([-1], 0), ([0, 1, 2, 3], 0))
]
OTHERS = ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL1", "ReduceL2"]


@pytest.mark.parametrize(("op", "axes", "keepdims"), [*MEANS, *((op, [1, 2], 0) for op in OTHERS)])
def test_reductions(op: str, axes: list[int], keepdims: int) -> None:
    constants = {"axes": np.array(axes, np.int64)}
    assert single(op, (2, 20, 5, 6), constants, keepdims=keepdims) < TOLERANCE


def test_a_mean_over_a_map_of_blocks() -> None:
    assert after_conv("ReduceMean", {"axes": np.array([2, 3], np.int64)}, keepdims=1) < TOLERANCE


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("axis", "opset"), [(-1, 18), (1, 18), (1, 11)])
def test_softmax(op: str, axis: int, opset: int) -> None:
    assert single(op, (2, 7, 9), opset=opset, axis=axis) < TOLERANCE


def test_norms() -> None:
    scale, shift = normal(CHANNELS, seed=3), normal(CHANNELS, seed=4)
    assert after_conv("InstanceNormalization", {"s": scale, "b": shift}) < TOLERANCE
    assert after_conv("LayerNormalization", {"s": normal(11), "b": normal(11, seed=5)}) < TOLERANCE
    assert single("LayerNormalization", (2, 5, 33), {"s": normal(33)}, axis=-1) < TOLERANCE
    assert after_conv("LRN", size=5, alpha=0.1, beta=0.75, bias=1.5) < TOLERANCE


@pytest.mark.parametrize("opset", [18, 21])
def test_a_group_norm(opset: int) -> None:
    """Opset 18 scales groups, 21 channels."""
    count = 4 if opset == 18 else CHANNELS
    constants = {"v": normal(CHANNELS, 3, 3, 3), "s": normal(count, seed=3), "b": normal(count, seed=4)}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("GroupNormalization", ["a", "s", "b"], ["n"], num_groups=4),
        helper.make_node("Conv", ["n", "u"], ["y"]),
    ]
    constants["u"] = normal(8, CHANNELS, 1, 1)
    model = model_of(nodes, {"x": IMAGE}, ["y"], constants, opset, sizes={"y": (1, 8, 7, 9)})
    assert gap(model) < TOLERANCE


def test_a_batch_norm_that_follows_no_convolution() -> None:
    arrays = {"s": normal(3), "b": normal(3, seed=1), "m": normal(3, seed=2), "v": np.abs(normal(3, seed=3)) + 1}
    assert single("BatchNormalization", (1, 3, 5, 5), arrays) < TOLERANCE


@pytest.mark.parametrize(
    "settings_of", [{}, {"transA": 1}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transA": 1, "transB": 1}]
)
@pytest.mark.parametrize("rows", [1, 17])
def test_gemm(settings_of: dict[str, Any], rows: int) -> None:
    a = (24, rows) if settings_of.get("transA") else (rows, 24)
    b = (35, 24) if settings_of.get("transB") else (24, 35)
    assert single("Gemm", a, {"w": normal(*b), "c": normal(35)}, **settings_of) < TOLERANCE
    node = helper.make_node("Gemm", ["x", "z"], ["y"], **settings_of)
    assert gap(model_of([node], {"x": a, "z": b}, ["y"])) < TOLERANCE


@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 12), (12, 40)), ((2, 5, 12), (12, 7)), ((2, 3, 31, 8), (2, 3, 8, 31)), ((1, 3, 4, 8), (2, 1, 8, 5))],
)
def test_matrix_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])
    assert gap(model_of([node], {"x": left, "z": right}, ["y"])) < TOLERANCE
    assert single("MatMul", left, {"w": normal(*right)}) < TOLERANCE


@pytest.mark.parametrize("widths", [(16, 32, 20), (20, 7), (3, 16)])
def test_concatenated_channels(widths: tuple[int, ...]) -> None:
    nodes = [helper.make_node("Conv", ["x", f"w{k}"], [f"c{k}"]) for k in range(len(widths))]
    nodes.append(helper.make_node("Concat", [f"c{k}" for k in range(len(widths))], ["j"], axis=1))
    nodes.append(helper.make_node("Conv", ["j", "u"], ["y"]))
    constants = {f"w{k}": normal(width, 3, 1, 1, seed=k) for k, width in enumerate(widths)}
    constants["u"] = normal(8, sum(widths), 1, 1)
    assert gap(model_of(nodes, {"x": IMAGE}, ["y"], constants)) < TOLERANCE


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_concatenated_axes(axis: int) -> None:
    node = helper.make_node("Concat", ["x", "z"], ["y"], axis=axis)
    assert gap(model_of([node], {"x": (2, 3, 4), "z": (2, 3, 4)}, ["y"])) < TOLERANCE


@pytest.mark.parametrize("sizes", [(4, 16), (10, 10), (16, 4)])
def test_split_channels(sizes: tuple[int, ...]) -> None:
    assert after_conv("Split", {"sizes": np.array(sizes, np.int64)}, outputs=2, axis=1) < TOLERANCE


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [([0], [16], [1], [1]), ([4], [20], [1], [1]), ([1, 2], [9, 10], [2, 3], [2, 3]), ([-1], [-9], [3], [-1])],
)
def test_slices(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    arrays = dict(
        zip(
            ("from", "to", "axes", "by"),
            (np.array(each, np.int64) for each in (starts, ends, axes, steps)),
            strict=True,
        )
    )
    assert after_conv("Slice", arrays) < TOLERANCE


@pytest.mark.parametrize(
    "indices", [np.array(2), np.array([1]), np.array([0, 2, -1]), np.array([[3, 1], [0, 0]])], ids=str
)
def test_gather(indices: np.ndarray) -> None:
    assert single("Gather", (2, 4, 5), {"i": indices.astype(np.int64)}, axis=1) < TOLERANCE


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads(mode: str) -> None:
    pads = np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64)
    assert after_conv("Pad", {"pads": pads}, opset=19, mode=mode) < TOLERANCE
    assert after_conv("Pad", {"pads": np.array([0, 3, 0, 0, 0, 5, 0, 0], np.int64)}, opset=19, mode=mode) < TOLERANCE


def test_a_pad_that_cuts() -> None:
    pads = np.array([0, 0, -1, 2, 0, 0, 1, -2], np.int64)
    assert single("Pad", (1, 3, 6, 7), {"pads": pads, "value": np.float32(1.5)}) < TOLERANCE


WHERE = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
RESIZES: list[dict[str, Any]] = [
    *({"mode": "linear", "coordinate_transformation_mode": where} for where in WHERE),
    {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"},
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"},
    {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"},
    {"mode": "nearest", "coordinate_transformation_mode": "align_corners", "nearest_mode": "ceil"},
]


@pytest.mark.parametrize("settings_of", RESIZES, ids=lambda each: "-".join(each.values()))
def test_resize_to_a_size(settings_of: dict[str, Any]) -> None:
    for size in ((14, 16), (4, 3)):
        nodes = [helper.make_node("Resize", ["x", "", "", "size"], ["y"], **settings_of)]
        constants = {"size": np.array([1, 3, *size], np.int64)}
        assert gap(model_of(nodes, {"x": (1, 3, 7, 8)}, ["y"], constants)) < TOLERANCE


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_by_a_factor(mode: str) -> None:
    scales = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 3], np.float32)}
    assert (
        after_conv("Resize", scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        < TOLERANCE
    )


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    assert single("DepthToSpace", (1, 12, 3, 4), blocksize=2, mode=mode) < TOLERANCE
    assert single("SpaceToDepth", (1, 3, 4, 6), blocksize=2) < TOLERANCE
    assert after_conv("DepthToSpace", blocksize=2, mode=mode) < TOLERANCE


def test_other_movements() -> None:
    assert single("Transpose", (2, 3, 4, 5), perm=[0, 2, 3, 1]) < TOLERANCE
    assert single("Transpose", (2, 3, 4)) < TOLERANCE
    assert single("Expand", (2, 1, 4), {"shape": np.array([3, 1, 3, 1], np.int64)}) < TOLERANCE
    assert single("Tile", (2, 3), {"times": np.array([2, 3], np.int64)}) < TOLERANCE
    assert single("Unsqueeze", (2, 3), {"axes": np.array([1], np.int64)}) < TOLERANCE
    assert single("Flatten", (2, 3, 4), axis=2) < TOLERANCE
    assert after_conv("Transpose", perm=[0, 1, 3, 2]) < TOLERANCE


def test_sizes_are_known_beforehand() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "minus"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = {"zero": np.array([0], np.int64), "minus": np.array([-1], np.int64)}
    assert gap(model_of(nodes, {"x": (2, 3, 4)}, ["y"], constants)) < TOLERANCE


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("reset", [0, 1])
def test_recurrent_layers(op: str, direction: str, reset: int) -> None:
    if reset and op != "GRU":
        return
    gates, hidden, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 6, 1 + (direction == "bidirectional")
    constants = {
        "w": normal(ways, gates * hidden, 5, scale=0.5),
        "r": normal(ways, gates * hidden, hidden, seed=1, scale=0.5),
        "b": normal(ways, 2 * gates * hidden, seed=2, scale=0.5),
    }
    names = ["y", "h", "c"][: 3 if op == "LSTM" else 2]
    more = {"linear_before_reset": reset} if op == "GRU" else {}
    node = helper.make_node(op, ["x", "w", "r", "b", "", "s"], names, hidden_size=hidden, direction=direction, **more)
    assert gap(model_of([node], {"x": (4, 2, 5), "s": (ways, 2, hidden)}, names, constants)) < TOLERANCE


def test_every_operator_in_the_table_is_tried_here() -> None:
    """A kernel without a test is no kernel."""
    source = __import__("pathlib").Path(__file__).read_text()
    elsewhere = {"Conv", "ConvTranspose", "Cast", "CastLike", "Dropout", "Identity", "Squeeze", "Reshape"}
    untried = {each for each in {*OPERATORS, *ELEMENTWISE} if f'"{each}"' not in source}
    assert untried <= elsewhere | {"ReduceLogSum", "RMSNormalization", "Sum", "Swish"}


@pytest.mark.parametrize(
    ("op", "constants", "attributes"),
    [
        (
            "LSTM",
            {"w": normal(1, 8, 5), "r": normal(1, 8, 2)},
            {"hidden_size": 2, "activations": ["Relu", "Tanh", "Tanh"]},
        ),
        ("RNN", {"w": normal(1, 2, 5), "r": normal(1, 2, 2)}, {"hidden_size": 2, "clip": 1.0}),
    ],
)
def test_recurrent_settings_without_a_kernel_are_refused(op: str, constants: Any, attributes: Any) -> None:
    node = helper.make_node(op, ["x", *constants], ["y"], name="cell", **attributes)
    with pytest.raises(CompileError, match="'cell'"):
        lower(model_of([node], {"x": (3, 1, 5)}, ["y"], constants), cpu_of("x86_64", "avx2"))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Cast", ["a"], ["b"], name="odd", to=7),
        helper.make_node("CastLike", ["a", "seven"], ["b"], name="odd"),
        helper.make_node("Dropout", ["a", "half", "yes"], ["b"], name="odd"),
    ],
    ids=lambda each: each.op_type,
)
def test_nodes_that_only_look_like_views_are_refused(node: Any) -> None:
    constants = {"seven": np.array(7), "half": np.float32(0.5), "yes": np.array(True)}
    nodes = [helper.make_node("Relu", ["x"], ["a"]), node]
    nodes += [helper.make_node("Cast", ["b"], ["y"], to=1)]
    used = {name: array for name, array in constants.items() if name in node.input}
    with pytest.raises(CompileError, match="'odd'"):
        lower(model_of(nodes, {"x": (1, 3)}, ["y"], used), cpu_of("x86_64", "avx2"))


def test_a_mask_that_is_read_is_refused() -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["a", "mask"], name="odd"),
        helper.make_node("Cast", ["mask"], ["y"], to=1),
    ]
    with pytest.raises(CompileError, match="'odd'"):
        lower(model_of(nodes, {"x": (1, 3)}, ["y"]), cpu_of("x86_64", "avx2"))


def test_views_are_free() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=1),
        helper.make_node("Unsqueeze", ["b", "axis"], ["c"]),
        helper.make_node("Squeeze", ["c", "axis"], ["d"]),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 3)}, ["y"], {"axis": np.array([1])})
    assert len(lower(model, cpu_of("x86_64", "avx2")).steps) == 2
    assert gap(model) < TOLERANCE


def test_bounds_that_are_attributes() -> None:
    assert single("Clip", (3, 9), opset=6, min=-0.5, max=0.5) < TOLERANCE
    assert single("Clip", (3, 9), opset=6, min=-0.5) < TOLERANCE


def test_an_operand_of_lower_rank_is_read_within_its_bounds() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("Relu", ["z"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["b"]),
        helper.make_node("Conv", ["b", "u"], ["y"]),
    ]
    constants = {"v": normal(CHANNELS, 3, 1, 1), "u": normal(4, CHANNELS, 1, 1)}
    assert gap(model_of(nodes, {"x": IMAGE, "z": (CHANNELS, 1, 1)}, ["y"], constants)) < TOLERANCE


def test_a_resize_without_a_kernel_is_refused() -> None:
    node = helper.make_node("Resize", ["x", "", "", "size"], ["y"], mode="linear", antialias=1, name="smooth")
    model = model_of([node], {"x": (1, 3, 8, 8)}, ["y"], {"size": np.array([1, 3, 4, 4], np.int64)})
    assert feeds_of(model)["x"].shape == (1, 3, 8, 8)
    with pytest.raises(CompileError, match="'smooth'"):
        lower(model, cpu_of("x86_64", "avx2"))
