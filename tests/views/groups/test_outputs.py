"""The figure, table and frame of /outputs: every map that was measured, and nothing in place of the rest."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

import metaint
from metaint.errors import InputError
from metaint.views.groups.outputs import outputs_frame, plot_outputs, print_outputs


@pytest.fixture(scope="module")
def scan(gpt2, repeated):
    return metaint.scan(gpt2, repeated, [metaint.OutputProbe(positions=8)])


def printed(scan):
    console = Console(width=160, file=io.StringIO())
    print_outputs(console, scan)
    return console.file.getvalue()


def test_each_map_holds_its_variable_and_says_copy_above_the_null(scan):
    data, maps = scan["outputs"], {trace.name: trace for trace in plot_outputs(scan).data}
    assert list(maps) == [
        "output_share", "first_token_output", "sink_drain", "induction_written", "copying_deviations",
        "following_deviations",
    ]  # fmt: skip
    assert np.allclose(maps["output_share"].z, data["output_share"])
    assert np.allclose(maps["copying_deviations"].z, data["copying_deviations"] - data["copying_deviations_null"])
    assert "head 1.2" in maps["sink_drain"].customdata[1][2]


def test_text_is_drawn_by_prefix_match_and_what_is_unknown_is_left_out(gpt2):
    tokens = torch.randint(5, 95, (3, 24), generator=torch.Generator().manual_seed(0))
    scan = metaint.scan(gpt2, tokens, [metaint.OutputProbe(positions=0)])
    assert [trace.name for trace in plot_outputs(scan).data] == [
        "output_share", "first_token_output", "sink_drain", "prefix_match_written",
    ]  # fmt: skip
    assert "What heads say is not known" in printed(scan)


def first_heads(text):
    """The head in the first row of each table."""
    lines = text.splitlines()
    return [lines[i + 1].split()[0] for i, line in enumerate(lines) if "───" in line]


def test_the_table_names_those_that_write_least_and_say_most(scan):
    frame = outputs_frame(scan)
    above = frame["copying_deviations"] - frame["copying_deviations_null"]
    ends = [frame["z_share"].argmin(), above.argmax(), above.argmin()]
    assert first_heads(printed(scan)) == [frame["head"][i] for i in ends]


def test_a_scan_without_outputs_says_what_makes_them(repeated_scan):
    with pytest.raises(
        InputError, match=r"has no /outputs group: scan with metaint.OutputProbe\(\), or --probes outputs"
    ):
        plot_outputs(repeated_scan)
