"""A scan's variable as a metric, against scans: of the model as it is, and of one that is edited by plain hooks."""

from functools import partial

import numpy as np
import pytest
import torch

import metaint
from metaint.circuits.ablation import ablate
from metaint.circuits.scan_metrics import scan_metric
from metaint.errors import ActivationError, InputError
from metaint.measures.attention import HEAD_MEASURES
from metaint.measures.tile import TAUS
from metaint.models.describe import is_causal, sublayers_of
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer
from tests.builders import available_kinds, build
from tests.circuits.planted import traces
from tests.circuits.test_passes import shared

KINDS = [*available_kinds(), "pre", "output", "post", "parallel"]
# Long enough for `sink_rate`; the first three repeat themselves, the others do so here and there.
TOKENS = torch.cat(
    [
        repeated_tokens(45, 33, batch=3, ids=(5, 45)),
        torch.randint(5, 45, (4, 66), generator=torch.Generator().manual_seed(0)),
    ]
)
LONG = build(available_kinds()[0])
SHORT = TOKENS[:, :20]


def fits(model, tokens):
    return tokens[:, :32] if model.cfg.n_ctx < tokens.shape[1] else tokens


def scanned(model, tokens, measure, tau=None, hooks=()):
    """The variable of every head [layer, head] in a scan of the model with these hooks on it."""
    with model.hooks(fwd_hooks=list(hooks)):
        found = metaint.scan(model, tokens, [metaint.HeadProbe([measure])])["heads"][measure.name]
    return found.values if tau is None else found.sel(tau=tau).values


def edit(activation, hook, head=None, positions=slice(None), value=0.0):
    new = activation.clone()
    new[(slice(None), positions) if head is None else (slice(None), positions, head)] = value
    return new


# ---- what it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", HEAD_MEASURES, ids=lambda measure: measure.name)
@pytest.mark.parametrize("kind", KINDS)
def test_clean_is_the_scans_variable(kind, measure):
    """For each measure, whatever a sequence counts, in batches that are not those of the scan."""
    model = shared(kind)
    tokens = fits(model, TOKENS)
    tau = 0.5 if measure.per_tau else None
    expected = scanned(model, tokens, measure, tau)
    if np.isnan(expected).all():  # where it is not defined: short sequences, both directions, nothing that repeats
        with pytest.raises(InputError, match="tokens hold no position where"):
            ablate(model, tokens, ["0.0"], metric=scan_metric(measure.name, tau=tau))
        return
    for chosen, value in (
        ({"layers": [1]}, expected[1].mean()),
        ({"heads": ["1.1", "0.0"]}, expected[[0, 1], [0, 1]].mean()),
    ):
        metric = scan_metric(measure.name, tau=tau, **chosen)
        if np.isnan(value):  # a window hides it in one of the layers
            with pytest.raises(InputError, match="name other layers"):
                ablate(model, tokens, ["0.0"], metric=metric)
            continue
        found = ablate(model, tokens, ["0.0"], metric=metric, batch_size=3)
        assert float(found["clean"]) == pytest.approx(value, abs=1e-6, rel=1e-6)


def test_sequences_count_by_their_queries():
    """On sequences of which some have hardly a query where the variable is defined; the interval too."""
    probe = metaint.HeadProbe(["prefix_match"])
    tokens = torch.cat(
        [
            TOKENS[:3],
            torch.arange(5, 71)[None],
            torch.randint(5, 95, (3, 66), generator=torch.Generator().manual_seed(0)),
        ]
    )
    tokens[3, 40] = 9
    heads = metaint.scan(LONG, tokens, [probe])["heads"]
    count = torch.cat(probe.counts)[:, 0, 0]
    assert float(count.max()) > 2 * float(count.min())
    found = ablate(LONG, tokens, ["0.0"], metric=scan_metric("prefix_match", heads=["1.2"]))
    for end in ("", "_low", "_high"):
        expected = float(heads[f"prefix_match{end}"].sel(layer=1, head=2))
        assert float(found[f"clean{end}"]) == pytest.approx(expected, abs=1e-6)
    assert found.attrs["positions"] == int(count.sum())


