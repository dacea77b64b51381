"""Tables and figures of /recurrence: the scan's own numbers, whole at any width, readable by machines."""

import io
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.tasks import autoregressive
from metaint.toys.linear_attention import gradient_step, vector_transformer
from metaint.views.drawing.page import write_page
from metaint.views.groups.recurrence import (
    plot_decodability,
    plot_recurrence,
    print_recurrence,
    recurrence_figures,
    recurrence_frame,
)

STEPS = (1, 2, 5)
SAMPLE = autoregressive("haar", 3, 20, 24, dtype=torch.float64)
SIZES: dict[str, Any] = {"n_ctx": 19, "n_layers": 2, "n_heads": 1, "d_model": 8, "d_mlp": 8}


@pytest.fixture(scope="module")
def scan():
    model = gradient_step(3, 0.05, dtype=torch.float64)
    return metaint.recur(model, *SAMPLE, steps=STEPS, positions=[2, 4, 7, 15])


@pytest.fixture(scope="module")
def scans(scan):
    model = vector_transformer(d_in=3, d_out=3, dtype=torch.float64, **SIZES)
    return {"one": scan, "other": metaint.recur(model, *SAMPLE, steps=STEPS)}


@pytest.fixture(scope="module")
def poor():
    """No matrices, and too few sequences to decode from."""
    model = gradient_step(3, 0.05, dtype=torch.float64)
    return metaint.recur(model, *(x[:5] for x in SAMPLE), positions=())


def printed(scan, width):
    file = io.StringIO()
    print_recurrence(Console(width=width, file=file), scan)
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit(scan, poor, width):
    for each in (scan, poor):
        text = printed(each, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text


def test_tables_hold_the_scan_s_numbers(scan, poor):
    data, lines = scan["recurrence"].to_dataset(), printed(scan, 200).splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["2"], ["4"], ["7"], ["15"])]
    assert [row[0] for row in rows] == 2 * ["2", "4", "7", "15"]
    for row in rows[:4]:
        at = data.sel(position=int(row[0]))
        losses = ("loss", "loss_zero", "loss_gradient_step", "loss_least_squares", "loss_persistence")
        losses += tuple(f"loss_gradient_steps_{k}" for k in STEPS)
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            [float(at[name]) for name in losses], rel=0.5, abs=6e-4
        )
    for row in rows[4:]:
        at = data.sel(position=int(row[0]))
        cosines, null = at["effective_matrix_cosine"], at["effective_matrix_cosine_null"].sel(reference="truth")
        wanted = [cosines.sel(reference="truth"), null]
        wanted += [cosines.sel(reference=name) for name in ("gradient_step", "least_squares")]
        wanted += [at["step_size"], at["effective_matrix_error"].sel(reference="truth")]
        wanted += [at["prediction_difference"]]
        wanted += [cosines.sel(reference=f"gradient_steps_{k}") for k in STEPS[1:]]
        assert [float(cell) for cell in row[1:]] == pytest.approx([float(value) for value in wanted], abs=6e-4)
    raw = f"{float(data['decodability_raw']):.3f}"
    for layer in (0, 1):
        cells = (data["decodability"][layer], data["decodability_null"][layer])
        assert [str(layer), *(f"{float(cell):.3f}" for cell in cells), raw] in [line.split() for line in lines]
    assert "Effective matrix: cosine" not in printed(poor, 200)


def test_the_frame_has_a_row_for_each_length_and_reference(scan):
    frame, data = recurrence_frame(scan), scan["recurrence"]
    assert len(frame) == 19 * 6
    row = frame[(frame["position"] == 7) & (frame["reference"] == "least_squares")].iloc[0]
    at = {"position": 7, "reference": "least_squares"}
    for name in (
        "effective_matrix_cosine",
        "effective_matrix_cosine_null",
        "reference_prediction_difference",
        "reference_model_difference",
    ):
        assert row[name] == float(data[name].sel(at))
    assert row["loss"] == float(data["loss"].sel(position=7))


def curve(figure: Any, name: str, axis: str = "y") -> Any:
    return next(trace for trace in figure.data if trace.name == name and trace.yaxis == axis and trace.x[0] is not None)


