"""`Recorder`: what it records in any loop, that training can't tell, and what a kill at any moment leaves."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from torch.optim import optimizer as optimizers

import metaint
from metaint import HeadProbe
from metaint.errors import InputError, StoreError
from metaint.probes.residual import ResidualProbe
from metaint.scanning import record_store as records, recorder as recording
from metaint.scanning.recorder import Recorder
from metaint.scans.recordings import read_recording
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build

KIND = next(kind for kind in ("native-mlp-ln", "hooked") if kind in available_kinds())
TOKENS = repeated_tokens(96, 8, batch=3, ids=(5, 95), seed=1)
needs_bridge = pytest.mark.skipif("gpt2" not in available_kinds(), reason="needs a bridge around a Hugging Face model")


def heads():
    return HeadProbe(["previous_token", "entropy"])


def recorder_of(model, path, probes=None, **options):
    return Recorder(model, probes or [heads()], path=path, **{"every": 1, "tokens": TOKENS, **options})


@pytest.fixture(scope="module")
def model():
    """Shared, so that it is audited once: for tests that don't care what its weights are."""
    return build(KIND)


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


def test_a_long_recording_fills_several_chunks(model, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK_RECORDS", 4)
    recorder, scans = recorder_of(model, tmp_path / "run.zarr"), []
    for step in range(11):
        scans.append(recorder(step, loss=step))
        change(model)
    for found in (read_recording(tmp_path / "run.zarr"), metaint.load(tmp_path / "run.zarr")):
        wanted = together(scans, list(range(11)), "heads")["entropy"].drop_vars("window")
        xr.testing.assert_equal(found["heads"]["entropy"].drop_vars("window"), wanted)
        assert found["training"]["loss"].values.tolist() == list(range(11))


def test_appending_writes_no_earlier_record_again(model, tmp_path):
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    recorder(0)
    chunk = path / "heads" / "entropy" / "c" / "0" / "0" / "0"
    row = recorder.last["heads"]["entropy"].values
    chunk.write_bytes(row[::-1].tobytes() + chunk.read_bytes()[row.nbytes :])
    change(model)
    recorder(1)
    later = recorder.last["heads"]["entropy"].values
    assert chunk.read_bytes().startswith(row[::-1].tobytes() + later.tobytes())
    with pytest.raises(StoreError, match=r"run\.zarr is damaged: heads/entropy/c/0/0/0 does not hold what was written"):
        read_recording(path)  # not blessed by the record after it


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


# ---------------------------------------------------------------------------------------------------------------------
# Kills

MOMENTS = [("_write_row", 0), ("_write_row", 3), ("_replace", 0), ("_lengthen", 0), ("_lengthen", 7)]
MOMENTS += [("_commit", 0), ("_add_scalar", 0)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is undone after it."""


def killed_at(monkeypatch, name, call, error):
    """Let the given call of a step of the append fail halfway."""
    module = recording if name == "create" else records
    original, calls = getattr(module, name), []

    def fails(*args):
        calls.append(args)
        if len(calls) == call + 1:
            if name == "_write_row":
                original(*args[:3], args[3] * np.nan, *args[4:])
            if name == "_replace":
                args[0].with_name("half").write_bytes(args[1][:3])
            raise error
        original(*args)

    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [(*moment, Killed) for moment in MOMENTS]
    + [(*moment, (KeyboardInterrupt, SystemExit)[i % 2]) for i, moment in enumerate(MOMENTS[::2])],
)
def test_a_kill_leaves_whole_records_and_resume_goes_on(name, call, error, model, tmp_path, monkeypatch):
    path, scans = tmp_path / "run.zarr", []
    recorder = recorder_of(model, path)
    for step in (0, 1):
        scans.append(recorder(step, loss=step))
        change(model)
    with monkeypatch.context() as patch:
        killed_at(patch, name, call, error)
        if error is Killed:
            patch.setattr(recording, "trim", lambda *_: None)
        with pytest.raises(error):
            recorder(2, loss=2, accuracy=0.5)
    assert steps_of(path) == [0, 1]
    if error is Killed:
        recorder = recorder_of(model, path, resume=True)
    assert metaint.load(path)["heads"]["step"].values.tolist() == recorder.steps == [0, 1]
    for step in (2, 3):
        scans.append(recorder(step, loss=step, accuracy=0.5))
        change(model)
    found = read_recording(path)
    xr.testing.assert_identical(found["heads"].to_dataset(), together(scans, [0, 1, 2, 3], "heads"))
    for training in (found["training"], metaint.load(path)["training"]):
        assert training["loss"].values.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(training["accuracy"], [np.nan, np.nan, 0.5, 0.5])
    assert [file.name for file in tmp_path.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("name", ["_write_row", "_lengthen", "_commit"])
def test_a_kill_at_the_first_record_leaves_nothing_at_the_path(name, model, tmp_path, monkeypatch):
    path, model = tmp_path / "run.zarr", model
    with monkeypatch.context() as patch:
        killed_at(patch, name, 1 if name != "_commit" else 0, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            recorder_of(model, path)(0)
    assert list(tmp_path.iterdir()) == []
    recorder_of(model, path, resume=True)(0)
    assert steps_of(path) == [0]


CHILD = """
    import sys, torch, metaint
    torch.set_num_threads(1)
    from metaint.scanning import recorder as recording
    from metaint.scanning import record_store as records
    from tests.scanning.test_recorder import KIND, build, recorder_of
    model = build(KIND)
    scan = recording.scan

    def once(*args, **options):  # its time goes into writing: every number is the step
        global found
        found = globals().get("found") or scan(*args, **options)
        return found.map_over_datasets(lambda data: data * 0 + step if "layer" in data.dims else data)

    recording.scan = once
    recorder = recorder_of(model, sys.argv[1])
    for step in range(10**6):
        recorder(step, loss=step, **({"late": step} if step > 40 else {}))
"""


def test_what_a_killed_process_leaves_is_whole(tmp_path):
    path, moments = tmp_path / "run.zarr", random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    place = {**os.environ, "TMPDIR": str(tmp_path)}  # where what it can't clean up after a kill is forgotten
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=place)
    try:
        for i in range(12):  # a stopped process leaves on disk what a killed one would
            wait_for(path, 5 * i + 1, child)
            time.sleep(0.03 * moments.random())
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            shutil.copytree(path, tmp_path / f"{i}.zarr")
            child.send_signal(signal.SIGCONT)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert all(check_whole(tmp_path / f"{i}.zarr") > 5 * i for i in range(12))
    records = check_whole(path)
    recorder = recorder_of(build(KIND), path, resume=True)
    recorder(10**6, loss=1)
    assert len(metaint.load(path)["heads"]["step"]) == len(recorder.steps) == records + 1


def wait_for(path, records, child):
    patience = time.monotonic() + 60
    while not path.exists() or json.loads((path / "zarr.json").read_text())["attributes"]["records"] < records:
        assert time.monotonic() < patience
        assert child.poll() is None
        time.sleep(0.005)


def check_whole(path):
    found = read_recording(path)
    steps = list(range(found.attrs["records"]))
    assert found["heads"]["step"].values.tolist() == found["training"]["step"].values.tolist() == steps
    assert found["training"]["loss"].values.tolist() == steps
    for name in ("entropy", "previous_token", "entropy_low"):
        values = found["heads"][name].values
        assert (values == np.asarray(steps)[:, None, None]).all(), name
    return len(steps)


@pytest.mark.parametrize("name", ["_write_row", "_lengthen", "_replace", "create"])
def test_a_full_disk_is_one_sentence_and_the_records_before_stay(name, model, tmp_path, monkeypatch):
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    if name != "create":
        recorder(0)
    with monkeypatch.context() as patch:
        killed_at(patch, name, 0, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(StoreError, match=r"can't be written to .*run\.zarr \(No space left on device\): the rec"):
            recorder(1, new=1)
    if name != "create":
        assert steps_of(path) == metaint.load(path)["heads"]["step"].values.tolist() == [0]
    assert recorder.steps == ([] if name == "create" else [0])
    recorder(2)
    assert steps_of(path)[-1] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Loops of others


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


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

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


def test_what_is_at_the_path_is_never_overwritten(repeated_scan, model, tmp_path):
    path = tmp_path / "run.zarr"
    recorder_of(model, path)(0)
    with pytest.raises(StoreError, match=r"run\.zarr exists: give another path, or resume=True to go on"):
        recorder_of(model, path)
    metaint.save(repeated_scan, tmp_path / "scan.zarr")
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("scan.zarr", "notes.txt"):
        with pytest.raises(StoreError, match=rf"{name} is not a recording, or a damaged one"):
            recorder_of(model, tmp_path / name, resume=True)
    with pytest.raises(StoreError, match=r"can't be written to .*notes\.txt"):
        recorder_of(model, tmp_path / "notes.txt" / "run.zarr")
    late = recorder_of(model, tmp_path / "late.zarr")
    recorder_of(model, tmp_path / "late.zarr")(0)
    with pytest.raises(StoreError, match=r"the recording could not be written to .*late\.zarr"):
        late(1)
    assert steps_of(tmp_path / "late.zarr") == [0]


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


def test_what_is_no_recording_is_named(repeated_scan, model, tmp_path):
    with pytest.raises(StoreError, match=r"nowhere\.zarr does not exist: give the folder that a Recorder wrote"):
        read_recording(tmp_path / "nowhere.zarr")
    metaint.save(repeated_scan, tmp_path / "scan.zarr")
    with pytest.raises(StoreError, match=r"scan\.zarr is not a recording, or a damaged one"):
        read_recording(tmp_path / "scan.zarr")
    path = tmp_path / "run.zarr"
    recorder = recorder_of(model, path)
    recorder(0)
    about = (path / "heads" / "entropy" / "zarr.json").read_text()
    (path / "heads" / "entropy" / "zarr.json").write_text('{"zarr_format"')
    for read in (read_recording, lambda path: recorder_of(model, path, resume=True)):
        with pytest.raises(StoreError, match=r"run\.zarr is damaged: heads/entropy/zarr\.json does not hold"):
            read(path)
    with pytest.raises(StoreError, match="can't be written"):
        recorder(1)
    (path / "heads" / "entropy" / "zarr.json").write_text(about.replace('"shape": [1', '"shape": [0'))
    with pytest.raises(StoreError, match=r"run\.zarr is damaged"):
        read_recording(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.zarr is not a recording, or a damaged one"):
        read_recording(path)


def test_a_copy_made_by_save_is_read_but_not_written(model, tmp_path):
    recorder_of(model, tmp_path / "run.zarr")(0)
    recording = read_recording(tmp_path / "run.zarr")
    xr.testing.assert_identical(metaint.load(tmp_path / "run.zarr"), recording)
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False) as stored:
        rows = stored.load()
    for copied in (recording, rows, rows.map_over_datasets(lambda data: data.drop_encoding())):
        metaint.save(copied, tmp_path / "copy.zarr")
        xr.testing.assert_identical(read_recording(tmp_path / "copy.zarr"), recording)
    with pytest.raises(
        StoreError, match=r"step was rewritten since it was recorded, compressed: record to another path"
    ):
        recorder_of(model, tmp_path / "copy.zarr", resume=True)(1)
    assert steps_of(tmp_path / "copy.zarr") == [0]
