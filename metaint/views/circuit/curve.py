"""`plot_ablation_curve`: what becomes of a metric as the heads of a score are ablated, beside random heads.

In: what `metaint.ablation_curve` gives. Out: a plotly figure with a caption.
"""

from html import escape
from typing import Any

import numpy as np
import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError
from metaint.views.circuit.words import figure as digits, unit_of
from metaint.views.drawing.panels import BLUE, GREY, VERMILION, Line, draw, finish, panels, rule, short_name, wrapped

# Height of the panel, 1 being 270 pixels.
_HEIGHT = 1.25
# Room left and right of the curve, in powers of ten of the share, and at a single share.
_BESIDE = 0.06
_ALONE = 0.5
# Pixels of the ticks' second line.
_SECOND_LINE = 16
# Shares closer than this, in the same, are labelled once.
_NEAR = 0.12


def plot_ablation_curve(curve: xr.Dataset) -> go.Figure:
    """The metric as the heads that score highest are ablated together, beside random heads and those that write most.

    - `curve`: what `metaint.ablation_curve` gives. Bands are 95 % bootstrap intervals over sequences; a thin grey line
      is a random draw.

    Raises InputError where it is anything else.

    >>> import metaint
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=4, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> tokens = metaint.tasks.repeated_tokens(50, 8, batch=4)
    >>> curve = metaint.ablation_curve(model, metaint.scan(model, tokens), shares=[0.1, 0.3], tokens=tokens, random=5)
    >>> metaint.plot_ablation_curve(curve).layout.title.text
    'induction is not load-bearing here'
    """
    if not isinstance(curve, xr.Dataset) or not {"effect", "norm_effect", "random_effect"} <= set(curve.data_vars):
        what = "a dataset without curves" if isinstance(curve, xr.Dataset) else f"a {type(curve).__name__}"
        raise InputError(f"curve is {what}: pass what metaint.ablation_curve gives.")
    data = curve.assign_coords(share=np.log10(curve["share"].values))
    figure = panels([_axis_title(curve)], [_HEIGHT])
    rule(figure, 1, 0.0)
    _draw_draws(figure, data)
    draw(figure, 1, {"": data}, _lines(curve))
    finish(figure, _title(curve), {"": curve}, _caption(curve), "share of all heads that are ablated")
    figure.update_layout(title_subtitle_text=_facts(curve), hovermode="closest")
    _ticks(figure, curve)
    _make_room(figure)
    return figure


def _lines(curve: xr.Dataset) -> list[Line]:
    score = str(curve.attrs.get("score", "the score")).replace("_", " ")
    return [
        Line("random_mean", f"{_others(curve)}, mean", GREY),
        Line("norm_effect", "heads that write most", BLUE, "dash"),
        Line("effect", f"heads with the highest {score}", VERMILION),
    ]


def _draw_draws(figure: go.Figure, data: xr.Dataset) -> None:
    """A thin line for each random draw, all in one trace, with gaps between them."""
    values = data["random_effect"].transpose("draw", "share").values
    if np.isnan(values).all():
        return
    gap = np.full((len(values), 1), np.nan)
    x = np.broadcast_to(data["share"].values, values.shape)
    lines = go.Scatter(
        x=np.hstack([x, gap]).ravel(), y=np.hstack([values, gap]).ravel(), mode="lines+markers", showlegend=True,
        line={"color": GREY, "width": 0.8}, marker={"color": GREY, "size": 3}, opacity=0.4, hoverinfo="skip",
        name=wrapped(f"{len(values)} random draws"), legend="legend",
    )  # fmt: skip
    figure.add_trace(lines, row=1, col=1)


def _ticks(figure: go.Figure, curve: xr.Dataset) -> None:
    """A label for each share, with how many heads it is; and the share before what the pointer tells."""
    places, texts, said = [], [], []
    for share, count in zip(curve["share"].values, curve["count"].values, strict=True):
        heads = f"{count} head{'s' * int(count != 1)}"
        said.append(f"{100 * share:.3g} %, {heads}")
        place = float(np.log10(share))
        if not places or place - places[-1] >= _NEAR:
            places.append(place)
            texts.append(f"{100 * share:.3g} %<br>{heads}")
    ends, beside = np.log10(curve["share"].values[[0, -1]]), _BESIDE if len(said) > 1 else _ALONE
    figure.update_xaxes(tickvals=places, ticktext=texts, range=[ends[0] - beside, ends[1] + beside])
    traces: Any = figure.data
    for trace in traces:
        if trace.hovertemplate:
            trace.update(text=said, hovertemplate=f"%{{text}}<br>{trace.hovertemplate}")


def _make_room(figure: go.Figure) -> None:
    """The caption a line lower, since ticks take two."""
    layout: Any = figure.layout
    caption = next(note for note in layout.annotations if note.name == "caption")
    caption.yshift -= _SECOND_LINE
    figure.update_layout(height=layout.height + _SECOND_LINE, margin_b=layout.margin.b + _SECOND_LINE)


def _axis_title(curve: xr.Dataset) -> str:
    metric = escape(str(curve.attrs.get("metric", "metric")).replace("_", " "), quote=False)
    unit = " (nats)" if unit_of(curve.attrs) == " nats" else ""
    return f"{metric}{unit}:<br>ablated minus whole"


def _others(curve: xr.Dataset) -> str:
    return f"random heads{' of the same layers' * (curve.attrs.get('against') == 'random-same-layers')}"


def _title(curve: xr.Dataset) -> str:
    score = escape(str(curve.attrs.get("score", "the score")), quote=False)
    answers = {"yes": f"{score} is load-bearing here", "no": f"{score} is not load-bearing here"}
    return answers.get(curve.attrs.get("load_bearing", ""), f"Whether {score} is load-bearing cannot be told")


def _facts(curve: xr.Dataset) -> str:
    """What was ablated, how, and what all heads bring."""
    attrs = curve.attrs
    model, metric = (escape(short_name(str(attrs.get(key, key))), quote=False) for key in ("model", "metric"))
    clean, every = digits(float(curve["clean"])), digits(float(curve["all_heads"]), True)
    facts = f"{model}: {attrs.get('how', '')} ablation, {attrs.get('sequences', 0)} sequences, "
    return f"{facts}{metric.replace('_', ' ')} {clean}, with all heads ablated {every}"


def _caption(curve: xr.Dataset) -> str:
    verdict = str(curve.attrs.get("verdict", ""))
    return (
        f"Verdict: {escape(verdict, quote=False)} How to read: a score is load-bearing where its "
        "curve leaves the grey ones: further right more heads are ablated together, those with the highest score "
        "first; bands are 95 % bootstrap intervals over sequences, a thin grey line is one random draw. It misleads "
        "where read as what the heads do: what is lost may pass through them for another reason than the score; where "
        "the metric is already as bad as it gets, curves meet; and it speaks of these tokens alone."
    )
