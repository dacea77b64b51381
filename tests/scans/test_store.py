"""Scans on disk: what was saved comes back, and a failed save harms nothing."""

import errno

import pytest
import xarray as xr

import metaint
from metaint.errors import StoreError


def test_a_scan_comes_back_as_it_was(repeated_scan, tmp_path):
    path = metaint.save(repeated_scan, tmp_path / "scan.zarr")
    found = metaint.load(path)
    xr.testing.assert_identical(found["heads"].to_dataset(), repeated_scan["heads"].to_dataset())
    assert {k: found.attrs[k] for k in ("model", "seed", "bos")} == {
        k: repeated_scan.attrs[k] for k in ("model", "seed", "bos")
    }
    assert list(found.attrs["tokens_shape"]) == [6, 64]
    assert set(metaint.label_heads(found)["head"]) == set(metaint.label_heads(repeated_scan)["head"])


def test_a_scan_replaces_a_scan_and_leaves_nothing_beside_it(repeated_scan, tmp_path):
    path = tmp_path / "scan.zarr"
    metaint.save(repeated_scan, path)
    metaint.save(repeated_scan.isel(head=slice(0, 1)), path)
    assert metaint.load(path)["heads"].sizes["head"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["scan.zarr"]


def test_a_folder_of_someone_else_s_is_never_replaced(repeated_scan, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(StoreError, match="thesis exists and is not a Zarr store: choose another name"):
        metaint.save(repeated_scan, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_full_disk_leaves_the_earlier_scan(repeated_scan, tmp_path, monkeypatch):
    path = tmp_path / "scan.zarr"
    metaint.save(repeated_scan, path)

    def full(self, store, **_):
        store.mkdir(exist_ok=True)
        (store / "zarr.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(xr.DataTree, "to_zarr", full)
    with pytest.raises(StoreError, match=r"could not be written to .*scan\.zarr \(No space left on device\)"):
        metaint.save(repeated_scan, path)
    monkeypatch.undo()
    assert metaint.load(path)["heads"].sizes["layer"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["scan.zarr"]


def test_what_is_no_scan_is_named(repeated_scan, tmp_path):
    with pytest.raises(StoreError, match=r"nowhere\.zarr does not exist: give the folder that save"):
        metaint.load(tmp_path / "nowhere.zarr")
    (tmp_path / "file.zarr").write_text("not a store")
    with pytest.raises(StoreError, match=r"file\.zarr is not a Zarr store"):
        metaint.load(tmp_path / "file.zarr")
    path = metaint.save(repeated_scan, tmp_path / "torn.zarr")
    (path / "heads" / "entropy" / "zarr.json").write_text('{"zarr_format"')
    with pytest.raises(StoreError, match=r"torn\.zarr is damaged: heads/entropy/zarr\.json does not hold"):
        metaint.load(path)
    metaint.save(xr.DataTree(), tmp_path / "empty.zarr")
    with pytest.raises(StoreError, match=r"empty\.zarr holds no group of a scan"):
        metaint.load(tmp_path / "empty.zarr")


def test_a_recording_and_what_was_cut_out_of_it_are_opened(repeated_scan, gpt2, repeated, tmp_path):
    recorder = metaint.Recorder(gpt2, [metaint.HeadProbe()], every=1, path=tmp_path / "run.zarr", tokens=repeated[:2])
    for step in range(3):
        recorder(step)
    recording = metaint.load(tmp_path / "run.zarr")
    xr.testing.assert_identical(recording, metaint.read_recording(tmp_path / "run.zarr"))
    assert recording["heads"]["window"].dims == ("layer",)
    for part in (recording.isel(step=-1), recording.isel(step=[0, 2])):
        cut = metaint.load(metaint.save(part, tmp_path / "part.zarr"))
        xr.testing.assert_equal(cut["heads"].to_dataset(), part["heads"].to_dataset())
