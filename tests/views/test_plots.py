"""One plot for each group: it takes a scan, the group as node or dataset, and tells what was passed by mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from plotly import graph_objects as go

import metaint
from metaint.errors import InputError
from metaint.scans.finding import kind_of
from metaint.scans.groups import BY_NAME, SCANNED
from metaint.tasks import autoregressive
from metaint.toys.linear_attention import gradient_step

GROUPS = list(BY_NAME)
COMPARED = ("residual", "inner", "recurrence")


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    """All groups in one tree, and what training records."""
    found = metaint.scan(gpt2, repeated, [getattr(metaint, BY_NAME[name].probe)() for name in SCANNED])
    sample = autoregressive("haar", 3, 20, 24, dtype=torch.float64)
    found["recurrence"] = metaint.recur(gradient_step(3, 0.05, dtype=torch.float64), *sample)["recurrence"]
    found["training"] = xr.DataTree(xr.Dataset({"loss": ("step", [2.0, 1.0])}, {"step": [0, 9]}))
    return found


def plot_of(group):
    return getattr(metaint, f"plot_{group}")


@pytest.mark.parametrize("group", GROUPS)
def test_a_scan_its_node_and_its_dataset_are_drawn_alike(scan, group):
    whole, node, data = (plot_of(group)(given) for given in (scan, scan[group], scan[group].to_dataset()))
    assert isinstance(whole, go.Figure)
    drawn = [json.loads(figure.to_json())["data"] for figure in (whole, node, data)]  # where no number is null
    assert drawn[0] == drawn[1] == drawn[2]
    assert whole.layout == node.layout  # a node knows the scan that it is in
    name = scan.attrs["model"][-30:]
    assert name in whole.layout.title.subtitle.text
    assert data.layout.title.subtitle.text.startswith("scan")
    own = scan[group].to_dataset().assign_attrs(model="mine")
    assert plot_of(group)(own).layout.title.subtitle.text.startswith("mine")


@pytest.mark.parametrize("group", GROUPS)
def test_another_group_is_told_by_its_name(scan, group):
    for other in [*GROUPS, "training"]:
        if other == group:
            continue
        for given in (scan[other], scan[other].to_dataset()):
            with pytest.raises(InputError) as caught:
                plot_of(group)(given)
            assert str(caught.value) == f"the scan is a /{other} group: pass a scan, or its /{group}."


def test_groups_are_known_by_what_they_hold(scan):
    for group in [*GROUPS, "training"]:
        assert kind_of(scan[group].to_dataset()) == group
    assert kind_of(xr.Dataset({"x": ("layer", [1.0])})) is None
    assert kind_of(xr.Dataset()) is None


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_no_scan_is_told_in_a_sentence(scan, group):
    makers = f"scan with metaint.{BY_NAME[group].probe}(), or --probes {group} at the shell"
    makers = "make one with metaint.recur" if group == "recurrence" else makers
    many = group in COMPARED
    over = xr.DataTree.from_dict({f"/{group}": scan[group].to_dataset().expand_dims(step=[0, 5])})
    for given, words in {
        "missing": (xr.DataTree(), f"the scan has no /{group} group: {makers}."),
        "empty": (xr.DataTree.from_dict({f"/{group}": xr.Dataset()}), f"the scan's /{group} group is empty: nothing"),
        "nothing": (xr.Dataset({"x": 1}), f"the scan is no group of a scan: pass a scan, or its /{group}."),
        "over steps": (over, "scan is a recording over steps: pass one of them, such as scan.isel(step=-1), or"),
        "list": ([1], f"scans is a list: pass a scan, its /{group}, or a dict" if many else "scan is a list: pass one"),
        "dict": ({}, "scans is empty" if many else f"scan is a dict: pass one scan, or its /{group}."),
    }.values():
        with pytest.raises(InputError) as caught:
            plot_of(group)(given)
        assert str(caught.value).startswith(words)


@pytest.mark.parametrize("group", COMPARED)
def test_scans_and_groups_are_compared_by_name(scan, group):
    figure = plot_of(group)({"whole": scan, "node": scan[group], 3: scan[group].to_dataset()})
    lines = [t for t in figure.data if t.name in ("whole", "node", "3") and t.showlegend]
    assert [line.name for line in lines] == ["whole", "node", "3"]
    np.testing.assert_array_equal(lines[0].y, lines[2].y)
    with pytest.raises(InputError, match=f"^the scan b is a /heads group: pass a scan, or its /{group}"):
        plot_of(group)({"a": scan, "b": scan["heads"]})
    with pytest.raises(InputError, match=f"^the scan b has no /{group} group: "):
        plot_of(group)({"a": scan, "b": xr.DataTree()})


def test_views_are_public_and_load_plotly_late():
    names = [f"plot_{group}" for group in [*GROUPS, "training"]] + ["show_attention", "show_circuit", "show_tokens"]
    assert set(names) <= set(metaint.__all__)
    code = f"import sys, metaint; print(set({names!r}) <= set(dir(metaint)), 'plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
