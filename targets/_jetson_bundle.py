"""What a bundle holds for a Jetson, and how it checks itself there.

device/README.txt  edge_run.py      how, and what runs it: Python's standard library and the board's trtexec
device/model.typed.onnx             the truth: the model with its precision written into it
device/model.engine  engine.json    what was made of it on one board, and the key that it is good for
device/timing.cache                 what the builder learnt there
"""

import json
import tarfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgeprune.artifact import Artifact
from edgeprune.errors import BundleError, DeviceLost
from edgeprune.scratch import Scratch
from edgeprune.target import Selftest

from . import _jetson_store, _ssh  # noqa: TID251 private parts of this adapter

ENGINE_CAP = 2 << 30
CACHE_CAP = 256 << 20
RUNNER, GUIDE = "edge_run.py", "README.txt"

WRONG_ANSWER, BUG, DAMAGED = 1, 70, 4
"""Exit codes of the runner: the first two are of the bundle's own doing."""


def shipped(name: str) -> bytes:
    """Return a file that this edgeprune puts into every bundle for a Jetson."""
    return (files("edgeprune.device") / "jetson" / name).read_bytes()


def contents(
    store: _jetson_store.Store, engine: _jetson_store.Engine, graph: Artifact, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Path]:
    """Return name below ``device/`` → file, fetched from the board into `folder` where it lies there.

    Args:
        graph: the typed graph.
        facts: "key", "precision" and "workspace_mib" of the engine.
    """
    told = {**engine.to_json(), **facts}
    made = {GUIDE: shipped(GUIDE), RUNNER: shipped(RUNNER), "engine.json": json.dumps(told, indent=1).encode()}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    found = {name: folder / name for name in made}
    found["model.typed.onnx"] = graph.check().path
    store.ssh.get(engine.path, folder / "model.engine", cap=ENGINE_CAP, limit_s=600)
    found["model.engine"] = folder / "model.engine"
    if store.ssh.run(["test", "-s", store.timing_cache], limit_s=20).rc == 0:
        store.ssh.get(store.timing_cache, folder / "timing.cache", cap=CACHE_CAP, limit_s=120)
        found["timing.cache"] = folder / "timing.cache"
    return found


def selftest(
    store: _jetson_store.Store, bundle: Path, *, trusted: bool, arguments: list[str], limit_s: float
) -> Selftest:
    """Return what the bundle's runner says when it checks itself on the board.

    An engine is a program as well: one that came with the bundle is loaded only if the bundle is trusted; otherwise
    one is built from the graph.

    Raises:
        BundleError: if the bundle is damaged, or holds a runner that is not ours and is not trusted.
        DeviceLost: if the board fails.
    """
    if not trusted and (bundle / "device" / RUNNER).read_bytes() != shipped(RUNNER):
        raise BundleError(
            f"device/{RUNNER} is not the one that this edgeprune puts into bundles",
            why="it could do anything on the board that you can",
            next_step="if you trust who made the bundle: the same command with --trust-runner",
        )
    with store.job() as job, Scratch("bundle") as folder:
        archive = folder / "bundle.tar"
        _pack(bundle, archive)
        store.ssh.put(archive, f"{job}/bundle.tar", limit_s=60 + archive.stat().st_size / 2**19)
        unpacked = store.ssh.run(["tar", "-C", job, "-xf", f"{job}/bundle.tar"], limit_s=120)
        if unpacked.rc != 0:
            raise DeviceLost(f"{store.ssh.name}: the bundle could not be unpacked", why=unpacked.said)
        words = ["python3", "-I", "-B", f"{job}/bundle/device/{RUNNER}", "--selftest", "--json", f"--cache={job}/cache"]
        own = [] if trusted else ["--rebuild"]
        done = store.ssh.run([*words, *own, *arguments], limit_s=limit_s)
    return _said(done, store.ssh.name)


def _pack(bundle: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for path in sorted(bundle.rglob("*")):
            if path.is_file() and not path.is_symlink():
                tar.add(path, arcname=f"bundle/{path.relative_to(bundle)}", recursive=False)


def _said(done: _ssh.Done, name: str) -> Selftest:
    try:
        report = json.loads(done.stdout)
        if report["status"] == "ok":
            data = report["data"]
            worst = float(data["worst_of_tolerance"])
            detail = (
                f"{int(data['files'])} files, {int(data['samples'])} samples, worst at "
                f"{worst:.3g} of tolerance, engine {data['made']} for {data['key']}"
            )
            return Selftest(ok=done.rc == 0 and worst <= 1, detail=_ssh.plain(detail)[:500])
        first = report["diagnostics"][0]
        detail = _ssh.plain(f"{first['what']} {first['why']}".strip())[:500]
        advice = _ssh.plain(str(first.get("next", "")))[:300]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DeviceLost(
            f"{name}: the bundle's runner gave no report",
            why=done.said,
            next_step="see that the board has Python 3.8 or newer: python3 --version",
        ) from error
    if done.rc == DAMAGED:
        raise BundleError(f"device/{RUNNER} refuses the bundle", why=detail)
    if done.rc in (WRONG_ANSWER, BUG):
        return Selftest(ok=False, detail=detail)
    raise DeviceLost(f"{name}: the bundle could not be run", why=detail, next_step=advice)
