"""From what the user named to a module that is known to work: evaluated once, finite, one logit for each class.

Everything that a run will do to it hours later is tried as well: copying it and calling it in train mode.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from edgeprune.canonical import digest
from edgeprune.errors import ModelError
from edgeprune.intake.program import Program, read_program
from edgeprune.intake.rebuild import rebuild
from edgeprune.intake.weights import check_finite, fill, read_state, state_sha256

if TYPE_CHECKING:
    from edgeprune.intake.config import ModelConfig

COLOURS = (1, 3, 4)
"""Sizes of an axis that look like colour channels."""

TOLERANCE = 1e-3
"""Largest difference, relative to the largest logit, between an image alone and the same image in a batch of two."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to be pruned.

    Attributes:
        module: in eval mode, float32, on the CPU.
        name: as the user named it.
        input_shape: of one call, 1 x C x H x W.
        classes: logits for each image.
        digest: SHA-256 of names, shapes and values of the weights and of the printed structure.
        notes: what had to be done to the weights, one sentence each.
    """

    module: nn.Module
    name: str
    input_shape: tuple[int, int, int, int]
    classes: int
    digest: str
    notes: tuple[str, ...] = ()


def load_model(settings: "ModelConfig", *, input_shape: tuple[int, ...] | None = None) -> LoadedModel:
    """Return the model that the settings name.

    Args:
        input_shape: of the data, for settings that do not say; 1 x C x H x W.

    Raises:
        ModelError: if it cannot be built, its weights do not fit or are not finite, or it does not map an image of
            the input shape to finite logits, one row for each image, in eval mode and in train mode; or if it cannot
            be copied.
    """
    module, shape, notes = _built(settings)
    chosen = settings.input_shape or input_shape or shape
    if chosen is None:
        raise ModelError(
            f"the input shape of {settings} is unknown",
            next_step="set model.input_shape, for 32 x 32 pixels in colour to [1, 3, 32, 32]",
        )
    module = module.to(device="cpu", dtype=torch.float32).eval()
    check_finite(module, settings.weights.name if settings.weights else str(settings))
    name = str(settings)
    probe = _copied(module, name)
    classes = _check_forward(module, tuple(chosen), name)
    _check_training(probe, tuple(chosen), name, classes)
    return LoadedModel(
        module=module,
        name=name,
        input_shape=cast(tuple[int, int, int, int], tuple(chosen)),
        classes=classes,
        digest=digest({"structure": str(module), "weights": state_sha256(module.state_dict())}),
        notes=notes,
    )


def _built(settings: "ModelConfig") -> tuple[nn.Module, tuple[int, ...] | None, tuple[str, ...]]:
    """Return the module, the input shape if it says, and notes."""
    if settings.program is not None:
        program = read_program(settings.program)
        return rebuild(program), _input_shape(program), ()
    if settings.name is not None:
        module = _from_hub(settings.name, settings.kwargs, pretrained=settings.weights is None)
    else:
        assert settings.factory is not None
        module = _module(settings.factory.call(settings.kwargs, ModelError), str(settings.factory))
    if settings.weights is None:
        return module, None, ()
    return module, None, fill(module, read_state(settings.weights), settings.weights.name)


def _module(made: object, source: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"factory {source!r} returned a {type(made).__name__}",
            why="a torch.nn.Module is wanted",
            next_step="return the model itself"
            if made is not None
            else "check that the function has a return statement",
        )
    return made


def _input_shape(program: Program) -> tuple[int, ...] | None:
    _, *rest = program.shapes.get(program.input, ()) or (None,)
    return (1, *(each for each in rest if each)) if len(rest) == 3 and all(rest) else None


def _from_hub(name: str, kwargs: Mapping[str, object], *, pretrained: bool) -> nn.Module:
    library, _, model = name.partition(":")
    hub = _imported(library, name)
    try:
        if library == "timm":
            made = hub.create_model(model, **{"pretrained": pretrained, **kwargs})
        else:
            made = hub.models.get_model(model, **{"weights": "DEFAULT" if pretrained else None, **kwargs})
    except Exception as error:  # the hubs raise whatever their downloads and constructors raise
        raise ModelError(
            f"{library} cannot make {model!r}",
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            next_step=f"check the name in {library}'s list of models; give weights where there is no network",
        ) from error
    return _module(made, name)


def _imported(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module("timm" if library == "timm" else "torchvision")
    except ImportError as error:
        raise ModelError(
            f"{name!r} needs {library}", why=str(error), next_step=f"python -m pip install {library}"
        ) from error
    except RuntimeError as error:  # a torchvision that was built for another torch
        raise ModelError(
            f"{library} does not work with torch {torch.__version__}",
            why=str(error).splitlines()[0],
            next_step="python -m pip install --upgrade torchvision, the version that belongs to this torch",
        ) from error


def _check_forward(module: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """Return the number of classes after trying one image and two."""
    pair = _pair(shape)
    alone = _forward(module, pair[:1], name, _input_advice(module, shape))
    if alone.dim() != 2 or alone.shape[0] != 1 or alone.shape[1] < 2:
        raise ModelError(
            f"{name} maps {_times(shape)} to {_times(tuple(alone.shape))}",
            why="logits of shape images x classes are wanted, with two classes or more",
            next_step="wrap the model so that it returns the logits of a classifier",
        )
    together = _forward(module, pair, name, _advice(module))
    if not bool(torch.isfinite(together).all()):
        raise ModelError(f"{name} returns NaN or infinity for ordinary noise", next_step="check its weights")
    scale = float(together.abs().max()) or 1.0
    if together.shape[0] != 2 or float((together[:1] - alone).abs().max()) > TOLERANCE * scale:
        raise ModelError(
            f"{name} gives another answer for an image alone than in a batch of two",
            why="it was written or exported for one batch size, or it is not deterministic in eval mode",
            next_step=_advice(module),
        )
    return alone.shape[1]


def _pair(shape: tuple[int, ...]) -> Tensor:
    """Return two images of noise, the same ones every time."""
    try:
        return torch.randn((2, *shape[1:]), generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError) as error:  # sizes from a file may be negative or anything, and memory is finite
        raise ModelError(
            f"no image of the input shape {_times(shape)} can be made",
            why=str(error).splitlines()[0],
            next_step="set model.input_shape to what the model was trained on, for example [1, 3, 224, 224]",
        ) from error


def _check_training(probe: nn.Module, shape: tuple[int, ...], name: str, classes: int) -> None:
    """Check that the model answers in train mode as it does in eval mode: fine-tuning, hours later, needs it.

    Args:
        probe: a copy, whose batch norms may count the images.
    """
    pair = _pair(shape)
    advice = "return the logits alone in train mode as well, for example with kwargs aux_logits = false"
    with torch.random.fork_rng(devices=[]):
        logits = _forward(probe.train(), pair, f"{name} in train mode", advice, wrap=advice, mode=torch.enable_grad)
    if logits.shape != (2, classes):
        raise ModelError(
            f"{name} in train mode maps {_times(tuple(pair.shape))} to {_times(tuple(logits.shape))}",
            why=f"in eval mode it has {classes} classes, and fine-tuning compares the two",
            next_step=advice,
        )
    _copied(probe, name)


def _copied(module: nn.Module, name: str) -> nn.Module:
    """Return a copy; what computes weights in a hook can be copied either never or not after a forward."""
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever the attributes of a stranger's module raise
        raise ModelError(
            f"{name} cannot be copied",
            why=f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}",
            next_step="fold weights that a hook computes: torch.nn.utils.remove_weight_norm or remove_spectral_norm of "
            "each such layer; keep locks, files and generators out of the module",
        ) from error


def _forward(
    module: nn.Module,
    images: Tensor,
    name: str,
    advice: str,
    *,
    wrap: str = "wrap the model",
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
) -> Tensor:
    """Return the logits.

    Args:
        advice: what to do if it raises.
        wrap: what to do if it returns something else.
        mode: of autograd.
    """
    try:
        with mode():
            output = module(images)
    except Exception as error:  # a stranger's forward may raise anything
        raise ModelError(
            f"{name} cannot process {_times(tuple(images.shape))}",
            why=f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}",
            next_step=advice,
        ) from error
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ModelError(f"{name} returns a {kind}", why="one tensor of logits is wanted", next_step=wrap)
    return output


def _input_advice(module: nn.Module, shape: tuple[int, ...]) -> str:
    """Return what to do about a model that cannot process one image."""
    wanted = [
        each
        for each in inspect.signature(module.forward).parameters.values()
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(wanted) > 1:
        names = ", ".join(each.name for each in wanted)
        return f"wrap the model in a module with one input: its forward takes {names}"
    if len(shape) == 4 and shape[-1] in COLOURS and shape[1] not in COLOURS:
        return "float arrays are taken as N x C x H x W: transpose(0, 3, 1, 2)"
    return "set model.input_shape to what it was trained on, batch 1"


def _advice(module: nn.Module) -> str:
    """Return what to do about a model that works on one image and not on two."""
    if isinstance(module, torch.fx.GraphModule):
        return 'export it with dynamic_shapes={"x": {0: torch.export.Dim("batch")}}'
    return "let its forward take any number of images"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(each) for each in shape)
