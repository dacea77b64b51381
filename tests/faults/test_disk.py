"""Wrong bytes, lost files, a full disk and kills: nothing healthy is lost, nothing wrong is believed."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import StoreError
from metaint.scans import whole
from tests.builders import available_kinds, build
from tests.faults.moments import THOROUGH

TRIES = 500 if THOROUGH else 60


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A scan and a recording of three steps on the disk, small ones."""
    folder, model = tmp_path_factory.mktemp("stores"), build(available_kinds()[0])
    tokens = torch.arange(16).view(2, 8)
    probes = [metaint.HeadProbe(["entropy", "previous_token"])]
    metaint.save(metaint.scan(model, tokens, probes), folder / "scan.zarr")
    recorder = metaint.Recorder(model, probes, every=1, path=folder / "run.zarr", tokens=tokens)
    for step in range(3):
        recorder(step, loss=step)
    recorder(3, loss=3, accuracy=0.5)
    return folder


def flip(file, draws):
    content = bytearray(file.read_bytes())
    place = draws.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def truncate(file, draws):
    os.truncate(file, draws.randrange(file.stat().st_size))


def zero(file, draws):
    file.write_bytes(bytes(file.stat().st_size))


def delete(file, draws):
    file.unlink()


def loaded(path):
    """What is read, or the sentence why not."""
    try:
        return metaint.load(path), ""
    except StoreError as error:
        return None, str(error)


@pytest.mark.parametrize("name", ["scan.zarr", "run.zarr"])
@pytest.mark.parametrize("harm", [flip, truncate, zero, delete])
def test_no_harm_is_believed(harm, name, stores, tmp_path):
    whole_store, draws = metaint.load(stores / name), random.Random(0)
    files = sorted(path.relative_to(stores / name) for path in (stores / name).rglob("*") if path.is_file())
    refused = 0
    for _ in range(TRIES):
        copy = tmp_path / name
        shutil.copytree(stores / name, copy)
        file = draws.choice(files)
        harm(copy / file, draws)
        read, sentence = loaded(copy)
        if read is None:
            refused += 1
            assert str(file) in sentence or file.name == "zarr.json", (file, sentence)
        else:  # the byte counts for nothing: behind the last record, a space, or a name in the table itself
            assert set(read.children) == set(whole_store.children), file
            for group in whole_store.children:
                xr.testing.assert_equal(read[group].to_dataset(), whole_store[group].to_dataset())
        shutil.rmtree(copy)
    assert refused > TRIES * (0.3 if name == "run.zarr" else 0.9)


def test_a_store_of_others_is_taken_as_it_is(stores, tmp_path):
    scan = metaint.load(stores / "scan.zarr")
    scan.to_zarr(tmp_path / "foreign.zarr", consolidated=False)
    xr.testing.assert_equal(metaint.load(tmp_path / "foreign.zarr"), scan)
    opened = xr.open_datatree(stores / "scan.zarr", engine="zarr", consolidated=False)
    xr.testing.assert_equal(opened["heads"].to_dataset().load(), scan["heads"].to_dataset())


@contextmanager
def full_disk(folder: Path):
    """A small tmpfs that is full where root may mount one, else no room in any file."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs root and a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def test_a_full_disk_shows_no_torn_record(stores, tmp_path):
    model = build(available_kinds()[0])
    with full_disk(tmp_path):
        path = tmp_path / "run.zarr"
        probes = [metaint.HeadProbe(["entropy"])]
        recorder = metaint.Recorder(model, probes, every=1, path=path, tokens=torch.arange(16).view(2, 8))
        scans = [recorder(step, loss=step) for step in range(3)]
        metaint.save(scans[0], tmp_path / "scan.zarr")
        fill(tmp_path)
        with pytest.raises(StoreError, match="No space left on device"):
            recorder(3, loss=3)
        with pytest.raises(StoreError, match="No space left on device"):
            metaint.save(scans[1], tmp_path / "scan.zarr")
        assert metaint.load(path)["heads"]["step"].values.tolist() == [0, 1, 2]
        opened = xr.open_datatree(path, engine="zarr", consolidated=False)
        assert opened["heads"].sizes["step"] == 3
        assert metaint.load(tmp_path / "scan.zarr")["heads"].to_dataset().equals(scans[0]["heads"].to_dataset())
        (tmp_path / "filler").unlink()
        recorder(3, loss=3)
        assert metaint.load(path)["training"]["loss"].values.tolist() == [0, 1, 2, 3]


def test_no_file_may_grow_and_the_scan_before_stays(stores, tmp_path):
    shutil.copytree(stores / "scan.zarr", tmp_path / "scan.zarr")
    scan = metaint.load(tmp_path / "scan.zarr")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(StoreError, match="File too large"):
            metaint.save(scan.isel(head=[0]), tmp_path / "scan.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    xr.testing.assert_identical(metaint.load(tmp_path / "scan.zarr"), scan)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]


CHILD = """
import sys
from pathlib import Path
from metaint.scans import whole
if sys.argv[2] == "twice":
    whole._exchanged = lambda *_: False
number = 0
print("ready", flush=True)
while True:
    number += 1
    with whole.whole_folder(Path(sys.argv[1]), "the notes") as aside:
        for name in "abcdefgh":
            (aside / name).write_text(str(number))
"""


@pytest.mark.parametrize("how", ["exchange", "twice"])
def test_a_kill_at_any_moment_leaves_one_of_both_and_its_leftovers_are_cleaned(how, tmp_path):
    path, draws = tmp_path / "notes", random.Random(0)
    with whole.whole_folder(path, "the notes") as aside:
        for name in "abcdefgh":
            (aside / name).write_text("0")
    for _ in range(60 if THOROUGH else 8):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), how], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(draws.uniform(0, 0.02))
        child.kill()
        child.wait()
        child.stdout.close()
        whole.restore(path)
        assert len({(path / name).read_text() for name in "abcdefgh"}) == 1
    whole.write_text(tmp_path / "other", "")
    with whole.whole_folder(path, "the notes") as aside:
        (aside / "a").write_text("new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes", "other"]
