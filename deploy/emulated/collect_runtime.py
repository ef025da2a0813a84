"""Collect the runtimes of an architecture, and the headers that TVM's is compiled against, from their wheels.

    python collect_runtime.py ARCH TVM_VERSION TVM_FFI_VERSION ONNXRUNTIME_VERSION FOLDER

FOLDER gets lib/libtvm_runtime.so, lib/libtvm_ffi.so, lib/libonnxruntime.so.VERSION and include/. What is installed here
is used if it is right, else the wheels are downloaded by pip, which compares them with the digests that the index
states. Needs Python 3.11 and, to download, pip.
"""

import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

LIBRARIES = {"tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so"}
ONNXRUNTIME = "onnxruntime/capi/libonnxruntime.so.{}"
HEADERS = "tvm_ffi/include/"


def main(arch: str, tvm: str, tvm_ffi: str, onnxruntime: str, folder: Path) -> None:
    """Collect everything into `folder`."""
    versions = {"apache-tvm": tvm, "apache-tvm-ffi": tvm_ffi, "onnxruntime": onnxruntime}
    LIBRARIES.add(ONNXRUNTIME.format(onnxruntime))
    if arch == platform.machine() and all(_installed(name) == version for name, version in versions.items()):
        found = sum(_copied(name, folder) for name in versions)
    else:
        with TemporaryDirectory() as wheels:
            _download(arch, versions, wheels)
            found = sum(_unpacked(wheel, folder) for wheel in Path(wheels).glob("*.whl"))
    if found != len(LIBRARIES):
        raise SystemExit(f"collect_runtime: the wheels of {versions} hold {found} of {len(LIBRARIES)} libraries")


def _installed(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _download(arch: str, versions: dict[str, str], folder: str) -> None:
    platforms = [f"--platform=manylinux_{minor}_{arch}" for minor in ("2_28", "2_27", "2_24", "2_17")]
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    only_wheels = ["--only-binary=:all:", "--no-deps", "--python-version=3.11", *platforms]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *quiet, *only_wheels, "--dest", folder, *wanted], check=True
    )


def _copied(name: str, folder: Path) -> int:
    """Copy what is wanted of an installed package; return the number of libraries among it."""
    own = distribution(name)
    return sum(
        _placed(each, Path(str(own.locate_file(each))).read_bytes(), folder) for each in _wanted(own.files or [])
    )


def _wanted(names: Iterable[object]) -> list[str]:
    files = (str(each) for each in names)
    return [each for each in files if each in LIBRARIES or (each.startswith(HEADERS) and not each.endswith("/"))]


def _unpacked(wheel: Path, folder: Path) -> int:
    """Unpack what is wanted of a wheel; return the number of libraries among it."""
    with ZipFile(wheel) as archive:
        return sum(_placed(each, archive.read(each), folder) for each in _wanted(archive.namelist()))


def _placed(name: str, content: bytes, folder: Path) -> int:
    library = name in LIBRARIES
    place = folder / ("lib/" + Path(name).name if library else "include/" + name.removeprefix(HEADERS))
    if ".." in place.parts:
        raise SystemExit(f"collect_runtime: {name!r} leaves its folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return int(library)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5]))
