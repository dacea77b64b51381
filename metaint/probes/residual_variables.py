"""What `/residual` holds: each variable, its dimensions and what it says."""

from typing import Any

import torch

from metaint.probes.means import Variable, mean

NORM = ("layer", "position")
LAYER = ("layer",)
BLOCK = ("block",)
_FINAL: dict[str, Any] = {"dims": ("position",), "count": "final_tokens", "interval": False}

# Means of a layer's tokens by position, of the last stream's by position, and of all tokens but those at position 0.
VARIABLES = (
    mean(
        "norm_mean", NORM, "tokens", of="norm",
        words="mean length of the stream before any norm; layer 0 is the embedding, the last before the final norm",
    ),
    mean(
        "norm_geometric", NORM, "tokens", of="log_norm", then=torch.exp,
        words="geometric mean length of the stream before any norm",
    ),
    mean(
        "norm_final_mean", of="norm_final", **_FINAL,
        words="mean length of the last stream after the final norm and its gain (NaN without such a norm)",
    ),
    mean(
        "norm_final_geometric", of="log_norm_final", then=torch.exp, **_FINAL,
        words="geometric mean length after the final norm and its gain",
    ),
    mean(
        "cos_to_final", LAYER, "samples",
        "mean cosine of the stream with the last one at the same position",
    ),
    mean(
        "growth", BLOCK, "steps",
        "mean over tokens of ||x after the block|| / ||x before||, position 0 left out",
    ),
    mean(
        "growth_orthogonal", BLOCK, "steps",
        "what growth would be if each step were orthogonal to the stream: its baseline",
    ),
    mean("radial", BLOCK, "steps", "mean length of the step along the stream (negative: against it)"),
    mean("tangential", BLOCK, "steps", "mean length of the step across the stream"),
    mean(
        "norm_squared_change", BLOCK, "steps",
        "mean of ||x after||² - ||x before||² = norm_squared_cross + norm_squared_step",
    ),
    mean(
        "norm_squared_cross", BLOCK, "steps",
        "mean of 2 <x, D>, what the direction of the step adds to ||x||²",
    ),
    mean("norm_squared_step", BLOCK, "steps", "mean of ||D||², what any step of this length adds to ||x||²"),
    mean("attn_write_norm", BLOCK, "attn_writes", "mean length of what attention adds to the stream"),
    mean(
        "cos_stream_attn", BLOCK, "attn_writes",
        "mean cosine of what attention adds with the stream it reads",
    ),
    mean("mlp_write_norm", BLOCK, "mlp_writes", "mean length of what the MLP adds to the stream"),
    mean(
        "cos_stream_mlp", BLOCK, "mlp_writes",
        "mean cosine of what the MLP adds with the stream it is added to",
    ),
    Variable(
        "growth_geometric", BLOCK,
        "ratio of the geometric means of the length after and before the block",
    ),
    Variable(
        "growth_rate", (),
        "factor per layer of a line through the mean log length over the layers in growth_layers",
    ),
    Variable("growth_r2", (), "R² of that line; high for any smooth curve, the more so over few layers"),
    Variable(
        "norm_histogram", (*NORM, "bin"),
        "tokens in each log bin of the length; the coordinate is the bin's lower edge",
    ),
    Variable("norm_quantile", ("quantile", *NORM), "quantiles of the length, from the histogram (true to 9 %)"),
    Variable("norm_count", NORM),
    Variable(
        "effective_rank", LAYER,
        "participation ratio of the covariance over tokens, 1 to d_model (through 128 random directions)",
    ),
    Variable(
        "massive_mean", ("layer", "rank"),
        "the largest, second ... |x| of a sequence, averaged over sequences",
    ),
    Variable("median_magnitude", LAYER, "median |x| over the sampled positions"),
    Variable(
        "massive_value", ("layer", "rank"),
        "largest |x| of all sequences, one for each dimension and position",
    ),
    Variable(
        "massive", ("layer", "rank"),
        "whether it is above 100 and 1000 times the median |x| (Sun et al. 2024)",
    ),
    Variable(
        "cos_null_std", (),
        "standard deviation of the cosine of unrelated directions, 1 / sqrt(d_model); their mean is 0",
    ),
)  # fmt: skip
