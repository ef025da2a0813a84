"""Commands for every TensorRT from what its help offers, and what becomes of versions that nobody knows."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.errors import CompileError, ProfileError
from edgeprune.targets._trtexec import Trtexec, Version, tool_from_help, version_from_banner

REPLAY = Path(__file__).parent / "replay"
VERSIONS = ["8.2", "8.4", "8.5", "8.6", "10.3", "10.13", "11.1"]


def help_of(version: str, tmp_path: Path) -> str:
    config = tmp_path / f"{version}.json"
    config.write_text(f'{{"version": "{version}"}}')
    words = [sys.executable, str(REPLAY / "replay_trtexec.py"), "--help"]
    return subprocess.run(words, env={"EDGEPRUNE_REPLAY": str(config)}, capture_output=True, text=True).stdout


@pytest.fixture(params=VERSIONS)
def tool(request: pytest.FixtureRequest, tmp_path: Path) -> Trtexec:
    return tool_from_help("/usr/bin/trtexec", help_of(request.param, tmp_path), "orin")


def commands(tool: Trtexec) -> dict[str, list[str]]:
    made = {
        precision: tool.build(
            onnx="g.onnx", engine="e", timing_cache="t", layer_info="l", precision=precision, workspace_mib=512, level=2
        )
        for precision in ("fp32", "fp16", "int8")
    }
    made["time"] = tool.time(engine="e", times="t.json", warm_up_ms=2000, duration_s=5, iterations=100)
    made["profile"] = tool.profile(engine="e", profile="p.json", warm_up_ms=200, iterations=50)
    made["answer"] = tool.answer(engine="e", inputs={"x:0": "x.bin", "y": "y.bin"}, outputs="o.json")
    return made


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec --help", (8, 2, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec", (8, 5, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", (10, 3, 0)),
        ("&&&& PASSED TensorRT.trtexec [TensorRT v101602] [b10] # trtexec", (10, 16, 2)),
        ("noise\n&&&& RUNNING TensorRT.trtexec [TensorRT v110401] [b106] #", (11, 4, 1)),
    ],
)
def test_a_banner_tells_the_version_in_both_spellings(banner: str, version: tuple[int, int, int]) -> None:
    found = version_from_banner(banner)
    assert found is not None
    assert (found.major, found.minor, found.patch) == version


@pytest.mark.parametrize("text", ["", "trtexec: not found", "TensorRT.trtexec [TensorRT v12]"])
def test_a_help_without_a_version_is_told_what_to_install(text: str) -> None:
    with pytest.raises(ProfileError, match="names no TensorRT version") as caught:
        tool_from_help("/usr/bin/trtexec", text, "orin")
    assert "libnvinfer-bin" in caught.value.next_step


@pytest.mark.parametrize("number", ["v7103", "v8001", "v120000"])
def test_an_unknown_version_says_what_is_known_and_what_to_do(number: str) -> None:
    banner = f"&&&& RUNNING TensorRT.trtexec [TensorRT {number}] # trtexec --help\n --onnx --saveEngine"
    with pytest.raises(ProfileError, match=r"TensorRT .* on orin is not known.*8\.2 to 11") as caught:
        tool_from_help("/usr/bin/trtexec", banner, "orin")
    assert "pip install --upgrade edgeprune" in caught.value.next_step


def test_a_known_version_without_what_it_must_have_is_refused() -> None:
    banner = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --help\n --onnx --saveEngine --loadEngine"
    with pytest.raises(ProfileError, match="lacks --exportTimes"):
        tool_from_help("/usr/bin/trtexec", banner, "orin")


def test_every_command_takes_only_flags_that_the_version_offers(tool: Trtexec) -> None:
    for word in itertools.chain.from_iterable(each[1:] for each in commands(tool).values()):
        assert word.startswith("--")
        assert tool.takes(word[2:].partition("=")[0]), (word, tool.version)


def test_precision_is_a_permission_before_10_and_nothing_but_the_graph_from_then_on(tool: Trtexec) -> None:
    made, weak = commands(tool), tool.version < Version(major=10, minor=0, patch=0)
    assert ("--fp16" in made["fp16"]) == weak
    assert ("--int8" in made["int8"]) == weak
    assert not {"--fp16", "--int8", "--best"} & set(made["fp32"])
    assert ("--stronglyTyped" in made["fp16"]) == (tool.version.major == 10)
    assert tool.typed_by_graph == (not weak)


def test_every_version_measures_the_same_thing(tool: Trtexec) -> None:
    """Before 11 graphs and spin wait are asked for and transfers taken back; from 11 on that is the default."""
    pinned = {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"}
    assert pinned & set(commands(tool)["time"]) == (set() if tool.version.major >= 11 else pinned)


def test_a_build_runs_nothing_and_is_bounded(tool: Trtexec) -> None:
    build = commands(tool)["fp16"]
    assert {"--skipInference", "--buildOnly"} & set(build)
    assert any(each in build for each in ("--memPoolSize=workspace:512", "--workspace=512"))
    assert ("--builderOptimizationLevel=2" in build) == (tool.version >= Version(major=8, minor=6, patch=0))


def test_raw_outputs_are_taken_where_they_can_be_had(tool: Trtexec) -> None:
    answer = commands(tool)["answer"]
    assert ("--dumpRawBindingsToFile" in answer) == (tool.version >= Version(major=8, minor=6, patch=0))
    assert ("--exportOutput=o.json" in answer) != ("--dumpRawBindingsToFile" in answer)
    assert "--loadInputs='x:0':x.bin,'y':y.bin" in answer


@pytest.mark.parametrize("name", ["it's", "a\nb"])
def test_an_input_name_that_could_end_its_quotes_is_refused(name: str) -> None:
    tool = Trtexec(path="trtexec", version=Version(major=10, minor=3, patch=0), flags=frozenset())
    with pytest.raises(CompileError, match="cannot be given"):
        tool.answer(engine="e", inputs={name: "x.bin"}, outputs="o")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_replay_refuses_what_its_version_does_not_take(version: str, tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    config = tmp_path / "c.json"
    config.write_text(f'{{"version": "{version}"}}')
    words = [sys.executable, str(REPLAY / "replay_trtexec.py"), "--onnx=x", "--tuneEverything=1"]
    done = subprocess.run(words, env={"EDGEPRUNE_REPLAY": str(config)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "[E] Unknown option: --tuneEverything" in done.stdout
    assert ("&&&& FAILED" in done.stdout) == (not version.startswith("11"))
