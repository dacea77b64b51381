"""`ablate` against the plain loop of one pass a head, and on a model whose circuit is known."""

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr

import metaint
from metaint.circuits.ablation import ablate
from metaint.circuits.beside import heads_beside, sets_beside
from metaint.circuits.experiment import cycle
from metaint.circuits.metrics import in_context_loss, next_token_loss
from metaint.circuits.parts import named_sets, part_name
from metaint.circuits.subject import subject_of
from metaint.errors import HookAuditError, InputError
from metaint.models.describe import sublayers_of
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import circuit_model, traces, written_model
from tests.circuits.test_passes import shared
from tests.models.handmade import HandMade
from tests.planted import VOCAB

TOKENS = repeated_tokens(96, 8, batch=5, ids=(5, 95), seed=1)
CHOICES = (
    'heads from "0.0" to "1.3", "attn 0" to "attn 1", "mlp 0" to "mlp 1", or "heads", "mlps" or "attns" for all of a '
    "kind"
)


def loop(model, tokens, metric, stand, sets):
    """The metric of each set, each in a pass of its own, minus the clean one: [set, sequence]; and the clean one."""
    with torch.no_grad():
        clean = metric(model(tokens), tokens)
        rows = []
        for heads in sets:
            hooks = []
            for layer in {layer for layer, _ in heads}:

                def edit(z, hook, layer=layer, heads=heads):
                    z = z.clone()
                    for head in [j for i, j in heads if i == layer]:
                        z[:, :, head] = stand(layer, head)
                    return z

                hooks.append((f"blocks.{layer}.attn.hook_z", edit))
            rows.append(metric(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens) - clean)
    return torch.stack(rows), clean


def z_of(model, tokens):
    kept = {}
    hooks = [
        (f"blocks.{i}.attn.hook_z", lambda z, hook: kept.update({int(hook.name.split(".")[1]): z.clone()}))
        for i in range(model.cfg.n_layers)
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return kept


def every(model):
    return [[(i, j)] for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_every_head_like_the_plain_loop(any_model, how):
    """Grouped-query attention, rotations, norms after attention: all kinds, heads one by one and together."""
    causal = "Bert" not in str(getattr(any_model.cfg, "architecture", ""))
    metric = "next_token_loss" if causal else lambda logits, tokens: logits[:, 1:].logsumexp(-1).mean(1)
    plain = next_token_loss if causal else metric
    z = z_of(any_model, TOKENS)
    stand = (lambda i, j: z[i][:, :, j].mean((0, 1))) if how == "mean" else (lambda i, j: 0.0)
    expected, clean = loop(any_model, TOKENS, plain, stand, [*every(any_model), [(0, 1), (1, 2)]])
    found = ablate(any_model, TOKENS, how=how, metric=metric, batch_size=4)
    np.testing.assert_allclose(found["effect"].values.ravel(), expected[:-1].mean(1), atol=1e-5)
    np.testing.assert_allclose(found["clean"], clean.mean(), atol=1e-5)
    assert float(expected.abs().max()) > 0.01
    assert found.attrs["passes"] == "from the ablated layer" or not causal
    together = ablate(any_model, TOKENS, ["0.1"], how, metric, sets={"both": ["0.1", "1.2"]}, batch_size=16)
    np.testing.assert_allclose(together["set_effect"].sel(set="both"), expected[-1].mean(), atol=1e-5)
    np.testing.assert_allclose(together["effect"].sel(layer=0, head=1), expected[1].mean(), atol=1e-5)
    assert int(together["effect"].notnull().sum()) == 1


# ---- parts and positions -----------------------------------------------------------------------------------------


def every_part(model):
    """Names of some heads, of all MLPs and all layers, with what each stands for."""
    heads = [f"{i}.{j}" for i in range(model.cfg.n_layers) for j in (0, model.cfg.n_heads - 1)]
    mlps = [f"mlp {i}" for i in range(model.cfg.n_layers) if sublayers_of(model) != "attention"]
    return [*heads, *mlps, *(f"attn {i}" for i in range(model.cfg.n_layers))]


def edited_hooks(model, names, stand, positions=None, patterns=None):
    """Plain hooks that put what stands for each part in its place, at positions or everywhere.

    `stand(name)` gives what replaces hook_z [batch, position, head, d_head] or hook_mlp_out. With clean `patterns`,
    layers above the first edit attend as those tell.
    """
    edits = {}
    for name in names:
        kind, layer = name.split() if " " in name else ("head", name.split(".")[0])
        at = f"blocks.{layer}.hook_mlp_out" if kind == "mlp" else f"blocks.{layer}.attn.hook_z"
        which = {"mlp": (), "attn": (slice(None),), "head": (int(name.split(".")[-1]) if kind == "head" else 0,)}[kind]
        edits.setdefault(at, []).append((slice(None), slice(None) if positions is None else positions, *which))
    first, values, hooks = min(int(name.split(".")[1]) for name in edits), {}, []
    if patterns is not None:
        for layer in range(first + 1, model.cfg.n_layers):
            hooks.append((f"blocks.{layer}.attn.hook_v", partial(keep, into=values, key=layer)))
            edits.setdefault(f"blocks.{layer}.attn.hook_z", [])

    def edit(activation, hook, name):
        new, layer = activation.clone(), int(name.split(".")[1])
        if name.endswith("hook_z") and layer in values:
            group = model.cfg.n_heads // values[layer].shape[2]
            new = torch.einsum("bhqk,bkhd->bqhd", patterns[layer], values[layer].repeat_interleave(group, 2)).clone()
        for there in edits[name]:
            new[there] = torch.as_tensor(stand(name)).expand_as(activation)[there]
        return new

    return [*hooks, *((name, partial(edit, name=name)) for name in edits)]


def keep(activation, hook, into, key):
    into[key] = activation.clone()


def activations(model, tokens, *hooks):
    """What these hooks of each layer carry."""
    kept = {}
    names = [f"blocks.{i}.{name}" for i in range(model.cfg.n_layers) for name in hooks]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, partial(keep, into=kept, key=name)) for name in names])
    return kept


