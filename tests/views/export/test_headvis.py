"""HeadVis's folder: its form, metrics by Neuronpedia's definition, and what can't be written."""

import errno
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import ActivationError, InputError, StoreError
from metaint.views.export.headvis import save_headvis
from metaint.views.export.headvis_examples import METRICS
from tests.builders import build
from tests.views.export.headvis_files import (
    HEADS,
    KIND,
    LAYERS,
    LENGTH,
    OF_SCAN,
    SEQUENCES,
    check_form,
    patterns_of,
    read,
)
from tests.views.groups.test_heads import planted


def metrics_by_definition(patterns, sequences):
    """Each metric of one head as Neuronpedia's pipeline computes it, with a threshold of 0: `patterns` [query, key]."""
    own, before, entropy, follows, distances, squares, queries = [], [], 0.0, 0.0, 0.0, 0.0, 0
    for pattern, ids in zip(patterns, sequences, strict=True):
        n = len(ids)
        own += [pattern[q][q] for q in range(n)]
        before += [pattern[q][q - 1] for q in range(1, n)]
        for q in range(n):
            earlier = [k for k in range(q) if ids[k] == ids[q]]
            follows += sum(pattern[q][k + 1] for k in earlier)
            queries += bool(earlier)
            for k in range(q + 1):
                entropy -= pattern[q][k] * math.log(max(pattern[q][k], 1e-300))
                distances += pattern[q][k] * (q - k)
                squares += pattern[q][k] * (q - k) ** 2
    mean = distances / len(own)
    return {
        "self_attention_score": sum(own) / len(own),
        "prev_token_score": sum(before) / len(before),
        "pattern_entropy": entropy / len(own),
        "qk_distance": mean,
        "qk_distance_variance": squares / len(own) - mean**2,
        "induction_score": follows / queries,
    }


# ---- form ---------------------------------------------------------------------------------------------------------


def test_a_scan_alone_has_the_form(scan, tmp_path):
    config = check_form(save_headvis(scan, tmp_path / "data"))
    assert [name for name in config["metrics"] if name in METRICS] == list(OF_SCAN)
    assert {"previous_token", "entropy", "prefix_match"} <= set(config["metrics"])
    assert config["metric_descriptions"]["previous_token"].startswith("metaint: The token before.")
    assert read(tmp_path / "data" / "heads" / "L0H0.json")["sequences"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_with_model_and_tokens_it_has_the_form_and_every_metric(scan, folder):
    config = check_form(folder)
    assert config["metrics"][: len(METRICS)] == list(METRICS)
    assert config["dataset_name"] == "made up"
    # What Neuronpedia's loaders (load-head-metrics.py, load-head-sequences.py) ask of a run.
    run = config["pipeline_config"]
    assert (run["n_sequences"], run["seq_len"], run["dtype"]) == (SEQUENCES, LENGTH, "float32")
    assert all(run[key] for key in ("model_name", "dataset_name", "attn_implementation"))
    assert run["metaint"]["tokens_shape"] == [SEQUENCES, LENGTH]


def test_a_stored_scan_gives_the_same_files(scan, folder, gpt2, tokens, tmp_path):
    stored = metaint.load(metaint.save(scan, tmp_path / "s.zarr"))
    again = save_headvis(stored, tmp_path / "data", gpt2, tokens, batch_size=24)
    for path in folder.rglob("*.json"):
        assert read(again / path.relative_to(folder)) == read(path)


def test_what_no_token_repeats_is_left_out(gpt2, tmp_path):
    plain = torch.arange(5, 65).view(3, 20)
    config = check_form(save_headvis(metaint.scan(gpt2, plain), tmp_path / "data", gpt2, plain))
    assert not {"induction_score", "prefix_match", "duplicate_token"} & set(config["metrics"])
    assert "prev_token_score" in config["metrics"]


# ---- metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_metrics_are_those_of_the_pipeline(gpt2, tokens, tmp_path, padding):
    mask, batch = torch.ones_like(tokens), tokens[:6]
    mask = mask[:6]
    for row in range(1, 6) if padding else ():
        mask[row, slice(row) if padding == "left" else slice(LENGTH - row, LENGTH)] = 0
    found = metaint.scan(gpt2, batch, attention_mask=mask)
    patterns = patterns_of(gpt2, batch, attention_mask=mask)
    real = [row.nonzero().flatten() for row in mask]
    alone = read(save_headvis(found, tmp_path / "a") / "scatter_data.json")
    rows = read(save_headvis(found, tmp_path / "b", gpt2, batch, attention_mask=mask) / "scatter_data.json")
    for row, short in zip(rows, alone, strict=True):
        cut = [patterns[s, row["layer"], row["head"]][kept][:, kept].tolist() for s, kept in enumerate(real)]
        wanted = metrics_by_definition(cut, [batch[s, kept].tolist() for s, kept in enumerate(real)])
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=1e-4), name
        assert {name: short.get(name) for name in METRICS} == {
            name: row[name] if name in OF_SCAN else None for name in METRICS
        }


