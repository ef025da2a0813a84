"""What ships: one folder, or one archive of it, that holds a pruned model, the promise it keeps and the proof.

    with open_bundle(Path("dist/resnet20")) as bundle:        a folder or its .tar
        print(bundle.manifest.measurement.ratio)

Opening hashes every byte: a bundle in hand is whole. Whether it still does what it says is for `edgeprune.verify`.
`edgeprune.pack` writes them.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeprune.archive import read_archive
from edgeprune.artifact import Artifact
from edgeprune.canonical import file_sha256
from edgeprune.errors import BundleError, ConfigError, CorruptArtifact
from edgeprune.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    MEASUREMENT,
    MODEL,
    RUNNER,
    FileEntry,
    Manifest,
    Signature,
    Tensor,
    parity_input,
    parity_output,
    read_manifest,
)
from edgeprune.measurement import Measurement
from edgeprune.parity_vectors import Array, from_npy
from edgeprune.scratch import Scratch
from edgeprune.signature import input_specs, read_signature

_NEXT = "copy the bundle again from where it was made; do not trust this copy"
_FORBIDDEN_MODE = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | stat.S_IWOTH


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder that holds exactly what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Artifact:
        """Return the model."""
        return Artifact.of(self.path / MODEL, kind="onnx", inputs=input_specs(self.manifest.signature))

    @property
    def runner(self) -> Path:
        """Return the path of the runner."""
        return self.path / RUNNER

    def signature(self) -> Signature:
        """Return what the model itself says of its inputs and outputs.

        Raises:
            BundleError: if it is no valid ONNX model or keeps data in other files.
        """
        try:
            return read_signature((self.path / MODEL).read_bytes(), MODEL)
        except CorruptArtifact as error:
            raise BundleError(error.what, why=error.why, next_step=error.next_step) from error

    def measurement(self) -> Measurement:
        """Return the samples behind the claimed latency.

        Raises:
            BundleError: if the file does not hold a measurement.
        """
        try:
            return Measurement.from_json(json.loads((self.path / MEASUREMENT).read_bytes()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(f"{MEASUREMENT} does not hold a measurement", why=str(error)[:200]) from error

    def parity_inputs(self) -> list[dict[str, Array]]:
        """Return the recorded inputs of each call, by name.

        Raises:
            BundleError: if a file does not hold as many samples of its input as the manifest says.
        """
        return self._calls(self.manifest.signature.inputs, parity_input)

    def parity_outputs(self) -> list[dict[str, Array]]:
        """Return the recorded answers of each call, by name.

        Raises:
            BundleError: if a file does not hold as many samples of its output as the manifest says.
        """
        return self._calls(self.manifest.signature.outputs, parity_output)

    def _calls(self, tensors: tuple[Tensor, ...], path_of: Callable[[int], str]) -> list[dict[str, Array]]:
        count = self.manifest.parity.samples
        columns = {}
        for place, tensor in enumerate(tensors):
            content = (self.path / path_of(place)).read_bytes()
            columns[tensor.name] = from_npy(content, tensor, count, path_of(place))
        return [{name: column[number] for name, column in columns.items()} for number in range(count)]


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Yield the bundle in a folder or an archive, every byte checked; an archive is unpacked until the block is left.

    Raises:
        ConfigError: if there is nothing at `path`.
        BundleError: if it does not hold exactly what its manifest says.
        StorageFull: if there is no room to unpack the archive.
    """
    if path.is_dir():
        yield check_bundle(path)
    elif path.is_file():
        with Scratch("bundle") as above:
            folder = above / "bundle"
            folder.mkdir()
            top = read_archive(path, folder)
            bundle = check_bundle(folder)
            if bundle.manifest.name != top:
                raise BundleError(f"{path.name} holds {bundle.manifest.name!r} in a folder {top!r}", next_step=_NEXT)
            yield bundle
    else:
        raise ConfigError(f"there is no bundle at {path}", next_step="give the folder or the .tar that deploy wrote")


def check_bundle(folder: Path) -> Bundle:
    """Return the bundle in `folder` after hashing every file of it.

    Raises:
        BundleError: for a changed, missing or extra file, for anything that is not a plain file or folder, for one
            that anybody may write, and for a manifest that is not spelled as we spell it.
    """
    try:
        present = set(_walk(folder))
        if MANIFEST not in present:
            why = "it is not a bundle, or not a whole one"
            raise BundleError(f"{folder} holds no {MANIFEST}", why=why, next_step=_bundle_of(folder))
        if (folder / MANIFEST).stat().st_size > MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} is larger than {MANIFEST_BYTES >> 20} MiB", next_step=_NEXT)
        manifest = read_manifest((folder / MANIFEST).read_bytes())
        _check_names(present - {MANIFEST}, manifest)
        for entry in manifest.files:
            _check_file(folder, entry)
    except OSError as error:
        raise BundleError(f"the bundle in {folder} cannot be read", why=error.strerror or str(error)) from error
    return Bundle(path=folder, manifest=manifest)


def _bundle_of(folder: Path) -> str:
    """Return what to give instead of a folder that is no bundle: for a run, the bundle it made."""
    made = folder.with_name(folder.name.removesuffix(".run")) if folder.name.endswith(".run") else folder
    if made != folder and (made / MANIFEST).is_file():
        return f"this is a run; its bundle is {made}"
    return "give the folder or the .tar that deploy wrote, dist/<name>; if this was one, copy it again"


def _walk(folder: Path, above: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name, mode = above + entry.name, entry.stat(follow_symlinks=False).st_mode
            if mode & _FORBIDDEN_MODE and not stat.S_ISLNK(mode):
                why = f"its mode is {stat.filemode(mode)}: others may write it, or it carries a special bit"
                raise BundleError(f"{name!r} may not stand in a bundle", why=why, next_step=f"chmod o-w,a-s,-t {name}")
            if stat.S_ISDIR(mode):
                yield from _walk(folder / entry.name, f"{name}/")
            elif stat.S_ISREG(mode):
                yield name
            else:
                raise BundleError(f"{name!r} may not stand in a bundle", why="a link or a device", next_step=_NEXT)


def _check_names(present: set[str], manifest: Manifest) -> None:
    promised = {each.path for each in manifest.files}
    if missing := sorted(promised - present):
        raise BundleError(f"{missing[0]!r} is missing from the bundle", next_step=_NEXT)
    if extra := sorted(present - promised):
        raise BundleError(f"{extra[0]!r} does not belong to the bundle", next_step="move it out of the folder")


def _check_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.path
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{entry.path!r} has {size} bytes", why=f"it had {entry.size}", next_step=_NEXT)
    if file_sha256(path) != entry.sha256:
        raise BundleError(f"{entry.path!r} was changed", why="its SHA-256 is not the recorded one", next_step=_NEXT)