def stands(model, tokens, how, donors):
    """What stands at a hook, from plain passes; and the clean patterns where they are kept."""
    mlps = () if sublayers_of(model) == "attention" else ("hook_mlp_out",)
    clean = activations(model, tokens, "attn.hook_z", "attn.hook_pattern", *mlps)
    if how == "mean":
        return (lambda name: clean[name].mean((0, 1))), None
    if how == "resample":
        return (lambda name: clean[name][donors]), None
    kept = {i: clean[f"blocks.{i}.attn.hook_pattern"] for i in range(model.cfg.n_layers)}
    return (lambda name: 0.0), (kept if how == "pattern_preserving" else None)


def last_logit(logits, tokens):
    """For models of both directions too, and touched by every position."""
    return logits[:, :, 7].mean(1)


@pytest.mark.parametrize("positions", [None, [0], [3, 9]], ids=["everywhere", "first", "two"])
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "pattern_preserving"])
@pytest.mark.parametrize("kind", [*available_kinds(), "pre", "output", "post", "parallel"])
def test_every_part_at_positions_like_a_plain_pass(kind, how, positions):
    """Grouped queries, parallel blocks, norms that follow what an MLP writes, both directions: by run_with_hooks."""
    model = shared(kind)
    tokens = TOKENS % model.cfg.d_vocab
    donors = cycle(len(TOKENS), 3).tolist()
    stand, patterns = stands(model, tokens, how, donors)
    names = every_part(model)
    sets = {"mixed": [names[1], names[-1], *(name for name in names if name.startswith("mlp"))]}
    found = ablate(model, tokens, names, how, last_logit, positions=positions, sets=sets, batch_size=7, seed=3)
    with torch.no_grad():
        clean = last_logit(model(tokens), tokens)
        expected = {}
        for name, some in {**{name: [name] for name in names}, **sets}.items():
            hooks = edited_hooks(model, some, stand, positions, patterns)
            expected[name] = float((last_logit(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens) - clean).mean())
    largest = max(abs(value) for value in expected.values())
    assert largest > 1e-3
    for name, value in expected.items():
        assert effect_of(found, name) == pytest.approx(value, abs=2e-5 * max(1, largest))
    assert found.attrs["ablated_positions"] == (positions or "all")


