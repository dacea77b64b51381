"""`Recorder` in the loops of others: an optimiser's steps, TransformerLens's training, a Trainer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from torch.optim import optimizer as optimizers

import metaint
from metaint.errors import InputError
from metaint.scans.recordings import read_recording
from tests.builders import available_kinds, build
from tests.scanning.recordings import KIND, TOKENS, heads, learn, recorder_of, steps_of

needs_bridge = pytest.mark.skipif("gpt2" not in available_kinds(), reason="needs a bridge around a Hugging Face model")


def test_following_counts_the_optimiser_steps_of_this_model_alone(tmp_path):
    model, other = build(KIND), build(KIND)
    recorder = recorder_of(model, tmp_path / "run.zarr", every=2)
    with recorder.following() as same:
        assert same is recorder
        losses = learn(model, 3)
        learn(other, 5)
        learn(model, 2)  # with an optimiser of its own
    learn(model, 4)
    assert recorder.steps == [0, 2, 4]
    with recorder.following():  # goes on where it left off
        learn(model, 3)
    assert recorder.steps == [0, 2, 4, 6, 8]
    found = read_recording(tmp_path / "run.zarr")["training"]["loss"].values
    assert np.isnan(found[0])
    assert found[1] <= losses[1] <= 2 * found[1]  # `learn` scales what the model returns
    assert len(optimizers._global_optimizer_post_hooks) == 0


def test_two_optimisers_of_one_model_count_once(tmp_path):
    model = build(KIND)
    recorder = recorder_of(model, tmp_path / "run.zarr")
    parameters = list(model.parameters())
    both = [torch.optim.SGD(part, lr=1e-3) for part in (parameters[:4], parameters[4:])]
    with recorder.following(start=10):
        for _ in range(3):
            model(TOKENS, return_type="loss").backward()
            for optimizer in both:
                optimizer.step()
    assert recorder.steps == [10, 11, 12, 13]


def test_following_takes_its_hooks_off_also_by_an_exception(tmp_path):
    model = build(KIND)
    before = len(model._forward_hooks)

    def breaks(step, loss):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), recorder_of(model, tmp_path / "run.zarr").following():
        learn(model, 2, breaks)
    assert len(optimizers._global_optimizer_post_hooks) == 0
    assert len(model._forward_hooks) == before
    assert steps_of(tmp_path / "run.zarr") == [0, 1]


def test_following_passes_over_the_steps_that_resume_found(tmp_path):
    model = build(KIND)
    with recorder_of(model, tmp_path / "run.zarr").following():
        learn(model, 3)
    recorder = recorder_of(model, tmp_path / "run.zarr", resume=True)
    with recorder.following(start=1):  # from an older checkpoint
        learn(model, 4)
    assert recorder.steps == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="step is 4, and step 5 is already recorded"), recorder.following(start=4):
        pass


def test_transformer_lens_s_own_training_is_followed(tmp_path):
    training = pytest.importorskip("transformer_lens.tools.training")
    data = [{"tokens": row} for row in torch.randint(5, 95, (12, 8), generator=torch.Generator().manual_seed(0))]
    config = training.TrainConfig(num_epochs=2, batch_size=4, lr=1e-3, device="cpu", print_every=None)
    plain, model = build(KIND), build(KIND)
    training.train(plain, config, data)
    recorder = recorder_of(model, tmp_path / "run.zarr", every=3)
    with recorder.following():
        training.train(model, config, data)
    assert recorder.steps == [0, 3, 6]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    found = read_recording(tmp_path / "run.zarr")
    assert np.isfinite(found["training"]["loss"].values[1:]).all()
    wanted = metaint.scan(model, TOKENS, [heads()])["heads"].to_dataset()
    xr.testing.assert_equal(recorder.last["heads"].to_dataset(), wanted)


@needs_bridge
def test_a_trainer_of_the_wrapped_model_is_recorded(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    bridge, weights = build("gpt2"), []
    rows = torch.randint(5, 95, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(tmp_path, max_steps=4, learning_rate=1e-2, **options)
    recorder = recorder_of(bridge, tmp_path / "run.zarr", every=2)
    trainer = Trainer(bridge.original_model, arguments, train_dataset=data, callbacks=[recorder.as_callback()])
    weights.append(metaint.scan(bridge, TOKENS, [heads()]))
    trainer.train()
    weights.append(metaint.scan(bridge, TOKENS, [heads()]))
    found = read_recording(tmp_path / "run.zarr")
    assert found["heads"]["step"].values.tolist() == [0, 2, 4]
    for i, scan in zip((0, 2), weights, strict=True):
        np.testing.assert_array_equal(found["heads"]["entropy"].values[i], scan["heads"]["entropy"].values)
    assert len(np.unique(found["heads"]["entropy"].values[:, 0, 0])) == 3
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    np.testing.assert_array_equal(found["training"]["loss"].values, [np.nan, logged[1], logged[3]])
    with pytest.raises(InputError, match="step is 0, and step 4 is already recorded"):
        trainer.train()


def test_the_callback_as_a_trainer_calls_it(tmp_path):
    model = build(KIND)
    recorder = recorder_of(model, tmp_path / "run.zarr")

    def run(recorder, steps, model=model, main=True):
        callback = recorder.as_callback()
        state = SimpleNamespace(global_step=steps[0], is_world_process_zero=main, log_history=[])
        callback.on_train_begin(None, state, None, model=model)
        for state.global_step in steps[1:]:
            callback.on_step_end(None, state, None, model=model)
            state.log_history += [{"loss": 1 / state.global_step}, {"grad_norm": 3.0}]

    run(recorder, [0, 1, 2])
    np.testing.assert_array_equal(read_recording(tmp_path / "run.zarr")["training"]["loss"], [np.nan, np.nan, 1])
    again = recorder_of(model, tmp_path / "run.zarr", resume=True)
    run(again, [1, 2, 3])  # the Trainer went back to its checkpoint
    assert again.steps == [0, 1, 2, 3]
    run(again, [3, 4])  # and trains on
    run(again, [9, 10], main=False)
    assert again.steps == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="the Trainer trains another model than the recorder scans"):
        run(again, [4, 5], model=build(KIND))
