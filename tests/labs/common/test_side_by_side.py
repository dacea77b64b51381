"""Runs that are trained one after the other: what they say, and how the bar moves."""

import io
from typing import NamedTuple

import pytest
from tqdm import tqdm

from metaint.labs.common import side_by_side
from metaint.labs.common.side_by_side import Diverged, train_all


class Run(NamedTuple):
    name: str
    steps: int
    begins: int
    ends: int
    loss: float = 0.03


def tell_steps(folder, settings, on_step):
    """A run that was trained to step `begins` before, and stops at `ends`."""
    for step in range(settings.begins, settings.ends + 1):
        on_step(step, settings.loss)
    if settings.name == "wild":
        raise Diverged("learning_rate is too large.")


FRESH, DONE, HALF = Run("fresh", 10, 0, 10), Run("done", 8, 8, 8, 0.0004), Run("half", 12, 6, 12)
EARLY, WILD, SILENT = Run("early", 20, 0, 3), Run("wild", 30, 0, 2), Run("silent", 5, 1, 0)


def bar_of(monkeypatch, tmp_path, runs):
    """What `train_all` gives back, the bar, and the last that was shown of it."""
    shown, bars = io.StringIO(), []

    def keep(*args, **options):
        bars.append(tqdm(*args, **options, file=shown, ncols=120))
        return bars[-1]

    monkeypatch.setattr(side_by_side, "tqdm", keep)
    failed = train_all(tell_steps, tmp_path, runs, jobs=1, threads=1, number="loss", progress=True)
    return failed, bars[0], shown.getvalue().strip().split("\r")[-1]


@pytest.mark.parametrize(
    ("runs", "timed"),
    [
        ([FRESH], 10),
        ([FRESH, DONE], 10),  # what is on disk is done, and has taken no time
        ([HALF, FRESH], 16),
        ([DONE], 0),
        ([EARLY, FRESH], 13),  # what stops early leaves nothing to wait for
        ([FRESH, WILD], 12),
        ([SILENT, FRESH], 10),
    ],
)
def test_the_bar_ends_at_its_end(monkeypatch, tmp_path, runs, timed):
    failed, bar, last = bar_of(monkeypatch, tmp_path, runs)
    assert bar.n == bar.total
    assert bar.n - bar.initial == timed
    assert last.startswith("training: 100%")
    assert failed == ({"wild": "learning_rate is too large."} if WILD in runs else {})


def test_the_bar_has_the_number_of_each_run(monkeypatch, tmp_path):
    assert "loss 0.03, 0.0004]" in bar_of(monkeypatch, tmp_path, [FRESH, DONE])[2]


def test_nothing_is_shown_unless_it_is_asked_for(tmp_path, capsys):
    assert train_all(tell_steps, tmp_path, [FRESH, DONE], jobs=1, threads=1, number="loss", progress=False) == {}
    assert capsys.readouterr() == ("", "")