def effect_of(found, name):
    if name == "mixed":
        return float(found["set_effect"].sel(set=name))
    if " " in name:
        kind, layer = name.split()
        return float(found[f"{kind}_effect"].sel(layer=int(layer)))
    layer, head = map(int, name.split("."))
    return float(found["effect"].sel(layer=layer, head=head))


def test_families_and_variables_of_what_was_asked_for(gpt2):
    """All of a kind by one word, in the list or alone; only what was asked for has a variable, heads always."""
    mlps = ablate(gpt2, TOKENS, "mlps", metric="next_token_loss")
    assert mlps["mlp_effect"].notnull().all()
    assert mlps["effect"].isnull().all()
    assert "attn_effect" not in mlps
    assert mlps["mlp_effect_low"].dims == ("layer",)
    some = ablate(gpt2, TOKENS, ["mlps", "0.1", "attn 1", "0.1"], metric="next_token_loss", sets={"all": "heads"})
    xr.testing.assert_allclose(some["mlp_effect"], mlps["mlp_effect"], atol=1e-6)
    assert int(some["effect"].notnull().sum()) == 1
    assert some["attn_effect"].isnull().values.tolist() == [True, False]
    every = ablate(gpt2, TOKENS, ["heads"], metric="next_token_loss")
    xr.testing.assert_allclose(every["effect"], ablate(gpt2, TOKENS, metric="next_token_loss")["effect"], atol=1e-6)
    both = ablate(gpt2, TOKENS, metric="next_token_loss", sets=[[f"{i}.{j}" for i in range(2) for j in range(4)]])
    np.testing.assert_allclose(some["set_effect"], both["set_effect"], atol=1e-6)


def test_nothing_before_a_position_hears_of_it(gpt2):
    """Exactly: the loss of tokens before the position is that of the clean pass."""

    def early(logits, tokens):
        return logits[:, :5].square().sum((1, 2))

    found = ablate(gpt2, TOKENS, ["0.1", "mlp 0", "attn 0"], metric=early, positions=[5])
    names = ("effect", "mlp_effect", "attn_effect")
    assert [float(found[name].max()) for name in names] == [0, 0, 0]
    found = ablate(gpt2, TOKENS, ["0.1", "mlp 0", "attn 0"], metric=early, positions=[4])
    assert all(float(abs(found[name]).max()) > 0.01 for name in names)


def test_resampled_heads_are_another_sequences(gpt2):
    """The same whatever the batches, and like swapping every sequence's z for that of the one it is told."""
    found = [ablate(gpt2, TOKENS, how="resample", batch_size=size, seed=3) for size in (2, 5, 40)]
    for other in found[1:]:
        np.testing.assert_allclose(other["effect"], found[0]["effect"], atol=1e-5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    donor = {order[i]: order[i - 1] for i in range(5)}
    assert sorted(donor.values()) == list(range(5))
    assert all(giver != taker for taker, giver in donor.items())
    z = z_of(gpt2, TOKENS)
    giver = [donor[i] for i in range(5)]
    expected, _ = loop(gpt2, TOKENS, in_context_loss, lambda i, j: z[i][giver, :, j], every(gpt2))
    np.testing.assert_allclose(found[0]["effect"].values.ravel(), expected.mean(1), atol=1e-5)
    other = ablate(gpt2, TOKENS, how="resample", seed=4)["effect"]
    assert float(abs(other - found[0]["effect"]).max()) > 1e-4


def test_intervals_are_over_sequences(gpt2):
    """Against resampling by hand, and none for a single sequence."""
    expected, clean = loop(gpt2, TOKENS, in_context_loss, lambda i, j: 0.0, every(gpt2))
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=1000)
    means = draws @ expected.double().numpy().T / 5
    found = ablate(gpt2, TOKENS, how="zero")
    for name, level in (("effect_low", 0.025), ("effect_high", 0.975)):
        np.testing.assert_allclose(found[name].values.ravel(), np.quantile(means, level, axis=0), atol=1e-5)
    cleans = draws @ clean.double().numpy() / 5
    np.testing.assert_allclose(found["clean_low"], np.quantile(cleans, 0.025), atol=1e-5)
    alone = ablate(gpt2, TOKENS[:1])
    assert bool(alone["effect_low"].isnull().all())
    assert bool(alone["effect"].notnull().all())