@pytest.mark.parametrize("variable", ["first_token", "entropy", "prefix_match_recent"])
@pytest.mark.parametrize("positions", [None, [0], [2, 7]], ids=["everywhere", "first", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_a_scan_with_plain_hooks(kind, positions, variable):
    """Heads, MLPs and whole layers, in both directions too; layers that no later layer reads change nothing at all."""
    model = shared(kind)
    measure = next(measure for measure in HEAD_MEASURES if measure.name == variable)
    hooks = {"0.1": ("blocks.0.attn.hook_z", 1), "attn 0": ("blocks.0.attn.hook_z", slice(None))}
    hooks["attn 1"] = ("blocks.1.attn.hook_z", slice(None))
    if sublayers_of(model) != "attention":
        hooks |= {"mlp 0": ("blocks.0.hook_mlp_out", None), "mlp 1": ("blocks.1.hook_mlp_out", None)}
    metric = scan_metric(variable, layers=[0, 1])
    sets = {"two": ["0.1", "attn 1"]}
    found = ablate(model, SHORT, list(hooks), "zero", metric, positions=positions, sets=sets, random=1)
    clean = scanned(model, SHORT, measure)[:2].mean()
    for part, (name, head) in hooks.items():
        on = [(name, partial(edit, head=head, positions=slice(None) if positions is None else positions))]
        expected = scanned(model, SHORT, measure, hooks=on)[:2].mean() - clean
        if part.startswith("mlp"):
            effect = found["mlp_effect"].sel(layer=int(part[-1]))
        elif part.startswith("attn"):
            effect = found["attn_effect"].sel(layer=int(part[-1]))
        else:
            effect = found["effect"].sel(layer=0, head=1)
        assert float(effect) == pytest.approx(expected, abs=1e-6)
        if part.endswith(" 1") and model.cfg.n_layers == 2:
            assert float(effect) == 0
    assert abs(float(found["attn_effect"].sel(layer=0))) > 2e-6  # what the comparisons above can't take for nothing
    assert found["set_effect"].item() != 0
    assert found.attrs["passes"] == "from the ablated layer" or not is_causal(model)


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_what_stands_in_for_a_part(how):
    z = {}
    name = "blocks.0.attn.hook_z"
    LONG.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: z.update(z=x.clone()))])
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(1))
    donors = torch.empty_like(order).scatter_(0, order, order.roll(1))
    values = z["z"][:, :, 2].mean((0, 1)) if how == "mean" else z["z"][donors, :, 2]
    measure = next(measure for measure in HEAD_MEASURES if measure.name == "averaging")

    def rows(activation, hook):
        new = activation.clone()
        new[:, :, 2] = values
        return new

    with LONG.hooks(fwd_hooks=[(name, rows)]):
        expected = metaint.scan(LONG, TOKENS, [metaint.HeadProbe([measure])], batch_size=7)["heads"]["averaging"]
    expected = float(expected.mean()) - scanned(LONG, TOKENS, measure).mean()
    found = ablate(LONG, TOKENS, ["0.2"], how, scan_metric("averaging"), seed=1, batch_size=7)
    assert float(found["effect"].sel(layer=0, head=2)) == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-4


def test_copies_of_several_batches_are_told_apart():
    alone = [
        float(ablate(LONG, TOKENS, [f"0.{head}"], metric=scan_metric("entropy"))["effect"][0, head])
        for head in range(4)
    ]
    for size in (2, 5, 28):
        found = ablate(LONG, TOKENS, ["0.0", "0.1", "0.2", "0.3"], metric=scan_metric("entropy"), batch_size=size)
        np.testing.assert_allclose(found["effect"][0], alone, atol=1e-6)
    assert len(set(np.round(alone, 6))) == 4


