"""Recordings over training, read from disk: what a `metaint.Recorder` wrote, finished or not.

In: the folder of a recording. Out: its whole records, with `step` before each variable's own dimensions. How they lie
there, and why a kill does them no harm, is in `scanning/record_store.py`.
"""

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import ZarrStore

from metaint.errors import StoreError, door
from metaint.scans.checksums import TABLE, Table, root_metadata, verify


@door
def read_recording(path: str | Path) -> xr.DataTree:
    """The whole records of a recording, finished or not, as `step` before each variable's own dimensions.

    Coordinates that never changed have no `step`, as after `xarray.concat`. Raises StoreError if the path is missing,
    not a recording, or damaged. `metaint.load` opens recordings too.

    >>> import metaint, tempfile
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=1, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=64)
    >>> folder = tempfile.mkdtemp() + "/run.zarr"
    >>> recorder = metaint.Recorder(model, [metaint.WeightProbe()], every=1, path=folder)
    >>> scans = [recorder(step, loss=3 - step) for step in (0, 1)]
    >>> recording = metaint.read_recording(folder)
    >>> recording["training"]["loss"].values.tolist(), recording["weights"].sizes["step"]
    ([3.0, 2.0], 2)
    """
    attributes = root_of(Path(path))["attributes"]
    groups = groups_of(Path(path), attributes["records"], attributes.pop(TABLE, None))
    for name, data in groups.items():
        first = data.isel(step=0, drop=True).variables
        still = [n for n in first if n in data.coords and first[n].broadcast_equals(data.variables[n])]
        groups[name] = data.assign_coords({n: first[n] for n in still})
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), **groups})


def root_of(path: Path) -> dict[str, Any]:
    """The root's metadata, with the count of records; StoreError if it is no recording's."""
    if not path.exists():
        raise StoreError(f"{path} does not exist: give the folder that a Recorder wrote.")
    root: dict[str, Any] = {}
    with suppress(OSError):
        root = root_metadata(path)
    if isinstance(root.get("attributes", {}).get("records"), int):
        return root
    raise StoreError(f"{path} is not a recording, or a damaged one: give the folder that a Recorder wrote.")


def is_recording(path: Path) -> bool:
    """Whether a store is a recording, and not a scan or a recording that was saved as one: its rows are plain bytes."""
    if not isinstance(root_metadata(path)["attributes"].get("records"), int):
        return False
    try:
        steps = json.loads((path / "training/step/zarr.json").read_bytes())
        return steps.get("dimension_names") == ["step"] and [codec["name"] for codec in steps["codecs"]] == ["bytes"]
    except FileNotFoundError:
        return (path / "training/step").is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return True  # damaged, which reading it tells


def groups_of(path: Path, records: int, table: Table | None) -> dict[str, xr.Dataset]:
    """Every group with its first `records` rows, however long a kill left its arrays, verified by the checksums."""
    verify(path, table, records if is_recording(path) else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {file.parent.name: _cut(file.parent, records) for file in sorted(path.glob("*/zarr.json"))}
    except Exception as error:  # Zarr raises KeyError, ValueError, JSON errors, ... for what is damaged
        raise StoreError(f"{path} is damaged ({type(error).__name__}): record again to another path.") from error


def _cut(folder: Path, records: int) -> xr.Dataset:
    variables, attributes = ZarrStore.open_group(folder, mode="r", consolidated=False).load()
    cut = {name: v.isel(step=slice(records)) if "step" in v.dims else v for name, v in variables.items()}
    data = xr.decode_cf(xr.Dataset(cut, attrs=attributes)).load()
    if data.sizes["step"] != records:
        raise ValueError(f"{folder} has {data.sizes['step']} of {records} records")
    return data