def test_sequences_without_a_place_do_not_count(gpt2):
    """A sequence in which nothing repeats adds nothing to the mean over the others."""
    other = torch.arange(10, 26)[None]
    found = ablate(gpt2, torch.cat([TOKENS, other]), how="zero")
    np.testing.assert_allclose(found["effect"], ablate(gpt2, TOKENS, how="zero")["effect"], atol=1e-5)
    assert found.attrs["positions"] == ablate(gpt2, TOKENS).attrs["positions"] == 5 * 7


# ---- beside random heads of the same layers ----------------------------------------------------------------------


def test_mean_is_what_stands_in_by_default(gpt2):
    found = ablate(gpt2, TOKENS)
    assert found.attrs["how"] == "mean"
    xr.testing.assert_identical(found, ablate(gpt2, TOKENS, how="mean"))


def test_every_head_stands_beside_all_others_of_its_layer(gpt2):
    found = ablate(gpt2, TOKENS, random=2)
    effects = found["effect"].values
    for layer, head in np.ndindex(*effects.shape):
        others = np.delete(effects[layer], head)
        assert float(found["effect_same_layer_mean"][layer, head]) == pytest.approx(others.mean(), abs=1e-9)
        assert float(found["effect_same_layer_std"][layer, head]) == pytest.approx(others.std(ddof=1), abs=1e-9)
    assert found["effect_same_layer_mean"].attrs["description"] == "mean of the effects of other heads of the layer"


def test_few_heads_stand_beside_draws_of_their_layer(gpt2):
    """The same whatever else is asked for; all others where that many are asked for, and nothing for `random=0`."""
    every = ablate(gpt2, TOKENS)["effect"].values
    shape = subject_of(gpt2).shape
    found = ablate(gpt2, TOKENS, ["0.1", "1.2", "mlp 0"], random=2, seed=3)
    for head, others in heads_beside(shape, [(0, 1), (1, 2)], 2, 3).items():
        assert len(set(others)) == 2
        assert all(layer == head[0] and number != head[1] for layer, number in others)
        values = [every[other] for other in others]
        assert float(found["effect_same_layer_mean"][head]) == pytest.approx(np.mean(values), abs=1e-6)
        assert float(found["effect_same_layer_std"][head]) == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert int(found["effect_same_layer_mean"].notnull().sum()) == 2
    many = ablate(gpt2, TOKENS, ["0.1"], random=20)
    assert float(many["effect_same_layer_mean"][0, 1]) == pytest.approx(np.delete(every[0], 1).mean(), abs=1e-6)
    one = ablate(gpt2, TOKENS, ["0.1"], random=1)
    assert one["effect_same_layer_mean"].notnull().sum() == 1
    assert one["effect_same_layer_std"].isnull().all()
    assert ablate(gpt2, TOKENS, random=0)["effect_same_layer_mean"].isnull().all()


def test_sets_stand_beside_draws_with_as_many_heads_in_each_layer(gpt2):
    sets = {"few": ["0.1", "0.3", "1.0", "mlp 1"], "most": ["0.0", "0.1", "0.2"], "MLPs": "mlps", "layer": ["attn 1"]}
    found = ablate(gpt2, TOKENS, sets=sets, random=5, seed=2)
    shape = subject_of(gpt2).shape
    named = named_sets(shape, sets)
    draws = sets_beside(shape, named, 5, 2)
    assert set(draws["MLPs"]) == set(draws["layer"]) == {None}
    for draw in draws["few"]:
        assert draw == {(0, 0), (0, 2), *(draw - {(0, 0), (0, 2), (1, None)}), (1, None)}
        assert [layer for layer, head in draw if head is not None].count(1) == 1
        assert (1, 0) not in draw
    assert all((0, 3) in draw and len(draw) == 3 for draw in draws["most"])
    for name in ("few", "most"):
        again = {str(i): [part_name(part) for part in draw] for i, draw in enumerate(draws[name])}
        expected = ablate(gpt2, TOKENS, sets=again, random=0)["set_effect"]
        values = found["set_effect_same_layer"].sel(set=name)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        assert float(found["set_effect_same_layer_mean"].sel(set=name)) == pytest.approx(float(values.mean()))
        assert float(found["set_effect_same_layer_std"].sel(set=name)) == pytest.approx(float(values.std(ddof=1)))
    nothing = found.sel(set=["MLPs", "layer"])
    assert nothing["set_effect_same_layer"].isnull().all()
    assert nothing["set_effect_same_layer_mean"].isnull().all()
    assert nothing["set_effect"].notnull().all()


