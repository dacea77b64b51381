"""Progress: bars where they can be seen, else lines with rate and time left, at most every ten seconds."""

import pytest

from metaint.scanning import progress
from metaint.scanning.progress import duration, progress_of, tell


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "has_bars", lambda: False)
    return now


def test_lines_without_a_terminal(clock, capsys):
    with progress_of("parts", 100) as advance:
        assert capsys.readouterr().err == "parts: 100 to do\n"
        for second in (4, 9.9):
            clock[0] = second
            advance(5)
        assert capsys.readouterr().err == ""
        clock[0] = 10
        advance(10)
        assert capsys.readouterr().err == "parts: 20 of 100, 2 a second, 40 s left\n"
        clock[0] = 19
        advance(10)
        assert capsys.readouterr().err == ""
        clock[0] = 30
        advance(70)
    assert capsys.readouterr().err == "parts: 100 of 100 done in 30 s\n"


def test_an_exception_is_not_called_done(clock, capsys):
    stage = progress_of("parts", 100)
    stage.__enter__()
    assert not stage.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "parts: 100 to do\n"


def test_a_bar_where_it_can_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    with progress_of("parts", 4, stays=True) as advance:
        advance(4)
    assert "parts: 100%" in capsys.readouterr().err


def test_nothing_is_shown_unasked(capsys):
    with progress_of("parts", 4, shown=False) as advance:
        advance(4)
    tell("a stage", shown=False)
    assert capsys.readouterr() == ("", "")


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 119, 121)] == ["0 s", "119 s", "2 min 1 s"]
