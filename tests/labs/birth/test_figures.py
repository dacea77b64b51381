"""Figures of the birth of an induction head: they show the recordings' own numbers, and what the matrices score."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from metaint.errors import InputError
from metaint.labs.birth import figures as birth, pictures
from metaint.toys.memory_transformer import memory_transformer, write_induction_head
from metaint.views.drawing.page import write_page
from metaint.views.drawing.panels import COLOURS, GREY
from metaint.views.groups.birth import plot_birth
from tests.views.figures import caption_of, titles_of

STEPS = np.array([0, 10, 20, 40])
VOCABULARY = tuple(" \n<bcdefghijk")
LONG = "fixed5-uniform-2-layer-seed0-frozen-W_K1100-W_K2100"


def recording(top=0.9, layers=2, outputs="uniform", length=128):
    """A run in which all that is learnt rises in a straight line, to `top` at most."""
    rise = top * STEPS / STEPS[-1]
    zeros = np.zeros((len(STEPS), layers, 1))
    heads = ("step", "layer", "head")
    ov, positions, early = zeros.copy(), zeros.copy(), zeros.copy()
    ov[:, -1, 0], positions[:, 0, 0], early[:, 0, 0] = rise, rise / 4, rise / 4 if length <= 64 else rise / 2
    pairs = np.full((len(STEPS), layers, 1, layers, 1), np.nan)
    if layers > 1:
        pairs[:, 0, 0, 1, 0] = rise / 3
    memory = {
        "ov_recall": (heads, ov),
        "previous_position_recall": (heads, positions),
        "previous_position_recall_early": (heads, early),
        "key_composition_recall": ((*heads, "layer_to", "head_to"), pairs),
    }
    chances = {"ov_recall": 1 / 68, "key_composition_recall": 1 / 5 if layers > 1 else np.nan}
    for name in list(memory):
        memory[f"{name}_chance"] = ("step", np.full(len(STEPS), chances.get(name, 1 / 127)))
    training = {"accuracy": rise, "accuracy_without_copies": rise / 2, "copy_accuracy": 0 * rise + 0.2}
    training |= {"loss_later": 4 - rise, "loss_first": 5 + rise, "loss_bigram": 4 + rise}
    training |= {"previous_mass": rise / 2, "induction_mass": rise, "previous_uniform": 0 * rise + 0.05}
    training |= {
        "induction_uniform": 0 * rise + 0.25,
        f"accuracy_{'bigram' if outputs == 'uniform' else 'test'}": rise / 3,
    }
    groups = {
        "/training": xr.Dataset({name: ("step", values) for name, values in training.items()}, {"step": STEPS}),
        "/memory": xr.Dataset(memory, {"step": STEPS}),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs["outputs"] = outputs
    return tree


@pytest.fixture
def runs():
    return {"seed0": recording(), "seed1": recording(0.7), "one layer": recording(0.4, layers=1)}


@pytest.fixture(scope="module")
def gradients():
    """/memory of the first gradients of two runs, without steps."""
    found = [recording(top)["memory"].to_dataset().isel(step=-1, drop=True) for top in (0.3, 0.6)]
    return dict(zip(("seed0", "seed1"), found, strict=True))


@pytest.fixture(scope="module")
def models():
    """A model as it is drawn, and with an induction head written into it."""
    sizes = {"d_vocab": len(VOCABULARY), "n_ctx": 24, "d_model": 128}
    before, after = memory_transformer(**sizes), memory_transformer(**sizes)
    write_induction_head(after, 60)
    return {"step 0": before, "step 9": after}


def named(figure, name, panel=None):
    axis = None if panel is None else f"y{panel if panel > 1 else ''}"
    return [t for t in figure.data if t.name == name and t.x[0] is not None and axis in (None, t.yaxis)]


# ---- over training ----


def test_every_figure_says_how_to_read_it_and_when_it_misleads(runs, gradients, models):
    figures = [
        plot_birth(runs),
        plot_birth({"one": recording()}),
        birth.plot_staged(runs, {"seed1": {"W_K1": 10}}),
        birth.plot_sweep(runs),
        birth.plot_first_gradients(gradients),
        pictures.plot_recall_maps(models, range(5), VOCABULARY),
        pictures.plot_attention_at_birth(models, range(5), VOCABULARY),
    ]
    for figure in figures:
        assert "How to read" in caption_of(figure)
        assert "It misleads" in caption_of(figure)
        assert figure.layout.title.text
        assert figure.layout.title.subtitle.text


def test_one_run_has_a_colour_for_each_memory_and_rings_where_they_pass_one_half():
    tree = recording()
    figure = plot_birth({"fixed5": tree})
    assert titles_of(figure) == ["in-context accuracy", "recall", "attention", "nats"]
    assert figure.layout.title.subtitle.text == "fixed5, 40 steps"
    rise = tree["training"]["accuracy"].values
    for name, values in (
        ("W_O2: ½ from 40", rise),
        ("W_K2", rise / 3),
        ("W_K1", rise / 4),
        ("W_K1, first 64", rise / 2),
    ):
        assert named(figure, name, 2)[0].y == pytest.approx(values)
    assert named(figure, "accuracy", 1)[0].y == pytest.approx(rise)
    assert named(figure, "previous token", 3)[0].y == pytest.approx(rise / 2)
    rings = [trace for trace in figure.data if trace.marker.symbol == "circle-open"]
    assert [(ring.x[0], ring.y[0], ring.yaxis) for ring in rings] == [
        (40, pytest.approx(0.9), "y"), (40, pytest.approx(0.9), "y2"), (40, pytest.approx(0.9), "y3"),
    ]  # fmt: skip
    dotted = [t for t in figure.data if t.line.dash == "dot" and t.x[0] is not None]
    assert {trace.mode for trace in dotted} == {"lines"}
    assert {round(trace.y[0], 4) for trace in dotted if trace.yaxis == "y2"} == {0.0147, 0.2, 0.0079}


def test_the_floor_is_that_of_uniform_outputs():
    def floors(tree):
        return [
            t.y[0]
            for t in plot_birth({"run": tree}).data
            if t.line.dash == "dot" and t.yaxis == "y4" and t.x[0] is not None
        ]

    assert floors(recording()) == pytest.approx([math.log(68)])
    assert floors(recording(outputs="train")) == []


def test_several_runs_have_a_colour_each_and_a_panel_for_each_memory(runs):
    figure = plot_birth(runs)
    recalls = ["recall, W_O1 / W_O2", "recall, W_K2", "recall, W_K1, first 64", "recall, W_K1"]
    attention = ["attention, previous token", "attention, induction"]
    assert titles_of(figure) == ["in-context accuracy", *recalls, *attention, "nats"]
    assert [t.line.color for t in figure.data if t.showlegend and t.x[0] is not None] == list(COLOURS[:3])
    assert named(figure, "one layer", 2)[0].y == pytest.approx(runs["one layer"]["memory"]["ov_recall"][:, 0, 0].values)
    assert not named(figure, "one layer", 3)
    assert [t.name for t in figure.data if t.line.color == GREY] == [
        "chance, see below",
        "known from context",
        "no triggers",
    ]


def test_short_sequences_have_one_panel_for_positions():
    runs = {"a": recording(length=64), "b": recording(length=64)}
    assert "recall, W_K1, first 64" not in titles_of(plot_birth(runs))
    assert "recall, W_K1" in titles_of(plot_birth(runs))


def test_matrices_are_released_at_vertical_lines(runs):
    released = {"seed1": {"W_K1": 10, "W_K2": 10, "W_O2": 20}}
    figure = birth.plot_staged(runs, released)
    told = {a.text: (a.x, a.font.color) for a in figure.layout.annotations if a.text.endswith("released")}
    assert told == {"W_K1, W_K2 released": (10, COLOURS[1]), "W_O2 released": (20, COLOURS[1])}
    assert len(figure.layout.shapes) == 2 * len(titles_of(figure))
    assert {shape.x0 for shape in figure.layout.shapes} == {10, 20}
    shared = birth.plot_staged(runs, {"seed0": {"W_K1": 10}, "seed1": {"W_K1": 10}})
    assert [a.font.color for a in shared.layout.annotations if a.text == "W_K1 released"] == [GREY]
    with pytest.raises(InputError, match="released names 'seed7': name some of seed0, seed1, one layer"):
        birth.plot_staged(runs, {"seed7": {}})


def test_a_sweep_has_a_row_for_each_run_and_a_colour_for_each_distribution():
    runs = {
        f"{kind}-seed{seed}": recording(top) for kind, top in (("fixed5", 0.9), ("random5", 0.4)) for seed in (0, 1)
    }
    runs[LONG] = recording(outputs="train")
    figure = birth.plot_sweep(runs)
    rows = list(figure.layout.yaxis3.ticktext)
    assert rows[:4] == list(runs)[:4]
    assert rows[4].replace("<br>", "") == LONG
    assert max(len(line) for line in rows[4].split("<br>")) <= 36
    curves = [t for t in figure.data if t.yaxis == "y"]
    assert [t.line.color for t in curves] == [COLOURS[i] for i in (0, 0, 1, 1, 2)]
    assert [t.name for t in curves if t.showlegend] == ["fixed5", "random5", curves[-1].name]
    assert [t.y[-1] for t in figure.data if t.yaxis == "y2"] == pytest.approx([0.3, 0.3, 0.4 / 3, 0.4 / 3, 0.3])
    passed = [(t.x[0], t.y[0], t.text) for t in figure.data if t.yaxis == "y3"]
    assert passed == [(40, 0, None), (40, 1, None), (0, 2, ("not reached",)), (0, 3, ("not reached",)), (40, 4, None)]
    last = {(t.marker.symbol, t.y[0]): t.x[0] for t in figure.data if t.yaxis == "y4" and t.x[0] is not None}
    assert last["circle", 2] == pytest.approx(0.4)
    assert last["circle-open", 2] == pytest.approx(0.4 / 3)
    assert last["line-ns-open", 2] == pytest.approx(0.2)


def test_first_gradients_stand_beside_chance_and_the_end(gradients, runs):
    figure = birth.plot_first_gradients(gradients, runs)
    assert figure.layout.xaxis.ticktext == ("W_O2", "W_K2", "W_K1, first 64", "W_K1")
    filled = [t for t in figure.data if t.marker.symbol == "circle"]
    assert filled[0].y == pytest.approx([0.3, 0.1, 0.15, 0.075])
    assert filled[1].y == pytest.approx([0.6, 0.2, 0.3, 0.15])
    last = [t for t in figure.data if t.marker.symbol == "circle-open" and t.x[0] is not None]
    assert last[0].y == pytest.approx([0.9, 0.3, 0.45, 0.225])
    assert last[0].x == filled[0].x
    assert named(figure, "chance")[0].y == pytest.approx([1 / 68, 1 / 5, 1 / 127, 1 / 127])
    alone = birth.plot_first_gradients(gradients)
    assert not [t for t in alone.data if t.marker.symbol == "circle-open"]
    with pytest.raises(InputError, match="gradients is empty"):
        birth.plot_first_gradients({})


def test_what_is_missing_is_refused(runs):
    for group in ("training", "memory"):
        bare = runs["seed0"].copy()
        del bare[group]
        with pytest.raises(InputError, match=f"the recording bare has no /{group} over steps"):
            plot_birth({"bare": bare})
    with pytest.raises(InputError, match="recordings is empty"):
        birth.plot_sweep({})


# ---- pictures of a model ----


def plain_scores(model, ids):
    """Each score of each memory by itself, from vectors."""
    E, P, U = (table.detach().double() for table in (model.W_E, model.W_pos, model.W_U.T))
    W_K, W_V, W_O = (getattr(model, f"W_{part}").detach().double()[:, 0] for part in "KVO")
    moved = {k: E[k] @ W_V[0] @ W_O[0] for k in ids}
    return {
        "W_O2": [[float(E[k] @ W_V[1] @ W_O[1] @ U[j]) for j in ids] for k in ids],
        "W_K2": [[float(E[k] @ (moved[j] @ W_K[1])) for j in ids] for k in ids],
        "W_K1": [[float(P[t] @ (P[s] @ W_K[0])) for s in range(len(P))] for t in range(len(P))],
    }


def test_maps_are_the_scores_of_the_memories_by_row(models):
    ids = [0, 3, 4, 7, 9]
    figure = pictures.plot_recall_maps(models, [9, 4, 3, 4, 7, 0], VOCABULARY)
    assert [a.text for a in figure.layout.annotations[:2]] == list(models)
    assert [t.split("<br>")[0] for t in titles_of(figure) if t] == ["W_O2", "W_K2", "W_K1"]
    for column, model in enumerate(models.values()):
        for row, scores in enumerate(map(np.array, plain_scores(model, ids).values())):
            z = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
            drawn = next(t for t in figure.data if t.yaxis == f"y{2 * row + column + 1}".replace("y1", "y"))
            np.testing.assert_allclose(drawn.z, z, atol=1e-4)
            assert drawn.coloraxis == f"coloraxis{row + 1}".replace("coloraxis1", "coloraxis")
            pairs = [(i, i) for i in range(len(z))] if row < 2 else [(t, t - 1) for t in range(1, len(z))]
            inside = z[:, :-1] if row == 2 else z
            share = np.mean([inside[i].argmax() == j for i, j in pairs])
            assert figure.layout[drawn.xaxis.replace("x", "xaxis")].title.text.endswith(f"recall {share:.2f}")
    assert figure.layout.xaxis.ticktext == ("␣", "b", "c", "f", "h")
    assert figure.layout.xaxis6.title.text == "position: recall 1.00"
    assert figure.layout.xaxis5.title.text != figure.layout.xaxis6.title.text


def test_maps_of_what_a_model_has():
    sizes = {"d_vocab": len(VOCABULARY), "n_ctx": 8, "d_model": 16}
    one, turned = memory_transformer(**sizes, n_layers=1), memory_transformer(**sizes, positions="rotary")
    alone = pictures.plot_recall_maps({"one": one}, range(13), VOCABULARY)
    assert titles_of(alone) == ["W_O1<br>token"]
    assert [t for t in titles_of(pictures.plot_recall_maps({"turned": turned}, range(13), VOCABULARY)) if t] == [
        "W_O2<br>token", "W_K2<br>token",
    ]  # fmt: skip
    assert len(pictures.plot_attention_at_birth({"one": one}, range(8), VOCABULARY).data) == 1


def test_attention_is_the_pattern_and_leaves_no_trace(models):
    tokens = torch.tensor([[3, 4, 5, 0, 3, 4, 1, 2]])
    model = models["step 9"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    figure = pictures.plot_attention_at_birth(models, tokens, VOCABULARY)
    patterns = {}
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda x, hook, i=i: patterns.update({i: x[0, 0].detach()})) for i in (0, 1)
    ]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert all(not point._forward_hooks for point in model.hook_dict.values())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for i, drawn in enumerate(figure.data[2:]):
        lower = np.tril(np.ones((8, 8), dtype=bool))
        np.testing.assert_allclose(np.array(drawn.z)[lower], patterns[i].numpy()[lower], atol=1e-6)
        assert np.isnan(np.array(drawn.z)[~lower]).all()
    assert figure.layout.xaxis4.ticktext == ("b", "c", "d", "␣", "b", "c", "↵", "&lt;")
    assert figure.data[3].text[4][1] == "b → c"
    assert figure.data[2].z[4][3] > 0.9  # written so: the token before, and what followed the last b
    assert figure.data[3].z[4][1] > 0.9
    assert [a.text for a in figure.layout.annotations[:2]] == ["first layer's head", "last layer's head"]
    assert [t for t in titles_of(figure) if t] == [f"{name}<br>token that looks" for name in models]


def test_at_most_48_tokens_of_a_sequence_are_shown():
    model = memory_transformer(d_vocab=13, n_ctx=60, d_model=8)
    figure = pictures.plot_attention_at_birth({"long": model}, torch.arange(60) % 13, VOCABULARY)
    assert len(figure.data[0].z) == 48
    assert figure.layout.title.subtitle.text == "48 tokens of one sequence"


def test_unknown_tokens_are_refused(models):
    for plot in (pictures.plot_recall_maps, pictures.plot_attention_at_birth):
        with pytest.raises(InputError, match="models is empty: pass a dict from names to models"):
            plot({}, range(3), VOCABULARY)
        for tokens in ([0, 13], [-1, 2], []):
            with pytest.raises(InputError, match="tokens must be ids from 0 to 12, the end of the vocabulary"):
                plot(models, tokens, VOCABULARY)


def test_names_cannot_break_the_page(models, gradients, tmp_path):
    run = {"<b>x</b>": recording(), "y": recording()}
    figures = {
        "birth": plot_birth(run),
        "staged": birth.plot_staged(run, {"y": {"<i>": 10}}),
        "sweep": birth.plot_sweep(run),
        "gradients": birth.plot_first_gradients({"<b>x</b>": gradients["seed0"]}, run),
        "maps": pictures.plot_recall_maps({"<b>x</b>": models["step 0"]}, range(13), VOCABULARY),
        "attention": pictures.plot_attention_at_birth({"<b>x</b>": models["step 0"]}, range(13), VOCABULARY),
    }
    for figure in figures.values():
        assert "<b>" not in str(figure.to_dict())
        assert "<i>" not in str(figure.to_dict())
    assert write_page(figures, tmp_path / "page.html", "Birth").stat().st_size > 1e5
