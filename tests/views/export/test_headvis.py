"""HeadVis's folder: its form, metrics by Neuronpedia's definition, examples that are the model's own patterns."""

import bisect
import errno
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import ActivationError, InputError, StoreError
from metaint.tasks import repeated_tokens
from metaint.views.export.headvis import save_headvis
from metaint.views.export.headvis_examples import METRICS, sampled, sparse
from tests.builders import available_kinds, build
from tests.views.groups.test_heads import planted

LAYERS, HEADS, SEQUENCES, LENGTH = 2, 4, 24, 17
OF_SCAN = ("self_attention_score", "qk_distance", "induction_score")
NUMBER = (int, float)
KIND = "gpt2" if "gpt2" in available_kinds() else available_kinds()[0]


@pytest.fixture(scope="module")
def tokens():
    """Repeated blocks after a token that stays, with some tokens twice in a row."""
    blocks = repeated_tokens(96, 8, batch=SEQUENCES, ids=(5, 95), bos=4, seed=3)
    blocks[::3, 5] = blocks[::3, 4]
    return blocks


@pytest.fixture(scope="module")
def scan(gpt2, tokens):
    return metaint.scan(gpt2, tokens, attributes={"source": "made up"})


@pytest.fixture(scope="module")
def patterns(gpt2, tokens):
    return patterns_of(gpt2, tokens)


@pytest.fixture(scope="module")
def folder(scan, gpt2, tokens, tmp_path_factory):
    return save_headvis(scan, tmp_path_factory.mktemp("headvis") / "data", gpt2, tokens, batch_size=5)


def patterns_of(model, tokens, **options):
    """Patterns [sequence, layer, head, query, key]."""
    kept = {}
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda x, hook: kept.update({hook.name: x.detach().double()}))
        for i in range(LAYERS)
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(tokens, return_type=None, **options)
    return torch.stack([kept[f"blocks.{i}.attn.hook_pattern"] for i in range(LAYERS)], 1)


def read(path):
    """A JSON file as a browser takes it, without NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(Path(path).read_text("utf-8"), parse_constant=refuse)


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


# ---- form -------------------------------------------------------------------------------------------------------


def check_form(folder):
    """What the docstrings of HeadVis's data_pipeline.py ask for, and what its frontend reads without asking."""
    config = read(folder / "config.json")
    heads = [[i, j] for i in range(LAYERS) for j in range(HEADS)]
    assert isinstance(config["model_name"], str)
    assert config["heads"] == heads
    assert (config["n_layers"], config["n_heads"]) == (LAYERS, HEADS)
    assert all(isinstance(name, str) for name in config["metrics"])
    assert set(config["metric_descriptions"]) == set(config["metrics"])
    assert config["head_data_pattern"] == "L{layer}H{head}.json"
    assert config["has_umap"] is False
    assert config["umap_heads"] == []
    for kind in ("custom_plots", "custom_tables"):
        assert all(set(entry) == {"key", "label"} for entry in config[kind])
    rows = read(folder / "scatter_data.json")
    assert [[row["layer"], row["head"]] for row in rows] == heads
    for row in rows:  # App.svelte takes the metrics from the first row, and those alone that are numbers there
        assert set(row) == {"layer", "head", *config["metrics"]}
        assert all(isinstance(row[name], NUMBER) for name in config["metrics"])
    assert read(folder / "server_config.json") == read(folder / "attributions" / "manifest.json") == {}
    assert sorted(path.name for path in (folder / "heads").iterdir()) == sorted(f"L{i}H{j}.json" for i, j in heads)
    for i, j in heads:
        check_head(read(folder / "heads" / f"L{i}H{j}.json"), config)
    return config


def check_head(payload, config):
    keys = ["sequences", "qk_distance_histogram", "top_query_tokens", "top_key_tokens", "histogram", "statistics"]
    assert sorted(payload) == sorted(keys)
    for sequence in payload["sequences"]:
        assert isinstance(sequence["sequence_id"], int)
        assert sequence["interval"] in range(1, config["n_intervals"] + 1)
        assert all(isinstance(token, str) for token in sequence["tokens"])
        assert len(sequence["tokens"]) == sequence["seq_len"]
        assert len(sequence["attention_indices"]) == len(sequence["attention_values"])
        assert all(isinstance(place, int) for place in sequence["attention_indices"])
        assert all(isinstance(value, NUMBER) for value in sequence["attention_values"])
        assert isinstance(sequence["max_activation"], NUMBER)
    for name in ("qk_distance_histogram", "histogram"):
        if payload[name]:
            assert set(payload[name]) == {"bin_edges", "bin_values"}
            assert len(payload[name]["bin_edges"]) == len(payload[name]["bin_values"]) + 1
    for name in ("top_query_tokens", "top_key_tokens"):
        weights = [entry["weight"] for entry in payload[name]]
        assert weights == sorted(weights, reverse=True)
        assert all(set(entry) == {"token", "weight"} for entry in payload[name])


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


