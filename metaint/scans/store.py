"""Scans on disk: one Zarr folder each, whole or not there, with checksums that `load` verifies."""

import warnings
from pathlib import Path
from typing import Any

import xarray as xr
from zarr.codecs import Crc32cCodec, ZstdCodec

from metaint.errors import StoreError, door
from metaint.scans.checksums import TABLE, root_metadata, seal, verify
from metaint.scans.recordings import is_recording, read_recording
from metaint.scans.whole import restore, whole_folder

# Chunks have a checksum of their own, too, by which any reader of Zarr tells wrong bytes.
_ENCODING: Any = {"compressors": [ZstdCodec(level=0), Crc32cCodec()]}


@door
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
        groups = {
            node.path: dict.fromkeys(node.to_dataset(inherit=False).variables, _ENCODING) for node in scan.subtree
        }
        scan.to_zarr(aside, mode="w", consolidated=False, zarr_format=3, encoding=groups)
        seal(aside)
    return path


@door
def load(path: str | Path) -> xr.DataTree:
    """Read a scan into memory, or the whole records of a recording, finished or not (`metaint.read_recording`).

    Raises StoreError if the path is missing or neither, and, naming the file, where one is lost or damaged. A store
    that others wrote has no checksums and is taken as it is.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(20).view(2, 10))
    >>> metaint.load(metaint.save(scan, tempfile.mkdtemp() + "/scan.zarr"))["heads"].equals(scan["heads"])
    True
    """
    path = Path(path)
    restore(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist: give the folder that save or --out wrote.")
    if not _is_store(path):
        raise StoreError(f"{path} is not a Zarr store: give the folder that save or --out wrote.")
    return read_recording(path) if is_recording(path) else _read_scan(path)


def _read_scan(path: Path) -> xr.DataTree:
    verify(path, root_metadata(path)["attributes"].get(TABLE))
    try:
        with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
            scan = tree.load()
    except Exception as error:  # Zarr raises KeyError, ValueError, JSON errors, ... for what is torn
        raise StoreError(f"{path} is damaged or half written ({type(error).__name__}): scan again.") from error
    if not scan.children:
        raise StoreError(f"{path} holds no group of a scan: it was not written by metaint, or only in part.")
    scan.attrs.pop(TABLE, None)
    return scan


def _is_store(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))
