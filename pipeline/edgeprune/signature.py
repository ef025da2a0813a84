"""What goes in and what comes out of an ONNX graph that stands alone."""

from collections.abc import Iterable
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgeprune.artifact import TensorSpec
from edgeprune.errors import CorruptArtifact
from edgeprune.manifest import Signature, Tensor


def read_signature(content: bytes, name: str) -> Signature:
    """Return the inputs and outputs of the ONNX model spelled by `content`.

    Args:
        content: the file's bytes; nothing else is read.
        name: of the file, for messages.

    Raises:
        CorruptArtifact: if it is no valid ONNX model or keeps data in other files.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CorruptArtifact(f"{name} is not an ONNX model", why="its bytes cannot be decoded") from error
    if _has_external_data(model):
        raise CorruptArtifact(f"{name} keeps data in other files", next_step="save it with all data inside")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise CorruptArtifact(f"{name} is not a valid ONNX model", why=str(error).strip().splitlines()[0]) from error
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    return Signature(inputs=_tensors(inputs, name), outputs=_tensors(model.graph.output, name))


def input_specs(signature: Signature) -> tuple[TensorSpec, ...]:
    """Return the inputs as an artifact lists them; an axis without a number counts 1."""
    return tuple(TensorSpec(name=each.name, shape=fixed_shape(each), dtype=each.dtype) for each in signature.inputs)


def fixed_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape with 1 for every axis that has no number."""
    return tuple(axis if isinstance(axis, int) else 1 for axis in tensor.shape)


def _has_external_data(message: Any) -> bool:
    if isinstance(message, onnx.TensorProto):
        external: bool = message.data_location == onnx.TensorProto.EXTERNAL or bool(message.external_data)
        return external
    children = (value for field, value in message.ListFields() if field.message_type is not None)
    return any(_has_external_data(each) for value in children for each in _each(value))


def _each(value: Any) -> Iterable[Any]:
    return (value,) if hasattr(value, "ListFields") else value


def _tensors(values: Iterable[Any], name: str) -> tuple[Tensor, ...]:
    return tuple(_tensor(value, name) for value in values)


def _tensor(value: Any, name: str) -> Tensor:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise CorruptArtifact(f"{name}: {value.name!r} is not a tensor of known rank")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except KeyError as error:
        raise CorruptArtifact(f"{name}: {value.name!r} has an unknown element type") from error
    return Tensor(name=value.name, dtype=dtype, shape=tuple(_axis(axis) for axis in kind.shape.dim))


def _axis(axis: Any) -> int | str | None:
    if axis.HasField("dim_value"):
        return int(axis.dim_value)
    return str(axis.dim_param) or None
