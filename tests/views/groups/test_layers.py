"""Tables of the residual stream: the scan's own numbers, whole at 80 columns, and readable by machines."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.views.export.scan_json import scan_json
from metaint.views.groups.inner import print_inner
from metaint.views.groups.layers import layer_frame
from metaint.views.groups.residual import later_norms, print_residual
from tests.builders import available_kinds, build


@pytest.fixture(scope="module")
def both(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.ResidualProbe(), metaint.InnerProbe()])


def printed(function, scan, width):
    console = Console(width=width, file=io.StringIO())
    function(console, scan)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_and_a_wider_one_tells_more(both, width):
    for function in (print_residual, print_inner):
        text = printed(function, both, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
    assert len(printed(print_inner, both, 200).splitlines()[4]) > len(printed(print_inner, both, 60).splitlines()[4])


def test_numbers_are_the_scan_s(both):
    text = printed(print_inner, both, 200)
    for value in both["inner"]["loss"].values:
        assert f"{value:.3f}" in text
    text = printed(print_residual, both, 200)
    for value in both["residual"]["growth"].values:
        assert (f"{value:.3f}" if value < 10 else f"{value:.1f}") in text
    assert "no evidence" in text
    later, _ = later_norms(both["residual"].to_dataset())
    assert (later > 0).all()


def test_a_block_stands_in_the_row_it_starts_from(both):
    frame = layer_frame(both, "inner")
    assert frame["layer"].tolist() == [0, 1, 2]
    assert np.allclose(frame["loss"], both["inner"]["loss"])
    assert np.allclose(frame["improved"][:2], both["inner"]["improved"])
    assert np.isnan(frame["improved"][2])
    residual = layer_frame(both, "residual")
    assert np.allclose(residual["norm_mean_position_1-3"], both["residual"]["norm_mean"].sel(position="1-3"))
    assert "massive_value_rank_1" in residual


def test_json_holds_every_group(gpt2, repeated, both):
    found = json.loads(scan_json(both))
    assert {"attributes", "residual", "inner"} == set(found)
    assert found["inner"]["layers"][2]["improved"] is None
    assert found["residual"]["growth_rate"] == pytest.approx(float(both["residual"]["growth_rate"]))
    with_heads = metaint.scan(gpt2, repeated, [metaint.HeadProbe(), metaint.InnerProbe()])
    assert {"attributes", "heads", "inner"} == set(json.loads(scan_json(with_heads)))


def test_what_is_missing_is_a_dash_or_a_sentence(repeated, repeated_scan):
    kind = next((k for k in available_kinds() if k.endswith("attn-only")), available_kinds()[0])
    scan = metaint.scan(build(kind), repeated[:1], [metaint.ResidualProbe(), metaint.InnerProbe()])
    assert "–" in printed(print_residual, scan, 120)
    assert "nan" not in printed(print_inner, scan, 200)
    with pytest.raises(InputError, match=r"^the scan has no /inner group: scan with metaint\.InnerProbe\(\), or "):
        layer_frame(repeated_scan, "inner")
