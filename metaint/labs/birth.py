"""Birth of a transformer: how an induction head comes to be (Bietti et al. 2023, 2306.00802).

In: a `BigramTask`. Out: the simplified two-layer model of that paper, trained, with states kept along the way.
Source: transformer-birth `ihead_basic_model.py` (the model) and `ihead_basic_main.py` (the training).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from metaint.errors import InputError
from metaint.models.toy import boot_toy
from metaint.tasks.bigram import BigramSample, BigramTask

TRAINED = ("blocks.0.attn.k.weight", "blocks.1.attn.k.weight", "blocks.1.attn.o.weight")
"""Names in the model's state dict of W_K^1, W_K^2 and W_O^2, the three matrices that are trained."""

Checkpoint = tuple[int, dict[str, Tensor]]


class Training(NamedTuple):
    """What `train` gives back."""

    model: Any
    checkpoints: list[Checkpoint]
    """(step, state of the three trained matrices), closer together early; `restore` puts one into a model."""
    history: xr.Dataset
    """By `step`, on a fixed held-out batch and positions with `outs >= 2` alone: `loss` in nats, `accuracy`, and
    `accuracy_without_copies`, which leaves out the positions whose target equals the current token."""


def build(vocab: int, length: int = 128, d: int = 128, seed: int = 0, device: Any = None) -> Any:
    """The untrained model: two layers, one head each, d_head = d_model = d, no normalisation, no MLP, no biases.

    Embeddings and positions are standard normal, W_Q is the identity, every other matrix is uniform in ±1/√d (the
    default of `torch.nn.Linear`, as in the paper's code). Only `TRAINED` require a gradient. The weights depend on
    `seed` alone, and the global random state stays as it was.
    """
    for name, value in (("vocab", vocab), ("length", length), ("d", d)):
        if value < 1:
            raise InputError(f"{name} is {value}; give at least 1.")
    shape = {"n_layers": 2, "n_heads": 1, "d_model": d, "d_head": d, "n_ctx": length, "d_vocab": vocab}
    model = boot_toy(shape, device=device)
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, like: Tensor) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros_like(like)
        if name.endswith("q.weight"):
            return torch.eye(d)
        if "embed.weight" in name and not name.startswith("unembed"):
            return torch.randn(like.shape, generator=generator)
        return (2 * torch.rand(like.shape, generator=generator) - 1) / math.sqrt(d)

    model.load_state_dict({name: draw(name, like) for name, like in model.state_dict().items()})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for matrix in trained_matrices(model).values():
        matrix.requires_grad_(True)
    return model


def trained_matrices(model: Any) -> dict[str, Tensor]:
    """The parameters named in `TRAINED`, in the orientation of torch.nn.Linear, [out, in]."""
    return {name: model.get_parameter(name) for name in TRAINED}


def restore(model: Any, checkpoint: Checkpoint) -> Any:
    """Puts the matrices of one checkpoint into `model`, which is returned."""
    matrices = trained_matrices(model)
    with torch.no_grad():
        for name, value in checkpoint[1].items():
            matrices[name].copy_(value)
    return model


