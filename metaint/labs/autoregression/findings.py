"""What the autoregression lab found, in tables and words.

In: the rows of `compare` and `describe` as frames. Out: tables for the terminal, how to read them, and one line.
"""

import math
from typing import Any

import pandas as pd
from rich.console import Console

from metaint.labs.autoregression.comparison import HAAR_REFERENCES
from metaint.views.drawing.terminal import plain_table

_WORDS = {
    "augmented": (
        "Predicted is one gradient step of the best size on the inner loss: (d - 1) / (T + d - 2), at a step of 1 / (T "
        "+ d - 2); of shared, the best step for all contexts up to T together. That optimum (derived) is of the "
        "theorem's structure, as we read it: one layer, and in it the diagonals of the construction's blocks alone. "
        "Trained models of that structure meet it: diagonal, and signed, which began with random signs. The loss "
        "doesn't tell signs; it fixes the product of a coordinate's two weights, so that signed is a gradient step but "
        "for flipped coordinates. With whole blocks, or all weights free, training goes below it. What they use is "
        "coupling between coordinates: lambda_i^(t-1) lambda_k^(T-t+1) comes up as noise in the estimate of coordinate "
        "i and, at T + 2 - t, of k, so that a little of the other, taken off, lowers it; coupled values are the least "
        "loss to be had by that alone (derived). The second table says how much of the weights is coupling, and what "
        "the loss is without it, or without the blocks that the construction leaves empty, which matter little."
    ),
    "unitary": (
        "Predicted: the least expected loss d - H, summed over coordinates (derived), and what the weights are there. "
        "Losses are of the trained model on fresh sequences, and training was on the expected loss. Starts: the share "
        "of initialisations within 0.02 d of it. A head orthogonality of 0 means that no head reads what another asks "
        "for; with more heads than d nothing asks for it."
    ),
    "orthogonal": (
        "Predicted: the least expected loss d - 2H, summed over coordinates (derived), and what the weights are "
        "there. Losses are of the trained model on fresh sequences. Starts: the share of initialisations within 0.02 "
        "d of it; the rest ended in local minima, where a head has taken the sine of a pair's phase, [[1, -1], [-1, "
        "1]], for its cosine, and gradient descent doesn't turn it round. Each head may go either way, so that few "
        "starts have all right; heads beyond d / 2 mend it. The model is the best of the starts."
    ),
    "haar": (
        "Predicted is gradient descent with as many steps as there are layers, on the same sequences: eta = c / (T - "
        "1) with the best c, or for one linear layer, which can't divide by T, the best single eta. No theorem covers "
        "these sequences: below means that the model does more than these steps. The released model ends each layer "
        "in a LayerNorm, which may put in that vectors have length 1: one gradient step made to the best length is "
        "that much better too. Predictors: beside them what we computed once with the authors' task (4000 sequences)."
    ),
    "positional": (
        "Predicted is where gradient descent from P = 0 stands after as many steps, in closed form on the expected "
        "loss (derived). The optimum itself, p_T = 1 and a loss of 0, is far: where phases are spread over a small "
        "arc, many rows predict well, and descent stops (at a loss of 0.001, as the authors') at the smooth one. The "
        "authors' plot and saved arrays leave out p_T, the weight of the key after the query; as saved compares with "
        "those."
    ),
    "icl-regression": (
        "Predicted is one gradient step of the best size (derived; 0.2062 at 10 points in 10 dimensions); with more "
        "layers as many steps, all of one size, which trained layers needn't keep to: below means that they do "
        "better. Differences and the cosine compare with that one step, of predictions and of their gradients in the "
        "query."
    ),
}


