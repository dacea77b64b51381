"""Scans made under hooks of the model's owner say so, and those of metaint's own probes are nobody else's."""

import pickle

import numpy as np
import pytest
import torch

import metaint
from metaint.models.owner_hooks import as_attribute
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build

TOKENS = repeated_tokens(96, 8, batch=2, ids=(5, 95))
Z, RESIDUAL = "blocks.1.attn.hook_z", "blocks.0.hook_resid_pre"
KINDS = [kind for kind in ("native-mlp-ln", "gpt2", "llama", "hooked") if kind in available_kinds()]


def model_of(kind):
    if kind == "toy":
        return small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=96, n_ctx=32)
    return build(kind)


@pytest.fixture(params=[*KINDS, "toy"])
def model(request):
    return model_of(request.param)


def twice(activation, hook):
    return 2 * activation


def test_a_scan_names_the_hook_points_of_the_owner(model):
    probes = [metaint.HeadProbe(), metaint.WeightProbe()]
    assert "owner_hooks" not in metaint.scan(model, TOKENS, probes).attrs
    with model.hooks(fwd_hooks=[(Z, twice), (Z, twice), (RESIDUAL, twice)]):
        under = metaint.scan(model, TOKENS)
        assert under.attrs["owner_hooks"] == f"{RESIDUAL}, {Z}"
        assert metaint.ablate(model, TOKENS, ["0.1"]).attrs["owner_hooks"] == f"{RESIDUAL}, {Z}"
    after = metaint.scan(model, TOKENS)
    assert "owner_hooks" not in after.attrs
    assert not under["heads"].equals(after["heads"])


def test_attach_names_hooks_of_any_pass_it_read(model):
    """On the model before, inside the block, and for one pass alone; a pass without hooks does not clear the note."""
    with model.hooks(fwd_hooks=[(RESIDUAL, twice)]), metaint.attach(model, metaint.HeadProbe()) as probe:
        model(TOKENS)
    assert probe.to_scan().attrs["owner_hooks"] == RESIDUAL
    with metaint.attach(model, probe):
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z, twice)])
        model(TOKENS)
    assert probe.to_scan().attrs["owner_hooks"] == f"{RESIDUAL}, {Z}"
    probe.reset()
    with metaint.attach(model, probe):
        model(TOKENS)
    assert "owner_hooks" not in probe.to_scan().attrs


def test_probes_are_no_owners(model):
    """Several at once, one attached inside another, a scan inside that, and hooks handed to run_with_hooks."""
    probes = [metaint.HeadProbe(), metaint.ResidualProbe()]
    with metaint.attach(model, *probes), metaint.attach(model, metaint.HeadProbe()) as inner:
        model(TOKENS)
        inside = metaint.scan(model, TOKENS)
    alone = metaint.HeadProbe()
    model.run_with_hooks(TOKENS, fwd_hooks=alone.fwd_hooks(model, TOKENS))
    assert inside["heads"].equals(alone.to_scan()["heads"])
    for scan in (inside, *(probe.to_scan() for probe in (*probes, inner, alone))):
        assert "owner_hooks" not in scan.attrs
    model.run_with_hooks(TOKENS, fwd_hooks=[(Z, twice), *alone.fwd_hooks(model, TOKENS)])
    assert alone.to_scan().attrs["owner_hooks"] == Z


def test_merged_and_pickled_probes_keep_the_note(gpt2):
    with gpt2.hooks(fwd_hooks=[(Z, twice)]), metaint.attach(gpt2, metaint.HeadProbe()) as hooked:
        gpt2(TOKENS)
    with metaint.attach(gpt2, metaint.HeadProbe()) as plain:
        gpt2(TOKENS)
    plain.merge_state(pickle.loads(pickle.dumps(hooked)))
    assert plain.to_scan().attrs["owner_hooks"] == hooked.to_scan().attrs["owner_hooks"] == Z


def test_a_recording_says_which_records_were_made_under_hooks(gpt2, tmp_path):
    recorder = metaint.Recorder(gpt2, [metaint.HeadProbe()], every=1, path=tmp_path / "run.zarr", tokens=TOKENS)
    recorder(1)
    with gpt2.hooks(fwd_hooks=[(Z, twice), (RESIDUAL, twice)]):
        assert recorder(2).attrs["owner_hooks"] == f"{RESIDUAL}, {Z}"
    recorder(3)
    assert "owner_hooks" not in recorder.last.attrs
    recording = metaint.read_recording(tmp_path / "run.zarr")
    np.testing.assert_array_equal(recording["training"]["owner_hooks"], [np.nan, 2, np.nan])
    assert "owner_hooks" not in recording.attrs
    with gpt2.hooks(fwd_hooks=[(Z, twice)]):
        metaint.Recorder(gpt2, [metaint.HeadProbe()], every=1, path=tmp_path / "other.zarr", tokens=TOKENS)(1)
    assert metaint.read_recording(tmp_path / "other.zarr").attrs["owner_hooks"] == Z


def test_many_are_counted(gpt2):
    assert as_attribute(f"h{i}" for i in range(12)) == "h0, h1, h2, h3, h4, h5, h6, h7, h8, h9 and 2 more"
    with metaint.attach(gpt2, metaint.HeadProbe()) as probe, torch.no_grad():
        gpt2.run_with_cache(TOKENS)
    assert probe.to_scan().attrs["owner_hooks"].endswith(" more")
