"""`by_lag` and `by_match_lag` of `/heads` as a figure: how far from a query, or from a match, chosen heads look.

In: a scan made with `HeadProbe(by_lag=True)`. Out: a plotly figure with a caption.
"""

from collections.abc import Sequence

import xarray as xr
from plotly import graph_objects as go

from metaint.errors import InputError, door
from metaint.models.heads import head_among
from metaint.scans.finding import Scan, one_group
from metaint.scans.labels import telling_heads
from metaint.views.drawing.panels import COLOURS, GREY, finish, legend_of, panels, there

_PANELS = {
    "by_lag": "weight, by distance<br>from the query",
    "by_match_lag": "weight, by distance from<br>its token's last occurrence",
}
# Lags shown at first; the rest is a zoom away.
_SHOWN = 16


@door
def plot_lags(scan: Scan, heads: Sequence[str] | None = None) -> go.Figure:
    """Weight by lag of up to seven heads: from the query, and from where its token stood last.

    - `scan`: a scan, or its `/heads`, read with `HeadProbe(by_lag=True)`.
    - `heads`: names such as "5.1"; by default the most telling ones.

    Raises InputError for a scan without curves, more than seven heads, and one that the model does not have.

    >>> import metaint, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2), [metaint.HeadProbe(by_lag=True)])
    >>> metaint.plot_lags(scan, ["0.1"]).layout.title.text
    'Weight by lag'
    """
    model, data = one_group(scan, "heads")
    if not there(data, "by_lag"):
        raise InputError("scan has no by_lag in /heads: scan with metaint.HeadProbe(by_lag=True).")
    names = list(heads) if heads is not None else _telling(data)
    if isinstance(heads, str) or not 1 <= len(names) <= len(COLOURS):
        raise InputError(f"heads is {heads!r}: give the names of one to {len(COLOURS)} heads, such as ['5.1'].")
    figure = panels(list(_PANELS.values()), [1, 1])
    for row, variable in enumerate(_PANELS, 1):
        for name, colour in zip(names, COLOURS, strict=False):
            layer, head = head_among(data.sizes["layer"], data.sizes["head"], name)
            curve = data[variable].isel(layer=layer, head=head)
            legend = {"legend": legend_of(row), "showlegend": row == 1, "legendgroup": name}
            figure.add_trace(_line(curve, name, colour, "solid").update(legend), row=row, col=1)
        even = data[f"{variable}_uniform"].mean(("layer", "head"))
        grey = _line(even, "uniform attention", GREY, "dot").update(legend="legend", showlegend=row == 1)
        figure.add_trace(grey, row=row, col=1)
    figure.update_xaxes(range=[-_SHOWN - 0.5, _SHOWN + 0.5])
    finish(figure, "Weight by lag", {model: data}, _CAPTION, "lag in tokens: keys before the origin are negative")
    return figure


def _telling(data: xr.Dataset) -> list[str]:
    """The most telling heads; the first ones where none has a label."""
    names = list(telling_heads(data, len(COLOURS))["head"])
    return names or [f"0.{head}" for head in range(min(len(COLOURS), data.sizes["head"]))]


def _line(curve: xr.DataArray, name: str, colour: str, dash: str) -> go.Scatter:
    return go.Scatter(
        x=curve["lag"].values, y=curve.values, name=name, mode="lines", line={"color": colour, "dash": dash},
        hovertemplate="lag %{x}: %{y:.3f}<extra>" + name + "</extra>",
    )  # fmt: skip


_CAPTION = (
    "How to read: each curve is the mean weight of one head on the key that stands so many tokens after the query "
    "(first panel) or after the last earlier occurrence of the query's token (second). A previous-token head peaks at "
    "-1 of the first, an induction head at 1 of the second, a duplicate-token head at 0 there; position 0, the sink, "
    "counts as no key. It misleads where a text repeats itself at a fixed distance, which makes a peak in the first "
    "panel of a head that only matches, and where tokens are few: a lag is read on the queries that have a key there."
)
