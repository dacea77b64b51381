"""One record a group, one view a group: what a probe reads is drawn, printed, and handed on whole."""

import io
import json

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

import metaint
from metaint.scans.finding import without_bundles
from metaint.scans.groups import BY_NAME, GROUPS, SCANNED
from metaint.tasks import autoregressive
from metaint.toys.linear_attention import gradient_step
from metaint.views.export.scan_json import scan_json
from metaint.views.groups.catalogue import VIEWS


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    """Every group that there is."""
    whole = metaint.scan(gpt2, repeated, [getattr(metaint, BY_NAME[name].probe)() for name in SCANNED])
    sample = autoregressive("haar", 3, 20, 24, dtype=torch.float64)
    whole["recurrence"] = metaint.recur(gradient_step(3, 0.05, dtype=torch.float64), *sample)["recurrence"]
    return whole


def test_every_probe_has_a_group_and_every_group_a_view_and_a_figure():
    public = {name: getattr(metaint, name) for name in metaint.__all__}
    classes = {name: value for name, value in public.items() if isinstance(value, type) and value is not metaint.Probe}
    probes = {value.group: name for name, value in classes.items() if issubclass(value, metaint.Probe)}
    assert probes == {group.name: group.probe for group in GROUPS}
    assert list(VIEWS) == list(BY_NAME)
    for name, view in VIEWS.items():
        assert f"plot_{name}" in metaint.__all__
        assert view.source
        assert name in view.frames


def test_a_group_has_its_sign_and_no_other_group_has_it(scan):
    for group in GROUPS:
        holders = [name for name, node in scan.children.items() if group.sign in node.data_vars]
        assert holders == ([group.name] if group.sign else [])


def test_every_group_is_drawn_printed_and_framed(scan):
    for name, view in VIEWS.items():
        assert next(iter(view.figures(scan))) == name
        console = Console(width=100, file=io.StringIO())
        view.print(console, scan)
        assert len(console.file.getvalue().splitlines()) > 5
        for frame in view.frames.values():
            assert len(frame(scan))


def names_in(value):
    """Every name in a JSON document."""
    if isinstance(value, dict):
        return set(value).union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


def numbers_in(value):
    if isinstance(value, dict | list):
        return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
    return {value} if isinstance(value, int | float) else set()


def refuse(name):
    pytest.fail(f"{name} is not JSON")


def test_json_leaves_nothing_out(scan):
    scan = scan.copy()
    scan["mine"] = xr.DataTree(xr.Dataset({"depth": ("layer", [1.0, np.inf])}))
    scan["heads"] = scan["heads"].to_dataset().assign(depth_kind=("layer", [1, 2]), by_lag=("lag", [0.25, 0.5]))
    document = json.loads(scan_json(scan), parse_constant=refuse)
    assert list(document) == ["attributes", *VIEWS, "mine"]
    for group, node in scan.children.items():
        names, numbers = names_in(document[group]), np.array(sorted(numbers_in(document[group])))
        for name, values in without_bundles(node.to_dataset()).data_vars.items():
            assert name in names or any(each.startswith(f"{name}_") for each in names), (group, name)
            if values.dtype.kind in "fiu":
                finite = np.unique(values.values[np.isfinite(values.values)])
                assert np.isclose(finite[:, None], numbers, rtol=1e-6, atol=1e-11).any(1).all(), (group, name)


def test_json_of_a_recording_leaves_nothing_out(scan):
    groups = {f"/{name}": node.to_dataset().expand_dims(step=[0, 5]) for name, node in scan.children.items()}
    document = json.loads(scan_json(xr.DataTree.from_dict(groups)), parse_constant=refuse)
    for name, node in scan.children.items():
        assert set(document[name]["variables"]) == set(without_bundles(node.to_dataset()).data_vars)
        assert document[name]["coordinates"]["step"]["data"] == [0, 5]
