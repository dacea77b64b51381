"""`Recorder`: what it records in any loop, that training can't tell, and what it refuses."""

import random

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint import HeadProbe
from metaint.errors import InputError
from metaint.probes.residual import ResidualProbe
from metaint.scanning.recorder import Recorder
from metaint.scans.recordings import read_recording
from tests.builders import available_kinds, build
from tests.scanning.recordings import KIND, TOKENS, change, heads, learn, recorder_of, steps_of, together


def test_a_recording_is_every_checkpoint_scanned_by_hand(tmp_path):
    model, weights = build(KIND), {}
    recorder = recorder_of(model, tmp_path / "run.zarr", [heads(), ResidualProbe()], every=2, attributes={"run": "a"})
    recorder(0)
    weights[0] = {name: value.clone() for name, value in model.state_dict().items()}

    def after(step, loss):
        recorded = recorder(step, loss=loss, lr=1e-3)
        assert (recorded is None) == bool(step % 2)
        weights[step] = {name: value.clone() for name, value in model.state_dict().items()}

    learn(model, 5, after)
    found, scans = read_recording(tmp_path / "run.zarr"), []
    for step in (0, 2, 4):
        model.load_state_dict(weights[step])
        scans.append(metaint.scan(model, TOKENS, [heads(), ResidualProbe()]))
    for group in ("heads", "residual"):
        xr.testing.assert_identical(found[group].to_dataset(), together(scans, [0, 2, 4], group))
        xr.testing.assert_equal(recorder.last[group].to_dataset(), scans[-1][group].to_dataset())
    assert len(np.unique(found["heads"]["entropy"].values[:, 0, 0])) == 3
    assert recorder.steps == [0, 2, 4]
    there = scans[0].attrs | {"run": "a", "records": 3}
    assert {name: found.attrs[name] for name in there} == there

    loaded = metaint.load(tmp_path / "run.zarr")
    for group in ("heads", "residual"):
        for i, scan in enumerate(scans):
            one = loaded[group].to_dataset().isel(step=i, drop=True)
            xr.testing.assert_identical(one, scan[group].to_dataset().assign_attrs(one.attrs))


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (3, [0, 3, 6]),
        (np.int64(4), [0, 4]),
        ([1, 2, 5], [1, 2, 5]),
        (np.array([0, 6]), [0, 6]),
        (lambda step: step in (2, 3), [2, 3]),
    ],
)
def test_every_is_a_number_the_steps_or_a_function(every, steps, model, tmp_path):
    recorder = recorder_of(model, tmp_path / "run.zarr", every=every)
    for step in range(7):
        recorder(step)
    assert recorder.steps == steps_of(tmp_path / "run.zarr") == steps


def test_scalars_may_come_and_go(model, tmp_path):
    recorder = recorder_of(model, tmp_path / "run.zarr")
    recorder(0)
    recorder(1, loss=torch.tensor([2.0], requires_grad=True))
    recorder(2, loss=np.float32(1), accuracy=1)
    recorder(3)
    for found in (read_recording(tmp_path / "run.zarr"), metaint.load(tmp_path / "run.zarr")):
        np.testing.assert_array_equal(found["training"]["loss"], [np.nan, 2, 1, np.nan])
        np.testing.assert_array_equal(found["training"]["accuracy"], [np.nan, np.nan, 1, np.nan])
        assert found["training"]["step"].values.tolist() == [0, 1, 2, 3]


def test_training_can_t_tell_that_it_is_recorded(tmp_path):
    plain, recorded = build(KIND), build(KIND)
    recorder = recorder_of(recorded, tmp_path / "run.zarr", every=lambda step: step % 2 == 1)
    modes = []

    def after(step, loss):
        recorder(step, loss=loss)
        modes.append((recorded.training, torch.is_grad_enabled(), [module.training for module in recorded.modules()]))

    assert learn(plain, 5) == learn(recorded, 5, after)
    assert [torch.rand(()).item(), random.random(), np.random.rand()] == after_learning(build(KIND))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, recorded.state_dict()[name])
    assert all(training and grad and all(flags) for training, grad, flags in modes)
    assert recorder.steps == [1, 3, 5]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        recorder(7)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    wanted = metaint.scan(recorded, TOKENS, [heads()])["heads"].to_dataset()
    xr.testing.assert_equal(recorder.last["heads"].to_dataset(), wanted)


