"""Turn an exported program back into an `nn.Module` with real layers, so that its channels can be cut.

An exported graph calls ``aten.conv2d(x, weight, bias, ...)`` on stored tensors; nothing in it is a layer. Here every
such call becomes a layer at the path its weight had,

    aten.conv2d(x, layer1.0.conv1.weight, None, [1, 1], [1, 1])   →   layer1.0.conv1 = Conv2d(16, 16, 3, padding=1)

and every other call stays a call of the same operator. Only operators in `FUNCTIONS` are allowed: none of them reads
a file or runs code.

`fx.GraphModule` prints the graph as Python source and runs that. Of the text in a file, the names of arguments and of
layers would go into it as they are, so both are checked here; literals go in as their `repr`, and `program` lets
through none but numbers and text.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from edgeprune.errors import EdgepruneError, ModelError
from edgeprune.intake.program import Call, Program, Ref

FUNCTIONS = frozenset(
    """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add_ add alias amax amin
    arange argmax avg_pool1d avg_pool2d batch_norm bitwise_not bmm cat ceil celu_ celu channel_shuffle chunk clamp_
    clamp clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv2d conv_transpose2d cos cumsum
    detach div_ div dropout dropout_ einsum elu elu_ empty_like eq erf exp expand expand_as expm1 flatten flip floor
    full full_like ge gelu glu group_norm gt hardsigmoid_ hardsigmoid hardswish hardswish_ hardtanh hardtanh_ index
    index_select instance_norm layer_norm le leaky_relu leaky_relu_ linalg_vector_norm linear local_response_norm
    log log1p log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max max_pool1d
    max_pool2d maximum mean min minimum mish mish_ movedim mul mul_ narrow ne neg ones ones_like pad permute
    pixel_shuffle pixel_unshuffle pow prelu prod reciprocal relu_ relu relu6_ relu6 repeat repeat_interleave reshape
    reshape_as roll rsqrt rsub scalar_tensor scaled_dot_product_attention select selu selu_ sigmoid_ sigmoid silu
    silu_ sin slice softmax softplus split split_with_sizes sqrt square squeeze stack std sub sub_ sum swapaxes
    sym_size t tanh_ tanh tile to transpose type_as unbind unflatten unfold unsqueeze upsample_bicubic2d
    upsample_bilinear2d upsample_nearest2d _upsample_nearest_exact2d var view view_as where zeros zeros_like
    """.split()
)
"""ATen operators that a program may call."""

SIZES: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
}
"""Arithmetic on sizes that a program may do."""

ASSERTIONS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})
"""Operators that compute nothing; they are left out."""

_TARGET = re.compile(r"torch\.ops\.aten\.(?P<name>\w+)\.(?P<overload>\w+)")
_SIZE_ARGUMENTS = frozenset({"a", "b"})
_PRINTABLE = re.compile(r"[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)*")
"""Paths of layers and tensors that cannot end the string or the attribute that the source has them in."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer made of one call: the module and the tensor whose name says where it belongs."""

    module: nn.Module
    named_after: str


@dataclass(kw_only=True)
class _Workshop:
    """What is being built."""

    program: Program
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, fx.Node] = field(default_factory=dict)
    layers: dict[int, str] = field(default_factory=dict)


def rebuild(program: Program) -> fx.GraphModule:
    """Return the module whose outputs equal the program's, for any batch size where the program allows it.

    Raises:
        ModelError: naming an operator, an argument or a layer's name that is not allowed, or a batch norm exported in
            train mode; or if the graph does not hold together.
    """
    try:
        return _rebuilt(program)
    except EdgepruneError:
        raise
    except Exception as error:  # the constructors of layers and of graphs raise whatever a strange argument makes them
        raise ModelError(
            "the program's graph is not one that torch.export makes",
            why=f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"[:300],
            next_step="write the file again with torch.export.save, or give a factory and weights instead of a program",
        ) from error