def test_a_measure_of_ones_own():
    @metaint.statistic
    def on_last(tile):
        """Weight on the query's own place, and nothing for every other query."""
        found = tile.pattern.diagonal(dim1=-2, dim2=-1).clone()
        found[..., ::2] = torch.nan
        return found

    found = ablate(LONG, TOKENS, ["0.0"], metric=scan_metric(on_last, layers=[1]))
    assert float(found["clean"]) == pytest.approx(scanned(LONG, TOKENS, on_last)[1].mean(), abs=1e-6)
    assert found.attrs["metric"] == "on_last of layer 1"


def test_a_circuit_is_checked_by_a_scans_variable():
    """As by a function of the logits: shares of what all heads bring."""
    metric = scan_metric("entropy", layers=[1])
    heads = [f"{i}.{j}" for i in range(2) for j in range(4)]
    sets = {"all": heads, "others": [name for name in heads if name != "0.1"], "0.1": ["0.1"]}
    found = ablate(LONG, TOKENS, None, "zero", metric, sets=sets)["set_effect"]
    checked = metaint.check_circuit(LONG, ["0.1"], TOKENS, "zero", metric, random=0)
    assert float(checked["faithfulness"]) == pytest.approx(float(1 - found[1] / found[0]), abs=1e-6)
    assert float(checked["completeness"]) == pytest.approx(float(found[2] / found[0]), abs=1e-6)


# ---- what is run -------------------------------------------------------------------------------------------------


def test_no_logits_are_made_and_no_more_layers_than_are_read():
    model = small_transformer(norm="pre", n_layers=5, n_heads=2, d_model=16, d_mlp=32, d_vocab=50, n_ctx=80)
    metric = scan_metric("first_token", layers=[1, 3])
    ablate(model, TOKENS, ["2.0"], metric=metric)  # the audit's passes
    ran, made = [], []
    for layer, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda module, args, output, layer=layer: ran.append(layer))
    model.unembed.register_forward_hook(lambda module, args, output: made.append(output.numel()))
    ablate(model, TOKENS, ["2.0"], metric=metric)  # anew: these hooks are another state of the model
    ran.clear()
    made.clear()
    found = ablate(model, TOKENS, ["2.0", "mlp 2", "3.1", "mlp 4"], "zero", metric, random=0)
    assert ran == [*range(5), 2, 3, 2, 3]
    assert sum(made) == 0
    assert float(found["effect"].sel(layer=2, head=0)) != 0
    assert float(found["effect"].sel(layer=3, head=1)) == 0
    assert found["mlp_effect_low"].sel(layer=4) == 0


def test_hooks_of_the_owner_count():
    with LONG.hooks(fwd_hooks=[("blocks.0.attn.hook_z", partial(edit, head=0, value=1.5))]):
        found = ablate(LONG, TOKENS, ["0.1"], "zero", scan_metric("entropy"))
        entropy = next(measure for measure in HEAD_MEASURES if measure.name == "entropy")
        assert float(found["clean"]) == pytest.approx(scanned(LONG, TOKENS, entropy).mean(), abs=1e-6)
        expected = scanned(LONG, TOKENS, entropy, hooks=[("blocks.0.attn.hook_z", partial(edit, head=1))]).mean()
    assert found.attrs["passes"].startswith("whole (hooks are on the model")
    assert float(found["effect"][0, 1] + found["clean"]) == pytest.approx(expected, abs=1e-6)


def test_no_trace_is_left():
    LONG(TOKENS)
    before = traces(LONG)
    ablate(LONG, TOKENS, ["0.0", "attn 0"], metric=scan_metric("entropy"))
    assert traces(LONG) == before


def test_patterns_that_overflow_are_told():
    model = build(available_kinds()[0])
    found = scan_metric("entropy", layers=[1])
    ablate(model, TOKENS, ["0.0"], metric=found)

    def overflow(z, hook):
        return z * torch.inf

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", overflow)]), pytest.raises(ActivationError, match="NaN"):
        ablate(model, TOKENS, ["0.0"], metric=found)


# ---- what can't be used ------------------------------------------------------------------------------------------

