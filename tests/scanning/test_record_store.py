"""A recording's files: each record is appended whole, and what a kill at any moment leaves."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import metaint
from metaint.errors import StoreError
from metaint.scanning import record_store as records, recorder as recording
from metaint.scans.recordings import read_recording
from tests.builders import build
from tests.scanning.recordings import KIND, change, recorder_of, steps_of, together


def test_a_long_recording_fills_several_chunks(model, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK_RECORDS", 4)
    recorder, scans = recorder_of(model, tmp_path / "run.zarr"), []
    for step in range(11):
        scans.append(recorder(step, loss=step))
        change(model)
    for found in (read_recording(tmp_path / "run.zarr"), metaint.load(tmp_path / "run.zarr")):
        wanted = together(scans, list(range(11)), "heads")["entropy"].drop_vars("window")
        xr.testing.assert_equal(found["heads"]["entropy"].drop_vars("window"), wanted)
        assert found["training"]["loss"].values.tolist() == list(range(11))


def test_appending_writes_no_earlier_record_again(model, tmp_path):
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    recorder(0)
    chunk = path / "heads" / "entropy" / "c" / "0" / "0" / "0"
    row = recorder.last["heads"]["entropy"].values
    chunk.write_bytes(row[::-1].tobytes() + chunk.read_bytes()[row.nbytes :])
    change(model)
    recorder(1)
    later = recorder.last["heads"]["entropy"].values
    assert chunk.read_bytes().startswith(row[::-1].tobytes() + later.tobytes())
    with pytest.raises(StoreError, match=r"run\.zarr is damaged: heads/entropy/c/0/0/0 does not hold what was written"):
        read_recording(path)  # not blessed by the record after it


# ---- kills ------------------------------------------------------------------------------------------------------

MOMENTS = [("_write_row", 0), ("_write_row", 3), ("_replace", 0), ("_lengthen", 0), ("_lengthen", 7)]
MOMENTS += [("_commit", 0), ("_add_scalar", 0)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is undone after it."""


