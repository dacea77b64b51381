"""The inner lab: verdicts follow from planted models, and a run leaves its files."""

import io
import math

import pandas as pd
import pytest
import torch
from rich.console import Console

import metaint
from metaint.errors import StoreError
from metaint.labs import inner
from metaint.labs.inner import CONDITIONS, Estimate, judge, shuffled, study
from tests.descent import D_VOCAB, Descent
from tests.probes.test_heads import random_tokens


def verdicts_of(models, tokens):
    scans, probes = {}, {}
    for name, model in zip(CONDITIONS, models, strict=True):
        probes[name] = metaint.InnerProbe(1000)
        scans[name] = metaint.scan(model, tokens, [metaint.ResidualProbe(), probes[name]])
    return judge(scans, probes)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(D_VOCAB, (24, 20), generator=torch.Generator().manual_seed(0))


def test_planted_descent_holds_and_random_steps_do_not(tokens):
    found = verdicts_of([Descent(0.02), Descent(0.02, random=True), Descent(0.02, random=True)], tokens)
    assert found["verdict"][:4].tolist() == ["holds"] * 4
    assert found["trained"][3] == pytest.approx(1, abs=0.05)
    nothing = verdicts_of([Descent(0.02, random=True)] * 3, tokens)
    assert not nothing["verdict"][:3].str.startswith("holds").any()
    assert nothing["verdict"][4].startswith("no evidence")


def test_what_controls_do_as_well_is_said(tokens):
    found = verdicts_of([Descent(0.02), Descent(0.02), Descent(0.02, random=True)], tokens)
    assert found["verdict"][:3].tolist() == ["holds, but no more than at initialisation"] * 3


def test_estimates_are_means_over_blocks_less_the_null(tokens):
    found = verdicts_of([Descent(0.02)] * 3, tokens)
    scan = metaint.scan(Descent(0.02), tokens, [metaint.InnerProbe(1000)])["inner"]
    excess = scan["step_gradient_cosine"] - scan["step_gradient_cosine_null"]
    assert found["trained"][2] == pytest.approx(float(excess[1:].mean()))  # the first block is left out
    assert found["trained"][0] == pytest.approx(float(scan["loss_decrease"][1:].mean()))
    assert (found["trained low"][:3] <= found["trained"][:3]).all()


def test_shuffling_keeps_the_tokens_of_each_sequence_and_its_bos(tokens):
    moved = shuffled(tokens, keep_first=True)
    assert torch.equal(moved[:, 0], tokens[:, 0])
    assert torch.equal(moved.sort(-1).values, tokens.sort(-1).values)
    assert not torch.equal(moved, tokens)
    assert not torch.equal(shuffled(tokens, False)[:, 0], tokens[:, 0])


def test_one_sequence_tells_nothing_for_certain(tokens):
    found = verdicts_of([Descent(0.02)] * 3, tokens[:1])
    assert found["verdict"][0] == "undecided: one sequence tells no interval"
    assert math.isnan(found["trained low"][0])


def test_a_run_leaves_figures_verdicts_and_scans(gpt2, tmp_path):
    if not hasattr(gpt2, "original_model"):
        pytest.skip("written for bridges")
    before = {k: v.clone() for k, v in gpt2.state_dict().items() if torch.is_tensor(v)}
    console = Console(width=100, file=io.StringIO())
    found = inner.run(console, gpt2, random_tokens(gpt2, 4, 20), tmp_path / "lab", "a model", positions=8)
    text = console.file.getvalue()
    assert "Does a model look like an inner optimisation?" in text
    assert "no theorem of" in text
    written = {path.name for path in (tmp_path / "lab").iterdir()}
    scans = {"trained.zarr", "random-initialisation.zarr", "shuffled-tokens.zarr"}
    assert written == {"figures.html", "verdicts.csv"} | scans
    assert pd.read_csv(tmp_path / "lab" / "verdicts.csv")["verdict"].tolist() == found.verdicts["verdict"].tolist()
    assert metaint.load(tmp_path / "lab" / "trained.zarr").attrs["condition"] == "trained"
    assert all(torch.equal(v, before[k]) for k, v in gpt2.state_dict().items() if torch.is_tensor(v))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be made"):
        inner.run(console, gpt2, random_tokens(gpt2), tmp_path / "file", "x")


def test_an_untrained_model_is_no_inner_optimisation(gpt2):
    from metaint.models.fresh import fresh_model

    found = study(fresh_model(gpt2, seed=3), random_tokens(gpt2, 12, 40)).verdicts
    assert "holds" not in found["verdict"][:3].tolist()


def test_an_estimate_prints_its_interval():
    assert str(Estimate(1.5, 1.0, 2.0)) == "1.500\n1.000 to 2.000"
    assert str(Estimate(1.5, math.nan, math.nan)) == "1.500"
