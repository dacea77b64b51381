"""`scan.metaint`: there wherever scans are, and importing metaint costs no more for it."""

import subprocess
import sys

import pandas as pd
import pytest
import xarray as xr
from plotly import graph_objects as go

import metaint
from metaint.errors import InputError
from tests.views.groups.test_heads import planted
from tests.views.groups.test_training import recording


def test_plot_gives_one_figure_or_all(gpt2, repeated):
    scan = metaint.scan(gpt2, repeated, [metaint.HeadProbe(), metaint.ResidualProbe()])
    assert isinstance(scan.metaint.plot("heads"), go.Figure)
    assert scan.metaint.plot("residual") == metaint.plot_residual(scan)
    assert list(scan.metaint.plot()) == ["heads", "residual"]
    with pytest.raises(InputError, match=r"^group is 'norms': this scan has figures of heads, residual\.$"):
        scan.metaint.plot("norms")
    both = metaint.scan(gpt2, repeated, [metaint.SaturationProbe()])
    assert list(both.metaint.plot("saturation")) == ["saturation", "head_saturation"]


def test_a_recording_is_plotted_over_its_steps_and_at_the_last():
    tree = recording(weights=False)
    assert tree.metaint.plot("training") == metaint.plot_training(tree)
    assert list(tree.metaint.plot()) == ["training", "heads", "saturation"]


def test_labels_and_report_are_those_of_the_functions(tmp_path):
    scan = planted()
    pd.testing.assert_frame_equal(scan.metaint.labels(), metaint.label_heads(scan))
    path = scan.metaint.report(tmp_path / "r.html")
    assert "previous_token" in path.read_text()
    with pytest.raises(InputError, match="no group that can be drawn"):
        xr.DataTree().metaint.report(path)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_metaint_loads_no_xarray_for_it():
    heavy = "sorted({'xarray', 'pandas', 'plotly', 'torch'} & set(sys.modules))"
    assert run(f"import sys, metaint; print({heavy})").stdout.strip() == "[]"
    assert run(f"import sys, xarray, metaint; print({heavy})").stdout.strip() == "['pandas', 'xarray']"


@pytest.mark.parametrize(
    "code",
    [
        "import xarray, metaint",
        "import metaint; metaint.load; import xarray",
        "from metaint import save; import xarray",
    ],
)
def test_it_is_there_whichever_is_imported_first(code):
    ran = run(f"{code}; print(type(xarray.DataTree().metaint).__name__)")
    assert ran.stdout.strip() == "ScanAccessor", ran.stderr