def test_scores_of_the_scan_keep_their_names(scan, folder):
    rows = read(folder / "scatter_data.json")
    for name in ("previous_token", "first_token", "max_weight"):
        found = [[row[name] for row in rows[i * HEADS : (i + 1) * HEADS]] for i in range(LAYERS)]
        np.testing.assert_allclose(found, scan["heads"][name], atol=5.1e-5)


# ---- what can't be written --------------------------------------------------------------------------------------


def test_the_model_is_as_it_was(scan, tokens, tmp_path):
    model = build(KIND)
    before = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    wanted = patterns_of(model.eval(), tokens)
    model.train()
    save_headvis(metaint.scan(model, tokens), tmp_path / "data", model, tokens)
    assert model.training
    assert {name: len(point._forward_hooks) for name, point in model.hook_dict.items()} == before
    torch.testing.assert_close(patterns_of(model.eval(), tokens), wanted)


def test_only_an_export_is_replaced(scan, tmp_path):
    save_headvis(scan, tmp_path / "data")
    (tmp_path / "data" / "heads" / "L9H9.json").write_text("{}")  # of a larger model
    check_form(save_headvis(scan, tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    check_form(save_headvis(scan, tmp_path / "empty"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_name": "gpt2", "pipeline_config": {"n_sequences": 16384}}')
    (tmp_path / "file").write_text("years of work")
    for name in ("theirs", "file"):
        with pytest.raises(StoreError, match=f"{name} exists and is no export to HeadVis of metaint's: choose another"):
            save_headvis(scan, tmp_path / name)
    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty", "file", "theirs"]


def test_a_full_disk_leaves_the_earlier_export(scan, tmp_path, monkeypatch):
    save_headvis(scan, tmp_path / "data")
    whole = Path.write_text

    def full(self, text, **options):
        if self.name == "L1H1.json":
            whole(self, text[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match=r"the export could not be written to .*data \(No space left on device\)"):
        save_headvis(scan, tmp_path / "data")
    monkeypatch.undo()
    check_form(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_export_that_can_not_be_put_in_place_leaves_the_earlier_one(scan, tmp_path, monkeypatch):
    save_headvis(scan, tmp_path / "data")
    moved = Path.rename

    def refuse(self, target):
        if self.suffix == ".new":
            raise OSError(errno.EIO, "Input/output error")
        return moved(self, target)

    monkeypatch.setattr("metaint.scans.whole._exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match=r"the export could not be written to .*data \(Input/output error\)"):
        save_headvis(scan, tmp_path / "data")
    check_form(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def bidirectional():
    scan = planted()
    scan.attrs["attention"] = "bidirectional"
    return scan


def uncounted():
    scan = planted()
    del scan["heads"].attrs["sequences"]
    return scan


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (xr.DataTree, "scan has no /heads group: scan with a HeadProbe."),
        (lambda: xr.DataTree.from_dict({"/heads": planted()["heads"].to_dataset().expand_dims(step=[1, 2])}),
         r"scan is a recording over training, and HeadVis shows one step: choose it, as in scan\.isel\(step=-1\)\."),
        (bidirectional, "scan is of a bidirectional model: HeadVis shows causal ones."),
        (uncounted, "scan doesn't tell how many sequences its /heads was read from: scan again."),
    ],
)  # fmt: skip
def test_scans_that_headvis_can_not_show(made, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        save_headvis(made(), tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_step_of_a_recording_can_be_shown(tmp_path):
    recording = xr.DataTree.from_dict({"/heads": planted(LAYERS, HEADS)["heads"].to_dataset().expand_dims(step=[1, 2])})
    check_form(save_headvis(recording.isel(step=-1), tmp_path / "data"))


def test_other_models_and_tokens_are_told_apart(scan, gpt2, tokens, tmp_path):
    cases = [
        ((gpt2, None), {}, "model was given without tokens: examples need both."),
        ((None, tokens), {}, "tokens was given without model: examples need both."),
        ((gpt2, tokens[:3]), {}, r"tokens has shape \(3, 17\), and the scan read \(24, 17\): give the same tokens."),
        ((gpt2, tokens.flip(-1)), {}, "model and tokens have another self_attention_score than the scan"),
        ((build(KIND, seed=5), tokens), {}, "model and tokens have another self_attention_score than the scan"),
        ((gpt2, tokens), {"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        ((gpt2, tokens + 90), {}, "the model's vocabulary is"),
    ]  # fmt: skip
    for given, options, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            save_headvis(scan, tmp_path / "data", *given, **options)
    assert not list(tmp_path.iterdir())


def test_nan_is_named(scan, gpt2, tokens, tmp_path):
    def spoil(pattern, hook):
        return pattern * math.nan

    spoilt = gpt2.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", spoil)])
    with spoilt, pytest.raises(ActivationError, match=r"blocks\.1\.attn\.hook_pattern holds NaN or infinity"):
        save_headvis(scan, tmp_path / "data", gpt2, tokens)
    assert not list(tmp_path.iterdir())
