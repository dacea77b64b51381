"""A scan as the folder that HeadVis's frontend reads: its scatter plot of heads, and examples of what they attend to.

In: a scan with `/heads`; its model and tokens too, for what a scan doesn't keep. Out: a folder of JSON files, `data/`
to the frontend. The form is HeadVis's (Luger, Kamath et al. 2026, transformer-circuits.pub/2026/headvis;
github.com/anthropics/headvis, its only commit, of 2026-05-04): the docstrings of `data_pipeline.py`, and what
`App.svelte`, `data.js`, `sparse.js`, `MetricsTab.svelte` and `SequencesTab.svelte` read. Names of metrics are those of
Neuronpedia's pipeline (see `headvis_examples.py`), whose loaders read these files too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from metaint.errors import InputError, StoreError, door
from metaint.models.protocol import Model
from metaint.models.tokens import check_tokens, encoded
from metaint.probes.heads import HeadProbe
from metaint.scans.labels import heads_of
from metaint.scans.whole import whole_folder
from metaint.views.export.headvis_examples import (
    EXAMPLES,
    INTERVALS,
    LEAST_WEIGHT,
    METRICS,
    MOST_KEYS,
    TOP_EXAMPLES,
    Examples,
    Numbers,
    measured,
)

_SHOWN: dict[str, Any] = {
    "head_data_pattern": "L{layer}H{head}.json",
    "has_umap": False,
    "umap_heads": [],
    "custom_plots": [
        {"key": "qk_distance_histogram", "label": "Q-K distance"},
        {"key": "histogram", "label": "Activation distribution"},
    ],
    "custom_tables": [
        {"key": "top_query_tokens", "label": "Top query tokens"},
        {"key": "top_key_tokens", "label": "Top key tokens"},
    ],
    "statistics_display": {
        "n_samples": {"label": "Samples kept", "format": "default"},
        "mean_max_activation": {"label": "Mean max activation", "format": "default"},
    },
}


@door
def save_headvis(
    scan: xr.DataTree,
    folder: str | Path,
    model: Any = None,
    tokens: Int[Tensor, "batch position"] | str | None = None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
) -> Path:
    """Write a scan of a causal model to the folder that HeadVis's frontend reads as `data/`, and return its path.

    Of HeadVis's metrics a scan knows three by the same definition: `self_attention_score`, `qk_distance` and
    `induction_score`, here without the threshold of 0.01 below which a weight doesn't count for Neuronpedia. Scores of
    the scan with one number a head stand beside them, under their own names.

    `prev_token_score` (a scan leaves out the query whose previous token is position 0), `pattern_entropy` (a scan
    normalises it) and `qk_distance_variance` (a scan's deviation is within rows) need `model` and the `tokens` that
    were scanned, which are read twice more, and so do examples: for each head up to 3 sequences from each of 5
    intervals of the largest weight, 10 from the highest, with the 8 largest weights of each query. Position 0 doesn't
    count for the largest weight. Unlike in Neuronpedia's pipeline all sequences, and not the first ones alone, tell
    where the intervals lie, and all can be examples.

    Left out: HeadVis's three metrics of scores before the softmax, which a scan doesn't read; its entropies of tokens
    at high attention, since it doesn't say what is high; projections and attributions.

    A folder that this function wrote before is replaced once the new one is whole. Raises InputError for a scan
    without `/heads`, a recording over training, a bidirectional model, or a model or tokens that aren't the scan's;
    HookAuditError and ActivationError as `metaint.scan` does; StoreError if something else is in the way, or the
    folder can't be written.

    >>> import metaint, tempfile, torch
    >>> from metaint.toys.small import small_transformer
    >>> model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=32)
    >>> scan = metaint.scan(model, torch.arange(10).repeat(2, 2))
    >>> folder = metaint.save_headvis(scan, tempfile.mkdtemp() + "/data")
    >>> (folder / "config.json").is_file()
    True
    """
    folder = Path(folder).resolve()
    heads = _checked(scan, model, tokens)
    if folder.exists() and not _ours(folder):
        raise StoreError(f"{folder} exists and is no export to HeadVis of metaint's: choose another name.")
    known, examples = metrics_of(heads), None
    if model is not None:
        known, examples = _read(scan, model, tokens, attention_mask, batch_size, known)
    scores = {name: (known[name], about) for name, about in METRICS.items() if name in known} | _own_scores(heads)
    scores = {name: score for name, score in scores.items() if np.isfinite(score[0]).any()}
    with whole_folder(folder, "the export") as aside:
        for path, content in _files(scan, heads, scores, examples):
            (aside / path).parent.mkdir(exist_ok=True)
            (aside / path).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return folder


def metrics_of(heads: xr.Dataset) -> Numbers:
    """HeadVis's metrics that the `/heads` of a causal model know; those of measures that weren't read are left out.

    A scan leaves out position 0 as a query, which attends to itself alone: weight 1, distance 0.
    """
    metrics, sequences = Numbers(), heads.attrs["sequences"]
    for name, ours, at_first in (("self_attention_score", "current_token", 1), ("qk_distance", "distance_mean", 0)):
        if ours in heads:
            mean, count = _values(heads[ours]), _values(heads[f"{ours}_count"])
            metrics[name] = (mean * count + at_first * sequences) / (count + sequences)
    if "prefix_match" in heads:
        metrics["induction_score"] = _values(heads["prefix_match"])
    return metrics


def _own_scores(heads: xr.Dataset) -> dict[str, tuple[Float[np.ndarray, "layer head"], str]]:
    """The scan's own scores with one number a head, and what they are."""
    names = sorted(str(name)[: -len("_count")] for name in heads.data_vars if str(name).endswith("_count"))
    scores = {name: heads[name] for name in names if set(heads[name].dims) == {"layer", "head"}}
    return {name: (_values(data), f"metaint: {data.attrs.get('description', name)}") for name, data in scores.items()}


