from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from metaint.errors import InputError
from metaint.labs.autoregression import comparison_figures as compared, figures as views
from metaint.views.drawing.page import write_page

STEPS, POSITIONS, REFERENCES = [0, 4, 16], [1, 2, 3, 4], ["truth", "gradient_step", "least_squares"]


def recording(scale: float = 1.0) -> xr.DataTree:
    """What the lab records, with numbers that tell where they come from."""
    loss = scale * np.array([1.0, 0.6, 0.4])
    table = loss[:, None] / np.array(POSITIONS)
    names = ["zero", "persistence", "gradient_step", *(f"gradient_steps_{k}" for k in (1, 2, 3, 5))]
    read: dict[str, Any] = {"loss": (("step", "position"), table)}
    read |= {f"loss_{name}": (("step", "position"), 0 * table + 0.1 * i) for i, name in enumerate(names, 1)}
    read["loss_least_squares"] = (("step", "position"), np.where(np.array(POSITIONS) > 2, 1e-12, table))
    cosine = np.full((3, 3, 4), np.nan)
    cosine[:, :, 1], cosine[:, :, 3] = 0.1, np.array([[0, 0.2, 0.3], [0, 0.4, 0.5], [0, 0.6, 0.7]])
    for end in ("", "_low", "_high"):
        read[f"effective_matrix_cosine{end}"] = (("step", "reference", "position"), cosine)
    coords: Any = {"step": STEPS, "position": POSITIONS, "reference": REFERENCES}
    groups = {
        "/recurrence": xr.Dataset(read, coords, {"sequences": 7}),
        "/training": xr.Dataset({"held_out_loss": ("step", loss)}, {"step": STEPS}),
    }
    return xr.DataTree.from_dict(groups)


def regression() -> xr.DataTree:
    data = {
        name: ("step", [0.1, 0.5, 0.9]) for name in ("sensitivity_cosine", "prediction_difference", "model_difference")
    }
    training = xr.Dataset({"held_out_loss": ("step", [0.4, 0.3, 0.2])}, {"step": STEPS})
    return xr.DataTree.from_dict({"/recurrence": xr.Dataset(data, {"step": STEPS}), "/training": training})


def details(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"setting": "unitary", "d": 4, "model": "heads", **columns})


def named(figure: Any, name: str) -> Any:
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def caption(figure: Any) -> str:
    (found,) = [note.text for note in figure.layout.annotations if note.name == "caption"]
    return found


def test_losses_run_over_the_root_of_the_step_to_what_is_predicted() -> None:
    figure: Any = views.plot_losses({"one": recording(), "two": recording(2)}, {"two": 0.7})
    assert named(figure, "one").x.tolist() == [0, 2, 4]
    assert named(figure, "two").y.tolist() == [2, 1.2, 0.8]
    dotted = [trace for trace in figure.data if trace.line.dash == "dot"]
    assert [list(trace.y) for trace in dotted] == [[0.7, 0.7]]
    assert dotted[0].line.color == named(figure, "two").line.color
    assert figure.layout.yaxis.type is None
    assert list(figure.layout.xaxis.ticktext)[-1] == "16"


def test_losses_of_several_sizes_have_a_log_axis_that_a_wild_start_may_leave() -> None:
    figure: Any = views.plot_losses({"one": recording(), "wild": recording(1e6), "low": recording(0.01)}, {})
    low, top = figure.layout.yaxis.range
    assert figure.layout.yaxis.type == "log"
    assert low == pytest.approx(np.log10(0.004 / 1.25))
    assert top < np.log10(1e6)


def test_positions_leave_out_what_is_no_loss() -> None:
    figure: Any = views.plot_positions({"one": recording()})
    assert named(figure, "one").y.tolist() == pytest.approx([0.4, 0.2, 0.4 / 3, 0.1])
    exact = named(figure, "least squares").y
    assert np.isnan(exact).tolist() == [False, False, True, True]
    assert named(figure, "2 steps").y.tolist() == pytest.approx([0.5] * 4)
    assert figure.layout.title.subtitle.text == "7 fresh sequences"


