"""How `InnerProbe` takes a pass apart: its points and steps, the tokens they are read for, and what each token adds.

In: the sampled rows of a pass, by hook. Out: points and steps for `measures.inner.read_path`, and from its readings the
summands of the means of `/inner`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from metaint.measures.inner import PathReadings
from metaint.probes.stream import Rows


def path_of(
    activations: Mapping[str, Tensor], n_layers: int, sublayers: str
) -> tuple[list[Tensor], dict[tuple[int, str], tuple[int, int]]]:
    """The points of a pass and its steps {(block, part): (start, stop)}; part "" is the whole block.

    The MLP's step starts after attention's in sequential blocks, and from the same stream in parallel ones. Where
    there is nothing but attention its step is the block's; `sublayers` "whole" asks for no parts.
    """
    points: list[Tensor] = []
    steps: dict[tuple[int, str], tuple[int, int]] = {}
    for block in range(n_layers):
        start = len(points)
        stream = activations[f"blocks.{block}.hook_resid_pre"]
        points.append(stream)
        if sublayers in ("attention", "whole"):
            steps[block, ""] = (start, start + 1)
            if sublayers == "attention":
                steps[block, "_attn"] = (start, start + 1)
            continue
        points.append(stream + activations[f"blocks.{block}.hook_attn_out"])
        steps[block, "_attn"] = (start, start + 1)
        if sublayers == "parallel":
            points.append(stream + activations[f"blocks.{block}.hook_mlp_out"])
            steps[block, "_mlp"] = (start, start + 2)
        else:
            steps[block, "_mlp"] = (start + 1, start + 2)
        steps[block, ""] = (start, len(points))
    points.append(activations[f"blocks.{n_layers - 1}.hook_resid_post"])
    return points, steps


def targets_of(rows: Rows) -> tuple[Int[Tensor, "sampled 2"], Tensor]:
    """The next token of each sampled row and, as baseline, that of the row half the sample away in its sequence.

    Second, whether there is another row to take it from.
    """
    assert rows.tokens is not None
    following = rows.pick(pad(rows.tokens[:, 1:], (0, 1)))
    count = rows.sampled.sum(-1, keepdim=True)
    sample = torch.arange(rows.sampled.shape[1], device=count.device).expand_as(rows.sampled)
    other = (sample + count // 2) % count.clamp(min=1)
    both = torch.stack([following, following.gather(1, other)], -1)[rows.sampled]
    return both, (count > 1).expand_as(rows.sampled)[rows.sampled]


def of_layers(
    readings: PathReadings, streams: list[int], lengths: Tensor, has_null: Tensor
) -> dict[str, Float[Tensor, "sampled layer"]]:
    """What each token adds to the means that lie along layers, and to their counts."""
    rank = readings.rank[streams].mT
    hit = (rank == 1).to(lengths.dtype)
    compared = has_null[:, None].expand_as(hit)
    return {
        "loss": readings.loss[streams, :, 0].mT,
        "loss_null": readings.loss[streams, :, 1].mT * compared,
        "target_rank": rank.log(),
        "top1": hit,
        "prediction_entropy": readings.entropy[streams].mT,
        "kl_to_final": readings.kl[streams].mT,
        "gradient_norm": readings.gradient_norm[streams].mT,
        "norm_correct": lengths * hit,
        "norm_wrong": lengths * (1 - hit),
        "correct": hit,
        "wrong": 1 - hit,
        "samples": torch.ones_like(hit),
        "samples_null": compared,
    }


def of_steps(
    readings: PathReadings, steps: Mapping[tuple[int, str], tuple[int, int]], has_null: Tensor
) -> dict[str, Float[Tensor, "sampled block"]]:
    """What each token adds to the means that lie along blocks, and to their counts."""
    values: dict[str, Tensor] = {}
    for part in dict.fromkeys(part for _, part in steps):
        places = [i for i, (_, of_part) in enumerate(steps) if of_part == part]
        stretches = [stretch for (_, of_part), stretch in steps.items() if of_part == part]
        starts, stops = zip(*stretches, strict=True)
        decrease = readings.loss[list(starts)] - readings.loss[list(stops)]
        values_of_part = {
            "loss_decrease": decrease,
            "improved": decrease > 0,
            "step_gradient_cosine": readings.agreement[places],
            "descent": readings.descent[places],
            "steps": torch.ones_like(decrease),
        }
        for name, value in values_of_part.items():
            values[name + part] = value[..., 0].mT
            values[f"{name}_null{part}"] = value[..., 1].mT * has_null[:, None]
    return values
