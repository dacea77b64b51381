"""Records in a Zarr store: one more row of every array at a time, so that a kill at any moment harms no earlier one.

In: datasets by group, each with a `step` of length one. Out: a store that xarray and Zarr read. A record is first
written behind the ends of the arrays, then the arrays are lengthened, and last of all `records` in the root's
attributes goes up, by write aside and rename: whatever lies beyond that count was torn by a kill. Rows are written
here and not by Zarr, which takes seconds for the few hundred arrays of a record and rewrites chunks with earlier rows.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from metaint.errors import MetaintError, StoreError
from metaint.scans.recordings import root_of

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
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    empty = {f"/{name}": data.isel(step=slice(0)) for name, data in groups.items()}
    encoding: dict[str, Any] = {name: {} for name in empty}
    for group, data in empty.items():
        for name, v in data.variables.items():
            if _moves(v):
                row = [max(1, size) for size in v.shape[1:]]
                length = max(1, min(_CHUNK_RECORDS, _CHUNK_BYTES // (math.prod(row) * v.dtype.itemsize)))
                encoding[group][name] = {"chunks": (length, *row), "compressors": None}
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={**attributes, "records": 0}), **empty})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Zarr 3 warns that fixed-length texts are not yet in its standard
            tree.to_zarr(aside, mode="w", consolidated=False, encoding=encoding, zarr_format=3)
        append(aside, groups, 0)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def append(path: Path, groups: Mapping[str, xr.Dataset], count: int) -> None:
    """Write record number `count`: nothing of an earlier record is written again, so that no kill can harm it."""
    rows = {
        path / g / str(n): v.values[0] for g, data in groups.items() for n, v in data.variables.items() if _moves(v)
    }
    scalars = {file.parent: np.float64("nan") for file in (path / "training").glob("*/zarr.json")}
    for folder in rows.keys() - scalars.keys():
        if folder.parent.name == "training":
            _add_scalar(folder, path.with_name(f".{path.name}.scalar"))
    rows = {**scalars, **rows}
    for folder, row in rows.items():
        _write_row(folder, np.asarray(row), count)
    for folder in rows:
        _lengthen(folder, count + 1)
    _commit(path, count + 1)


def _add_scalar(folder: Path, aside: Path) -> None:
    """A scalar that was not given so far: as long as the steps and without a chunk, which reads as NaN."""
    steps = json.loads((folder.with_name("step") / "zarr.json").read_text())
    about = {**steps, "data_type": "float64", "fill_value": "NaN", "attributes": {}}
    aside.mkdir(exist_ok=True)
    (aside / "zarr.json").write_text(json.dumps(about))
    aside.rename(folder)


def _write_row(folder: Path, row: np.ndarray, index: int) -> None:
    """Row `index` of an uncompressed Zarr array in its place in its chunk, beyond what the array's shape shows."""
    about = json.loads((folder / "zarr.json").read_text())
    if [codec["name"] for codec in about["codecs"]] != ["bytes"]:
        raise StoreError(f"{folder} was rewritten since it was recorded, compressed: record to another path.")
    shape = about["chunk_grid"]["configuration"]["chunk_shape"]
    number, place = divmod(index, shape[0])
    file = folder.joinpath("c", str(number), *["0"] * row.ndim)
    values = row.astype(row.dtype.newbyteorder("<"))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, np.full(shape, np.nan if row.dtype.kind in "fc" else 0, values.dtype).tobytes())
    with file.open("r+b") as out:
        out.seek(place * row.nbytes)
        out.write(values.tobytes())


def _lengthen(folder: Path, length: int) -> None:
    file = folder / "zarr.json"
    about = json.loads(file.read_text())
    about["shape"][0] = length
    content = json.dumps(about).encode().ljust(file.stat().st_size)
    with file.open("r+b") as out:  # one write of less than a page, which a kill can't split; a rename costs a flush
        out.write(content)


def _commit(path: Path, records: int) -> None:
    root = root_of(path)
    root["attributes"]["records"] = records
    # Not inside the store, where Zarr would wonder what a file left by a kill may be.
    _replace(path / "zarr.json", json.dumps(root).encode(), path.with_name(f".{path.name}.records"))


def trim(path: Path, records: int) -> None:
    """Take the store back to this many records."""
    _commit(path, records)
    for file in path.glob("*/*/zarr.json"):
        about = json.loads(file.read_text())
        if (about.get("dimension_names") or [""])[0] == "step" and about["shape"][0] > records:
            _lengthen(file.parent, records)


def _replace(file: Path, content: bytes, aside: Path | None = None) -> None:
    aside = aside or file.with_name(f"{file.name}.new")
    aside.write_bytes(content)
    aside.replace(file)
