"""What the tests of recordings share: a recorder of a tiny model, and a training loop."""

import random

import numpy as np
import torch
import xarray as xr

from metaint import HeadProbe
from metaint.scanning.recorder import Recorder
from metaint.scans.recordings import read_recording
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds

KIND = next(kind for kind in ("native-mlp-ln", "hooked") if kind in available_kinds())
TOKENS = repeated_tokens(96, 8, batch=3, ids=(5, 95), seed=1)


def heads():
    return HeadProbe(["previous_token", "entropy"])


def recorder_of(model, path, probes=None, **options):
    return Recorder(model, probes or [heads()], path=path, **{"every": 1, "tokens": TOKENS, **options})


def steps_of(path):
    return read_recording(path)["heads"]["step"].values.tolist()


def change(model):
    """What stands for an optimiser step where it need not learn."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def learn(model, n_steps, after=lambda step, loss: None, seed=0):
    """A loop that leans on every random state and mode a recorder might disturb; returns its losses."""
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(1, n_steps + 1):
        tokens = torch.randint(5, 95, (2, 8)) + random.randrange(2) * np.random.randint(2)
        loss = model(tokens, return_type="loss") * (1 + torch.rand(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step, loss)
        losses.append(float(loss.detach()))
    return losses


def together(scans, steps, group):
    step = xr.DataArray(steps, dims="step", name="step")
    return xr.concat([scan[group].to_dataset() for scan in scans], dim=step, combine_attrs="override")
