"""The set-up of a board without hardware: once, at once if nothing changed, and plain about what it lacks."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from board_programs import HERE, SETUP, programs

from edgeprune import __version__


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", str(SETUP), *words], capture_output=True, text=True, timeout=280, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arch", [HERE, "aarch64"])
def test_what_is_built_already_is_found_at_once(arch: str) -> None:
    folder = programs(arch)
    started = time.monotonic()
    done = run("--arch", arch, "--python", sys.executable)
    assert done.returncode == 0
    assert Path(done.stdout.strip()) == folder
    assert time.monotonic() - started < 10
    libraries = {f"lib/lib{name}" for name in ("tvm_runtime.so", "tvm_ffi.so", "onnxruntime.so.1.31.1")}
    held = {"bin/edgeprune-board", "bin/edgeprune-run", "count.so", "key", *libraries}
    found = {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}
    assert {each for each in found if not each.startswith("root/")} == held


def test_the_same_compiler_gives_the_same_bytes_wherever_it_builds(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "deploy"
    shutil.copytree(SETUP.parents[1], copy)
    command = ["sh", str(copy / "emulated" / "setup"), "--arch", HERE, "--cache", str(tmp_path / "another cache")]
    done = subprocess.run([*command, "--python", sys.executable], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    here, there = programs(HERE), Path(done.stdout.splitlines()[-1])
    held = [each.relative_to(here) for each in here.rglob("*") if each.is_file()]
    assert len(held) == 7
    assert [str(each) for each in held if (here / each).read_bytes() != (there / each).read_bytes()] == []


def test_an_emulated_program_sees_an_arm_board_and_knows_that_it_is_none() -> None:
    root = programs("aarch64") / "root"
    assert "CPU part\t: 0xd08" in (root / "proc" / "cpuinfo").read_text()
    assert (root / "proc" / "cpuinfo").read_text().endswith("emulated by qemu-user\n")
    assert (root / "sys/devices/system/cpu/possible").read_text() == "0-3\n"
    assert (root / "lib" / "ld-linux-aarch64.so.1").exists()


def test_it_brings_the_onnxruntime_that_is_installed_with_edgeprune() -> None:
    pins = (SETUP.parents[2] / "constraints.txt").read_text().splitlines()
    (pinned,) = [each.partition("==")[2] for each in pins if each.startswith("onnxruntime==")]
    assert f"\nONNXRUNTIME={pinned} " in SETUP.read_text()


def test_it_is_of_this_version() -> None:
    assert f"\nVERSION={__version__}\n" in SETUP.read_text()


@pytest.mark.parametrize("words", [["--arch", "vax"], ["--speed", "1"]])
def test_a_senseless_option_is_refused(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("setup: ")


def test_without_root_it_says_what_root_must_run(tmp_path: Path) -> None:
    """A path that holds the tools of the script, but no compiler and a user who is not root."""
    for name in ("sh", "dirname", "uname", "cat", "mkdir"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = run("--cache", str(tmp_path / "cache"), PATH=str(tmp_path))
    assert done.returncode == 1
    assert "as root: apt-get install --yes --no-install-recommends qemu-user g++-aarch64-linux-gnu" in done.stderr
    assert not (tmp_path / "cache").exists()