def killed_at(monkeypatch, name, call, error):
    """Let the given call of a step of the append fail halfway."""
    module = recording if name == "create" else records
    original, calls = getattr(module, name), []

    def fails(*args):
        calls.append(args)
        if len(calls) == call + 1:
            if name == "_write_row":
                original(*args[:3], args[3] * np.nan, *args[4:])
            if name == "_replace":
                args[0].with_name("half").write_bytes(args[1][:3])
            raise error
        original(*args)

    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [(*moment, Killed) for moment in MOMENTS]
    + [(*moment, (KeyboardInterrupt, SystemExit)[i % 2]) for i, moment in enumerate(MOMENTS[::2])],
)
def test_a_kill_leaves_whole_records_and_resume_goes_on(name, call, error, model, tmp_path, monkeypatch):
    path, scans = tmp_path / "run.zarr", []
    recorder = recorder_of(model, path)
    for step in (0, 1):
        scans.append(recorder(step, loss=step))
        change(model)
    with monkeypatch.context() as patch:
        killed_at(patch, name, call, error)
        if error is Killed:
            patch.setattr(recording, "trim", lambda *_: None)
        with pytest.raises(error):
            recorder(2, loss=2, accuracy=0.5)
    assert steps_of(path) == [0, 1]
    if error is Killed:
        recorder = recorder_of(model, path, resume=True)
    assert metaint.load(path)["heads"]["step"].values.tolist() == recorder.steps == [0, 1]
    for step in (2, 3):
        scans.append(recorder(step, loss=step, accuracy=0.5))
        change(model)
    found = read_recording(path)
    xr.testing.assert_identical(found["heads"].to_dataset(), together(scans, [0, 1, 2, 3], "heads"))
    for training in (found["training"], metaint.load(path)["training"]):
        assert training["loss"].values.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(training["accuracy"], [np.nan, np.nan, 0.5, 0.5])
    assert [file.name for file in tmp_path.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("name", ["_write_row", "_lengthen", "_commit"])
def test_a_kill_at_the_first_record_leaves_nothing_at_the_path(name, model, tmp_path, monkeypatch):
    path = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        killed_at(patch, name, 1 if name != "_commit" else 0, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            recorder_of(model, path)(0)
    assert list(tmp_path.iterdir()) == []
    recorder_of(model, path, resume=True)(0)
    assert steps_of(path) == [0]


CHILD = """
    import sys, torch, metaint
    torch.set_num_threads(1)
    from metaint.scanning import recorder as recording
    from metaint.scanning import record_store as records
    from tests.builders import build
    from tests.scanning.recordings import KIND, recorder_of
    model = build(KIND)
    scan = recording.scan

    def once(*args, **options):  # its time goes into writing: every number is the step
        global found
        found = globals().get("found") or scan(*args, **options)
        return found.map_over_datasets(lambda data: data * 0 + step if "layer" in data.dims else data)

    recording.scan = once
    recorder = recorder_of(model, sys.argv[1])
    for step in range(10**6):
        recorder(step, loss=step, **({"late": step} if step > 40 else {}))
"""


def test_what_a_killed_process_leaves_is_whole(tmp_path):
    path, moments = tmp_path / "run.zarr", random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    place = {**os.environ, "TMPDIR": str(tmp_path)}  # where what it can't clean up after a kill is forgotten
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=place)
    try:
        for i in range(12):  # a stopped process leaves on disk what a killed one would
            wait_for(path, 5 * i + 1, child)
            time.sleep(0.03 * moments.random())
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            shutil.copytree(path, tmp_path / f"{i}.zarr")
            child.send_signal(signal.SIGCONT)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert all(check_whole(tmp_path / f"{i}.zarr") > 5 * i for i in range(12))
    records = check_whole(path)
    recorder = recorder_of(build(KIND), path, resume=True)
    recorder(10**6, loss=1)
    assert len(metaint.load(path)["heads"]["step"]) == len(recorder.steps) == records + 1


def wait_for(path, records, child):
    patience = time.monotonic() + 60
    while not path.exists() or json.loads((path / "zarr.json").read_text())["attributes"]["records"] < records:
        assert time.monotonic() < patience
        assert child.poll() is None
        time.sleep(0.005)


def check_whole(path):
    found = read_recording(path)
    steps = list(range(found.attrs["records"]))
    assert found["heads"]["step"].values.tolist() == found["training"]["step"].values.tolist() == steps
    assert found["training"]["loss"].values.tolist() == steps
    for name in ("entropy", "previous_token", "entropy_low"):
        values = found["heads"][name].values
        assert (values == np.asarray(steps)[:, None, None]).all(), name
    return len(steps)


@pytest.mark.parametrize("name", ["_write_row", "_lengthen", "_replace", "create"])
def test_a_full_disk_is_one_sentence_and_the_records_before_stay(name, model, tmp_path, monkeypatch):
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    if name != "create":
        recorder(0)
    with monkeypatch.context() as patch:
        killed_at(patch, name, 0, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(StoreError, match=r"can't be written to .*run\.zarr \(No space left on device\): the rec"):
            recorder(1, new=1)
    if name != "create":
        assert steps_of(path) == metaint.load(path)["heads"]["step"].values.tolist() == [0]
    assert recorder.steps == ([] if name == "create" else [0])
    recorder(2)
    assert steps_of(path)[-1] == 2


# ---- what is at the path ----------------------------------------------------------------------------------------


def test_what_is_at_the_path_is_never_overwritten(repeated_scan, model, tmp_path):
    path = tmp_path / "run.zarr"
    recorder_of(model, path)(0)
    with pytest.raises(StoreError, match=r"run\.zarr exists: give another path, or resume=True to go on"):
        recorder_of(model, path)
    metaint.save(repeated_scan, tmp_path / "scan.zarr")
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("scan.zarr", "notes.txt"):
        with pytest.raises(StoreError, match=rf"{name} is not a recording, or a damaged one"):
            recorder_of(model, tmp_path / name, resume=True)
    with pytest.raises(StoreError, match=r"can't be written to .*notes\.txt"):
        recorder_of(model, tmp_path / "notes.txt" / "run.zarr")
    late = recorder_of(model, tmp_path / "late.zarr")
    recorder_of(model, tmp_path / "late.zarr")(0)
    with pytest.raises(StoreError, match=r"the recording could not be written to .*late\.zarr"):
        late(1)
    assert steps_of(tmp_path / "late.zarr") == [0]


def test_what_is_no_recording_is_named(repeated_scan, model, tmp_path):
    with pytest.raises(StoreError, match=r"nowhere\.zarr does not exist: give the folder that a Recorder wrote"):
        read_recording(tmp_path / "nowhere.zarr")
    metaint.save(repeated_scan, tmp_path / "scan.zarr")
    with pytest.raises(StoreError, match=r"scan\.zarr is not a recording, or a damaged one"):
        read_recording(tmp_path / "scan.zarr")
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    recorder(0)
    about = (path / "heads" / "entropy" / "zarr.json").read_text()
    (path / "heads" / "entropy" / "zarr.json").write_text('{"zarr_format"')
    for read in (read_recording, lambda path: recorder_of(model, path, resume=True)):
        with pytest.raises(StoreError, match=r"run\.zarr is damaged: heads/entropy/zarr\.json does not hold"):
            read(path)
    with pytest.raises(StoreError, match="can't be written"):
        recorder(1)
    (path / "heads" / "entropy" / "zarr.json").write_text(about.replace('"shape": [1', '"shape": [0'))
    with pytest.raises(StoreError, match=r"run\.zarr is damaged"):
        read_recording(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.zarr is not a recording, or a damaged one"):
        read_recording(path)


def test_a_copy_made_by_save_is_read_but_not_written(model, tmp_path):
    recorder_of(model, tmp_path / "run.zarr")(0)
    recording = read_recording(tmp_path / "run.zarr")
    xr.testing.assert_identical(metaint.load(tmp_path / "run.zarr"), recording)
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False) as stored:
        rows = stored.load()
    for copied in (recording, rows, rows.map_over_datasets(lambda data: data.drop_encoding())):
        metaint.save(copied, tmp_path / "copy.zarr")
        xr.testing.assert_identical(read_recording(tmp_path / "copy.zarr"), recording)
    with pytest.raises(
        StoreError, match=r"step was rewritten since it was recorded, compressed: record to another path"
    ):
        recorder_of(model, tmp_path / "copy.zarr", resume=True)(1)
    assert steps_of(tmp_path / "copy.zarr") == [0]
