"""What is left of a graph when channel groups keep nothing: their residual branches fall silent and disappear.

x ─┬─ conv1 ─ bn ─ relu ─ conv2 ─ bn ─┬─ Add ─▶       conv1 keeps nothing: the branch gives zeros, Add gives x,
   └──────────────────────────────────┘              and nobody reads the branch any more
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

HOLDERS = {
    "Conv": 1,
    "ConvTranspose": 1,
    "Gemm": 1,
    "PRelu": 1,
    "BatchNormalization": 3,  # the running mean: it is there even without an affine part
}
"""Operation → which of its inputs is named after the layer that owns it."""

OF_ZEROS_ZERO = frozenset(
    "Conv ConvTranspose Gemm BatchNormalization PRelu Relu LeakyRelu Elu Selu Celu HardSwish Tanh Softsign Erf Abs Neg "
    "Sqrt Sign Floor Ceil Round Identity Dropout Cast MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean "
    "ReduceMax ReduceMin ReduceSum Resize Reshape Flatten Transpose Slice Split Squeeze Unsqueeze Concat Mul".split()
)
"""Of inputs that are all zero these make zeros; layers do because a silent layer loses its bias and statistics too."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node, as silence sees it.

    Attributes:
        op: the ONNX operation.
        inputs, outputs: names of tensors, initializers left out.
        held: names of the initializers it reads.
        layer: module path of the layer whose weights it holds, None if it holds none.
        silent_of_zeros: whether its outputs are zero when all its inputs are.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str | None
    silent_of_zeros: bool
    held: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What becomes of the graph.

    Attributes:
        aliases: output of an addition → the operand that is left of it.
        dead_layers: layers that nothing alive reads any more, those before the silence included.
    """

    aliases: Mapping[str, str]
    dead_layers: tuple[str, ...]


NOTHING = Removal(aliases={}, dead_layers=())


def steps_of(graph: onnx.GraphProto) -> tuple[Step, ...]:
    """Return the nodes of a graph as steps, in its order."""
    constants = {each.name: each for each in graph.initializer}
    return tuple(_step(node, constants) for node in graph.node)


def _step(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Step:
    holder, _, tensor = node.input[HOLDERS[node.op_type]].rpartition(".") if node.op_type in HOLDERS else ("", "", "")
    return Step(
        op=node.op_type,
        inputs=tuple(name for name in node.input if name and name not in constants),
        outputs=tuple(name for name in node.output if name),
        layer=holder if tensor in ("weight", "running_mean") else None,
        silent_of_zeros=_silent_of_zeros(node, constants),
        held=tuple(name for name in node.input if name in constants),
    )


def _silent_of_zeros(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    held = [numpy_helper.to_array(constants[name]) if name in constants else None for name in node.input]
    if node.op_type in ("Add", "Sub", "Max", "Min"):
        return all(value is None for value in held)
    if node.op_type == "Clip":
        low, high = (*held[1:], None, None)[:2]
        return (low is None or bool(low <= 0)) and (high is None or bool(high >= 0))
    if node.op_type == "Pad":
        return len(held) < 3 or held[2] is None or not held[2].any()
    return node.op_type in OF_ZEROS_ZERO


def find_removal(
    steps: Sequence[Step],
    owners: Mapping[str, NDArray[np.int64]],
    shapes: Mapping[str, tuple[int, ...]],
    classes: Collection[int],
    outputs: Collection[str],
) -> Removal | None:
    """Return what is left when the channels of `classes` all go, None if more than residual branches would die.

    Silence must end in additions to something that is not silent.

    Args:
        steps: the nodes of the graph.
        owners: tensor → class of each channel.
        shapes: tensor → shape.
        classes: classes of coupled channels that keep nothing.
        outputs: of the graph.
    """
    gone = _tensors_without_channels(owners, classes)
    silence = _Silence(gone=gone, shapes=shapes)
    if not gone or not all(silence.spreads(step) for step in steps):
        return None
    if not silence.aliases or silence.layers & silence.sounding:
        return None
    if silence.silent.union(silence.aliases).intersection(outputs):  # a node must still make what leaves the graph
        return None
    return Removal(aliases=silence.aliases, dead_layers=_dead_layers(steps, silence.aliases, outputs))


def _tensors_without_channels(owners: Mapping[str, NDArray[np.int64]], classes: Collection[int]) -> set[str]:
    lost = set(classes)
    return {name for name, each in owners.items() if len(each) and lost.issuperset(each.tolist())}


def settled(name: str, aliases: Mapping[str, str]) -> str:
    """Return what is left of a tensor."""
    while name in aliases:
        name = aliases[name]
    return name


def _dead_layers(steps: Sequence[Step], aliases: Mapping[str, str], outputs: Iterable[str]) -> tuple[str, ...]:
    """Return the layers, in graph order, that nothing alive reads when dead additions are read past."""
    needed = set(outputs)
    alive: set[str | None] = {None}
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            needed.update(settled(name, aliases) for name in step.inputs)
            alive.add(step.layer)
    return tuple(dict.fromkeys(step.layer for step in steps if step.layer is not None and step.layer not in alive))


class _Silence:
    """The tensors that hold only zeros or have no channels left, found in the order of the graph."""

    def __init__(self, *, gone: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._gone, self._shapes = gone, shapes
        self.silent: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.layers: set[str] = set()
        self.sounding: set[str] = set()

    def spreads(self, step: Step) -> bool:
        """Take in one step; return False if silence would reach something that is not a residual addition."""
        quiet = [name for name in step.inputs if name in self.silent]
        gone = [name for name in step.outputs if name in self._gone]
        if self._falls_silent(step, quiet, gone):
            self.silent.update(step.outputs)
            self.layers |= {step.layer} if step.layer is not None else set()
            return True
        self.sounding |= {step.layer} if step.layer is not None else set()
        self.silent.update(gone)  # one part of a split may go, and the others stay
        return not quiet or self._ends_in(step, quiet)

    @staticmethod
    def _falls_silent(step: Step, quiet: list[str], gone: list[str]) -> bool:
        if len(gone) == len(step.outputs) or (quiet and step.op == "Mul"):
            return True
        return bool(quiet) and len(quiet) == len(step.inputs) and step.silent_of_zeros

    def _ends_in(self, step: Step, quiet: list[str]) -> bool:
        loud = [name for name in step.inputs if name not in self.silent]
        if step.op != "Add" or len(quiet) != 1 or len(loud) != 1:
            return False
        self.aliases[step.outputs[0]] = loud[0]
        return self._shapes[loud[0]] == self._shapes[step.outputs[0]]