def train(
    task: BigramTask,
    *,
    length: int = 128,
    d: int = 128,
    batch: int = 32,
    learning_rate: float = 0.5,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    target: float = 0.85,
    settle: float = 3.0,
    steps: int = 1000,
    every: int = 10,
    keep: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    progress: bool = False,
) -> Training:
    """Trains by SGD on fresh sequences, with the cross entropy of positions with `outs >= 2` alone as the loss.

    Every `every` steps the model meets a fixed held-out batch. Once its in-context accuracy has passed `target` at
    step s, training goes on to step `settle * s` (1 stops at once) while the heads sharpen, and never beyond `steps`;
    `history.attrs["passed_at"]` is s, or -1. About `keep` checkpoints come back, the first and last state among them.
    `on_step(step, model)` is called before each step's update and after the last, for probes along the way.

    The settings are ours, chosen for a small machine (the paper's code: length 256, batch 512, learning rate 0.2,
    5 triggers). With `bigram(trigger_count=48, no_repeat=True)` they take about a minute on one core: the target is
    passed near step 200, and since most characters are triggers, the induction head works for rare tokens
    too. Everything depends on `seed` alone (weights, batches) up to the device's arithmetic, and the global random
    state stays as it was. Raises InputError for settings that can't train.
    """
    for name, value in (("steps", steps), ("every", every), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} is {value}; give at least 1.")
    if keep < 2:
        raise InputError(f"keep is {keep}; give at least 2, for the first and the last state.")
    if not 0 < target <= 1:
        raise InputError(f"target is {target}; give an accuracy above 0 and up to 1.")
    if settle < 1:
        raise InputError(f"settle is {settle}; give at least 1, which stops once the target is passed.")
    model = build(task.vocab, length, d, seed, device)
    matrices = trained_matrices(model)
    optimizer = torch.optim.SGD(matrices.values(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = task.sample(128, length, torch.Generator().manual_seed(seed + 2), device)
    if not (held_out.outs >= 2).any():
        raise InputError(f"length is {length}, too short for a trigger to come twice; give more, or more triggers.")

    states: list[Checkpoint] = []
    rows: list[dict[str, float]] = []
    passed_at, last = -1, steps
    step = 0
    with tqdm(total=steps, disable=not progress, desc="training the toy", unit="step") as bar:
        while True:
            if step % every == 0 or step == last:
                rows.append(evaluate(model, held_out))
                states.append((step, {name: m.detach().cpu().clone() for name, m in matrices.items()}))
                if not math.isfinite(rows[-1]["loss"]):
                    raise InputError(
                        f"learning_rate is {learning_rate}, with which the loss was no longer finite at step {step}; "
                        f"give a smaller one."
                    )
                if passed_at < 0 and rows[-1]["accuracy"] > target:
                    passed_at, last = step, min(steps, math.ceil(settle * step))
                    bar.total = last
                bar.set_postfix(accuracy=f"{rows[-1]['accuracy']:.2f}")
            if on_step is not None:
                on_step(step, model)
            if step >= last:
                break
            sample = task.sample(batch, length, generator, device)
            optimizer.zero_grad()
            loss, _, _ = head_loss(model, sample)
            loss.backward()
            optimizer.step()
            step += 1
            bar.update()
    history = xr.Dataset(
        {name: ("step", [row[name] for row in rows]) for name in rows[0]},
        coords={"step": [step for step, _ in states]},
    )
    history.attrs = {
        "target": target, "passed_at": passed_at, "length": length, "d": d, "batch": batch, "seed": seed,
        "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay,
        "triggers": task.triggers, "trigger_count": task.trigger_count, "vocab": task.vocab,
    }  # fmt: skip
    return Training(model, _thin(states, keep), history)


def head_loss(model: Any, sample: BigramSample) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy in nats where the target is known from the context (`outs >= 2`; 0 if it is nowhere), and at those
    positions whether the best guess is right, and whether the target only copies the current token."""
    known = sample.outs >= 2
    inputs, targets = sample.tokens[:, :-1], sample.tokens[:, 1:][known]
    logits = model(inputs)[known]
    loss = cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
    return loss, logits.argmax(-1) == targets, inputs[known] == targets


@torch.no_grad()
def evaluate(model: Any, sample: BigramSample) -> dict[str, float]:
    """`loss`, `accuracy` and `accuracy_without_copies` (nan where there is no such position) on a sample."""
    loss, right, copies = head_loss(model, sample)
    return {
        "loss": loss.item(),
        "accuracy": right.double().mean().item(),
        "accuracy_without_copies": right[~copies].double().mean().item(),
    }


def _thin(states: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """About `keep` of the states, the first and the last among them, closer together early on."""
    last = len(states) - 1
    places = {round(last * (i / (keep - 1)) ** 1.5) for i in range(keep)} if last >= keep else range(last + 1)
    return [states[place] for place in sorted(places)]
