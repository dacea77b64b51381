"""Finding a group in what was passed: a scan, a node of it, a dataset, or several by name.

In: whatever a reader of groups is given. Out: the group and what the scan is called, or an InputError that tells what
was passed in its place.
"""

from collections.abc import Mapping
from typing import Any

import xarray as xr

from metaint.errors import InputError
from metaint.scans.groups import BY_NAME, GROUPS

Scan = xr.DataTree | xr.Dataset
Scans = Scan | Mapping[str, Scan]
Recordings = Mapping[str, xr.DataTree]


def group_of(scan: Scan, group: str, who: str = "the scan") -> xr.Dataset:
    """One group of a scan, or what was passed where it is that group already.

    InputError, in which the scan is called `who`, if it has no such group, nothing was read into it, or it is another
    group or no scan at all.
    """
    wanted = f"pass a {'recording' if group == 'training' else 'scan'}, or its /{group}."
    if not isinstance(scan, xr.DataTree | xr.Dataset):
        raise InputError(f"{who} is a {type(scan).__name__}: {wanted}")
    whole = isinstance(scan, xr.DataTree) and not scan.data_vars and scan.name != group
    if whole and group not in scan.children:
        raise InputError(f"{who} has no /{group} group: {_maker(group)}.")
    node = scan.children[group] if isinstance(scan, xr.DataTree) and whole else scan
    data = node.to_dataset() if isinstance(node, xr.DataTree) else node
    if not data.data_vars:
        raise InputError(f"{who}'s /{group} group is empty: nothing was read yet.")
    kind = kind_of(data)
    if not whole and kind != group:
        raise InputError(f"{who} is {f'a /{kind} group' if kind else 'no group of a scan'}: {wanted}")
    return data


def _maker(group: str) -> str:
    """What makes a group that is not there."""
    if group not in BY_NAME:
        return "record one with a metaint.Recorder"
    record = BY_NAME[group]
    if not record.scanned:
        return "make one with metaint.recur"
    return f"scan with metaint.{record.probe}(), or --probes {group} at the shell"


def kind_of(data: xr.Dataset) -> str | None:
    """Which group a dataset is, by what it holds; None where it is none."""
    for group in GROUPS:
        if group.sign is not None and group.sign in data:
            return group.name
    if {"layer", "head"} <= set(data.dims):
        return "heads"
    if data.data_vars and all(values.dims == ("step",) for values in data.data_vars.values()):
        return "training"
    return None


def without_bundles(data: xr.Dataset) -> xr.Dataset:
    """A group without what it keeps of bundles of sequences, which is for comparing and not for reading."""
    bundles = ["bundle_value", "bundle_print", "score", "bundle"]
    return data.drop_vars(bundles) if "bundle_value" in data else data


def named_groups(scans: Scans, group: str) -> dict[str, xr.Dataset]:
    """The group of one scan, or of several, by the scans' names, for a figure.

    A scan is called after its model. InputError where `group_of` raises it, for no scan, and for a recording over
    several steps.
    """
    if isinstance(scans, xr.DataTree | xr.Dataset):
        named = {name_of(scans): group_of(scans, group)}
    elif isinstance(scans, Mapping) and scans:
        named = {str(name): group_of(scan, group, f"the scan {name}") for name, scan in scans.items()}
    else:
        raise InputError(f"scans is {_what(scans)}: pass a scan, its /{group}, or a dict from names to these.")
    over_steps = [name for name, data in named.items() if "step" in data.dims]
    if over_steps:
        raise InputError(
            f"{over_steps[0]} is a recording over steps: pass one of them, such as scan.isel(step=-1), or draw all of "
            "them with metaint.plot_training."
        )
    return named


def one_group(scan: Scan, group: str) -> tuple[str, xr.Dataset]:
    """The name of a scan and its group, for a figure of one; InputError as in `named_groups`, and for several."""
    if not isinstance(scan, xr.DataTree | xr.Dataset):
        raise InputError(f"scan is a {type(scan).__name__}: pass one scan, or its /{group}.")
    return next(iter(named_groups(scan, group).items()))


def name_of(scan: Scan) -> str:
    """The model that was scanned, told by the scan, or the group on its own; "scan" where neither knows."""
    root = scan.root.attrs if isinstance(scan, xr.DataTree) else {}
    return str(scan.attrs.get("model") or root.get("model") or "scan")


def recordings_of(recordings: Scans) -> dict[str, xr.DataTree]:
    """Recordings by name; a /training on its own is one, and what is passed alone is called after its model."""
    if isinstance(recordings, xr.DataTree | xr.Dataset):
        return {name_of(recordings): _recording(recordings, "the recording")}
    if not isinstance(recordings, Mapping) or not recordings:
        raise InputError(f"recordings is {_what(recordings)}: pass a recording, or a dict from names to recordings.")
    return {str(name): _recording(each, f"the recording {name}") for name, each in recordings.items()}


def _recording(given: Scan, who: str) -> xr.DataTree:
    if isinstance(given, xr.DataTree) and not given.data_vars:
        return given
    return xr.DataTree.from_dict({"/training": group_of(given, "training", who)})


def recordings_with(recordings: Recordings, group: str) -> dict[str, xr.DataTree]:
    """The recordings, each with this group over steps; InputError for one without it, and for none."""
    if not isinstance(recordings, Mapping) or not recordings:
        raise InputError(f"recordings is {_what(recordings)}: pass a dict from names to recordings.")
    for name, tree in recordings.items():
        if group not in tree.children or "step" not in tree[group].dims:
            raise InputError(f"the recording {name} has no /{group} over steps: record it with that probe.")
    return dict(recordings)


def _what(given: Any) -> str:
    return "empty" if isinstance(given, Mapping) else f"a {type(given).__name__}"