def after_learning(model):
    learn(model, 5)
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def test_a_probe_that_draws_leaves_the_random_states(model, tmp_path):
    class Drawing(HeadProbe):
        def compute(self):
            torch.rand(3), random.random(), np.random.rand()
            return super().compute()

    recorder = recorder_of(model, tmp_path / "run.zarr", [Drawing(["entropy"])])
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    recorder(0)
    assert states == [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


# ---- bad input --------------------------------------------------------------------------------------------------

BAD = [
    ({"every": 0}, InputError, "every is 0: give a number of steps above 0, a list of steps, or a function"),
    ({"every": "10"}, InputError, "every is '10': give a number"),
    ({"every": []}, InputError, r"every is \[\]: give a number"),
    ({"every": None}, InputError, "every is None: give a number"),
    ({"every": [1, 2.5]}, InputError, "a step in every is 2.5: it must be an integer"),
    ({"probes": ()}, InputError, r"probes is empty: pass at least one, such as \[metaint.HeadProbe"),
    ({"tokens": TOKENS.float()}, InputError, "tokens has dtype torch.float32"),
    ({"tokens": torch.full((1, 4), 100)}, InputError, "tokens holds id 100"),
]


@pytest.mark.parametrize(("options", "error", "sentence"), BAD)
def test_bad_arguments_get_one_sentence(options, error, sentence, model, tmp_path):
    options = {"probes": [heads()], "every": 1, "tokens": TOKENS, **options}
    with pytest.raises(error, match=sentence) as caught:
        Recorder(model, options.pop("probes"), path=tmp_path / "run.zarr", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_calls_get_one_sentence_and_write_nothing(model, tmp_path):
    recorder = recorder_of(model, tmp_path / "run.zarr", every=5)
    for step, scalars, sentence in [
        (1.5, {}, "step is 1.5: it must be an integer"),
        ("1", {}, "step is '1': it must be an integer"),
        (5, {"loss": torch.ones(2)}, "the scalar loss is a Tensor: give one number under a plain name"),
        (5, {"loss": None}, "the scalar loss is a NoneType"),
        (5, {"train/loss": 1.0}, "the scalar train/loss is a float: give one number under a plain name"),
    ]:
        with pytest.raises(InputError, match=sentence):
            recorder(step, **scalars)
    assert not (tmp_path / "run.zarr").exists()
    recorder(5)
    for step in (5, 3):
        with pytest.raises(InputError, match=rf"step is {step}, and step 5 is already recorded in .*: steps must rise"):
            recorder(step)
    assert steps_of(tmp_path / "run.zarr") == [5]


def test_defaults_are_those_of_scan(tmp_path):
    model = build("gpt2" if "gpt2" in available_kinds() else KIND)
    recorder = Recorder(model, [heads()], every=1, path=tmp_path / "deep" / "er" / "run.zarr")
    recorder(0)
    assert recorder.last.attrs["task"] == "repeated_tokens"
    wanted = metaint.scan(model, probes=[heads()])["heads"].to_dataset()
    xr.testing.assert_equal(recorder.last["heads"].to_dataset(), wanted)
    text = Recorder(model, [heads()], every=1, path=tmp_path / "text.zarr", tokens="w5 w6 w7", attributes={"a": KIND})
    text(0)
    assert read_recording(tmp_path / "text.zarr").attrs["a"] == KIND


def test_resume_goes_on_with_the_same_recording_alone(model, tmp_path):
    path = tmp_path / "run.zarr"
    recorder_of(model, path, attributes={"model": "mine"})(3, loss=1)
    mine = {"resume": True, "attributes": {"model": "mine"}}
    layers = build(KIND, n_layers=1)
    for other, options, sentence in [
        (model, {"attributes": {}}, r"a recording with model 'mine', and this recorder has '.*': resume with the same"),
        (layers, {}, "a recording with n_layers 2, and this recorder has 1"),
        (model, {"tokens": TOKENS + 1}, "a recording with tokens_sha256"),
        (model, {"seed": 1}, "a recording with seed 0, and this recorder has 1"),
        (model, {"probes": [heads(), ResidualProbe()]}, r"with probes \['heads'\], and this recorder has \['heads', "),
    ]:
        with pytest.raises(InputError, match=sentence):
            recorder_of(other, path, **{**mine, **options})
    other = recorder_of(model, path, [HeadProbe(["entropy", "sink_rate"])], **mine)
    with pytest.raises(InputError, match=r"the scan's /heads/\w+ has another shape or other labels than the records"):
        other(4)
    recorder = recorder_of(model, path, **mine)
    with pytest.raises(InputError, match="step is 3, and step 3 is already recorded"):
        recorder(3)
    assert recorder.last is None
    recorder(4, loss=2)
    assert steps_of(path) == metaint.load(path)["heads"]["step"].values.tolist() == [3, 4]


def test_resume_knows_every_kind_of_variable_again(model, tmp_path):
    path = tmp_path / "run.zarr"
    first = recorder_of(model, path, [heads(), ResidualProbe()])
    scans = [first(0)]
    change(model)
    scans.append(recorder_of(model, path, [heads(), ResidualProbe()], resume=True)(1))
    for group in ("heads", "residual"):
        xr.testing.assert_identical(read_recording(path)[group].to_dataset(), together(scans, [0, 1], group))
