"""From an ONNX model to a program: one kernel per group of nodes, values laid out so that channels fill registers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import onnx
from numpy.typing import NDArray

from edgeprune.errors import CompileError

from . import arena
from .cpus import Cpu
from .elementwise import UNSAFE
from .folding import folded
from .graph import Graph, Node, read_graph, unsupported
from .grouping import VIEWS, groups
from .movement import slice_ranges
from .operators import BLOCKED, check, write
from .program import Buffer, Kernel, Port, Program, Space, Step
from .recurrent import unrolled
from .schedule import VERSION
from .site import Site
from .tensorir import tvm, tvm_ffi
from .values import Value


def lower(model: onnx.ModelProto, cpu: Cpu) -> Program:
    """Return the program of a model for a CPU; the same model and CPU always give the same program.

    Raises:
        CompileError: naming the node, if one has no kernel; or if shapes are not static.
    """
    lowering = _Lowering(folded(unrolled(folded(read_graph(model)))), cpu)
    lowering.run()
    return lowering.program()


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One step before memory is planned."""

    kernel: str
    reads: tuple[Value, ...]
    constants: tuple[NDArray[Any], ...]
    writes: Value
    node: str


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A value that lies in another one, so many bytes behind its start."""

    owner: str
    offset: int


class _Lowering:
    """Turns one graph into steps."""

    def __init__(self, graph: Graph, cpu: Cpu) -> None:
        self._graph, self._cpu, self._uses = graph, cpu, graph.uses()
        self._values: dict[str, Value] = {}
        self._parts: dict[str, _Part] = {}
        self._calls: list[_Call] = []
        self._kernels: dict[str, Kernel] = {}
        self._known: dict[int, list[tuple[Kernel, str]]] = {}

    def run(self) -> None:
        """Write all steps."""
        for name in self._graph.inputs:
            self._values[name] = Value(name=name, shape=self._graph.shapes[name])
        for nodes in groups(self._graph):
            self._lower(nodes)
        for name in self._graph.outputs:
            if name in self._graph.constants or name in self._graph.inputs:
                raise CompileError(f"the output {name!r} does not depend on what is computed")

    def _lower(self, nodes: Sequence[Node]) -> None:
        first = nodes[0]
        for node in nodes:
            check(self._graph, node)
            for name in node.outputs:
                if name and self._uses.get(name) and name not in self._graph.shapes:
                    raise unsupported(node, f"the shape of {name!r} is not static")
        if len(nodes) == 1 and all(self._as_part(first, name) for name in first.outputs if self._uses.get(name)):
            return
        for name in first.outputs if len(nodes) == 1 else nodes[-1].outputs[:1]:
            if name and self._uses.get(name) and name not in self._values:
                self._write(nodes, name)

    # -- one kernel

    def _write(self, nodes: Sequence[Node], name: str) -> None:
        out = self._layout(name, nodes)
        site = Site(self._graph, self._values, self._cpu, out)
        for node in nodes:
            site.add(name if node is nodes[-1] else node.outputs[0], write(site, node))
        kernel = site.finish(name, masked=any(node.op in UNSAFE for node in nodes))
        call = _Call(
            kernel=self._named(kernel),
            reads=tuple(site.reads),
            constants=tuple(site.constants),
            writes=out,
            node=nodes[0].name or nodes[0].outputs[0],
        )
        self._calls.append(call)
        self._values[name] = out

    def _layout(self, name: str, nodes: Sequence[Node]) -> Value:
        """Return how a new value lies in memory."""
        shape = self._graph.shapes[name]
        if name in self._graph.outputs:
            return Value(name=name, shape=shape)
        value = Value(name=name, shape=shape, dtype=self._cpu.dtype)
        lanes = self._cpu.lanes
        if len(shape) not in (3, 4) or shape[1] * 2 <= lanes or any(each.op not in BLOCKED for each in nodes):
            return value
        read = [self._values[each] for node in nodes for each in node.inputs if each in self._values]
        blocked = nodes[0].op in ("Conv", "ConvTranspose") or any(each.block for each in read)
        return replace(value, block=lanes if blocked else 0)

    def _named(self, kernel: Kernel) -> str:
        """Return the kernel's name; equal kernels have one."""
        alike = self._known.setdefault(tvm_ffi.structural_hash(kernel.func), [])
        for other, name in alike:
            if other.plan == kernel.plan and tvm_ffi.structural_equal(other.func, kernel.func):
                return name
        name = kernel_name(kernel, self._cpu)
        alike.append((kernel, name))
        self._kernels[name] = kernel
        return name

    # -- values that lie in others

    def _as_part(self, node: Node, name: str) -> bool:
        """Let a result lie where its operand does, if its elements are there in the right order."""
        source = node.inputs[0] if node.inputs else ""
        if source not in self._values or source in self._graph.inputs or name in self._graph.outputs:
            return False
        value = self._values[source]
        if value.name in self._graph.outputs:
            return False
        result = self._viewed(value, name) if node.op in VIEWS else None
        start = 0
        if node.op in ("Slice", "Split"):
            result, start = self._cut(value, node, name)
        if result is None or start * result.bytes // max(1, result.size) % arena.ALIGNMENT:
            return False
        self._values[name] = result
        above = self._parts.get(source, _Part(owner=source, offset=0))
        self._parts[name] = _Part(owner=above.owner, offset=above.offset + start * (result.bytes // result.size))
        return True

    def _viewed(self, value: Value, name: str) -> Value | None:
        shape = self._graph.shapes[name]
        if shape == value.shape:
            return replace(value, name=name)
        flat = prod(value.shape[2:]) == 1 and value.shape[0] == 1
        if value.block and not flat:
            return None
        return Value(name=name, shape=shape, dtype=value.dtype)

    def _cut(self, value: Value, node: Node, name: str) -> tuple[Value | None, int]:
        """Return the part of a value that Slice or Split takes, and its first element, if it lies in one piece."""
        shape, starts = self._graph.shapes[name], self._starts(node, name, value.shape)
        axes = [axis for axis in range(len(shape)) if shape[axis] != value.shape[axis]]
        if starts is None or len(axes) != 1 or any(size != 1 for size in shape[: axes[0]]):
            return None, 0
        axis = axes[0]
        if value.block and (axis != 1 or starts[axis] % value.block):
            return None, 0
        return replace(value, name=name, shape=shape), starts[axis] * prod(shape[axis + 1 :])

    def _starts(self, node: Node, name: str, shape: Sequence[int]) -> list[int] | None:
        if node.op == "Slice":
            ranges = slice_ranges(self._graph, node, shape)
            return [first for first, _ in ranges] if all(step == 1 for _, step in ranges) else None
        axis = int(node.attributes.get("axis", 0)) % len(shape)
        before = node.outputs[: node.outputs.index(name)]
        starts = [0] * len(shape)
        starts[axis] = sum(self._graph.shapes[each][axis] for each in before)
        return starts

    # -- memory

    def program(self) -> Program:
        """Return the steps with every tensor placed."""
        return _Placing(self._graph, self._values, self._parts, self._calls).program(self._kernels)


def kernel_name(kernel: Kernel, cpu: Cpu) -> str:
    """Return a digest of everything that the kernel's object code depends on."""
    facts = [VERSION, tvm.__version__, cpu.target(), asdict(kernel.plan), tvm.ir.save_json(kernel.func)]
    return "k" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class _Placing:
    """Gives every tensor a buffer."""

    def __init__(
        self, graph: Graph, values: Mapping[str, Value], parts: Mapping[str, _Part], calls: Sequence[_Call]
    ) -> None:
        self._graph, self._values, self._parts, self._calls = graph, values, parts, calls
        self._offsets, self._arena_bytes = self._planned()
        self._buffers: list[Buffer] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._constants: list[NDArray[Any]] = []
        self._constant_bytes = 0

    def program(self, kernels: Mapping[str, Kernel]) -> Program:
        """Return the whole program."""
        inputs = tuple(Port(name=name, buffer=self._buffer(self._values[name])) for name in self._graph.inputs)
        outputs = tuple(Port(name=name, buffer=self._buffer(self._values[name])) for name in self._graph.outputs)
        return Program(
            kernels=dict(kernels),
            steps=tuple(self._step(call) for call in self._calls),
            inputs=inputs,
            outputs=outputs,
            constants=tuple(self._constants),
            buffers=tuple(self._buffers),
            arena_bytes=self._arena_bytes,
        )

    def _step(self, call: _Call) -> Step:
        read = [self._buffer(each) for each in call.reads]
        carried = [self._constant(each) for each in call.constants]
        return Step(kernel=call.kernel, buffers=(*read, *carried, self._buffer(call.writes)), node=call.node)

    def _owner(self, name: str) -> str:
        return self._parts[name].owner if name in self._parts else name

    def _planned(self) -> tuple[dict[str, int], int]:
        """Return the offset of each value of the arena, and its size."""
        last: dict[str, int] = {}
        for number, call in enumerate(self._calls):
            last.update({self._owner(each.name): number for each in call.reads})
        own = {
            call.writes.name: arena.Lifetime(
                bytes=call.writes.bytes, first=number, last=last.get(call.writes.name, number)
            )
            for number, call in enumerate(self._calls)
            if call.writes.name not in self._graph.outputs
        }
        offsets, total = arena.plan(list(own.values()))
        return dict(zip(own, offsets, strict=True)), total

    def _buffer(self, value: Value) -> int:
        part = self._parts.get(value.name, _Part(owner=value.name, offset=0))
        space: Space = "arena"
        if part.owner in self._graph.inputs:
            space = "input"
        if part.owner in self._graph.outputs:
            space = "output"
        start = self._offsets[part.owner] if space == "arena" else 0
        key = (space, part.owner if space != "arena" else "", start + part.offset, value.physical, value.dtype)
        if key not in self._numbers:
            self._numbers[key] = len(self._buffers)
            made = Buffer(space=space, offset=start + part.offset, shape=value.physical, dtype=value.dtype)
            self._buffers.append(made)
        return self._numbers[key]

    def _constant(self, array: NDArray[Any]) -> int:
        self._constants.append(array)
        self._buffers.append(
            Buffer(space="constant", offset=self._constant_bytes, shape=array.shape, dtype=str(array.dtype))
        )
        self._constant_bytes += arena.aligned(array.nbytes)
        return len(self._buffers) - 1