# ---- examples ---------------------------------------------------------------------------------------------------


def test_examples_are_the_largest_weights_of_the_model(gpt2, tokens, folder, patterns):
    for i, j in np.ndindex(LAYERS, HEADS):
        payload = read(folder / "heads" / f"L{i}H{j}.json")
        for sequence in payload["sequences"]:
            row = sequence["sequence_id"]
            pattern = patterns[row, i, j].numpy()
            assert sequence["tokens"] == [gpt2.tokenizer.decode([t]) for t in tokens[row].tolist()]
            query, key = np.divmod(sequence["attention_indices"], LENGTH)
            assert sequence["attention_indices"] == sorted(sequence["attention_indices"])
            np.testing.assert_allclose(pattern[query, key], sequence["attention_values"], atol=5.1e-5)
            for q in range(LENGTH):
                kept = key[query == q]
                assert len(kept) == min(8, (pattern[q] >= 0.005).sum())
                assert pattern[q, kept].min() >= np.delete(pattern[q], kept).max(initial=0)
            # As the frontend's findMax reads it.
            shown = [v for q, k, v in zip(query, key, sequence["attention_values"], strict=True) if q and k]
            assert sequence["max_activation"] == max(shown) == round(float(pattern[1:, 1:].max()), 4)


def test_intervals_run_from_the_smallest_to_the_largest(folder, patterns):
    largest = patterns[..., 1:, 1:].amax((-2, -1)).numpy()
    for i, j in np.ndindex(LAYERS, HEADS):
        payload = read(folder / "heads" / f"L{i}H{j}.json")
        by_interval = {n: [s for s in payload["sequences"] if s["interval"] == n] for n in range(1, 6)}
        assert [len(by_interval[n]) for n in range(1, 5)] == [3] * 4
        highest = largest[:, i, j] >= np.sort(largest[:, i, j])[19]  # 24 sequences: bounds at 5, 10, 14 and 19
        assert len(by_interval[5]) == highest.sum() >= 5
        assert by_interval[5][0]["sequence_id"] == int(largest[:, i, j].argmax())
        ends = [(min(s["max_activation"] for s in part), max(s["max_activation"] for s in part))
                for part in by_interval.values()]  # fmt: skip
        assert all(high <= low for (_, high), (low, _) in pairwise(ends))
        assert payload["histogram"]["bin_values"] == [
            int(((largest[:, i, j] * 50).astype(int).clip(max=49) == n).sum()) for n in range(50)
        ]
        assert payload["statistics"] == {
            "n_samples": len(payload["sequences"]), "mean_max_activation": round(float(largest[:, i, j].mean()), 4),
        }  # fmt: skip


def test_histogram_and_tokens_add_up_what_the_examples_show(folder):
    payload = read(folder / "heads" / "L1H2.json")
    edges, bins = payload["qk_distance_histogram"]["bin_edges"], [0.0] * 13
    queries, keys = {}, {}
    for s in payload["sequences"]:
        for place, value in zip(s["attention_indices"], s["attention_values"], strict=True):
            q, k = divmod(place, s["seq_len"])
            bins[bisect.bisect_right(edges, abs(q - k)) - 1] += value
            queries[s["tokens"][q]] = queries.get(s["tokens"][q], 0) + value
            keys[s["tokens"][k]] = keys.get(s["tokens"][k], 0) + value
    np.testing.assert_allclose(payload["qk_distance_histogram"]["bin_values"], bins, atol=1e-4)
    for name, weights in (("top_query_tokens", queries), ("top_key_tokens", keys)):
        assert len(payload[name]) == min(50, len(weights))
        for entry in payload[name]:
            assert entry["weight"] == pytest.approx(weights[entry["token"]], abs=1e-4)


def test_sampling_by_hand():
    largest = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 200))
    found = sampled(largest, [0])
    assert found == sampled(largest, [0]) != sampled(largest, [1])
    ordered = sorted(largest.tolist())
    bounds = [ordered[40 * i] for i in range(1, 5)]
    assert [interval for interval, _ in found] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 10
    assert all(interval == bisect.bisect_right(bounds, largest[row]) + 1 for interval, row in found)
    assert [row for interval, row in found if interval == 5] == np.argsort(-largest)[:10].tolist()
    assert sampled(np.array([0.5]), [0]) == [(5, 0)]
    assert len({row for _, row in found}) == len(found)


def test_sparse_keeps_eight_of_a_row_and_drops_what_is_small():
    pattern = torch.zeros(10, 10)
    pattern[9] = torch.tensor([0.3, 0.004, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.046])
    pattern[3, 1], pattern[3, 2] = 0.996, 0.004
    places, values = sparse(pattern)
    assert places == [31, 90, 92, 93, 94, 95, 96, 97, 98]
    assert values == pytest.approx([0.996, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05])


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
