"""One file on disk, known by what is in it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeprune.canonical import file_sha256
from edgeprune.errors import CorruptArtifact


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, shape and NumPy dtype name of one graph input."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A graph or an engine.

    Attributes:
        path: where it lies.
        kind: "onnx" or the engine format of an adapter.
        sha256: of the bytes, 64 hexadecimal digits.
        inputs: the graph's inputs, in order.
    """

    path: Path
    kind: str
    sha256: str
    inputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, path: Path, *, kind: str, inputs: Iterable[TensorSpec]) -> "Artifact":
        """Return the artifact for the file at `path`, hashing it."""
        return cls(path=path, kind=kind, sha256=file_sha256(path), inputs=tuple(inputs))

    def check(self) -> "Artifact":
        """Return self if the file still has the bytes it had.

        Raises:
            CorruptArtifact: if it is missing or changed.
        """
        if not self.path.is_file():
            raise CorruptArtifact(f"{self.path} is missing", next_step="run the command again to rebuild it")
        if file_sha256(self.path) != self.sha256:
            raise CorruptArtifact(f"{self.path} changed on disk", why="its SHA-256 is not the recorded one")
        return self

    def to_json(self) -> dict[str, object]:
        """Return the artifact as JSON values."""
        return {**asdict(self), "path": str(self.path)}