def print_findings(console: Console, setting: str, table: pd.DataFrame, details: pd.DataFrame) -> None:
    """The comparison, what else tells of the setting, and how to read it."""
    shown = plain_table("Measured against predicted")
    several = len(set(table["seed"])) > 1
    shown.add_column("run", no_wrap=True)
    shown.add_column("quantity")
    for name in ("measured", *(["over seeds"] * several), "predicted", "difference"):
        shown.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in over_seeds(table).to_dict("records"):
        spread = [f"{four(row['low'])}–{four(row['high'])}"] * several
        cells = (four(row["measured"]), *spread, four(row["predicted"]), _difference(row["measured"], row["predicted"]))
        run = "" if row["run"] == before else str(row["run"])
        shown.add_row(run, str(row["quantity"]), *cells)
        before = row["run"]
    console.print(shown)
    failed: Any = details[details["failed"].notna()] if "failed" in details else details.iloc[:0]
    whole = details.drop(index=failed.index)
    _print_details(console, setting, whole)
    if setting == "haar":
        _print_predictors(console, whole.to_dict("records")[0])
    console.print(f"[dim]{_WORDS[setting]}[/]\n".replace("[[1, -1], [-1, 1]]", "\\[[1, -1], [-1, 1]]"))
    for row in failed.to_dict("records"):
        console.print(f"{row['run']} diverged: {row['failed']}", markup=False)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `compare` averaged over seeds, with `low` and `high`, in their order."""
    grouped = table.groupby(["run", "quantity"], sort=False)
    means: Any = grouped[["measured", "predicted"]].mean()
    ends = {"low": grouped["measured"].min(), "high": grouped["measured"].max(), "key": grouped["key"].any()}
    return means.assign(**ends).reset_index()


def last_line(setting: str, table: pd.DataFrame) -> str:
    """Measured against predicted of what the setting is about."""
    rows: Any = over_seeds(table)
    rows = rows[rows["key"]]
    parts = []
    for quantity, same in rows.groupby("quantity", sort=False):
        runs = "" if len(same) == 1 and rows["run"].nunique() == 1 else f" ({'; '.join(same['run'])})"
        measured, predicted = (", ".join(map(four, same[name])) for name in ("measured", "predicted"))
        parts.append(f"{quantity}{runs} {measured} against {predicted}")
    seeds = len(set(table["seed"]))
    return f"{setting}, measured against predicted{f', mean of {seeds} seeds' if seeds > 1 else ''}: {'; '.join(parts)}"


def four(value: float) -> str:
    """Four decimals below 10, fewer above, a dash for what is not a number."""
    if math.isnan(value):
        return "–"
    if abs(value) < 10:
        return f"{value + 0.0:.4f}"
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"


def _difference(measured: float, predicted: float) -> str:
    if math.isnan(measured - predicted):
        return "–"
    share = f" ({100 * (measured / predicted - 1):+.1f} %)" if abs(predicted) > 1e-3 else ""
    return f"{measured - predicted:+.4f}{share}"


def _print_details(console: Console, setting: str, details: pd.DataFrame) -> None:
    """One row a run."""
    columns = {
        "augmented": {
            "loss": "loss", "loss_without_coupling": "without\ncoupling", "loss_without_other": "without\nothers",
            "QK_coupling": "QK\ncoupling", "QK_other": "QK\nother", "OV_coupling": "OV\ncoupling",
            "OV_other": "OV\nother", "flipped": "flipped", "cosine_gradient_step": "cosine\nof step",
        },
        "haar": {
            "loss": "loss", "cosine_gradient_step": "cosine of\none step", "cosine_least_squares": "of least\nsquares",
        },
        "unitary": {"loss": "loss", "reached": "reached"},
        "orthogonal": {"loss": "loss", "reached": "reached"},
    }.get(setting, {})  # fmt: skip
    titles = {
        "augmented": "What the weights are made of (shares of squared norms)",
        "haar": "The matrix it applies, at the longest context",
    }
    if not columns or details.empty:
        return
    shown = plain_table(titles.get(setting, "Starts"), tight=console.width < 110)
    shown.add_column("run", no_wrap=True)
    for word in columns.values():
        shown.add_column(word, justify="right")
    for row in details.to_dict("records"):
        seed = f", seed {row['seed']}" if len(set(details["seed"])) > 1 else ""
        shown.add_row(
            f"{row['label']}{seed}", *(f"{row[name]:.0f}" if name == "flipped" else four(row[name]) for name in columns)
        )
    console.print(shown)


def _print_predictors(console: Console, row: dict[str, Any]) -> None:
    """What predictors lose on the recorded sequences, beside the numbers of `HAAR_REFERENCES` where they apply."""
    known = HAAR_REFERENCES if (row["d"], row["length"]) == (5, 50) else {}
    shown = plain_table("Predictors on the same sequences", ("predictor",), ("measured", "authors' task"))
    for name in (*HAAR_REFERENCES, "unit_step"):
        word = "one step, to the best length" if name == "unit_step" else name.replace("_", " ")
        shown.add_row(word, four(row[f"loss_{name}"]), four(known.get(name, math.nan)))
    console.print(shown)