def _rebuilt(program: Program) -> fx.GraphModule:
    shop = _Workshop(program=program)
    calls = [each for each in program.calls if _name(each) not in ASSERTIONS]
    for call in calls:
        _check_arguments(call)
    _place_layers(shop, calls)
    shop.values[program.input] = shop.graph.placeholder("x")
    for number, call in enumerate(calls):
        _emit(shop, number, call)
    shop.graph.output(shop.values[program.output])
    _check_paths(shop.graph)
    shop.graph.lint()
    return fx.GraphModule(shop.root, shop.graph, class_name="ExportedProgram")


def _name(call: Call) -> str:
    """Return the operator's name without its overload."""
    match = _TARGET.fullmatch(call.target)
    return match["name"] if match else call.target


def _function(call: Call) -> Callable[..., Any]:
    """Return the operator itself."""
    if call.target in SIZES:
        return SIZES[call.target]
    match = _TARGET.fullmatch(call.target)
    overload = None
    if match and match["name"] in FUNCTIONS and "out" not in match["overload"]:
        overload = getattr(getattr(torch.ops.aten, match["name"]), match["overload"], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise ModelError(
            f"the program calls {call.target}",
            why="it is not among the operators that can be rebuilt",
            next_step="export without run_decompositions(), or give a factory and weights instead of a program",
        )
    return overload


def _check_arguments(call: Call) -> None:
    """Check that the operator has these arguments: fx prints their names into source as they are."""
    function = _function(call)
    schema = function._schema.arguments if isinstance(function, torch._ops.OpOverload) else ()
    known = {each.name for each in schema} or _SIZE_ARGUMENTS
    if strange := sorted(set(call.arguments) - known):
        raise ModelError(
            f"the program gives {call.target} the argument {strange[0][:60]!r}",
            why=f"it takes {', '.join(sorted(known))}",
            next_step="do not use this file: torch.export does not write such a call",
        )


def _check_paths(graph: fx.Graph) -> None:
    """Check the paths of all layers and tensors: fx prints them into source as they are."""
    for node in graph.nodes:
        if isinstance(node.target, str) and not _PRINTABLE.fullmatch(node.target):
            raise ModelError(
                f"the program has a layer or tensor named {node.target[:60]!r}",
                why="letters, digits and _ are allowed between the dots",
                next_step="rename it in the model and export it again",
            )


# ---------------------------------------------------------------------------------------------------------- layers


def _place_layers(shop: _Workshop, calls: list[Call]) -> None:
    """Make a layer of every call that can be one; equal calls share theirs, as the model's author shared it."""
    made: dict[str, str] = {}
    for number, call in enumerate(calls):
        maker = _MAKERS.get(_name(call))
        tensors = _tensor_names(shop.program, call)
        if maker is None or tensors is None:
            continue
        facts = {key: value for key, value in call.arguments.items() if not _is_data(key)}
        identity = f"{call.target} {sorted(facts.items(), key=str)}" if tensors else f"{number}"
        if identity not in made:
            layer = maker(_Arguments(call=call, program=shop.program))
            made[identity] = _put(shop.root, layer.named_after, layer.module)
        shop.layers[number] = made[identity]


def _is_data(key: str) -> bool:
    return key in {"input", "self"}


def _tensor_names(program: Program, call: Call) -> list[str] | None:
    """Return the stored tensors that the call takes beside its data, None if one of them is computed."""
    refs = [each for key, each in call.arguments.items() if isinstance(each, Ref) and not _is_data(key)]
    return (
        None if any(each.name not in program.stored for each in refs) else [program.stored[each.name] for each in refs]
    )


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """The arguments of a call by name, defaults filled in."""

    call: Call
    program: Program

    def literal(self, name: str) -> Any:
        """Return a literal argument."""
        if name in self.call.arguments:
            return self.call.arguments[name]
        schema = cast(Any, _function(self.call))._schema
        return next(each.default_value for each in schema.arguments if each.name == name)

    def stored(self, name: str) -> str | None:
        """Return the stored name of a tensor argument, None if it was not given."""
        ref = self.call.arguments.get(name)
        return self.program.stored[ref.name] if isinstance(ref, Ref) else None

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor argument."""
        stored = self.stored(name)
        return None if stored is None else self.program.state[stored]

    def parameter(self, name: str) -> nn.Parameter | None:
        """Return a tensor argument as a parameter."""
        tensor = self.tensor(name)
        return None if tensor is None else nn.Parameter(tensor)


def _layer(arguments: _Arguments, module: nn.Module, after: str = "weight") -> Layer:
    """Return the layer with its tensors taken from the program."""
    for name in ("weight", "bias"):
        if name in module._parameters:
            module.register_parameter(name, arguments.parameter(name))
    stored = arguments.stored(after) or ""
    return Layer(module=module, named_after=stored.removesuffix(f".{after}"))


def _convolution(kind: Callable[..., nn.Module]) -> Callable[[_Arguments], Layer]:
    def make(arguments: _Arguments) -> Layer:
        weight, groups = cast(Tensor, arguments.tensor("weight")), arguments.literal("groups")
        options = {each: arguments.literal(each) for each in ("stride", "padding", "dilation")}
        options = {
            key: value if isinstance(value, str) else _tuple(value, weight.dim() - 2) for key, value in options.items()
        }
        module = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            groups=groups,
            bias="bias" in arguments.call.arguments and arguments.tensor("bias") is not None,
            device="meta",
            **options,
        )
        return _layer(arguments, module)

    return make


def _transposed(arguments: _Arguments) -> Layer:
    weight, groups = cast(Tensor, arguments.tensor("weight")), arguments.literal("groups")
    options = {each: _tuple(arguments.literal(each), 2) for each in ("stride", "padding", "output_padding", "dilation")}
    module = nn.ConvTranspose2d(
        weight.shape[0],
        weight.shape[1] * groups,
        (weight.shape[2], weight.shape[3]),
        groups=groups,
        bias=arguments.tensor("bias") is not None,
        device="meta",
        **options,
    )
    return _layer(arguments, module)


def _tuple(value: Any, rank: int) -> Any:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(values * rank if len(values) == 1 else values)


def _linear(arguments: _Arguments) -> Layer:
    weight = cast(Tensor, arguments.tensor("weight"))
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=arguments.tensor("bias") is not None, device="meta")
    return _layer(arguments, module)


def _batch_norm(arguments: _Arguments) -> Layer:
    if arguments.literal("training") or arguments.tensor("running_mean") is None:
        raise ModelError(
            f"the program has a batch norm in train mode ({arguments.stored('weight')})",
            next_step="call model.eval() before torch.export.export",
        )
    mean, variance = cast(Tensor, arguments.tensor("running_mean")), cast(Tensor, arguments.tensor("running_var"))
    input_rank = len(arguments.program.shapes[arguments.call.arguments["input"].name])
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[input_rank]
    module = kind(
        len(mean),
        eps=arguments.literal("eps"),
        momentum=arguments.literal("momentum"),
        affine=arguments.tensor("weight") is not None,
        device="meta",
    )
    module.running_mean, module.running_var, module.num_batches_tracked = mean, variance, torch.tensor(0)
    return _layer(arguments, module, after="running_mean")


def _layer_norm(arguments: _Arguments) -> Layer:
    shape, affine = arguments.literal("normalized_shape"), arguments.tensor("weight") is not None
    bias = arguments.tensor("bias") is not None
    module = nn.LayerNorm(shape, arguments.literal("eps"), elementwise_affine=affine, bias=bias, device="meta")
    return _layer(arguments, module)


def _group_norm(arguments: _Arguments) -> Layer:
    weight = arguments.tensor("weight")
    channels = cast(int, arguments.program.shapes[arguments.call.arguments["input"].name][1])
    groups, eps = arguments.literal("num_groups"), arguments.literal("eps")
    return _layer(arguments, nn.GroupNorm(groups, channels, eps, affine=weight is not None, device="meta"))


def _prelu(arguments: _Arguments) -> Layer:
    return _layer(arguments, nn.PReLU(cast(Tensor, arguments.tensor("weight")).numel(), device="meta"))


def _dropout(arguments: _Arguments) -> Layer:
    return Layer(module=nn.Dropout(arguments.literal("p")), named_after="dropout")


_MAKERS: Mapping[str, Callable[[_Arguments], Layer]] = {
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "conv_transpose2d": _transposed,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    "dropout": _dropout,
    "dropout_": _dropout,
}
"""Operator → how to make its layer. A new layer is one function here."""


def _put(root: nn.Module, path: str, module: nn.Module) -> str:
    """Add `module` to the tree at `path`, or beside it if the place is taken; return where it is."""
    *above, name = (path or "layer").split(".")
    parent = _container(root, above)
    taken, number = name, 0
    while hasattr(parent, taken):
        number += 1
        taken = f"{name}_{number}"
    parent.add_module(taken, module)
    return ".".join([*above, taken])


def _container(root: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = cast(nn.Module, root._modules[name])
    return root


# ----------------------------------------------------------------------------------------------------------- calls


def _emit(shop: _Workshop, number: int, call: Call) -> None:
    """Append one call to the graph and name its results."""
    if number in shop.layers:
        data = next(value for key, value in call.arguments.items() if _is_data(key))
        shop.values[call.outputs[0]] = shop.graph.call_module(shop.layers[number], (_value(shop, data),))
        return
    function, arguments = _function(call), _any_batch(shop.program, call)
    if arguments is not call.arguments and "start_dim" in arguments:
        function = torch.ops.aten.flatten.using_ints
    positional, named = _split(function, {key: _value(shop, value) for key, value in arguments.items()})
    node = shop.graph.call_function(function, tuple(positional), named)
    if not call.listed:
        shop.values[call.outputs[0]] = node
        return
    for index, name in enumerate(call.outputs):
        shop.values[name] = shop.graph.call_function(operator.getitem, (node, index))


def _any_batch(program: Program, call: Call) -> Mapping[str, Any]:
    """Return the arguments of a view, free of the batch size the program was exported with.

    ``view(x, [1, 512])`` of a program exported with one image is `flatten` for any number of images, and it stays
    right when channels are cut.
    """
    size, shape = call.arguments.get("size", call.arguments.get("shape")), program.shapes.get(call.outputs[0], ())
    batch = program.shapes[program.input][0]
    if _name(call) not in {"view", "reshape"} or batch is None or not size or size[0] != batch:
        return call.arguments
    if program.shapes[call.arguments["self"].name][0] != batch:
        return call.arguments
    if len(shape) == 2:
        return {"self": call.arguments["self"], "start_dim": 1}
    key = "size" if "size" in call.arguments else "shape"
    return {**call.arguments, key: [-1, *shape[1:]]}


def _split(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and keyword arguments in the operator's order."""
    if not isinstance(function, torch._ops.OpOverload):
        return list(arguments.values()), {}
    positional: list[Any] = []
    for each in function._schema.arguments:
        if each.kwarg_only or each.name not in arguments:
            break
        positional.append(arguments.pop(each.name))
    return positional, arguments


def _value(shop: _Workshop, value: Any) -> Any:
    """Return the graph's node for a reference; a literal is itself."""
    if isinstance(value, list):
        return [_value(shop, each) for each in value]
    if not isinstance(value, Ref):
        return value
    if value.name not in shop.values:
        shop.values[value.name] = _attribute(shop, shop.program.stored[value.name])
    return shop.values[value.name]


def _attribute(shop: _Workshop, name: str) -> fx.Node:
    """Return a node that reads a stored tensor, which the tree then holds under its own name."""
    *above, leaf = name.split(".")
    parent, tensor = _container(shop.root, above), shop.program.state[name]
    if not hasattr(parent, leaf):
        if name in shop.program.parameters:
            parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            parent.register_buffer(leaf, tensor)
    return shop.graph.get_attr(name)
