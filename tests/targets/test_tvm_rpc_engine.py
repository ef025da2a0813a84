"""The engine file: the same parts give the same bytes, it says what is in it, and a damaged one is refused."""

from pathlib import Path

import pytest
from board_programs import HERE, ONE, SCRIPT, engine, kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.errors import CompileError, CorruptArtifact, ProfileError
from edgeprune.targets._tvm.engine import (
    BYTES,
    Call,
    Region,
    Script,
    Slot,
    read_engine,
    read_script,
    write_engine,
)

NUMBERS = st.integers(0, 2**31)
NAMES = st.text(min_size=1, max_size=60)
SCRIPTS = st.builds(
    Script,
    regions=st.lists(
        st.builds(Region, kind=st.sampled_from(["constants", "arena", "input", "output"]), size=NUMBERS)
    ).map(tuple),
    slots=st.lists(
        st.builds(
            Slot,
            region=NUMBERS,
            offset=NUMBERS,
            dtype=st.sampled_from(sorted(BYTES)),
            shape=st.lists(NUMBERS, max_size=8).map(tuple),
        )
    ).map(tuple),
    inputs=st.lists(st.tuples(NAMES, NUMBERS)).map(tuple),
    outputs=st.lists(st.tuples(NAMES, NUMBERS)).map(tuple),
    calls=st.lists(
        st.builds(
            Call,
            kernel=st.from_regex(r"k[0-9a-f]{16}", fullmatch=True),
            layer=NAMES,
            slots=st.lists(NUMBERS).map(tuple),
        )
    ).map(tuple),
)


@given(SCRIPTS)
def test_a_text_says_what_its_script_says(script: Script) -> None:
    """Names are whatever an exporter made of them, line feeds and all."""
    text = script.text()
    assert text.isascii()
    assert read_script(text) == script


@given(st.text(max_size=200))
def test_a_text_that_is_none_of_ours_is_refused(text: str) -> None:
    with pytest.raises(CorruptArtifact):
        read_script(text)


def script() -> Script:
    return read_script(SCRIPT.replace("{kernel}", "twice"))


def test_an_engine_says_what_is_in_it(tmp_path: Path) -> None:
    write_engine(tmp_path / "e.so", script=script(), constants=ONE, kernels={"a": kernels()}, arch=HERE)
    found = read_engine(tmp_path / "e.so")
    assert (found.arch, found.script, found.constants) == (HERE, script(), ONE)


def test_the_same_parts_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    places = [tmp_path / "a.so", tmp_path / "folder with spaces" / "another.so"]
    places[1].parent.mkdir()
    for place in places:
        write_engine(place, script=script(), constants=ONE, kernels={"a": kernels()}, arch=HERE)
    assert places[0].read_bytes() == places[1].read_bytes()


def test_an_engine_for_another_machine_is_written_as_well(tmp_path: Path) -> None:
    engine(tmp_path / "e.so", arch="aarch64")
    assert read_engine(tmp_path / "e.so").arch == "aarch64"


def test_constants_begin_at_an_aligned_address_even_if_there_are_none(tmp_path: Path) -> None:
    for constants in (b"", ONE, bytes(1 << 20)):
        write_engine(tmp_path / "e.so", script=script(), constants=constants, kernels={"a": kernels()}, arch=HERE)
        assert read_engine(tmp_path / "e.so").constants == constants
        offset = (tmp_path / "e.so").read_bytes().find(ONE) if constants == ONE else 0
        assert offset % 64 == 0


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_either_harmless_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "e.so"
    whole = path.read_bytes() if path.exists() else engine(path)
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.so").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_engine(tmp_path / "damaged.so")
    except CorruptArtifact as error:
        assert "damaged.so" in str(error)  # noqa: PT017 either outcome is right, another error is not


def test_a_file_that_is_missing_or_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not an engine")
    for name in ("text.so", "missing.so"):
        with pytest.raises(CorruptArtifact, match=name):
            read_engine(tmp_path / name)


def test_objects_that_do_not_fit_are_a_compile_error(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="could not link"):
        write_engine(tmp_path / "e.so", script=script(), constants=ONE, kernels={"a": b"no object"}, arch=HERE)
    assert not (tmp_path / "e.so").exists()


def test_a_machine_without_a_linker_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProfileError, match="no as for aarch64") as caught:
        write_engine(tmp_path / "e.so", script=script(), constants=ONE, kernels={}, arch="aarch64")
    assert "binutils-aarch64-linux-gnu" in caught.value.next_step


def test_an_unknown_architecture_is_a_profile_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="'vax' is unknown"):
        write_engine(tmp_path / "e.so", script=script(), constants=ONE, kernels={}, arch="vax")
