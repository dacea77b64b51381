"""Ctrl-C at every line of what must not be interrupted: nothing healthy is lost, and parameters come back."""

import os
import random
import signal
import threading
import time

import pytest
import torch

import metaint
from metaint.models import swapped
from metaint.scans import whole
from tests.builders import available_kinds, build
from tests.faults.moments import THOROUGH, interrupted_at_each_line
from tests.models.test_parameters import bits, same_bits


@pytest.fixture
def model():
    return build(available_kinds()[0])


def test_parameters_come_back_from_an_interrupt_at_every_line(model):
    before, handler = bits(model), signal.getsignal(signal.SIGINT)

    def scale():
        with metaint.scaled(model, 3.0):
            pass

    lines = 0
    for _ in interrupted_at_each_line(swapped, scale):
        same_bits(model, before)
        assert signal.getsignal(signal.SIGINT) is handler
        lines += 1
    assert lines > 20


def test_parameters_come_back_from_interrupts_at_random_moments(model):
    before, tokens, draws = bits(model), torch.arange(20).view(2, 10), random.Random(0)
    interrupts = 0
    start = time.monotonic()
    for _ in range(300 if THOROUGH else 40):
        wait = draws.uniform(0, 0.05)
        timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            metaint.saturate(model, tokens, scales=[2, 1000])
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            timer.join()
        same_bits(model, before)
        if time.monotonic() - start > 20 and not THOROUGH:
            break
    assert interrupts > 5


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_save_over_a_scan_keeps_one_of_them_at_every_line(exchanges, repeated_scan, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(whole, "_exchanged", lambda *_: False)
    path = tmp_path / "notes"

    def write(text):
        with whole.whole_folder(path, "the notes") as aside:
            (aside / "a").write_text(text)
            (aside / "b").write_text(text)

    write("old")
    for _ in interrupted_at_each_line(whole, lambda: write("new")):
        whole.restore(path)
        texts = {(path / name).read_text() for name in "ab"}
        assert texts in ({"old"}, {"new"})
        write("old")
        assert [file.name for file in tmp_path.iterdir()] == ["notes"]


def test_a_text_stays_whole_at_every_line(tmp_path):
    path = tmp_path / "page.html"
    whole.write_text(path, "old")
    for _ in interrupted_at_each_line(whole, lambda: whole.write_text(path, "new")):
        assert path.read_text() in ("old", "new")
        whole.write_text(path, "old")
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