def test_agreement_is_of_the_longest_context_that_was_read() -> None:
    figure: Any = views.plot_agreement({"one": recording(), "two": recording()})
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.y.tolist() for trace in curves[::2]] == [[0.2, 0.4, 0.6], [0.3, 0.5, 0.7]]
    one: Any = views.plot_agreement({"one": regression()})
    assert [axis.title.text for axis in (one.layout.yaxis, one.layout.yaxis2, one.layout.yaxis3)] == [
        "cosine of sensitivities", "difference of predictions", "difference of sensitivities",
    ]  # fmt: skip


def test_depth_stands_beside_gradient_descent() -> None:
    table = details(model=["linear", "linear", "released"], heads=1, layers=[1, 2, 1], same_loss=[0.3, 0.2, 0.1])
    figure: Any = compared.plot_depth(table, {1: 0.25, 2: 0.15})
    assert list(named(figure, "gradient descent").y) == [0.25, 0.15]
    assert list(named(figure, "linear").y) == [0.3, 0.2]
    assert list(named(figure, "released").x) == [1]


def test_steps_stand_beside_the_optimum() -> None:
    table = details(
        model=["diagonal", "diagonal", "free"], length=[3, 6, 6], step=[0.2, 0.1, 0.3], loss=[0.5, 0.4, 0.3]
    )
    figure: Any = compared.plot_steps(table)
    eta, loss = named(figure, "predicted, 1 / (T + 2)"), named(figure, "predicted, 3 / (T + 2)")
    assert list(eta.x) == [2, 3, 4, 5, 6]
    assert eta.y.tolist() == pytest.approx([1 / (T + 2) for T in range(2, 7)])
    assert loss.y.tolist() == pytest.approx([3 / (T + 2) for T in range(2, 7)])
    marks = [trace for trace in figure.data if trace.name == "diagonal"]
    assert [list(trace.y) for trace in marks] == [[0.2, 0.1], [0.5, 0.4]]


@pytest.mark.parametrize(("setting", "minima"), [("unitary", [3, 2, 1, 0, 0]), ("orthogonal", [2, 0, 0, 0, 0])])
def test_the_staircase(setting: str, minima: list[float]) -> None:
    few = setting == "orthogonal"
    table = details(setting=setting, heads=[1, 5], loss=[3.01, 0.02], reached=[1.0, 0.25 if few else 0.75])
    figure: Any = compared.plot_staircase(table)
    assert list(figure.data[0].y) == minima
    assert list(named(figure, "trained").y) == [3.01, 0.02]
    assert list(named(figure, "reached").y) == [1.0, 0.25 if few else 0.75]
    assert ("Where few get there" in caption(figure)) == few


def test_maps_share_their_colours() -> None:
    figure: Any = compared.plot_maps({"a": np.eye(2), "b": np.ones((3, 2))}, "Two", "How to read: it.", "told", limit=2)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-2, 2)
    assert [trace.z.shape for trace in figure.data] == [(2, 2), (3, 2)]
    titles = {note.text for note in figure.layout.annotations} - {caption(figure)}
    assert titles == {"a", "b"}


def test_rows_are_drawn_with_what_is_predicted() -> None:
    figure: Any = compared.plot_rows({"mu = 5": (np.array([0.1, 0.2]), np.array([0.15, 0.25]))})
    measured, predicted = figure.data
    assert (list(measured.x), list(measured.y), list(predicted.y)) == ([1, 2], [0.1, 0.2], [0.15, 0.25])


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: views.plot_losses({}, {}), "recordings is empty: give at least one."),
        (lambda: compared.plot_maps({}, "", ""), "maps is empty: give at least one matrix."),
        (
            lambda: views.plot_positions({"a": xr.DataTree()}),
            "the recording a has no /training and /recurrence: give those of the lab.",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        draw()
    assert str(caught.value) == sentence


def test_every_caption_says_how_to_read_and_names_are_no_html(tmp_path: Any) -> None:
    evil = {"<b>one</b>": recording()}
    figures = {
        "losses": views.plot_losses(evil, {"<b>one</b>": 0.5}),
        "positions": views.plot_positions(evil),
        "agreement": views.plot_agreement(evil),
        "rows": compared.plot_rows({"<b>": (np.ones(2), np.ones(2))}),
    }
    for figure in figures.values():
        assert caption(figure).startswith("How to read: ")
        shown = [getattr(trace, key) or "" for trace in figure.data for key in ("name", "hovertemplate")]
        assert not any("<b>" in text for text in shown)
    assert write_page(figures, tmp_path / "page.html", "Figures").stat().st_size > 1e5
