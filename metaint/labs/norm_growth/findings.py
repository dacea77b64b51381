"""What a run of the norm growth lab shows, in numbers and in words.

In: a recording with `/weights`, `/saturation` and `/heads`, and the trained model. Out: a row of numbers and sentences,
homogeneity slopes, and tables for the terminal. The measures are those of Merrill et al. 2021 (2010.09697).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console

from metaint.labs.norm_growth.run import trained_model
from metaint.labs.norm_growth.settings import Settings, characters
from metaint.measures import growth
from metaint.measures.saturation import EXPECTED_SLOPES
from metaint.scanning.saturate import saturate
from metaint.scans.curves import head_counts, steady_norms
from metaint.scans.labels import MARGIN
from metaint.views.drawing.terminal import number, plain_table
from metaint.views.groups.training import SIGNS

# A norm within this of its first is one that stays.
_STAYS = 0.01
# From this similarity on a model is called saturated.
_SATURATED = 0.9
# With this share of uniform attention's weight off the maximum, attention is nearly uniform.
_SOFT = 0.9
_SCALES, _SLOPE_WINDOWS = (512.0, 1024.0), 8
# Activations of EXPECTED_SLOPES, by the names that `saturate` has for their slopes.
_SLOPES = {
    "embedding": "embedding_slope",
    "scores": "score_slope",
    "attn_write": "attn_write_slope",
    "mlp_write": "mlp_write_slope",
    "stream": "stream_slope",
}
_FACTS = ("norm", "optimiser", "learning_rate", "weight_decay", "steps", "seed")


def describe(recording: xr.DataTree, settings: Settings, slopes: pd.DataFrame) -> dict[str, Any]:
    """Numbers of one run, and what they say in words (`growth`, `trend`, `dynamics`, `saturation`)."""
    training = recording["training"].to_dataset().isel(step=-1)
    heads = head_counts(recording).isel(step=-1)
    row: dict[str, Any] = {
        **facts_of_run(settings),
        "loss": float(training["loss"]),
        "held_out_loss": float(training["held_out_loss"]),
        **_growth(recording),
        **_dynamics(block_steps(recording["weights"].to_dataset())),
        **_saturation(recording["saturation"].to_dataset()),
        **{f"{name}_heads": int(heads[name]) for name in ("argmax", "averaging")},
        "heads": settings.n_layers * settings.n_heads,
    }
    for line in slopes.to_dict("records"):
        row |= {f"slope_{line['activation']}": line["slope"], f"expected_{line['activation']}": line["expected"]}
    return row


def block_steps(weights: xr.Dataset) -> xr.Dataset:
    """By step, of all parameters of the blocks: `norm`, and since the record before `step_norm`, `alignment`,
    `direction_cosine` (NaN at the first)."""
    norm, step = weights["parameter_norm"], weights["step_norm"]
    before = norm.shift(step=1)
    of_parts = (before**2, weights["alignment"] * before * step, step**2)  # which add up, as `growth.change` does
    change = torch.tensor(np.stack([part.sum(("layer", "part")).values for part in of_parts], -1))
    measures = {
        "step_norm": growth.step_norm,
        "alignment": growth.alignment,
        "direction_cosine": growth.direction_cosine,
    }
    data = {name: ("step", measure(change).numpy()) for name, measure in measures.items()}
    whole = (norm**2).sum(("layer", "part")).values ** 0.5
    return xr.Dataset({"norm": ("step", whole), **data}, {"step": weights["step"].values})


def facts_of_run(settings: Settings) -> dict[str, Any]:
    """What tells a run from others."""
    return {"run": settings.name, **{name: getattr(settings, name) for name in _FACTS}}


def _growth(recording: xr.DataTree) -> dict[str, Any]:
    """Of the norm without embeddings, from where to where, and its trend; the same of attention and MLP alone, whose
    growth the gains of norms would hide in a small model."""
    weights = recording["weights"].to_dataset()
    steps, norms = weights["step"].values, weights["total_norm_without_embeddings"].values
    matrices = (weights["parameter_norm"].sel(part=["attention", "mlp"]) ** 2).sum(("layer", "part")).values ** 0.5
    whole, alone = (growth.growth_exponent(steps, series) for series in (norms, matrices))
    trends = growth.fit_trends(*steady_norms(recording))
    ranked = sorted(trends, key=lambda name: -np.nan_to_num(trends[name].r2, nan=-np.inf))
    ratio, best = norms[-1] / norms[0], trends[ranked[0]].r2
    words = "grows" if ratio > 1 else "shrinks"
    if abs(ratio - 1) <= _STAYS:
        words = "stays"
    over = best - trends[ranked[1]].r2
    return {
        "norm_first": norms[0],
        "norm_last": norms[-1],
        "norm_ratio": ratio,
        "matrices_first": matrices[0],
        "matrices_last": matrices[-1],
        **{f"r2_{name}": trend.r2 for name, trend in trends.items()},
        "best_trend": ranked[0],
        "exponent": whole.norm,
        "exponent_r2": whole.r2,
        "matrices_exponent": alone.norm,
        "growth": f"{words}, ×{ratio:.2f}",
        "trend": f"{SIGNS[ranked[0]]}, R² {best:.3f}: {over:.3f} above {SIGNS[ranked[1]]}",
    }


def _dynamics(blocks: xr.Dataset) -> dict[str, Any]:
    """Of the blocks: the last norm beside what aligned and orthogonal steps between records would give."""
    curves = growth.dynamics(blocks["norm"].values, blocks["step_norm"].values[1:])
    observed, aligned, misaligned = (float(series[-1]) for series in curves)
    share = (observed - misaligned) / (aligned - misaligned)
    near = "nearer misaligned" if share < 0.5 else "nearer aligned"
    if share < 0:
        near = "below misaligned"
    steps = blocks["step"].values
    return {
        "blocks_last": observed,
        "aligned_last": aligned,
        "misaligned_last": misaligned,
        "aligned_share": share,
        "alignment": float(blocks["alignment"][-1]),
        "direction_cosine": float(blocks["direction_cosine"][-1]),
        "spacing": int(steps[-1] - steps[-2]),
        "dynamics": f"{near} ({share:.2f} of the way to aligned)",
    }


def _saturation(data: xr.Dataset) -> dict[str, Any]:
    """Of the last layer: similarity with saturated attention, beside its null; and the heads' own attention."""
    last = data.sel(scale=math.inf).isel(layer=-1)
    now = last.isel(step=-1)
    value, low, null = (float(now[f"similarity{end}"]) for end in ("", "_low", "_null"))
    off = data["off_maximum"].mean(("layer", "head")).values
    uniform = float(np.ravel(data["off_maximum_uniform"])[-1])
    words = "yes" if value >= _SATURATED else "partly"
    if low <= null or value < null + MARGIN:
        words = "no more than the null"
    elif off[-1] >= _SOFT * uniform:  # what attention adds hardly counts, so that nothing can change the stream
        words = "no, nearly uniform"
    return {
        "similarity_first": float(last["similarity"][0]),
        "similarity": value,
        "similarity_low": low,
        "similarity_null": null,
        "off_maximum_first": off[0],
        "off_maximum": off[-1],
        "off_maximum_uniform": uniform,
        "saturation": f"{words}: {value:.3f} against {null:.3f}",
    }


