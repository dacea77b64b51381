"""What the tests of exports to HeadVis share: a model's patterns, and the form of a folder."""

import json
from pathlib import Path

import torch

from tests.builders import available_kinds

LAYERS, HEADS, SEQUENCES, LENGTH = 2, 4, 24, 17
OF_SCAN = ("self_attention_score", "qk_distance", "induction_score")
NUMBER = (int, float)
KIND = "gpt2" if "gpt2" in available_kinds() else available_kinds()[0]


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