def _values(data: xr.DataArray) -> Float[np.ndarray, "layer head"]:
    return data.transpose("layer", "head").values.astype(float)


# ---- what comes in ----------------------------------------------------------------------------------------------


def _checked(scan: xr.DataTree, model: Any, tokens: Any) -> xr.Dataset:
    heads = heads_of(scan)
    if "step" in heads.dims:
        raise InputError(
            "scan is a recording over training, and HeadVis shows one step: choose it, as in scan.isel(step=-1)."
        )
    if scan.attrs.get("attention", "causal") != "causal":
        raise InputError("scan is of a bidirectional model: HeadVis shows causal ones.")
    if (model is None) != (tokens is None):
        given, other = ("tokens", "model") if model is None else ("model", "tokens")
        raise InputError(f"{given} was given without {other}: examples need both.")
    if not heads.attrs.get("sequences"):
        raise InputError("scan doesn't tell how many sequences its /heads was read from: scan again.")
    return heads


def _read(
    scan: xr.DataTree, model: Model, tokens: Any, mask: Any, batch_size: int, known: Numbers
) -> tuple[Numbers, Examples]:
    """The metrics and examples of the model on the tokens, if they are those of the scan."""
    if isinstance(tokens, str) and getattr(model, "tokenizer", None) is None:
        raise InputError("tokens is a text, and this model has no tokenizer: pass token ids.")
    tokens, mask = check_tokens(model, encoded(model, tokens), mask)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1.")
    shape = tuple(int(size) for size in scan.attrs.get("tokens_shape", tokens.shape))
    if shape != tuple(tokens.shape):
        raise InputError(f"tokens has shape {tuple(tokens.shape)}, and the scan read {shape}: give the same tokens.")
    HeadProbe().prepare(model)

    def same(scores: Numbers) -> None:
        for name, values in known.items():
            if values.shape != scores[name].shape or not np.allclose(values, scores[name], 2e-3, 2e-3, equal_nan=True):
                raise InputError(
                    f"model and tokens have another {name} than the scan: give the model, the tokens and the "
                    "attention_mask that were scanned."
                )

    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    return measured(model, tokens, real, batch_size, same)


# ---- what goes out ----------------------------------------------------------------------------------------------


def _files(
    scan: xr.DataTree,
    heads: xr.Dataset,
    scores: Mapping[str, tuple[Float[np.ndarray, "layer head"], str]],
    examples: Examples | None,
) -> Iterator[tuple[str, Any]]:
    """Every file of the folder with its content, one at a time."""
    each = list(np.ndindex(heads.sizes["layer"], heads.sizes["head"]))
    yield "config.json", _config(scan, heads, {name: about for name, (_, about) in scores.items()})
    yield (
        "scatter_data.json",
        [
            {"layer": i, "head": j, **{name: _number(float(values[i, j])) for name, (values, _) in scores.items()}}
            for i, j in each
        ],
    )
    yield "server_config.json", {}
    yield "attributions/manifest.json", {}
    for i, j in each:
        yield f"heads/L{i}H{j}.json", examples(i, j) if examples else _without_examples()


def _config(scan: xr.DataTree, heads: xr.Dataset, metrics: dict[str, str]) -> dict[str, Any]:
    """What the frontend reads first; what Neuronpedia's loaders ask for is under `pipeline_config`."""
    facts = {str(name): getattr(value, "tolist", lambda value=value: value)() for name, value in scan.attrs.items()}
    n_layers, n_heads, sequences = heads.sizes["layer"], heads.sizes["head"], int(heads.attrs["sequences"])
    # A model's name on Neuronpedia isn't known here: its loaders take that of the folder instead.
    source = {"model_name": str(facts.get("model", "model")), "np_model_id": None}
    source["dataset_name"] = str(facts.get("source") or facts.get("task", "tokens"))
    length = facts["tokens_shape"][1] if "tokens_shape" in facts else int(heads.attrs["tokens_seen"]) // sequences
    pipeline = {
        **source,
        "n_sequences": sequences,
        "seq_len": int(length),
        "dtype": str(facts.get("dtype")),
        "attn_implementation": "eager",  # hooks on patterns need it
        "induction_attention_threshold": 0.0,
        "n_intervals": INTERVALS,
        "samples_per_interval": EXAMPLES,
        "samples_per_top_interval": TOP_EXAMPLES,
        "sparse_topk_per_row": MOST_KEYS,
        "sparse_threshold": LEAST_WEIGHT,
        "metaint": facts,
    }
    return json.loads(json.dumps({
        **source, "heads": list(np.ndindex(n_layers, n_heads)), "n_layers": n_layers, "n_heads": n_heads,
        "n_intervals": INTERVALS, "metrics": list(metrics), "metric_descriptions": metrics, **_SHOWN,
        "pipeline_config": pipeline,
    }, default=str))  # fmt: skip


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _without_examples() -> dict[str, Any]:
    tables: dict[str, Any] = {"sequences": [], "top_query_tokens": [], "top_key_tokens": []}
    return {**tables, "qk_distance_histogram": {}, "histogram": {}, "statistics": {}}


def _ours(folder: Path) -> bool:
    """Whether a folder is empty or an export: others' examples may have taken days to make."""
    try:
        if not any(folder.iterdir()):
            return True
        return "metaint" in json.loads((folder / "config.json").read_text(encoding="utf-8"))["pipeline_config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
