"""`max_logit`: the largest score that the mask allows, against all scores written out, and in other people's passes."""

import numpy as np
import pytest
import torch

import metaint
from metaint.measures.logits import BINS, logit_bin, logit_quantile
from metaint.models.audit import holds
from metaint.models.invariants import score_hooks, scoring_of
from tests.builders import available_kinds, build

NAMES = ("max_logit", "max_logit_q99")


def tokens_of(batch=4, length=24):
    return torch.randint(5, 95, (batch, length), generator=torch.Generator().manual_seed(0))


def read(model, tokens, **more):
    return metaint.scan(model, tokens, [metaint.HeadProbe(["entropy"], max_logit=True)], **more)["heads"]


def row_maxima(model, tokens):
    """Of each layer, the largest score of every query [batch, head, query], from the product of all pairs."""
    found = {}

    def keeper(name):
        def keep(activation, hook):
            found[name] = activation.detach().clone()

        return keep

    parts, layers = score_hooks(model), range(model.cfg.n_layers)
    names = [f"blocks.{layer}.attn.{part}" for layer in layers for part in parts]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keeper(name)) for name in names])
    rows = []
    for layer in layers:
        scoring = scoring_of(model, layer)
        scores = scoring.scores(*(found[f"blocks.{layer}.attn.{part}"] for part in parts))
        rows.append(scores.masked_fill(scoring.hidden(scores), -torch.inf).amax(-1))
    return torch.stack(rows)


def test_every_architecture_equals_all_scores_written_out(any_model):
    tokens = tokens_of()
    heads = read(any_model, tokens, batch_size=3)
    if not holds(any_model, "pattern_from_scores"):  # rotated queries that no hook tells
        pytest.skip("see the tests of hook_attn_scores below")
    rows = row_maxima(any_model, tokens)
    assert heads["max_logit"].values == pytest.approx(rows.amax((1, 3)).numpy(), rel=1e-4, abs=1e-4)
    by_head = rows.transpose(1, 2).flatten(2)
    expected = np.quantile(by_head.numpy(), 0.99, axis=-1, method="inverted_cdf")
    assert heads["max_logit_q99"].values == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("kind", [kind for kind in ("gpt2", "llama", "neox") if kind in available_kinds()])
def test_it_is_what_the_model_gives_to_its_softmax(kind):
    """On these bridges hook_attn_scores holds scores, masked ones at the dtype's least."""
    model, tokens, largest = build(kind), tokens_of(), []

    def keep(scores, hook):
        largest.append(scores.detach().amax((0, 2, 3)))

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", keep) for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert read(model, tokens)["max_logit"].values == pytest.approx(torch.stack(largest).numpy(), rel=1e-4)


def test_padding_batches_and_merging_change_nothing(gpt2):
    tokens, padding = tokens_of(), torch.ones(4, 6, dtype=torch.long)
    whole = read(gpt2, tokens)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(tokens)], 1)
    padded = read(gpt2, torch.cat([padding, tokens], 1), attention_mask=mask)
    probes = [metaint.HeadProbe(["entropy"], max_logit=True) for _ in range(2)]
    for probe, half in zip(probes, tokens.split(2), strict=True):
        metaint.scan(gpt2, half, [probe])
    probes[0].merge_state(probes[1])
    for found in (padded, read(gpt2, tokens, batch_size=1), probes[0].to_dataset()):
        assert found["max_logit"].values == pytest.approx(whole["max_logit"].values, rel=1e-4)
        assert found["max_logit_q99"].values == pytest.approx(whole["max_logit_q99"].values, rel=0.02, abs=0.02)


def test_steps_that_continue_a_cache_are_left_out(gpt2):
    prompt = tokens_of(2, 10)
    with torch.no_grad(), metaint.attach(gpt2, metaint.HeadProbe(max_logit=True)) as probe:
        out = gpt2.generate(prompt, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    found, heads = probe.to_dataset(), metaint.scan(gpt2, out[:, :-1])["heads"]
    assert found["max_logit"].values == pytest.approx(read(gpt2, prompt)["max_logit"].values, rel=1e-4)
    assert found["entropy"].values == pytest.approx(heads["entropy"].values, rel=1e-4)


def test_where_queries_and_keys_do_not_make_the_pattern_it_is_not_a_number(gpt2, monkeypatch):
    monkeypatch.setattr("metaint.probes.largest_logits.holds", lambda model, check: False)
    monkeypatch.setattr("metaint.probes.largest_logits._scores_make_pattern", lambda model: False)
    heads = read(gpt2, tokens_of())
    assert heads["entropy"].notnull().all()
    for name in NAMES:
        assert heads[name].dims == ("layer", "head")
        assert heads[name].isnull().all()


@pytest.mark.skipif("native-rms-rotary" not in available_kinds(), reason="a bridge of TransformerLens 3.9 and newer")
def test_a_hook_that_holds_the_pattern_is_not_taken_for_scores():
    """TransformerLens's own rotary bridge tells neither rotated queries nor scores before the softmax."""
    assert read(build("native-rms-rotary"), tokens_of())["max_logit"].isnull().all()


def test_it_is_read_where_asked_for_alone(gpt2):
    assert not set(NAMES) & set(metaint.scan(gpt2, tokens_of())["heads"].data_vars)


def test_quantiles_of_signed_numbers_are_true_to_a_bin():
    values = torch.cat([-torch.logspace(-3, 5, 500), torch.logspace(-3, 5, 500)]).sort().values
    histogram = torch.zeros(BINS).scatter_add_(0, logit_bin(values), torch.ones(1000))
    for quantile in (0.01, 0.3, 0.5, 0.77, 0.99):
        expected = float(values[int(np.ceil(quantile * 1000)) - 1])
        assert float(logit_quantile(histogram, quantile)) == pytest.approx(expected, rel=0.011, abs=0.011)
    assert logit_quantile(torch.zeros(2, BINS), 0.99).isnan().all()
