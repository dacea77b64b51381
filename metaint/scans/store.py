"""Scans on disk: one Zarr folder each, written aside and renamed, so that an earlier result is never harmed."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr

from metaint.errors import StoreError
from metaint.scans.recordings import read_recording


def save(scan: xr.DataTree, path: str | Path) -> Path:
    """Write a scan to a Zarr folder, replacing a scan that is there; StoreError if it can't be written.

    A folder that is not a Zarr store is never replaced.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> metaint.save(scan, tempfile.mkdtemp() + "/scan.zarr").name
    'scan.zarr'
    """
    path = Path(path)
    if path.exists() and not _is_store(path):
        raise StoreError(f"{path} exists and is not a Zarr store: choose another name for the scan.")
    with whole_folder(path, "the scan") as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Zarr 3 warns that consolidated metadata is not yet in its standard
        scan.to_zarr(aside, mode="w", consolidated=False)
    return path


@contextmanager
def whole_folder(path: Path, what: str) -> Iterator[Path]:
    """A folder to write in, which takes the place of `path` once it is whole; StoreError, which names `what`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise StoreError(f"{what} could not be written to {path} ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load(path: str | Path) -> xr.DataTree:
    """Read a scan into memory, or the whole records of a recording, finished or not (`metaint.read_recording`).

    Raises StoreError if the path is missing or neither.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(20).view(2, 10))
    >>> metaint.load(metaint.save(scan, tempfile.mkdtemp() + "/scan.zarr"))["heads"].equals(scan["heads"])
    True
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist: give the folder that save or --out wrote.")
    if not _is_store(path):
        raise StoreError(f"{path} is not a Zarr store: give the folder that save or --out wrote.")
    try:
        return read_recording(path)
    except StoreError:  # no recording, or one of its steps that was saved as a scan and remembers where it comes from
        return _read_scan(path)


def _read_scan(path: Path) -> xr.DataTree:
    try:
        with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
            scan = tree.load()
    except Exception as error:  # Zarr raises KeyError, ValueError, JSON errors, ... for what is torn
        raise StoreError(f"{path} is damaged or half written ({type(error).__name__}): scan again.") from error
    if not scan.children:
        raise StoreError(f"{path} holds no group of a scan: it was not written by metaint, or only in part.")
    return scan


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it, so that an earlier one stays until the new one is whole; or StoreError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        aside.unlink(missing_ok=True)


def _is_store(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))
