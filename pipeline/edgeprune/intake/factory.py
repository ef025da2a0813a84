"""A function of the user's, named as ``package.module:function`` and called where its files are.

[model]
factory = "model:fashion_net"       # model.py beside edgeprune.toml, or any installed package
"""

import importlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgeprune.errors import UserError

_PATTERN = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")

_borrowed: dict[str, Path] = {}
"""Module name → the configuration folder it was imported from; it mirrors `sys.modules`, which is global as well."""


@dataclass(frozen=True, kw_only=True)
class Factory:
    """Where a function is.

    Attributes:
        module: dotted module name.
        function: attribute of the module, dotted for a class method.
        folder: put first on the import path while the function is imported and called.
    """

    module: str
    function: str
    folder: Path

    @classmethod
    def parse(cls, text: str, folder: Path) -> "Factory":
        """Return the factory written as ``package.module:function``.

        Raises:
            ValueError: if it is not written like that.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError('should be written "package.module:function"')
        return cls(module=match["module"], function=match["function"], folder=folder)

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"

    def call(self, arguments: Mapping[str, object], error: type[UserError]) -> object:
        """Return what the function returns.

        Args:
            arguments: keyword arguments.
            error: the class to raise, whose turn it is to act.

        Raises:
            error: if the function is not found or raises; the original exception is chained.
        """
        with importable(self.folder):
            function = self._find(error)
            try:
                return function(**arguments)
            except Exception as cause:  # a stranger's code may raise anything
                raise error(
                    f"factory {str(self)!r} raised {type(cause).__name__}",
                    why=f"{cause} ({_place(cause)})",
                    next_step=f"call {self.function}() in a Python session started in {self.folder}",
                ) from cause

    def _find(self, error: type[UserError]):  # type: ignore[no-untyped-def]  # a callable of unknown signature
        try:
            found: object = importlib.import_module(self.module)
        except ModuleNotFoundError as cause:
            raise error(
                f"factory {str(self)!r}: no module {cause.name!r}",
                why=f"looked in {self.folder} and the installed packages",
                next_step="give the module's name relative to the folder of edgeprune.toml, or install its package",
            ) from cause
        except Exception as cause:
            raise error(
                f"factory {str(self)!r}: importing {self.module} raised {type(cause).__name__}",
                why=f"{cause} ({_place(cause)})",
                next_step=f"run python -c 'import {self.module}' in {self.folder}",
            ) from cause
        for name in self.function.split("."):
            if not hasattr(found, name):
                raise error(
                    f"factory {str(self)!r}: {self.module} has no {self.function!r}", next_step=_offer(found, name)
                )
            found = getattr(found, name)
        if not callable(found):
            raise error(f"factory {str(self)!r} is a {type(found).__name__}", why="a function is wanted")
        return found


def _offer(found: object, name: str) -> str:
    public = [each for each in vars(found) if not each.startswith("_") and callable(getattr(found, each))]
    near = get_close_matches(name, public, n=3) or sorted(public)[:8]
    return f"name one of {', '.join(near)}" if near else "name a function that the module defines"


def _place(cause: BaseException) -> str:
    last = traceback.extract_tb(cause.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put `folder` first on the import path until the block is left.

    Modules that an earlier block imported from another folder are forgotten first, so that two configurations may
    both call their file ``model.py``.
    """
    entry = str(folder)
    for name, origin in list(_borrowed.items()):
        if origin != folder:
            sys.modules.pop(name, None)
            del _borrowed[name]
    before = set(sys.modules)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)
        for name in set(sys.modules) - before:
            if _lies_in(sys.modules[name], folder):
                _borrowed[name] = folder


def _lies_in(module: object, folder: Path) -> bool:
    path = getattr(module, "__file__", None)
    return path is not None and Path(path).is_relative_to(folder)