def test_a_model_of_one_head_a_layer_has_none_beside():
    found = ablate(written_model(), metric="induction_accuracy", sets=[["1.0"]])
    assert found["effect_same_layer_mean"].isnull().all()
    assert found["set_effect_same_layer"].isnull().all()


# ---- a known circuit ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return circuit_model()


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_the_circuit_destroys_and_the_rest_does_not(planted, how):
    tokens = repeated_tokens(VOCAB, 20, batch=6)
    found = ablate(planted, tokens, how=how, metric="induction_accuracy")
    assert float(found["clean"]) > 0.95
    effect = found["effect"].values.copy()
    assert effect[0, 0] < -0.8
    assert effect[1, 0] < -0.8
    effect[:, 0] = 0
    assert abs(effect).max() < 0.05
    high = found["effect_high"].values
    assert high[0, 0] < -0.5
    assert high[1, 0] < -0.5


def test_patterns_preserved_tell_what_is_moved_from_where_it_is_looked_for(planted):
    """The previous-token head works through the induction head's keys alone, which the clean pattern keeps."""
    tokens = repeated_tokens(VOCAB, 20, batch=4)
    found = ablate(planted, tokens, ["0.0", "1.0"], "pattern_preserving", sets=[["0.0", "1.0"]])
    assert abs(float(found["effect"].sel(layer=0, head=0))) < 0.01
    assert float(found["effect"].sel(layer=1, head=0)) > 2
    assert float(found["set_effect"].sel(set="0.0+1.0")) > 2


def test_the_papers_model():
    found = ablate(written_model(), metric="induction_accuracy")
    assert float(found["clean"]) > 0.95
    assert float(found["effect"].max()) < -0.8
    assert found["effect"].shape == (2, 1)


# ---- beside others -----------------------------------------------------------------------------------------------


def test_hooks_of_the_owner_stay_and_count(gpt2):
    """An owner's edit is part of the model: what is measured is the edited model, in whole passes of whole batches."""
    seen = []

    def edit(stream, hook):
        seen.append(len(stream))
        return stream * 1.5

    with gpt2.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", edit)]):
        point = gpt2.hook_dict["blocks.1.hook_resid_pre"]
        before = list(point._forward_hooks)
        found = ablate(gpt2, TOKENS, how="zero")
        assert list(point._forward_hooks) == before
        expected, _ = loop(gpt2, TOKENS, in_context_loss, lambda i, j: 0.0, every(gpt2))
    assert set(seen) == {5}
    assert found.attrs["passes"].startswith("whole (hooks are on the model")
    np.testing.assert_allclose(found["effect"].values.ravel(), expected.mean(1), atol=1e-5)
    assert float(abs(found["effect"] - ablate(gpt2, TOKENS, how="zero")["effect"]).max()) > 1e-3


def test_no_trace_is_left(gpt2):
    gpt2(TOKENS)
    ablate(gpt2, TOKENS, how="pattern_preserving")
    gpt2.train()
    try:
        before, state = traces(gpt2), torch.random.get_rng_state()
        for how in ("zero", "mean", "resample", "pattern_preserving"):
            ablate(gpt2, TOKENS, how=how)
        assert traces(gpt2) == before
        assert torch.equal(torch.random.get_rng_state(), state)

        def fail(logits, tokens):
            raise ValueError("on purpose")

        with pytest.raises(ValueError, match="on purpose"):
            ablate(gpt2, TOKENS, metric=fail)
        assert traces(gpt2) == before
    finally:
        gpt2.eval()


