"""Kinds and statistics against plain Python, closed forms, and invariances."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from metaint.errors import InputError
from metaint.measures import attention
from metaint.measures.tile import TAUS, Context, Tile
from tests.measures import plain

KINDS = [m for m in attention.HEAD_MEASURES if m.form == "kind"]
STATISTICS = [m for m in attention.HEAD_MEASURES if m.form == "statistic" and m.name != "sink_rate"]


def random_pattern(mask, causal, heads=3, sharp=3.0, seed=0):
    """Softmax of random scores over the visible keys; rows of padding are uniform, as models leave them."""
    batch, keys = mask.shape
    generator = torch.Generator().manual_seed(seed)
    scores = sharp * torch.randn(batch, heads, keys, keys, generator=generator)
    context = Context(torch.arange(keys), mask, causal=causal)
    seen = context.visible & mask[:, :, None]
    seen = seen | ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)


def cases():
    generator = torch.Generator().manual_seed(3)
    ragged = torch.randint(0, 6, (4, 20), generator=generator)
    copies = torch.stack([torch.randperm(9, generator=generator).repeat(3)[:20] for _ in range(4)])
    begun = torch.cat([torch.full((4, 1), 9), copies[:, :19]], 1)
    full = torch.ones(4, 20, dtype=torch.bool)
    left, right = full.clone(), full.clone()
    for i in range(4):
        left[i, : 2 * i] = False
        right[i, 20 - 3 * i :] = False
    for name, tokens in (("text", ragged), ("repeated", copies), ("bos", begun)):
        for padding, mask in (("full", full), ("left", left), ("right", right)):
            for causal in (True, False):
                direction = "causal" if causal else "both"
                yield pytest.param(tokens, mask, causal, id=f"{name}-{padding}-{direction}")


@pytest.mark.parametrize(("tokens", "mask", "causal"), cases())
def test_kinds_equal_plain_python(tokens, mask, causal):
    context = Context.whole(tokens, mask, causal)
    for measure in KINDS:
        found = set(zip(*(part.tolist() for part in attention.targets(measure, context)), strict=True))
        wanted = {
            (b, q, k)
            for b in range(len(tokens))
            for q in range(tokens.shape[1])
            if plain.counted(mask[b].tolist(), q)
            for k in plain.keys_of(measure.name, tokens[b].tolist(), mask[b].tolist(), q, causal)
        }
        assert found == wanted, measure.name


@pytest.mark.parametrize(("tokens", "mask", "causal"), cases())
def test_statistics_equal_plain_python(tokens, mask, causal):
    context = Context.whole(tokens, mask, causal)
    tile = Tile(random_pattern(mask, causal), context)
    values = {measure.name: measure(tile) for measure in STATISTICS}
    for b, h, q in [(0, 0, 7), (1, 2, 19), (2, 1, 6), (3, 0, 10), (1, 1, 4)]:
        if not context.counted[b, q]:
            continue
        wanted = plain.statistics_of(tile.pattern[b, h, q].tolist(), mask[b].tolist(), q, causal)
        for name, value in values.items():
            got = value[:, b, h, q] if value.ndim == 4 else value[b, h, q]
            torch.testing.assert_close(got, torch.tensor(wanted[name], dtype=got.dtype), rtol=2e-5, atol=2e-5)


def test_ideal_heads_score_one_and_uniform_heads_their_baseline():
    tokens = torch.arange(1, 13).repeat(2)[None]
    context = Context.whole(tokens)
    uniform = torch.tril(torch.ones(24, 24))
    uniform = (uniform / uniform.sum(-1, keepdim=True))[None, None]
    for measure in KINDS:
        batch, query, key = attention.targets(measure, context)
        ideal = torch.zeros(1, 1, 24, 24)
        ideal[batch, 0, query, key] = 1
        ideal = ideal / ideal.sum(-1, keepdim=True).clamp(min=1)
        rows = torch.zeros(24).index_add(0, query, ideal[batch, 0, query, key])
        defined = query.unique()
        torch.testing.assert_close(rows[defined], torch.ones(len(defined)))
        counts = torch.zeros(24).index_add(0, query, torch.ones(len(query)))[defined]
        even = torch.zeros(24).index_add(0, query, uniform[batch, 0, query, key])[defined]
        torch.testing.assert_close(even, counts / (defined + 1))
    tile = Tile(uniform, context)
    later = slice(1, None)
    for name in ("entropy", "averaging"):
        measure = getattr(attention, name)
        torch.testing.assert_close(measure(tile)[0, 0, later], torch.ones(23), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.effective_keys(tile)[0, 0], torch.arange(1.0, 25), rtol=1e-4, atol=1e-4)


def test_saturated_counts_of_a_uniform_head_are_the_published_closed_forms():
    # Merrill et al. at T = 83 and 700: a uniform causal head attends (T + 1) / 2 keys on average, more than one in
    # (T - 1) / T of the rows; the published 41.01 and 349.50 come from attending to masked keys instead.
    for length, mean, split in ((83, 42.0, 82 / 83), (700, 350.5, 699 / 700)):
        tokens = torch.zeros(1, length, dtype=torch.long)
        pattern = torch.tril(torch.ones(length, length))
        pattern = (pattern / pattern.sum(-1, keepdim=True))[None, None]
        ties = attention.tied_keys(Tile(pattern, Context.whole(tokens)))
        for tau in range(len(TAUS)):
            assert ties[tau].mean() == pytest.approx(mean)
            assert (ties[tau] > 1).float().mean() == pytest.approx(split)


def test_ties_within_tau_are_counted_exactly():
    scores = torch.tensor([0.0, -0.09, -0.3, -0.9, -1.9, -5.0])
    pattern = torch.zeros(1, 1, 6, 6)
    pattern[..., -1, :] = scores.softmax(0)
    ties = attention.tied_keys(Tile(pattern, Context.whole(torch.arange(6)[None])))
    assert ties[:, 0, 0, -1].tolist() == [1, 2, 3, 4, 5]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(0.0, 8.0))
def test_sharper_scores_never_raise_entropy(length, seed, sharp):
    mask = torch.ones(1, length, dtype=torch.bool)
    context = Context.whole(torch.zeros(1, length, dtype=torch.long))
    pattern = random_pattern(mask, True, sharp=sharp, seed=seed)
    sharper = (pattern.clamp(min=1e-30).log() * 2).softmax(-1) * (pattern > 0)
    before, after = (Tile(p, context).entropy[:, :, 1:] for p in (pattern, sharper))
    assert (after <= before + 1e-4).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.integers(0, 1000))
def test_blocks_of_rows_equal_the_whole(size, seed):
    tokens = torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :7] = False
    pattern = random_pattern(mask, True, seed=seed)
    context = Context.whole(tokens, mask)
    whole = Tile(pattern, context)
    for start in range(0, 40, size):
        rows = slice(start, start + size)
        stop = min(start + size, 40)
        part = Tile(pattern[:, :, rows, :stop], Context(context.queries[rows], mask[:, :stop], tokens[:, :stop]))
        for measure in STATISTICS:
            got, wanted = measure(part), measure(whole)[..., rows]
            keep = context.counted[:, rows][:, None].expand(got.shape[-3:])
            torch.testing.assert_close(got[..., keep], wanted[..., keep], rtol=1e-4, atol=1e-4)


def test_order_of_sequences_and_left_padding_do_not_matter():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 7, (3, 16), generator=generator)
    mask = torch.ones(3, 16, dtype=torch.bool)
    pattern = random_pattern(mask, True)
    wide_tokens = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], 1)
    wide_mask = torch.cat([torch.zeros(3, 4, dtype=torch.bool), mask], 1)
    wide = torch.zeros(3, 3, 20, 20)
    wide[:, :, 4:, 4:] = pattern
    plain_tile, padded = Tile(pattern, Context.whole(tokens)), Tile(wide, Context.whole(wide_tokens, wide_mask))
    for measure in STATISTICS:
        torch.testing.assert_close(measure(padded)[..., 5:], measure(plain_tile)[..., 1:], rtol=1e-5, atol=1e-5)
    for measure in KINDS:
        batch, query, key = attention.targets(measure, Context.whole(tokens))
        moved = attention.targets(measure, Context.whole(wide_tokens, wide_mask))
        assert [p.tolist() for p in moved] == [batch.tolist(), (query + 4).tolist(), (key + 4).tolist()]


def test_shuffled_null_equals_drawing_shuffles():
    mask = torch.ones(1, 12, dtype=torch.bool)
    pattern = random_pattern(mask, True, heads=1, sharp=2.0)
    context = Context.whole(torch.zeros(1, 12, dtype=torch.long))
    q, m = 10, 3
    matches = torch.zeros(1, 1, 12)
    matches[..., q] = m
    mean, variance = attention.shuffled(Tile(pattern, context), matches)
    row, generator = pattern[0, 0, q, 1 : q + 1], torch.Generator().manual_seed(0)
    draws = torch.stack([row[torch.randperm(q, generator=generator)[:m]].sum() for _ in range(20_000)])
    assert mean.item() == pytest.approx(draws.mean().item(), abs=3e-3)
    assert variance.sqrt().item() == pytest.approx(draws.std().item(), rel=0.03)


def test_shuffled_null_ignores_the_sink():
    pattern = torch.zeros(1, 1, 8, 8)
    pattern[..., 0] = 1.0
    mean, variance = attention.shuffled(Tile(pattern, Context.whole(torch.arange(8)[None])), torch.ones(1, 1, 8))
    assert mean.abs().max() == 0
    assert variance.abs().max() == 0


def test_sinks_are_counted_by_the_published_definition():
    total, count = torch.tensor([63.0, 18.0, 19.0, 63.0]), torch.tensor([63.0, 63.0, 63.0, 40.0])
    found = attention.is_sink(total, count)
    assert found[:3].tolist() == [1.0, 0.0, 1.0]  # 19/64 is below 0.3, 20/64 above it
    assert found[3].isnan()


def test_mean_distance_of_known_heads():
    length = 6
    context = Context.whole(torch.arange(length)[None])
    previous = torch.diag(torch.ones(length - 1), -1)[None, None]
    assert attention.distance_mean(Tile(previous, context))[0, 0, 1:].tolist() == [1.0] * 5
    assert attention.distance_std(Tile(previous, context))[0, 0, 1:].max() < 1e-6


def test_periods_are_found_with_and_without_a_first_token():
    tokens = torch.tensor([[5, 1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4, 5, 6, 7], [4, 4, 4, 4, 4, 4, 4]])
    period, start = attention.find_period(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert period.tolist() == [3, 3, 0, 2]
    assert start.tolist()[:2] == [1, 0]


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        (["previous"], "measures has 'previous', which is no head measure: choose from previous_token"),
        ([len], "decorate a function of one's own with @metaint.statistic or @metaint.kind"),
        (["entropy", "entropy"], "measures has 'entropy' twice"),
    ],
)
def test_measures_that_are_none(measures, sentence):
    with pytest.raises(InputError, match=sentence):
        attention.resolve(measures)


def test_detector_scores_refuse_an_unknown_measure():
    with pytest.raises(InputError, match='error_measure is \'sub\': choose "mul" or "abs"'):
        attention.detector_scores(torch.eye(3)[None], torch.arange(3), error_measure="sub")


@pytest.mark.parametrize("error_measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
def test_detector_scores_equal_detect_head(gpt2, error_measure, exclude_bos, exclude_current_token):
    from transformer_lens.head_detector import detect_head

    text = "the cat the dog the cat sat the dog sat"
    tokens = gpt2.to_tokens(text)
    _, cache = gpt2.run_with_cache(tokens, remove_batch_dim=True)
    kept = {layer: cache["pattern", layer, "attn"].clone() for layer in range(gpt2.cfg.n_layers)}
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    for layer in range(gpt2.cfg.n_layers):
        ours = attention.detector_scores(cache["pattern", layer, "attn"], tokens[0], **options)
        torch.testing.assert_close(cache["pattern", layer, "attn"], kept[layer], rtol=0, atol=0)
        for name, scores in ours.items():
            theirs = detect_head(gpt2, text, name, **options)
            torch.testing.assert_close(scores, theirs[layer].to(scores.dtype), rtol=0, atol=1e-5)
