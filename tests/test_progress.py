"""Progress goes to standard error, with time left, and says nothing where nobody wants it."""

import pytest

from edgeprune import progress
from edgeprune.progress import Bars, Lines, Silent, watch


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(clock: Clock) -> tuple[Lines, list[str]]:
    written: list[str] = []
    return Lines(write=written.append, clock=clock), written


def test_a_stage_is_named_when_it_starts_and_timed_when_it_ends() -> None:
    """One line each."""
    clock = Clock()
    shown, written = lines_of(clock)
    with shown.stage("search"):
        clock.now = 83.4
    assert written == ["search ...", "search done in 1 min 23 s"]


def test_between_them_a_line_comes_every_half_a_minute_with_share_and_time_left() -> None:
    """A quarter done in 31 s leaves 93 s; what happens in between is not said."""
    clock = Clock()
    shown, written = lines_of(clock)
    with shown.stage("search", total=40) as stage:
        clock.now = 10.0
        stage.advance(5, note="best 90 %")
        clock.now = 31.0
        stage.advance(5, note="best 91 %")
        clock.now = 40.0
        stage.advance(5)
    assert written[1:-1] == ["search 25 %, 1 min 33 s left  best 91 %"]


def test_a_stage_of_unknown_length_promises_nothing() -> None:
    """No share and no time left without a total."""
    clock = Clock()
    shown, written = lines_of(clock)
    with shown.stage("export") as stage:
        clock.now = 31.0
        stage.advance(note="tracing")
    assert written[1] == "export  tracing"


def test_a_stage_that_fails_is_not_said_to_be_done() -> None:
    """The error speaks instead."""
    shown, written = lines_of(Clock())
    with pytest.raises(ValueError, match="no"), shown.stage("export"):
        raise ValueError("no")
    assert written == ["export ..."]


def test_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to the result."""
    with Lines().stage("export"):
        pass
    Lines().note("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["export ...", "export done in 0.0 s", "hello"]


def test_bars_go_to_standard_error_and_end_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Also a stage whose length was never known."""
    bars = Bars()
    with bars.stage("search", total=4) as stage:
        stage.advance(2, note="best 90 %")
    with bars.stage("export"):
        pass
    bars.note("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "search" in captured.err
    assert "100%" in captured.err
    assert "hello" in captured.err


def test_silence_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Stages and notes alike."""
    quiet = watch(quiet=True)
    assert isinstance(quiet, Silent)
    with quiet.stage("search", total=3) as stage:
        stage.advance(note="best")
    quiet.note("hello")
    assert capsys.readouterr() == ("", "")


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe and a dumb terminal get lines."""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(watch(quiet=False), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(watch(quiet=False), Lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(watch(quiet=False), Lines)
