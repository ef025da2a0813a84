"""Read a state dict without unpickling anything, and put it into a module or say exactly why it does not fit."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.errors import ModelError

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and training frameworks put before every name."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which checkpoints keep the state dict."""

NAMED = 4
"""How many names an error lists."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a ``.safetensors`` file or one that `torch.save` wrote.

    Raises:
        ModelError: if it is missing, damaged, or would have to run code to be read.
    """
    if not path.is_file():
        raise ModelError(f"weights {path} are missing", next_step="give the path of a .safetensors or .pt file")
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    for key in WRAPPERS:
        inner = state.get(key)
        if isinstance(inner, Mapping):
            state = inner
    return {_name(name, path): _tensor(name, each, path) for name, each in state.items()}


def _name(name: object, path: Path) -> str:
    if not isinstance(name, str):
        raise ModelError(
            f"weights {path.name} are not a state dict",
            why=f"{str(name)[:60]} is not a name",
            next_step="save model.state_dict() alone",
        )
    return name


def _tensor(name: object, value: object, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(
            f"weights {path.name} are not a state dict",
            why=f"{name!r} is a {type(value).__name__}",
            next_step="save model.state_dict() alone",
        )
    return value


def _safetensors(path: Path) -> Mapping[object, object]:
    try:
        return cast(Mapping[object, object], load_file(path))
    except Exception as error:  # a type that torch does not have is a KeyError, damage a SafetensorError
        raise _unreadable(path, error) from error


def _torch(path: Path) -> Mapping[object, object]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights {path.name} would run code when read, so they are refused",
            why=str(error).splitlines()[0],
            next_step="save the state dict alone: torch.save(model.state_dict(), ...) or safetensors",
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise anything, an AssertionError as well
        raise _unreadable(path, error) from error
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ModelError(f"weights {path.name} hold a {kind}", why="a state dict is wanted: name to tensor")
    return state


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ModelError(f"weights {path.name} cannot be read", why=reason, next_step="save them again")


def fill(module: nn.Module, state: dict[str, Tensor], source: str) -> tuple[str, ...]:
    """Load `state` into `module` and return what had to be done for it, one sentence each.

    A prefix of all names is removed if, and only if, every name fits without it.

    Args:
        source: what to call the state in an error.

    Raises:
        ModelError: naming the first missing, unexpected and wrongly shaped tensors and how many there are.
    """
    wanted = module.state_dict()
    notes: tuple[str, ...] = ()
    for prefix in PREFIXES:
        shorter = {name.removeprefix(prefix): each for name, each in state.items()}
        if set(shorter) == set(wanted) != set(state):
            state, notes = shorter, (f"the prefix {prefix!r} was removed from every name in {source}",)
    _check_shapes(wanted, state, source)
    try:
        result = module.load_state_dict(state, strict=False)
    except Exception as error:  # a module may have hooks of its own, and torch refuses sparse tensors and the like
        raise ModelError(
            f"the tensors in {source} cannot be loaded into the model",
            why=(str(error).strip() or type(error).__name__).splitlines()[-1].strip(),
            next_step="save model.state_dict() of dense tensors of the types that the model has",
        ) from error
    _check_names(result.missing_keys, result.unexpected_keys, len(wanted), source)
    return notes


def _check_shapes(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    wrong = [
        f"{name} is {_shape(state[name])}, wanted {_shape(each)}"
        for name, each in wanted.items()
        if name in state and state[name].shape != each.shape and each.dim() > 0
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} of {len(wanted)} tensors in {source} have another shape",
            why=_first(wrong),
            next_step="give the factory the arguments (kwargs) that the weights were trained with",
        )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(each) for each in tensor.shape) or "a number"


def _check_names(missing: list[str], unexpected: list[str], wanted: int, source: str) -> None:
    found = []
    if missing:
        found.append(f"{len(missing)} of {wanted} are missing: {_first(missing)}")
    if unexpected:
        found.append(f"{len(unexpected)} are unexpected: {_first(unexpected)}")
    if found:
        raise ModelError(
            f"the names in {source} are not the model's",
            why="; ".join(found),
            next_step="give the factory that the weights were saved from",
        )


def check_finite(module: nn.Module, source: str) -> None:
    """Check that no tensor holds NaN or infinity.

    Raises:
        ModelError: naming the first tensors that do.
    """
    floats = {name: each for name, each in module.state_dict().items() if each.is_floating_point()}
    if bad := [name for name, each in floats.items() if not bool(torch.isfinite(each).all())]:
        raise ModelError(
            f"{len(bad)} of {len(floats)} tensors of {source} hold NaN or infinity",
            why=_first(bad),
            next_step="use a checkpoint from before the training diverged",
        )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, as 64 hexadecimal digits."""
    made = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
