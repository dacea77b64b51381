"""The alarm of a recorder: heads whose attention logits grow beyond a line."""

import pytest
import torch

import metaint
from metaint.errors import InputError
from metaint.scanning.recorder import Recorder
from metaint.scans.recordings import read_recording
from tests.builders import available_kinds, build

KIND = next(kind for kind in ("native-mlp-ln", "hooked") if kind in available_kinds())
TOKENS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return build(KIND)


def probe():
    return metaint.HeadProbe(["entropy"], max_logit=True)


def recorder_of(model, path, **options):
    return Recorder(model, [probe()], every=1, path=path, tokens=TOKENS, **options)


def grow(model, factor):
    """Queries of head 0.1 times a factor, so that its logits are."""
    attention = model.blocks[0].attn
    attention.W_Q.data[1] *= factor
    attention.b_Q.data[1] *= factor


def test_it_rings_at_the_step_at_which_a_head_passes_the_line(model, tmp_path):
    rung = []
    usual = float(metaint.scan(model, TOKENS, [probe()])["heads"]["max_logit"].max())

    def ring(step, heads):
        rung.append((step, dict(heads)))

    recorder = recorder_of(model, tmp_path / "run.zarr", warn_above=2 * usual, on_warning=ring)
    recorder(0)
    grow(model, 100)
    scan = recorder(1)
    assert [step for step, _ in rung] == [1]
    assert rung[0][1] == {"0.1": pytest.approx(float(scan["heads"]["max_logit"][0, 1]))}
    assert read_recording(tmp_path / "run.zarr")["training"]["logit_alarm"].values.tolist() == [0, 1]


def test_without_a_call_it_warns(model, tmp_path):
    recorder = recorder_of(model, tmp_path / "run.zarr", warn_above=1e-6)
    with pytest.warns(UserWarning, match=r"step 3: the largest attention logit of \d+ heads is above 1e-06, up to"):
        recorder(3)


def test_a_call_that_raises_loses_no_record(model, tmp_path):
    def stop(step, heads):
        raise KeyboardInterrupt

    recorder = recorder_of(model, tmp_path / "run.zarr", warn_above=1e-6, on_warning=stop)
    with pytest.raises(KeyboardInterrupt):
        recorder(0)
    assert read_recording(tmp_path / "run.zarr")["training"]["logit_alarm"].values.tolist() == [1]
    assert recorder.steps == [0]


def test_an_alarm_that_could_never_ring_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"no probe reads logits: add metaint\.HeadProbe\(max_logit=True\)"):
        Recorder(model, [metaint.HeadProbe()], every=1, path=tmp_path / "a", tokens=TOKENS, warn_above=100)
    with pytest.raises(InputError, match="warn_above is nan: give a number"):
        recorder_of(model, tmp_path / "a", warn_above=float("nan"))
    with pytest.raises(InputError, match="on_warning was given without warn_above"):
        recorder_of(model, tmp_path / "a", on_warning=print)
