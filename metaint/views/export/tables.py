"""A scan as tables for other programs: every number of it in a DataFrame, and each of those in a CSV or Parquet file.

In: a scan, or a recording over training. Out: plain pandas tables by name, and a folder with a file for each.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from metaint.errors import InputError, StoreError, door
from metaint.scans.finding import without_bundles
from metaint.scans.outgoing import cell, writable
from metaint.views.groups.catalogue import VIEWS

Tables = dict[str, pd.DataFrame]

_PAIR = ("layer", "head", "layer_to", "head_to")
_WRITERS: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    "csv": lambda table, path: csv_safe(table).to_csv(path, index=False),
    "parquet": lambda table, path: _with_texts(table, writable).to_parquet(path, index=False),
}


@door
def tables_of(scan: xr.DataTree) -> Tables:
    """Every table of a scan, by name; each variable of the scan is in at least one.

    - `heads`, `residual`, `inner`, `saturation`, `memory`, `memory_pairs`, `weights`, `recurrence`: a wide table of
      each group that was read, and `labels`, which is `metaint.label_heads`.
    - What doesn't fit there is tidy, one row for each value of its dimensions, under the group's name and theirs
      (`weights_pairs` for pairs of heads, `saturation_scale_layer_head`); numbers without dimensions share one row
      (`weights_scalars`). So are groups of other probes, and `training`.
    - `attributes`: where the scan comes from, by group ("" for the root) and name, values as text or JSON.

    A recording's tables, but for `attributes`, begin with a column `step`. In `heads` and `labels` the column `head`
    holds names ("5.1") and `index` numbers within the layer; elsewhere `head` is the number.

    Raises InputError where nothing was read.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.WeightProbe()])
    >>> list(metaint.tables_of(scan))
    ['weights', 'weights_scalars', 'weights_pairs', 'attributes']
    """
    tables: Tables = {}
    for name in _groups(scan):
        data = _sorted(scan[name].to_dataset())
        if data.data_vars:
            tables |= _over_steps(name, data) if "step" in data.dims else _of_group(name, data)
    if not tables:
        raise InputError("scan holds no group into which something was read: there is no table of it.")
    return {**tables, "attributes": _attributes(scan)}


@door
def save_tables(scan: xr.DataTree, folder: str | Path, format: str = "csv") -> list[Path]:
    """Write each table of a scan to `<name>.csv` or `<name>.parquet` in a folder, made if it isn't there.

    Returns the paths. All tables are written aside first, so that earlier ones of the same names stay until the new
    ones are whole; files of other names are left alone.

    - `format`: "csv" keeps every digit, but no types: read it with `pandas.read_csv(path, dtype={"head": str})`, since
      the head "5.10" is no number. "parquet" keeps both.

    Raises InputError for another format or an empty scan, StoreError if the folder can't be written.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> [path.name for path in metaint.save_tables(scan, tempfile.mkdtemp())]
    ['heads.csv', 'labels.csv', 'attributes.csv']
    """
    if format not in _WRITERS:
        raise InputError(f'format is {format!r}: it must be "csv" or "parquet".')
    tables, folder = tables_of(scan), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file: name a folder for the tables.")
    aside = folder / f".{os.getpid()}.new"
    files = [f"{name}.{format}" for name in tables]
    try:
        aside.mkdir(parents=True)
        for file, table in zip(files, tables.values(), strict=True):
            _WRITERS[format](table, aside / file)
        return [(aside / file).replace(folder / file) for file in files]
    except OSError as error:
        raise StoreError(f"the tables could not be written to {folder} ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def csv_safe(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts and column names UTF-8 can write and no spreadsheet runs as formulas."""
    return _with_texts(table, cell)


def _with_texts(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """A table with every text in it changed; numbers stay as they are."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{name: table[name].map(changed) for name in texts}).rename(columns=changed)


def _groups(scan: xr.DataTree) -> list[str]:
    """The groups, those of our own probes first: a store gives them back in any order."""
    names = sorted(str(name) for name in scan.children)
    return [name for name in VIEWS if name in names] + [name for name in names if name not in VIEWS]


def _sorted(data: xr.Dataset) -> xr.Dataset:
    """With variables and coordinates by name, for the same reason."""
    variables, coords = (
        {name: data.variables[name] for name in sorted(of, key=str)} for of in (data.data_vars, data.coords)
    )
    return xr.Dataset(variables, coords, data.attrs)


def _over_steps(name: str, data: xr.Dataset) -> Tables:
    """The tables of a group at each step, one below the other."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for i, step in enumerate(data["step"].values.tolist()):
        for table, frame in _of_group(name, data.isel(step=i, drop=True)).items():
            frame.insert(0, "step", step)
            parts.setdefault(table, []).append(frame)
    return {table: pd.concat(frames, ignore_index=True) for table, frames in parts.items()}


def _of_group(name: str, data: xr.Dataset) -> Tables:
    """The wide tables of a group, and tidy ones of what they don't show."""
    data = without_bundles(data)
    tables: Tables = {}
    shown: set[frozenset[str]] = set()
    if name in VIEWS:
        scan = xr.DataTree.from_dict({f"/{name}": data})
        tables = {table: _numbered(frame(scan)) for table, frame in VIEWS[name].frames.items()}
        shown = {frozenset(dims) for dims in VIEWS[name].shown}
    others: dict[frozenset[Any], list[Any]] = {}
    for variable in data.data_vars:
        dims = frozenset(data[variable].dims)
        if dims not in shown:
            others.setdefault(dims, []).append(variable)
    for names in others.values():
        dims = [str(dim) for dim in data[names[0]].dims]
        table = _tidy(data[names], dims)
        if set(dims) == set(_PAIR):  # half of the pairs run backwards, and are not known
            tables[f"{name}_pairs"] = table.dropna(how="all", subset=names).reset_index(drop=True)
        elif dims:
            tables[f"{name}_{'_'.join(dims)}"] = table
        else:
            tables[f"{name}_scalars" if name in VIEWS else name] = table
    return tables


def _tidy(data: xr.Dataset, dims: Sequence[str]) -> pd.DataFrame:
    """One row for each value of the dimensions; one row in all where there are none."""
    if not dims:
        return pd.DataFrame({str(name): [values.item()] for name, values in data.data_vars.items()})
    return data.to_dataframe(dim_order=list(dims)).reset_index()


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    """Where heads have names, with the number of each in its layer: programs that take "5.10" for a number lose it."""
    if "head" in table and "index" not in table and pd.api.types.is_string_dtype(table["head"]):
        table.insert(list(table).index("layer") + 1, "index", [int(name.split(".")[1]) for name in table["head"]])
    return table


def _attributes(scan: xr.DataTree) -> pd.DataFrame:
    attributes = {"": scan.attrs, **{name: scan[name].attrs for name in _groups(scan)}}
    rows = [(group, str(name), _text(value)) for group, of in attributes.items() for name, value in of.items()]
    rows = [tuple(map(writable, row)) for row in rows]  # pandas itself refuses half of a pair
    return pd.DataFrame(rows, columns=["group", "name", "value"])


def _text(value: Any) -> str:
    value = getattr(value, "tolist", lambda: value)()  # what Zarr gives back may be NumPy's
    return value if isinstance(value, str) else json.dumps(value, default=str)
