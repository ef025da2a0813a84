"""Read a ``.pt2`` file, what `torch.export.save` writes, without running anything that is in it.

`torch.export.load` unpickles the sample inputs and evaluates text as symbolic expressions, so a file from a stranger
could do anything. Here only JSON and raw tensor bytes are read: the archive is a ZIP file of stored members

    NAME/models/model.json                          the graph: calls of ATen operators by name
    NAME/data/weights/model_weights_config.json     parameter or buffer → member, shape, strides
    NAME/data/weights/weight_0 ...                  raw little-endian tensors

and a program that needs any other kind of payload is refused.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import EdgepruneError, ModelError

SCHEMA_MAJOR = 8
"""Major version of the JSON schema that is understood; minor versions only add optional fields."""

_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7
_LITERALS: dict[str, tuple[type, ...]] = {
    "as_int": (int,),
    "as_float": (int, float),
    "as_bool": (bool,),
    "as_string": (str,),
}
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""How a schema without NaN writes such numbers."""
_VALUE = re.compile(r"[A-Za-z_0-9]+")
_ADVICE = (
    "export the model's nn.Module in eval mode with torch.export.export(...), or give a factory and weights instead"
)


@dataclass(frozen=True, kw_only=True)
class Ref:
    """The value that an earlier call, an input or a stored tensor has."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call.

    Attributes:
        target: as serialised, for example "torch.ops.aten.conv2d.default".
        arguments: schema name → literal, `Ref`, or a list of them; arguments at their default are absent.
        outputs: names of its results.
        listed: the operator returns a list or tuple, even if it has one element.
    """

    target: str
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]
    listed: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """A graph with one input and one output.

    Attributes:
        input, output: names of the values.
        calls: in execution order.
        stored: value name → name of the parameter, buffer or constant it is.
        parameters: names of the stored tensors that are parameters.
        state: stored name → tensor.
        shapes: value name → sizes, None where a size is symbolic.
    """

    input: str
    output: str
    calls: tuple[Call, ...]
    stored: Mapping[str, str]
    parameters: frozenset[str]
    state: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int | None, ...]]