NAMES = ", ".join(measure.name for measure in HEAD_MEASURES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"variable": "norm_mean"},
            f"variable is 'norm_mean': choose a measure of /heads ({NAMES}), or give one made with @metaint.kind or "
            "@metaint.statistic.",
        ),
        (
            {"layers": [1], "heads": ["1.0"]},
            "layers and heads are both given: give one of them, or neither for every head.",
        ),
        ({"heads": "1.0"}, 'heads is \'1.0\': give a list of names such as ["5.1", "5.5"], or leave it out.'),
        ({"layers": []}, "layers is []: give the numbers of layers, such as range(18, 30), or leave it out."),
        ({"layers": 3}, "layers is 3: give the numbers of layers, such as range(18, 30), or leave it out."),
        ({"tau": 0.5}, "tau is 0.5, which first_token has no use for: leave it out."),
        (
            {"variable": "tied_keys"},
            f"tau is None: give one of {', '.join(map(str, TAUS))}, for which tied_keys is counted.",
        ),
    ],
)
def test_bad_input(arguments, sentence):
    with pytest.raises(InputError) as error:
        scan_metric(**{"variable": "first_token", **arguments})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("metric", "how", "sentence"),
    [
        (scan_metric("entropy", layers=[0, 2]), "zero", "layers of the metric have 2: this model's are 0 to 1."),
        (scan_metric("entropy", heads=["0.9"]), "zero", "head is '0.9': name one from 0.0 to 1.3."),
        (
            scan_metric("entropy"),
            "pattern_preserving",
            "how is 'pattern_preserving', and metric is 'entropy of all heads', read from the patterns that it keeps "
            "as they were: choose zero, mean or resample.",
        ),
        (
            scan_metric("induction", layers=[0, 1]),
            "zero",
            "tokens hold no position where induction of layers 0, 1 is defined: give longer ones, or such as repeat, "
            "or another metric.",
        ),
    ],
)
def test_what_a_model_and_tokens_have_not(metric, how, sentence):
    with pytest.raises(InputError) as error:
        ablate(LONG, torch.arange(5, 25).view(2, 10), ["0.0"], how, metric)
    assert str(error.value) == sentence


def test_a_trace_is_made_of_predictions():
    with pytest.raises(InputError, match="target is ScanMetric"):
        metaint.trace_circuit(LONG, TOKENS, target=scan_metric("entropy"))


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({}, "entropy of all heads"),
        ({"layers": range(3, 7)}, "entropy of layers 3 to 6"),
        ({"layers": [4, 1]}, "entropy of layers 1, 4"),
        ({"heads": ["5.1", "2.0", "5.1"]}, "entropy of 5.1, 2.0"),
    ],
)
def test_it_says_what_it_is(chosen, name):
    assert scan_metric("entropy", **chosen).name == name


def test_it_is_exported():
    assert metaint.scan_metric is scan_metric


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_what_the_attention_sink_of_a_real_model_rests_on(smollm2):
    """MLP 11 at position 0, and nowhere else: what layers 18 to 29 look at when they look at nothing."""
    from metaint.scanning.given import text_tokens

    tokens = text_tokens(smollm2, metaint.tasks.python_prose(), length=48, windows=4)
    sink = scan_metric("first_token", layers=range(18, 30))
    found = ablate(smollm2, tokens, ["mlp 10", "mlp 11", "mlp 12"], "zero", sink, positions=[0])
    assert float(found["clean"]) > 0.5
    assert float(found["mlp_effect"].sel(layer=11)) < 0.15 - float(found["clean"])
    assert float(abs(found["mlp_effect"].sel(layer=[10, 12])).max()) < 0.1
    elsewhere = ablate(smollm2, tokens, ["mlp 11"], "zero", sink, positions=[5])
    assert abs(float(elsewhere["mlp_effect"].sel(layer=11))) < 0.01
    loss = ablate(smollm2, tokens, ["mlp 11"], "zero", "next_token_loss", positions=[0])
    assert float(loss["mlp_effect"].sel(layer=11)) > 0.5
