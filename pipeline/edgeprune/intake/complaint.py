"""Turn what pydantic found into one `ConfigError` that names every setting, what was given and what is wanted."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgeprune.errors import ConfigError

Location = tuple[int | str, ...]


def config_error(
    error: ValidationError, root: type[BaseModel], source: str, flags: Collection[str] = ()
) -> ConfigError:
    """Return the error for a configuration read from `source` that does not fit `root`.

    Args:
        flags: dotted names of the settings that were given as flags, not by `source`.
    """
    complaints = error.errors(include_url=False)
    whole = "what is asked for" if flags else "the file"
    lines = [
        _line(each, root, whole) + (" (given as a flag)" if _is_flag(each["loc"], flags) else "") for each in complaints
    ]
    if all(_is_flag(each["loc"], flags) for each in complaints):
        source = "the command line"
    count = f"{len(lines)} settings" if len(lines) > 1 else "a setting"
    return ConfigError(
        f"{source}: {count} cannot be used",
        why="\n  ".join(["", *lines]) if len(lines) > 1 else lines[0],
        next_step="mend what is named and run the same command again",
    )


def _is_flag(location: Location, flags: Collection[str]) -> bool:
    path = ".".join(str(part) for part in location) + "."
    # A table that is unknown, or wrong as a whole, stands for the settings in it.
    return any(path.startswith(f"{flag}.") or f"{flag}.".startswith(path) for flag in flags)


def _line(each: ErrorDetails, root: type[BaseModel], whole: str) -> str:
    path = ".".join(str(part) for part in each["loc"]) or whole
    if each["type"] == "extra_forbidden":
        return f"{path} is unknown; {_suggestion(each['loc'], root)}"
    if each["type"] == "missing":
        return f"{path} is missing"
    wanted = each["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if each["input"] is None or isinstance(each["input"], dict):
        return f"{path} {wanted}"
    return f"{path} is {each['input']!r}, {wanted}{_near(each)}"


def _near(each: ErrorDetails) -> str:
    """Return the nearest of the words that may stand here, where only some may."""
    words = re.findall(r"'([^']+)'", str(each.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(each["input"]), words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _suggestion(location: Location, root: type[BaseModel]) -> str:
    *above, key = (str(part) for part in location)
    section = _section(root, above)
    known = list(section.model_fields) if section else []
    if near := get_close_matches(key, known, n=1):
        return f"did you mean {'.'.join([*above, near[0]])}?"
    homes = [name for name in root.model_fields if key in _keys(root, name)]
    return f"it belongs in [{homes[0]}]" if homes else f"known are {', '.join(known)}"


def _keys(root: type[BaseModel], name: str) -> list[str]:
    section = _section(root, [name])
    return list(section.model_fields) if section else []


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """Return the model that describes the table at `path`, going through the names of a table of tables."""
    kind: Any = root
    for part in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        else:
            return None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