def read_program(path: Path) -> Program:
    """Return the program in the file at `path`.

    Raises:
        ModelError: if it is missing, not such a file, truncated, or holds anything but a plain graph and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _program(_Members(archive), path)
    except OSError as error:
        raise ModelError(f"cannot read {path}", why=error.strerror or str(error)) from error
    except EdgepruneError:
        raise
    except Exception as error:  # zipfile, json, struct and torch each raise their own
        raise ModelError(
            f"{path} is not a program that torch.export.save wrote, or it is damaged",
            why=f"{type(error).__name__}: {error}"[:300],
            next_step="write it again with torch.export.save of torch 2.9 or newer",
        ) from error


class _Members:
    """The members of an archive by the part of their name after the archive's own."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._by_name = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def bytes(self, name: str) -> bytes:
        """Return a member's bytes; it must be stored, so that it cannot be larger than the file."""
        info = self._by_name[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {name} is compressed")
        return self._archive.read(info)

    def json(self, name: str) -> Any:
        """Return the value of a JSON member."""
        return json.loads(self.bytes(name))


def _program(members: _Members, path: Path) -> Program:
    top = members.json("models/model.json")
    if (major := top["schema_version"]["major"]) != SCHEMA_MAJOR:
        raise ValueError(f"schema version {major}, {SCHEMA_MAJOR} is understood")
    graph, signature = top["graph_module"]["graph"], top["graph_module"]["signature"]
    parameters, others = _stored(signature["input_specs"], "parameter"), _others(signature["input_specs"], path)
    stored = parameters | others
    state = _tensors(members, "weights", stored.values()) | _tensors(members, "constants", stored.values())
    if absent := sorted(set(stored.values()) - set(state)):
        raise ValueError(f"tensors {absent[:3]} are not in the archive")
    return Program(
        input=_only([each for each in signature["input_specs"] if "user_input" in each], "user_input", "input", path),
        output=_only(signature["output_specs"], "user_output", "output", path),
        calls=tuple(_call(each) for each in graph["nodes"]),
        stored=stored,
        parameters=frozenset(parameters.values()),
        state={name: state[name] for name in stored.values()},
        shapes={name: tuple(_size(each) for each in meta["sizes"]) for name, meta in graph["tensor_values"].items()},
    )


def _stored(specs: list[dict[str, Any]], kind: str) -> dict[str, str]:
    return {each[kind]["arg"]["name"]: each[kind][f"{kind}_name"] for each in specs if kind in each}


def _others(specs: list[dict[str, Any]], path: Path) -> dict[str, str]:
    known = {"parameter", "buffer", "tensor_constant", "user_input"}
    if strange := {kind for each in specs for kind in each} - known:
        raise ModelError(f"{path.name} has inputs of kind {sorted(strange)[0]}", next_step=_ADVICE)
    return _stored(specs, "buffer") | _stored(specs, "tensor_constant")


def _only(specs: list[dict[str, Any]], kind: str, word: str, path: Path) -> str:
    """Return the name of the one tensor among `specs`."""
    if len(specs) != 1 or kind not in specs[0]:
        kinds = ", ".join(key for each in specs for key in each) or "none"
        raise ModelError(
            f"{path.name} does not have exactly one {word}",
            why=f"{len(specs)}: {kinds[:120]}; a program exported in train mode also writes its statistics",
            next_step=_ADVICE,
        )
    return str(specs[0][kind]["arg"]["as_tensor"]["name"])


def _tensors(members: _Members, folder: str, wanted: Any) -> dict[str, Tensor]:
    config = members.json(f"data/{folder}/model_{folder}_config.json")["config"]
    return {name: _tensor(members, f"data/{folder}", config[name]) for name in wanted if name in config}


def _tensor(members: _Members, folder: str, facts: dict[str, Any]) -> Tensor:
    meta = facts["tensor_meta"]
    if facts["use_pickle"] or meta["layout"] != _STRIDED:
        raise ValueError(f"{facts['path_name']} is pickled or not a plain tensor")
    dtype, sizes = _DTYPES[meta["dtype"]], [_whole(each) for each in meta["sizes"]]
    raw = bytearray(members.bytes(f"{folder}/{facts['path_name']}"))
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    strides = [_whole(each) for each in meta["strides"]]
    return flat.as_strided(sizes, strides, _whole(meta["storage_offset"])).clone()


def _size(value: dict[str, Any]) -> int | None:
    return value.get("as_int")


def _whole(value: dict[str, Any]) -> int:
    return int(value["as_int"])


def _call(node: dict[str, Any]) -> Call:
    results = [_decoded(each) for each in node["outputs"]]
    listed = len(results) != 1 or isinstance(results[0], list)
    names = results[0] if len(results) == 1 and listed else results
    return Call(
        target=node["target"],
        arguments={each["name"]: _decoded(each["arg"]) for each in node["inputs"]},
        outputs=tuple(each.name for each in names if isinstance(each, Ref)),
        listed=listed,
    )


def _decoded(argument: dict[str, Any]) -> Any:
    """Return the Python value of one serialised argument, a union written as {"as_KIND": value}."""
    ((kind, value),) = argument.items()
    if kind in _LITERALS:
        return _literal(kind, value)
    if kind.removesuffix("s") in _LITERALS:
        return [_literal(kind.removesuffix("s"), each) for each in value]
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return _reference(value["name"])
    if kind == "as_tensors":
        return [_reference(each["name"]) for each in value]
    if kind in {"as_optional_tensors", "as_sym_ints", "as_sym_floats"}:
        return [_decoded(each) for each in value]
    if kind in {"as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"}:
        return _decoded(value)
    if kind == "as_name":
        return _reference(value)
    return _enumerated(kind, value)


def _literal(kind: str, value: Any) -> Any:
    """Return a number, a truth value or text; a mapping, say, must not get into a graph that is printed as source."""
    number = _NOT_FINITE.get(value, value) if kind == "as_float" and isinstance(value, str) else value
    if not isinstance(number, _LITERALS[kind]):
        raise ValueError(f"an argument of kind {kind} is a {type(value).__name__}")
    return number


def _reference(name: Any) -> Ref:
    if not isinstance(name, str) or not _VALUE.fullmatch(name):
        raise ValueError(f"{str(name)[:60]!r} is not a name of a value")
    return Ref(name=name)


def _enumerated(kind: str, value: Any) -> Any:
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _MEMORY_FORMATS[value]
    if kind == "as_device" and value["type"] == "cpu":
        return torch.device("cpu")
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    raise ValueError(f"an argument of kind {kind} is not understood")