def slopes_of(folder: str | Path, settings: Settings, text: str | None = None) -> pd.DataFrame:
    """Homogeneity slopes of a trained model in float64, between all parameters times 512 and 1024.

    Columns run, activation, slope (mean over layers), low and high (least and most), expected. NaN for what attention
    and MLP add where a norm follows the addition ("post"): there `saturate` doesn't tell.
    """
    model = trained_model(folder, text, torch.float64)
    tokens = characters(text, settings.length).held_out[:_SLOPE_WINDOWS]
    readings = saturate(model, tokens, _SCALES, positions=16)["saturation"].to_dataset()
    rows = []
    for activation, name in _SLOPES.items():
        slope = readings[name].sel(scale=_SCALES[0]).values if name in readings else np.array(np.nan)
        ends = {"slope": slope.mean(), "low": slope.min(), "high": slope.max()}
        expected = EXPECTED_SLOPES[settings.norm][activation]
        rows.append({"run": settings.name, "activation": activation, **ends, "expected": expected})
    return pd.DataFrame(rows)


def print_findings(console: Console, summary: pd.DataFrame) -> None:
    """Tables of growth, attention, heads and slopes, and how to read them."""
    whole: Any = summary[~summary["growth"].eq("diverged")]
    text = {
        "Does the norm grow?": {
            "held-out loss": ("held_out_loss",), "norm": ("norm_first", "norm_last"),
            "matrices": ("matrices_first", "matrices_last"), "growth": ("growth",),
        },
        "By which trend?": {
            "best trend": ("trend",), "exponent": ("exponent",), "of matrices": ("matrices_exponent",),
        },
        "By which steps?": {
            "blocks": ("dynamics",), "last alignment": ("alignment",), "direction cosine": ("direction_cosine",),
        },
        "Does attention saturate?": {
            "saturated?": ("saturation",), "at step 0": ("similarity_first",),
            "off the maximum": ("off_maximum_first", "off_maximum"),
        },
        "Heads": {"argmax": ("argmax_heads",), "averaging": ("averaging_heads",), "of": ("heads",)},
        "Homogeneity slopes of the trained models (expected)": {
            name.replace("_", " ").replace("ding", ""): (f"slope_{name}", f"expected_{name}") for name in _SLOPES
        },
    }  # fmt: skip
    for title, columns in text.items():
        table = plain_table(title)
        table.add_column("run", no_wrap=True)
        for name in columns:
            table.add_column(name)
        for row in whole.to_dict("records"):
            table.add_row(row["run"], *(_cell(row, names) for names in columns.values()))
        console.print(table)
    entropy, last, uniform = (whole[name].iloc[0] for name in ("unigram_entropy", "spacing", "off_maximum_uniform"))
    console.print(
        f"[dim]Losses in nats; a model that knows how often each character comes and no more has {entropy:.3f}. norm: "
        "of all parameters but the embeddings; matrices: without the gains of norms too, which begin at 1. Trends are "
        "fitted after the warmup. exponent: the power of t with which the norm grows from initialisation on, ½ by "
        "orthogonal steps of one length (a warmup raises it; – if a record lies below the first). blocks, aligned, "
        "misaligned: where the norm of the blocks would be had all changes between records been parallel, or "
        f"orthogonal (between records, not single steps: the last are {last} steps apart, which is also what alignment "
        "and direction cosine span). saturated: the cosine of the last layer's stream with that of attention to the "
        f"largest scores alone, against that of a token of another sequence (yes: {_SATURATED:g} or more, {MARGIN:g} "
        "above the other; partly: less, but as far above). Where attention adds little, as at step 0, it is high with "
        f"any attention: so no, if the weight off the maximum is {_SOFT:g} or more of what uniform attention has, "
        f"{uniform:.3f}.[/]\n"
    )
    for name in summary[summary["growth"].eq("diverged")]["run"]:
        console.print(f"{name} diverged: its learning rate is too large.")


def _cell(row: dict[str, Any], names: tuple[str, ...]) -> str:
    values = [row[name] for name in names]
    if names[0].startswith("slope_"):
        return f"{_text(values[0])} ({values[1]:g})"
    return " → ".join(map(_text, values))


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:d}" if isinstance(value, int) else number(value)
