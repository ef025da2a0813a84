"""What a device *is*: one TOML file a profile, read by name.

# profiles/host.toml
adapter = "onnxruntime_cpu"
arch = "any"
channel_multiple = 8

[options]
threads = 1
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from edgeprune.canonical import canonical_json, digest
from edgeprune.errors import ProfileError

Option = str | int | float | bool | list[object]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One kind of device, or one device when it has an address.

    Attributes:
        name: the profile's file name without suffix.
        adapter: the module of `edgeprune.targets` that drives it.
        address: where it is, None for this machine.
        arch: CPU or GPU architecture, "any" if the adapter does not care.
        precision: arithmetic of the engine.
        channel_multiple: kept channel counts are multiples of it, because the kernels of the runtime are blocked.
        memory_mib: memory an engine may use, None: unknown.
        power_mode: power mode the device must be in, None: as found.
        cooldown_c: temperature to wait for before measuring, degrees Celsius, None: do not wait.
        options: settings of the adapter alone.
        description: one line for people.
    """

    name: str
    adapter: str
    address: str | None = None
    arch: str = "any"
    precision: str = "fp32"
    channel_multiple: int = 8
    memory_mib: int | None = None
    power_mode: str | None = None
    cooldown_c: float | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if not self.channel_multiple >= 1:
            raise ProfileError(f"profile {self.name!r}: channel_multiple {self.channel_multiple} is below 1")

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that can change a latency; the address and the prose cannot."""
        facts = self.to_json()
        del facts["address"], facts["description"]
        return digest(facts)

    def to_json(self) -> dict[str, object]:
        """Return the profile as JSON values."""
        facts: dict[str, object] = {each.name: getattr(self, each.name) for each in fields(self)}
        return facts | {"options": dict(self.options)}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> "Profile":
        """Return the profile that `to_json` wrote.

        Raises:
            ProfileError: naming the field that is missing, unknown or of the wrong type.
        """
        return _checked(dict(value))


_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "adapter": (str,),
    "address": (str, type(None)),
    "arch": (str,),
    "precision": (str,),
    "channel_multiple": (int,),
    "memory_mib": (int, type(None)),
    "power_mode": (str, type(None)),
    "cooldown_c": (int, float, type(None)),
    "options": (dict,),
    "description": (str,),
}


def _checked(facts: dict[str, object]) -> Profile:
    name = facts.get("name", "?")
    if unknown := sorted(set(facts) - set(_TYPES)):
        raise ProfileError(f"profile {name!r}: unknown field {unknown[0]!r}", next_step=f"one of {', '.join(_TYPES)}")
    if "adapter" not in facts:
        raise ProfileError(
            f"profile {name!r}: no adapter", next_step='add adapter = "onnxruntime_cpu" or another adapter'
        )
    for key, value in facts.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and key != "options"):
            wanted = " or ".join(kind.__name__ for kind in _TYPES[key])
            raise ProfileError(f"profile {name!r}: {key} is {value!r}", why=f"a {wanted} is wanted")
        if isinstance(value, float) and not math.isfinite(value):
            raise ProfileError(f"profile {name!r}: {key} is {value!r}", why="a finite number is wanted")
    _check_options(facts.get("options", {}), name)
    return Profile(**facts)  # type: ignore[arg-type]


def _check_options(options: object, name: object) -> None:
    """Check that JSON can say every option: a profile is hashed, and sent to its adapter, as JSON."""
    assert isinstance(options, dict)
    for key, value in options.items():
        try:
            canonical_json(value)
        except (TypeError, ValueError) as error:
            raise ProfileError(
                f"profile {name!r}: option {key!r} is {value!r}",
                why="a number, text, true, false or a list of them is wanted",
                next_step="write a date as text; NaN and infinity are no settings",
            ) from error


def profile_names() -> tuple[str, ...]:
    """Return the names of the profiles that ship with edgeprune, sorted."""
    shipped = files("edgeprune.profiles").iterdir()
    return tuple(sorted(each.name.removesuffix(".toml") for each in shipped if each.name.endswith(".toml")))


def load_profile(name: str, overrides: Mapping[str, object] | None = None) -> Profile:
    """Return the shipped profile `name`, or the one in the TOML file `name` if that ends in ``.toml``.

    Args:
        name: a shipped profile, or a path.
        overrides: fields of a ``[targets.NAME]`` table; its ``options`` are merged into the profile's.

    Raises:
        ProfileError: if there is no such profile or it is malformed.
    """
    facts = {"name": Path(name).stem} | _read(name)
    extra = dict(overrides or {})
    options = _options(facts, name) | _options(extra, name)
    return _checked(facts | extra | {"options": options})


def _options(facts: Mapping[str, object], name: str) -> dict[str, object]:
    options = facts.get("options", {})
    if not isinstance(options, dict):
        raise ProfileError(f"profile {name!r}: options is {options!r}", why="a table is wanted")
    return options


def _read(name: str) -> dict[str, object]:
    shipped = files("edgeprune.profiles") / f"{name}.toml"
    source = Path(name) if name.endswith(".toml") else None
    try:
        if source is not None:
            return tomllib.loads(source.read_text(encoding="utf-8"))
        if "/" in name or not shipped.is_file():
            raise ProfileError(
                f"unknown target {name!r}",
                why=f"shipped profiles are {', '.join(profile_names())}",
                next_step="name one of them, give the path of a profile ending in .toml, or describe it in "
                f'edgeprune.toml, below [targets.{name}]: profile = "ONE OF THEM"',
            )
        return tomllib.loads(shipped.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"cannot read profile {name!r}", why=str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {name!r} is not TOML", why=str(error)) from error


def at_address(profile: Profile, address: str | None) -> Profile:
    """Return `profile` living at `address`."""
    return replace(profile, address=address)
