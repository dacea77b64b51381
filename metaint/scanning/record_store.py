"""Records in a Zarr store: one more row of every array at a time, so that a kill at any moment harms no earlier one.

In: datasets by group, each with a `step` of length one. Out: a store that xarray and Zarr read. A record is first
written behind the ends of the arrays, then the arrays are lengthened, and last of all `records` in the root's
attributes goes up, and with it the checksums of what counts now, by write aside and rename: whatever lies beyond was
torn by a kill. Rows are written here and not by Zarr, which takes seconds for the few hundred arrays of a record and
rewrites chunks with earlier rows.
"""

import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from metaint.errors import MetaintError, StoreError
from metaint.scans.checksums import TABLE, Table, chunk_and_row, damaged, metadata_crc, seal, sealed
from metaint.scans.recordings import root_of
from metaint.scans.whole import flush, whole_folder

# Many small records share a file, so that a long recording opens fast: up to so many bytes,
_CHUNK_BYTES = 2**16
# and so many records.
_CHUNK_RECORDS = 256


def with_step(data: xr.Dataset, step: int) -> xr.Dataset:
    """`step` before the dimensions of every number; labels and texts stay as they are, and must never change."""
    moving = [n for n, v in data.variables.items() if n not in data.dims and v.dtype.kind in "biufc"]
    variables = {n: v.expand_dims("step") if n in moving else v for n, v in data.variables.items()}
    coords = {n: variables[n] for n in data.coords} | {"step": ("step", [step])}
    return xr.Dataset({n: variables[n] for n in data.data_vars}, coords, data.attrs)


def _moves(variable: xr.Variable) -> bool:
    return variable.dims[:1] == ("step",)


def layout_of(groups: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """What all records share: dimensions, sizes and type of what moves, and what does not move. Scalars may vary."""
    layout = {}
    for group, data in groups.items():
        if group == "training":
            continue
        for name, variable in data.variables.items():
            if _moves(variable):
                layout[f"/{group}/{name}"] = str((variable.dims, variable.shape[1:], variable.dtype.str))
            else:
                layout[f"/{group}/{name}"] = str(variable.values.tolist())
    return layout


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except MetaintError:
        raise
    except (OSError, ValueError, KeyError) as error:  # the last two are of a store that was damaged meanwhile
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"the recording can't be written to {path} ({why}): the records before are intact.") from error


def create(path: Path, groups: Mapping[str, xr.Dataset], attributes: Mapping[Any, Any]) -> None:
    """A store with one record, made aside: the arrays are xarray's, with no rows yet and as plain bytes."""
    empty = {f"/{name}": data.isel(step=slice(0)) for name, data in groups.items()}
    encoding: dict[str, Any] = {name: {} for name in empty}
    for group, data in empty.items():
        for name, v in data.variables.items():
            if _moves(v):
                row = [max(1, size) for size in v.shape[1:]]
                length = max(1, min(_CHUNK_RECORDS, _CHUNK_BYTES // (math.prod(row) * v.dtype.itemsize)))
                encoding[group][name] = {"chunks": (length, *row), "compressors": None}
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={**attributes, "records": 0}), **empty})
    with whole_folder(path, "the recording", replace=False) as aside:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Zarr 3 warns that fixed-length texts are not yet in its standard
            tree.to_zarr(aside, mode="w", consolidated=False, encoding=encoding, zarr_format=3)
        seal(aside, records=0)
        append(aside, groups, 0)


def append(path: Path, groups: Mapping[str, xr.Dataset], count: int) -> None:
    """Write record number `count`: nothing of an earlier record is written again, so that no kill can harm it."""
    rows = {}
    for group, data in groups.items():
        rows.update({f"{group}/{name}": v.values[0] for name, v in data.variables.items() if _moves(v)})
    scalars = [f"training/{file.parent.name}" for file in (path / "training").glob("*/zarr.json")]
    for array in rows.keys() - set(scalars):
        if array.startswith("training/"):
            _add_scalar(path / array, _aside(path, "scalar"))
    rows = {**dict.fromkeys(scalars, np.float64("nan")), **rows}
    root = root_of(path)
    table = dict(root["attributes"].get(TABLE, {}))
    arrays = {array: json.loads((path / array / "zarr.json").read_text()) for array in rows}
    for array, row in rows.items():
        _write_row(path, array, arrays[array], np.asarray(row), count, table)
    for array, about in arrays.items():
        name = f"{array}/zarr.json"
        if table.setdefault(name, metadata_crc(about)) != metadata_crc(about):
            raise damaged(path, name)
        _lengthen(path / array / "zarr.json", about, count + 1)
    flush(path)
    _commit(path, root, count + 1, table)


def _add_scalar(folder: Path, aside: Path) -> None:
    """A scalar that was not given so far: as long as the steps and without a chunk, which reads as NaN."""
    steps = json.loads((folder.with_name("step") / "zarr.json").read_text())
    about = {**steps, "data_type": "float64", "fill_value": "NaN", "attributes": {}}
    aside.mkdir(exist_ok=True)
    (aside / "zarr.json").write_text(json.dumps(about))
    aside.rename(folder)


def _write_row(path: Path, array: str, about: dict[str, Any], row: np.ndarray, index: int, table: Table) -> None:
    """Row `index` of an uncompressed Zarr array in its place in its chunk, beyond what the array's shape shows."""
    if [codec["name"] for codec in about["codecs"]] != ["bytes"]:
        raise StoreError(f"{path / array} was rewritten since it was recorded, compressed: record to another path.")
    chunk, place = chunk_and_row(about, index)
    file, name = path / array / chunk, f"{array}/{chunk}"
    values = row.astype(row.dtype.newbyteorder("<"))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = about["chunk_grid"]["configuration"]["chunk_shape"]
        nothing = np.nan if row.dtype.kind in "fc" else 0
        empty = np.full(shape, nothing, values.dtype)
        _replace(file, empty.tobytes(), file.with_name(f"{file.name}.new"))
    with file.open("r+b") as out:
        before = table.get(name)
        if before is None:  # the rows before it of a scalar that was not given so far, or of an older recording
            before = zlib.crc32(out.read(place * row.nbytes))
        out.seek(place * row.nbytes)
        out.write(values.tobytes())
    table[name] = zlib.crc32(values.tobytes(), before)


def _lengthen(file: Path, about: dict[str, Any], length: int) -> None:
    content = json.dumps({**about, "shape": [length, *about["shape"][1:]]}).encode().ljust(file.stat().st_size)
    with file.open("r+b") as out:  # one write of less than a page, which a kill can't split; a rename costs a flush
        out.write(content)


def _commit(path: Path, root: dict[str, Any], records: int, table: Table) -> None:
    attributes = {**root["attributes"], "records": records}
    content = json.dumps(sealed({**root, "attributes": attributes}, table)).encode()
    # Not inside the store, where Zarr would wonder what a file left by a kill may be.
    _replace(path / "zarr.json", content, _aside(path, "records"))


def trim(path: Path, records: int) -> None:
    """Take the store back to its whole records, of which there are so many; this needs no space on the disk."""
    for file in path.glob("*/*/zarr.json"):
        about = json.loads(file.read_text())
        if (about.get("dimension_names") or [""])[0] == "step" and about["shape"][0] > records:
            _lengthen(file, about, records)


def _aside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _replace(file: Path, content: bytes, aside: Path) -> None:
    """Write a file aside, see it to the disk and rename it."""
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
