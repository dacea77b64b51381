"""The norm growth lab: what a run records, that a kill changes nothing, what is refused, and what findings say."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from rich.console import Console

from metaint.errors import InputError, StoreError
from metaint.labs.common import resumable
from metaint.labs.common.side_by_side import Diverged
from metaint.labs.norm_growth import findings as norm_findings, run as norm_training, study as norm_growth
from metaint.labs.norm_growth.findings import block_steps, describe, slopes_of
from metaint.labs.norm_growth.run import seconds, settings_of, train_run, trained_model
from metaint.labs.norm_growth.settings import Settings, characters
from metaint.labs.norm_growth.study import study
from metaint.scans.recordings import read_recording

TEXT = "the norm of the parameters grows as the square root of time; attention saturates. " * 20
SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 16, "length": 16, "batch": 4, "records": 5}
RUN = Settings("pre", "adamw", 12, **SIZES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, and its recording."""
    folder = tmp_path_factory.mktemp("lab") / RUN.name
    return folder, train_run(folder, RUN, TEXT)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A study of two runs through `run`: its folder, findings and what was printed."""
    out, console = tmp_path_factory.mktemp("lab") / "study", Console(width=240, file=io.StringIO())
    findings = norm_growth.run(
        console, out, TEXT, steps=30, norms=["pre", "post"], optimisers=["adamw"], **{**SIZES, "n_layers": 2}
    )
    return out, findings, console.file.getvalue()


def killed(monkeypatch, where, step):
    """The run without what comes after `where` (a method of a run) is called at this step."""
    original = getattr(norm_training._Run, where)

    def stop(self, *args, **options):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(norm_training._Run, where, stop)


def test_a_run_records_weights_saturation_and_heads(whole):
    folder, recording = whole
    assert recording["weights"]["step"].values.tolist() == RUN.record_steps == [0, 1, 2, 6, 12]
    assert {"weights", "saturation", "heads", "training"} == set(recording.children)
    assert recording["saturation"]["scale"].values.tolist() == [1.0, math.inf]
    assert recording["weights"]["step_norm"].isnull().all(["layer", "part"]).values.tolist() == [True] + [False] * 4
    training = recording["training"].to_dataset()
    assert np.isnan(training["loss"][0])
    assert training["held_out_loss"][-1] < training["held_out_loss"][0] - 0.1
    assert training["loss"][-1] < training["loss"][1]
    assert {path.name for path in folder.iterdir()} == {"settings.json", "recording.zarr", "state.safetensors"}
    assert settings_of(folder) == RUN
    assert read_recording(folder / "recording.zarr").identical(recording)


@pytest.mark.parametrize(("where", "step"), [("take_step", 5), ("record", 12)])
def test_a_killed_run_goes_on_to_the_very_same_numbers(whole, tmp_path, monkeypatch, where, step):
    with monkeypatch.context() as patch:
        killed(patch, where, step)
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path / "run", RUN, TEXT)
    assert train_run(tmp_path / "run", RUN, TEXT).identical(whole[1])
    ours, theirs = (trained_model(folder, TEXT).state_dict() for folder in (tmp_path / "run", whole[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_kill_between_record_and_state_loses_nothing(whole, tmp_path, monkeypatch):
    def save(folder, model, optimizer, step, save=resumable.save_state):
        if step == 6:
            raise KeyboardInterrupt
        save(folder, model, optimizer, step)

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "save_state", save)
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path / "run", RUN, TEXT)
    assert read_recording(tmp_path / "run" / "recording.zarr")["training"].sizes["step"] == 4
    assert train_run(tmp_path / "run", RUN, TEXT).identical(whole[1])


def test_a_run_with_momentum_goes_on_too(tmp_path, monkeypatch):
    settings = Settings("output", "sgd", 5, **{**SIZES, "records": 3})
    expected = train_run(tmp_path / "whole", settings, TEXT)
    with monkeypatch.context() as patch:
        killed(patch, "take_step", 4)
        with pytest.raises(KeyboardInterrupt):
            train_run(tmp_path / "run", settings, TEXT)
    assert train_run(tmp_path / "run", settings, TEXT).identical(expected)


def test_a_finished_run_is_not_trained_again(whole, monkeypatch):
    killed(monkeypatch, "take_step", 12)
    before = (whole[0] / "state.safetensors").stat().st_mtime_ns
    assert train_run(whole[0], RUN, TEXT).identical(whole[1])
    assert (whole[0] / "state.safetensors").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(InputError, match="a run with seed 0, and 1 was asked for: ask for the same, give another"):
        train_run(whole[0], Settings("pre", "adamw", 12, seed=1, **SIZES), TEXT)
    with pytest.raises(InputError, match="text_sha256"):
        train_run(whole[0], RUN, TEXT + "!")
    with pytest.raises(InputError, match="a run with steps 12, and 13"):
        train_run(whole[0], Settings("pre", "adamw", 13, **SIZES), TEXT)


def test_damage_is_named(tmp_path):
    folder = tmp_path / "run"
    settings = Settings("pre", "sgd", 1, **SIZES)
    train_run(folder, settings, TEXT)
    (folder / "recording.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(StoreError, match="lacks its record of step 0"):
        train_run(folder, settings, TEXT)
    (folder / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match=r"state.safetensors is damaged .*delete .* to train it again"):
        train_run(folder, settings, TEXT)
    (folder / "settings.json").write_text("{")
    with pytest.raises(StoreError, match=r"settings.json is damaged"):
        train_run(folder, settings, TEXT)
    with pytest.raises(StoreError, match="holds no trained model"):
        trained_model(tmp_path / "nothing", TEXT)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm": "none"}, "norm is 'none': choose one of pre, output, post."),
        ({"optimiser": "adam"}, "optimiser is 'adam': choose one of adamw, sgd."),
        ({"steps": 0}, "steps is 0: give at least 1."),
        ({"learning_rate": 0.0}, "learning_rate is 0: give a finite number above 0."),
        ({"learning_rate": math.nan}, "learning_rate is nan: give a finite number above 0."),
        ({"weight_decay": -1.0}, "weight_decay is -1: give 0 or a finite number above it."),
        ({"seed": -1}, "seed is -1: give at least 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(InputError) as error:
        Settings(**{"norm": "pre", "optimiser": "sgd", "steps": 5, **options})
    assert str(error.value) == sentence


def test_bad_input_to_a_study_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="minutes is 0: give a number above 0"):
        study(tmp_path / "out", TEXT, minutes=0, **SIZES)
    with pytest.raises(InputError, match="norm is 'sandwich'"):
        study(tmp_path / "out", TEXT, norms=["sandwich"], **SIZES)
    with pytest.raises(InputError, match="optimisers is 'sgd': give a list"):
        study(tmp_path / "out", TEXT, optimisers="sgd", **SIZES)
    with pytest.raises(InputError, match="text has 5 characters: give at least 320, for windows of 16"):
        study(tmp_path / "out", "short", steps=5, **SIZES)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file, which is a file: name a folder"):
        study(tmp_path / "file", TEXT, steps=5, **SIZES)
    assert not (tmp_path / "out").exists()


def test_unigram_entropy_is_that_of_the_characters():
    assert characters("ab" * 200, 16).entropy == pytest.approx(math.log(2))
    data = characters(TEXT, 16)
    assert len(data.train) + math.floor(0.1 * len(TEXT)) == len(TEXT)
    assert data.held_out.shape[1] == 16


def test_a_study_leaves_runs_tables_and_figures(found):
    out, findings, text = found
    names = ["pre-adamw-lr0.003-wd0.01", "post-adamw-lr0.003-wd0.01"]
    assert {path.name for path in out.iterdir()} == {*names, "figures.html", "summary.csv", "slopes.csv"}
    assert findings.summary["run"].tolist() == list(findings.recordings) == names
    written = pd.read_csv(out / "summary.csv")
    assert written["trend"].tolist() == findings.summary["trend"].tolist()
    assert {"norm_last", "r2_sqrt_t", "exponent", "aligned_share", "similarity_null", "argmax_heads"} <= set(written)
    for title in ("Does the norm grow?", "Does attention saturate?", "Homogeneity slopes", "nearer misaligned"):
        assert title in text
    assert "not single steps" in " ".join(text.split())
    assert "plotly" in (out / "figures.html").read_text()


def test_slopes_are_those_of_the_placement(found):
    slopes = found[1].slopes
    assert (slopes["slope"] - slopes["expected"]).abs().max() < 0.1
    told = slopes[slopes["run"].str.startswith("post")].set_index("activation")["slope"]
    assert not told[["embedding", "scores", "stream"]].isna().any()


def test_a_study_goes_on_with_as_many_steps(found, monkeypatch):
    told = []
    monkeypatch.setattr(norm_growth, "seconds", None)  # nothing is timed
    arguments = {"minutes": 1, "norms": ["pre"], "optimisers": ["adamw"], **SIZES, "n_layers": 2}
    again = study(found[0], TEXT, on_run=told.append, **arguments)
    assert again.summary["steps"].tolist() == [30]
    assert "has runs of 30 steps" in told[0]


def test_minutes_become_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(norm_growth, "seconds", lambda settings, text: (0.1, 0.5))
    drafts = [Settings("pre", "sgd", 1, **SIZES)] * 2
    steps = norm_growth.steps_for(drafts, 1, tmp_path, TEXT, lambda told: None)
    assert steps == pytest.approx((60 * 0.95 / 2 - 5 * 0.5) / 0.1, abs=2)
    assert norm_growth.steps_for(drafts, 0.001, tmp_path, TEXT, lambda told: None) == 30


def test_seconds_are_measured(monkeypatch):
    monkeypatch.setattr(norm_training, "_MEASURED", 0.01)
    assert all(0 < value < 10 for value in seconds(RUN, TEXT))


def test_a_diverged_run_is_told_and_left_out(tmp_path, monkeypatch):
    def forward(self, *args, original=norm_training._Run.finite):
        return original(self, math.nan if self.settings.learning_rate > 1 else args[0])

    monkeypatch.setattr(norm_training._Run, "finite", forward)
    arguments = {"steps": 4, "norms": ["pre"], "optimisers": ["sgd"], **SIZES}
    findings = study(tmp_path, TEXT, learning_rates=[0.1, 100.0], **arguments)
    assert findings.summary["growth"].eq("diverged").tolist() == [False, True]
    assert list(findings.recordings) == ["pre-sgd-lr0.1-wd0"]
    with pytest.raises(Diverged, match="learning_rate is 100, with which pre-sgd-lr100-wd0 had no finite loss at step"):
        train_run(tmp_path / "other", Settings("pre", "sgd", 4, 100.0, **SIZES), TEXT)
    with pytest.raises(InputError, match="no run with a finite loss"):
        study(tmp_path, TEXT, learning_rates=[100.0], **arguments)


def test_steps_of_the_blocks_add_up_over_their_parts(whole):
    weights = whole[1]["weights"].to_dataset()
    blocks = block_steps(weights)
    gain = np.diff(blocks["norm"].values ** 2)
    dot = (blocks["alignment"] * blocks["norm"].shift(step=1) * blocks["step_norm"]).values[1:]
    assert gain == pytest.approx(2 * dot + blocks["step_norm"].values[1:] ** 2, abs=1e-9)
    assert np.isnan(blocks["alignment"][0])
    assert (blocks["direction_cosine"][1:] > 0.9).all()


def test_words_follow_from_planted_norms(whole):
    recording = whole[1].copy(deep=True)
    weights = recording["weights"].to_dataset()
    t = weights["step"].values
    weights["total_norm_without_embeddings"] = ("step", 3 + 2 * np.sqrt(t))
    recording["weights"] = xr.DataTree(weights)
    slopes = slopes_of(whole[0], RUN, TEXT)
    row = describe(recording, RUN, slopes)
    assert row["growth"] == f"grows, ×{1 + 2 / 3 * math.sqrt(12):.2f}"
    assert row["trend"].startswith("√t, R² 1.000: ")
    assert row["best_trend"] == "sqrt_t"
    assert row["spacing"] == 6
    assert row["dynamics"].startswith("nearer misaligned")
    assert row["run"] == "pre-adamw-lr0.003-wd0.01"
    weights["total_norm_without_embeddings"] = ("step", 3 - 0.1 * np.sqrt(t))
    recording["weights"] = xr.DataTree(weights)
    assert describe(recording, RUN, slopes)["growth"].startswith("shrinks, ×0.88")


@pytest.mark.parametrize(
    ("similarity", "null", "off", "words"),
    [
        (0.95, 0.5, 0.3, "yes: 0.950 against 0.500"),
        (0.95, 0.9, 0.3, "no more than the null: 0.950 against 0.900"),
        (0.7, 0.5, 0.3, "partly: 0.700 against 0.500"),
        (0.95, 0.5, 0.78, "no, nearly uniform: 0.950 against 0.500"),
    ],
)
def test_saturation_needs_a_margin_and_attention_that_is_not_uniform(whole, similarity, null, off, words):
    data = whole[1]["saturation"].to_dataset()
    assert data["off_maximum_uniform"][-1] == pytest.approx(0.8, abs=0.05)
    planted = {"similarity": similarity, "similarity_low": similarity, "similarity_null": null, "off_maximum": off}
    data = data.assign({name: xr.full_like(data[name], value) for name, value in planted.items()})
    assert norm_findings._saturation(data)["saturation"] == words