def test_the_figure_of_one_scan_draws_what_it_says(scan):
    figure: Any = plot_recurrence(scan)
    data = scan["recurrence"].to_dataset()
    names = {"model": "loss", "one step": "loss_gradient_step", "5 steps (mean)": "loss_gradient_steps_5"}
    for name, variable in {**names, "least squares": "loss_least_squares", "zero": "loss_zero"}.items():
        assert list(curve(figure, name).y) == data[variable].values.tolist()
    known = data.sel(position=[2, 4, 7, 15])["effective_matrix_cosine"]
    for name, reference in {"W": "truth", "one step": "gradient_step", "least squares": "least_squares"}.items():
        drawn = curve(figure, name, "y2")
        assert list(drawn.x) == [2, 4, 7, 15]
        assert list(drawn.y) == known.sel(reference=reference).values.tolist()
    null = data["effective_matrix_cosine_null"].sel(reference="truth", position=[2, 4, 7, 15])
    assert list(curve(figure, "another W", "y2").y) == null.values.tolist()
    # One step on the mean loss points as one step does.
    assert not any(trace.name == "1 step (mean)" and trace.yaxis == "y2" for trace in figure.data)
    low, high = (10**end for end in figure.layout.yaxis.range)
    assert low < float(data["loss_gradient_steps_5"].min())
    assert high > float(data["loss_persistence"].max())
    assert low > 100 * float(data["loss_least_squares"].min())  # rounding isn't worth the room
    assert figure.layout.yaxis.type == "log"
    assert [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1] == [4, 4]


def test_the_figure_of_several_scans_has_a_colour_for_each(scans):
    figure: Any = plot_recurrence(scans)
    colours = {}
    for name, scan in scans.items():
        drawn = curve(figure, name)
        assert list(drawn.y) == scan["recurrence"]["loss"].values.tolist()
        colours[name] = drawn.line.color
    assert len(set(colours.values())) == 2
    first = scans["one"]["recurrence"]
    assert list(curve(figure, "one step").y) == first["loss_gradient_step"].values.tolist()
    assert "first scan" in figure.layout.annotations[-1].text.replace("<br>", " ")


def test_decodability_is_drawn_beside_the_raw_context(scans):
    figure, data = plot_decodability(scans["other"]), scans["other"]["recurrence"]
    for name, variable in {"stream": "decodability", "another W": "decodability_null"}.items():
        assert list(curve(figure, name).y) == data[variable].values.tolist()
    assert list(curve(figure, "raw context").y) == 3 * [float(data["decodability_raw"])]
    both = plot_decodability(scans)
    assert list(curve(both, "one").y) == scans["one"]["recurrence"]["decodability"].values.tolist()


def test_every_figure_says_how_to_read_it_and_when_it_misleads(scan, scans, poor, tmp_path):
    for given, names in ((scan, 2), (scans, 2), (poor, 1)):
        figures: dict[str, Any] = {**recurrence_figures(given)}
        assert list(figures) == ["recurrence", "decodability"][:names]
        for figure in figures.values():
            assert "How to read" in figure.layout.annotations[-1].text
            assert "misleads" in figure.layout.annotations[-1].text
        write_page(figures, tmp_path / "page.html", "t")


def test_losses_without_error_leave_the_axis_as_it_is(scan):
    data = scan["recurrence"].to_dataset()
    exact = xr.DataTree.from_dict({"/recurrence": data.map(lambda x: 0 * x, keep_attrs=True)})
    figure: Any = plot_recurrence(exact)
    assert figure.layout.yaxis.type is None
    tiny = xr.DataTree.from_dict({"/recurrence": data.assign(loss=data["loss"] * 1e-30)})
    figure = plot_recurrence(tiny)
    low, high = figure.layout.yaxis.range
    assert 5 < high - low < 7


def test_what_is_not_there_is_said(poor, repeated_scan):
    for function in (plot_recurrence, plot_decodability, recurrence_figures, recurrence_frame):
        with pytest.raises(InputError, match=r"^the scan has no /recurrence group: make one with metaint\.recur\.$"):
            function(repeated_scan)
    empty = xr.DataTree.from_dict({"/recurrence": xr.Dataset(attrs={"sequences": 0})})
    with pytest.raises(InputError, match=r"^the scan's /recurrence group is empty: nothing was read yet\.$"):
        plot_recurrence(empty)
    with pytest.raises(InputError, match=r"^scans is empty: pass a scan, its /recurrence, or a dict from names to th"):
        plot_recurrence({})
    with pytest.raises(InputError, match=r"^linear-attention has no decodability; scan 10 sequences or more\.$"):
        plot_decodability(poor)
    assert np.isnan(recurrence_frame(poor)["step_size"]).all()