def test_half_precision_is_close():
    model = build("gpt2") if "gpt2" in available_kinds() else build(available_kinds()[0])
    expected = ablate(model, TOKENS, metric="next_token_loss")["effect"]
    found = ablate(model.to(torch.bfloat16), TOKENS, metric="next_token_loss")
    assert float(abs(found["effect"] - expected).max()) < 0.02
    assert found.attrs["passes"] == "from the ablated layer"


# ---- what can't be used ------------------------------------------------------------------------------------------


@pytest.mark.skipif("bert" not in available_kinds(), reason="no BERT here")
def test_bert_is_refused_in_a_sentence():
    with pytest.raises(InputError) as error:
        ablate(build("bert"), TOKENS)
    assert str(error.value) == (
        "model attends in both directions, and metric is 'in_context_loss', a prediction of the next token: give a "
        "causal model, or a metric of your own."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"how": "noise"}, "how is 'noise': choose one of zero, mean, resample, pattern_preserving."),
        ({"parts": ["2.0"]}, f"parts has '2.0': name {CHOICES}."),
        ({"parts": ["mlp 2"]}, f"parts has 'mlp 2': name {CHOICES}."),
        ({"sets": [["0.1", "attn two"]]}, f"sets has 'attn two': name {CHOICES}."),
        ({"positions": [3, 16]}, "positions has 16: these sequences have positions 0 to 15."),
        ({"positions": [-1]}, "positions has -1: these sequences have positions 0 to 15."),
        ({"positions": 0}, "positions is 0: give a list of whole numbers such as [0], or None for all."),
        ({"positions": [0.5]}, "positions is [0.5]: give a list of whole numbers such as [0], or None for all."),
        (
            {"parts": "0.1"},
            'parts is \'0.1\': give a list of names such as ["5.1", "mlp 3"], "heads", "mlps" or "attns" for all of a '
            "kind, or None for every head.",
        ),
        ({"sets": {"none": []}}, 'sets has [] for \'none\': give each as a list of names such as ["0.1", "mlp 5"].'),
        ({"random": -1}, "random is -1: give how many random heads or sets stand beside each, 0 or more."),
        ({"random": True}, "random is True: give how many random heads or sets stand beside each, 0 or more."),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        (
            {"tokens": TOKENS[:1], "how": "resample"},
            "tokens is one sequence, and resampling takes another's activations: give two or more.",
        ),
        (
            {"tokens": torch.arange(10)},
            "tokens hold no position where in_context_loss is defined (the next token being what followed the current "
            "one before): give tokens that repeat, or another metric.",
        ),
    ],
)
def test_bad_input(gpt2, arguments, sentence):
    with pytest.raises(InputError) as error:
        ablate(gpt2, **{"tokens": TOKENS, **arguments})
    assert str(error.value) == sentence


def test_a_model_without_mlps_has_none_to_ablate():
    with pytest.raises(InputError) as error:
        ablate(circuit_model(), TOKENS, "mlps")
    assert str(error.value) == (
        'parts has \'mlps\': name heads from "0.0" to "1.7", "attn 0" to "attn 1", or "heads" or "attns" for all of a '
        "kind (the model has no MLPs)."
    )


def test_edits_of_mlps_that_do_nothing_are_refused():
    """A block that goes on with its MLP's output as it was before the hook."""
    model = small_transformer(norm="pre", n_layers=2, n_heads=2, d_model=16, d_mlp=32, d_vocab=96, n_ctx=32)
    block = model.blocks[1]

    def forward(stream, attention_mask):
        middle = stream + block.attn(block.ln1(stream), attention_mask)
        written = block.mlp(block.ln2(middle))
        block.hook_mlp_out(written.clone())
        return middle + written

    block.forward = forward
    ablate(model, TOKENS, ["1.0"])
    with pytest.raises(HookAuditError, match=r"edit_mlp fails at blocks\.1\.hook_mlp_out"):
        ablate(model, TOKENS, ["mlp 0"])


def test_edits_that_do_nothing_are_refused():
    with pytest.raises(HookAuditError, match="edit_z"):
        ablate(HandMade("late_z"), torch.randint(30, (2, 8)), metric="next_token_loss")


def test_it_is_exported():
    assert metaint.ablate is ablate
