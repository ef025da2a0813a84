"""TensorRT's own command: which version it is, what it takes, and how to say the same thing to every version.

    trtexec --help  ─tool_from_help─▶  Trtexec(version, flags)  ─build / time / profile / answer─▶  argument lists

One call of ``trtexec --help`` prints the version and every flag and never touches the GPU. Commands are made from that
list. What flipped its default in TensorRT 11 (CUDA graphs, spin wait, data transfers) is pinned in all of them:

    8.2 - 8.6     precision flags are permissions; weak typing
    10.0 - 10.16  --stronglyTyped, and no precision flag beside it: one would silently be dropped
    11.x          precision is in the graph and nowhere else; CUDA graphs, spin wait and no transfers are the default
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeprune.errors import CompileError, ProfileError

OLDEST, NEWEST_MAJOR = (8, 2), 11
"""Versions whose commands and logs are known here."""

PRECISIONS = ("fp32", "fp16", "int8")
PERCENTILES = "50,90,95,99"
WORKSPACE_MIB = 1024
"""Workspace of a build where the profile names none; TensorRT 8.2 would take 16 MiB."""

_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d{4,7})\](?: \[b(\d+)\])?")
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z][A-Za-z0-9]*)")
_PRECISION_FLAGS: Mapping[str, tuple[str, ...]] = {"fp32": (), "fp16": ("fp16",), "int8": ("int8",)}


@dataclass(frozen=True, kw_only=True, order=True)
class Version:
    """Of TensorRT."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def version_from_banner(text: str) -> Version | None:
    """Return the version in a line like ``&&&& RUNNING TensorRT.trtexec [TensorRT v100300]``, None without one.

    Below 10 the digits are major, minor and patch as 8502; from 10 on as 101300.
    """
    found = _BANNER.search(text)
    if found is None:
        return None
    number = int(found[1])
    base = 1000 if number < 10000 else 10000
    return Version(major=number // base, minor=number % base // 100, patch=number % 100)


@dataclass(frozen=True, kw_only=True)
class Trtexec:
    """The command on one board.

    Attributes:
        path: of the program there.
        flags: every flag it takes, without dashes.
    """

    path: str
    version: Version
    flags: frozenset[str]

    @property
    def typed_by_graph(self) -> bool:
        """Return whether the graph alone decides the precision, so that an engine cannot differ from it."""
        return self.version.major >= 10

    @property
    def writes_raw_outputs(self) -> bool:
        """Return whether outputs come as raw files; otherwise as JSON with six digits."""
        return "dumpRawBindingsToFile" in self.flags

    def takes(self, flag: str) -> bool:
        """Return whether `flag`, without dashes, is offered."""
        return flag in self.flags

    def build(
        self,
        *,
        onnx: str,
        engine: str,
        timing_cache: str,
        layer_info: str,
        precision: str,
        workspace_mib: int = WORKSPACE_MIB,
        level: int | None = None,
    ) -> list[str]:
        """Return the command that makes an engine and runs nothing.

        Args:
            onnx, engine, timing_cache, layer_info: paths on the board.
            precision: "fp32", "fp16" or "int8", which the graph is typed in already.
            level: of the builder's search, 0 to 5, where it can be set (8.6 and later).
        """
        wanted = [f"--onnx={onnx}", f"--saveEngine={engine}", f"--timingCacheFile={timing_cache}"]
        wanted.append(
            f"--memPoolSize=workspace:{workspace_mib}" if self.takes("memPoolSize") else f"--workspace={workspace_mib}"
        )
        wanted += self._offered("profilingVerbosity=detailed", f"exportLayerInfo={layer_info}")
        if level is not None:
            wanted += self._offered(f"builderOptimizationLevel={level}")
        wanted += self._offered("skipInference") or self._offered("buildOnly")
        return [self.path, *wanted, *self._precision(precision)]

    def _precision(self, precision: str) -> list[str]:
        if self.version.major >= 11:
            return []
        if self.version.major >= 10:
            return self._offered("stronglyTyped")
        return [f"--{each}" for each in _PRECISION_FLAGS[precision]]

    def time(self, *, engine: str, times: str, warm_up_ms: int, duration_s: int, iterations: int) -> list[str]:
        """Return the command that times an engine call by call; `duration_s` and `iterations` are both lower bounds."""
        wanted = [
            f"--loadEngine={engine}",
            f"--warmUp={warm_up_ms}",
            f"--duration={duration_s}",
            f"--iterations={iterations}",
            "--avgRuns=1",
            f"--percentile={PERCENTILES if self.version >= Version(major=8, minor=6, patch=0) else '99'}",
            f"--exportTimes={times}",
        ]
        return [self.path, *wanted, *self._pinned()]

    def _pinned(self) -> list[str]:
        """Return the flags that make every version measure the same thing."""
        return [] if self.version.major >= 11 else self._offered("useCudaGraph", "useSpinWait", "noDataTransfers")

    def profile(self, *, engine: str, profile: str, warm_up_ms: int, iterations: int) -> list[str]:
        """Return the command that times an engine layer by layer."""
        wanted = [f"--loadEngine={engine}", f"--warmUp={warm_up_ms}", "--duration=0", f"--iterations={iterations}"]
        apart = [] if self.version.major >= 11 else self._offered("separateProfileRun", "noDataTransfers")
        return [self.path, *wanted, "--dumpProfile", f"--exportProfile={profile}", *apart]

    def answer(self, *, engine: str, inputs: Mapping[str, str], outputs: str) -> list[str]:
        """Return the command that runs an engine once on given inputs and writes what comes out.

        Args:
            inputs: input name → raw file on the board.
            outputs: JSON file on the board, where raw files cannot be had.

        Raises:
            CompileError: if an input has a name that cannot be said on this command line.
        """
        for name in inputs:
            if re.search(r"['\x00-\x1f]", name):
                raise CompileError(f"input {name!r} cannot be given to trtexec", next_step="rename the input")
        given = ",".join(f"'{name}':{file}" for name, file in inputs.items())
        how = ["--dumpRawBindingsToFile"] if self.writes_raw_outputs else [f"--exportOutput={outputs}"]
        once = ["--iterations=1", "--duration=0", "--warmUp=0"]
        transfers = self._offered("includeDataTransfers")
        return [self.path, f"--loadEngine={engine}", *once, f"--loadInputs={given}", *how, *transfers]

    def _offered(self, *flags: str) -> list[str]:
        """Return those of the flags, values and all, that are offered."""
        return [f"--{each}" for each in flags if each.partition("=")[0] in self.flags]


def tool_from_help(path: str, text: str, board: str) -> Trtexec:
    """Return the command from what it prints when asked for help.

    Raises:
        ProfileError: if that shows no version, or one that is not known here.
    """
    version = version_from_banner(text)
    if version is None:
        raise ProfileError(
            f"{path} on {board} names no TensorRT version",
            why="its help does not begin with the line that trtexec begins with",
            next_step="sudo apt-get install --reinstall libnvinfer-bin",
        )
    if (version.major, version.minor) < OLDEST or version.major > NEWEST_MAJOR:
        raise ProfileError(
            f"TensorRT {version} on {board} is not known to this edgeprune",
            why=f"commands and logs of TensorRT {OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR} are",
            next_step="pip install --upgrade edgeprune; or name another trtexec of the board in the target's options: "
            'trtexec = "/usr/src/tensorrt/bin/trtexec"',
        )
    tool = Trtexec(path=path, version=version, flags=frozenset(_FLAG.findall(text)))
    if lacking := _lacking(tool, ("onnx", "saveEngine", "loadEngine", "exportTimes", "timingCacheFile")):
        raise ProfileError(
            f"{path} on {board} lacks --{lacking[0]}",
            why=f"every known TensorRT has it, and this calls itself {version}",
            next_step="sudo apt-get install --reinstall libnvinfer-bin",
        )
    return tool


def _lacking(tool: Trtexec, needed: Iterable[str]) -> list[str]:
    return [each for each in needed if not tool.takes(each)]
