"""HeadProbe inside other people's forward passes: same numbers however the model is run, and no trace left."""

import copy
import dataclasses
import pickle

import pytest
import torch

import metaint
from metaint.errors import ActivationError, HookAuditError, InputError
from metaint.measures import attention
from metaint.measures.tile import Context
from metaint.models.describe import shape_of
from metaint.models.inputs import InputWatch
from metaint.tasks import repeated_tokens
from tests.builders import available_kinds, build
from tests.measures import plain

SCORES = ("previous_token", "first_token", "prefix_match", "induction", "entropy", "averaging", "distance_mean")


def assert_same(left, right, atol=1e-5, names=None):
    """Equal variables, whatever scan or dataset they stand in."""
    left, right = (s["heads"].to_dataset() if "heads" in getattr(s, "children", ()) else s for s in (left, right))
    for name in names or left.data_vars:
        a, b = (torch.as_tensor(d[name].values) for d in (left, right))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def random_tokens(model, batch=4, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.cfg.d_vocab, (batch, length), generator=generator)


def test_every_architecture_equals_plain_python(any_model):
    tokens = random_tokens(any_model, 2, 20)
    tokens[1, 10:] = tokens[1, :10]
    causal = shape_of(any_model).causal
    patterns = {}

    def keep(pattern, hook):
        patterns[hook.name] = pattern.detach().clone()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(any_model.cfg.n_layers)]
    with torch.no_grad():
        any_model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
    heads = metaint.scan(any_model, tokens, batch_size=1)["heads"]
    layer, head = any_model.cfg.n_layers - 1, any_model.cfg.n_heads - 1
    pattern = patterns[names[layer]][:, head].tolist()
    mask = [True] * 20
    for name in ("previous_token", "first_token", "local_mass", "prefix_match", "induction"):
        rows = [
            sum(pattern[b][q][k] for k in keys)
            for b in range(2)
            for q in range(1, 20)
            if (keys := plain.keys_of(name, tokens[b].tolist(), mask, q, causal))
        ]
        assert heads[f"{name}_count"][layer, head] == len(rows), name
        if rows:
            assert heads[name][layer, head] == pytest.approx(sum(rows) / len(rows), abs=1e-5), name
    for name in ("entropy", "averaging", "max_weight", "distance_mean", "effective_keys"):
        rows = [plain.statistics_of(pattern[b][q], mask, q, causal)[name] for b in range(2) for q in range(1, 20)]
        assert heads[name][layer, head] == pytest.approx(sum(rows) / len(rows), rel=1e-4, abs=1e-5), name


def test_measures_are_the_same_functions_in_another_process():
    probe = pickle.loads(pickle.dumps(metaint.HeadProbe()))
    assert all(ours is theirs for ours, theirs in zip(metaint.HeadProbe().measures, probe.measures, strict=True))


def test_attach_learns_the_tokens_of_the_owners_passes(gpt2, repeated, repeated_scan):
    with torch.no_grad(), metaint.attach(gpt2, metaint.HeadProbe()) as probe:
        gpt2(repeated[:3])
        gpt2.run_with_hooks(repeated[3:], fwd_hooks=[])
    assert_same(probe.to_scan(), repeated_scan)


def test_hooks_of_one_s_own_run(gpt2, repeated, repeated_scan):
    probe = metaint.HeadProbe()
    gpt2.run_with_hooks(repeated, fwd_hooks=probe.fwd_hooks(gpt2, repeated))
    assert_same(probe.to_scan(), repeated_scan)
    if "embed.hook_in" in gpt2.hook_dict:
        probe = metaint.HeadProbe()
        gpt2.run_with_hooks(repeated, fwd_hooks=probe.fwd_hooks(gpt2))
        assert_same(probe.to_scan(), repeated_scan)
    else:
        with pytest.raises(InputError, match=r"tokens is missing, .* call fwd_hooks\(model, tokens\)"):
            metaint.HeadProbe().fwd_hooks(gpt2)


def test_a_cache_without_its_batch_dimension(gpt2, repeated):
    _, single = gpt2.run_with_cache(repeated[0], remove_batch_dim=True)
    assert_same(metaint.read_cache(single, repeated[0]), metaint.scan(gpt2, repeated[:1]))


def test_cache_without_patterns_is_refused(gpt2, repeated):
    _, cache = gpt2.run_with_cache(repeated, names_filter="blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match=r"cache lacks blocks\.1\.attn\.hook_pattern: run with a names_filter"):
        metaint.read_cache(cache, repeated)


def test_generation_with_a_cache_equals_the_whole_pass(gpt2):
    prompt = random_tokens(gpt2, 2, 10)
    # All but the one that needs the next token, which a step does not have.
    measures = [measure for measure in attention.HEAD_MEASURES if measure.name != "prefix_match_correct"]
    with torch.no_grad(), metaint.attach(gpt2, metaint.HeadProbe(measures)) as probe:
        out = gpt2.generate(prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    assert probe.counts[0].shape[0] == 2
    assert len(probe.counts) == 1  # steps go on with the prompt's sequences
    assert_same(probe.to_scan(), metaint.scan(gpt2, out[:, :-1], [metaint.HeadProbe(measures)]))


@pytest.mark.parametrize("kind", [k for k in ("llama", "gemma2", "neox") if k in available_kinds()])
def test_generation_with_rotary_and_sliding_windows(kind):
    model = build(kind)
    prompt = random_tokens(model, 2, 14)
    with torch.no_grad(), metaint.attach(model, metaint.HeadProbe()) as probe:
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    assert_same(probe.to_scan(), metaint.scan(model, out[:, :-1]), names=SCORES)


def test_attaching_in_the_midst_of_a_generation_is_refused(gpt2):
    probe = metaint.HeadProbe()
    hooks = dict(probe.fwd_hooks(gpt2, torch.ones(1, 1, dtype=torch.long)))
    start = next(iter(hooks))
    hooks[start](torch.ones(1, 1, dtype=torch.long), None)
    with pytest.raises(InputError, match="continues 4 cached positions whose tokens were never seen"):
        hooks["blocks.0.attn.hook_pattern"](torch.full((1, 4, 1, 5), 0.2), None)


def test_a_model_fed_with_embeddings_has_no_matches(gpt2, repeated, repeated_scan):
    if not hasattr(gpt2, "original_model"):
        pytest.skip("only bridges take embeddings as their input")
    embeddings = gpt2.embed(repeated).detach()
    with torch.no_grad(), metaint.attach(gpt2, metaint.HeadProbe()) as probe:
        gpt2(embeddings)
    found = probe.to_scan()
    assert_same(found, repeated_scan, names=("previous_token", "entropy", "first_token"))
    assert found["heads"]["induction"].isnull().all()
    assert (found["heads"]["prefix_match_count"] == 0).all()


def test_measures_of_one_s_own(gpt2, repeated, repeated_scan):
    @metaint.statistic
    def second_half(tile):
        """Weight on the later half of the visible keys, by the query's own position."""
        keys = torch.arange(tile.pattern.shape[-1])
        return (tile.pattern * (keys > tile.context.queries[:, None] / 2)).sum(-1)

    @metaint.kind
    def two_back(context):
        """The token before the previous one."""
        return (context.queries[:, None] - torch.arange(context.mask.shape[1]) == 2).expand(len(context.mask), -1, -1)

    heads = metaint.scan(gpt2, repeated, [metaint.HeadProbe([second_half, two_back, "previous_token"])])["heads"]
    assert_same(heads.to_dataset(), repeated_scan, names=["previous_token", "previous_token_null_std"])
    assert heads["second_half"].attrs["description"].startswith("Weight on the later half")
    assert heads["second_half_uniform"].values == pytest.approx(0.5, abs=0.03)
    assert float(heads["two_back_count"][0, 0]) == 6 * 62
    assert {"two_back_null_mean", "two_back_low", "second_half_high"} <= set(heads.data_vars)
    assert "tau" not in heads.dims


def test_the_contract_of_names(repeated_scan):
    heads = repeated_scan["heads"]
    kinds = [m.name for m in attention.HEAD_MEASURES if m.form == "kind"]
    for measure in attention.HEAD_MEASURES:
        dims = ("tau", "layer", "head") if measure.per_tau else ("layer", "head")
        parts = ["", "_uniform", "_low", "_high", "_count"]
        for part in parts + (["_null_mean", "_null_std"] if measure.name in kinds else []):
            assert heads[measure.name + part].dims == dims
    assert {"model", "weights", "dtype", "device", "seed", "bos", "metaint_version"} <= set(repeated_scan.attrs)
    assert heads.attrs["tokens_seen"] == 6 * 64


def test_baselines_and_nulls_of_a_uniform_model_are_its_scores():
    model = copy.deepcopy(build(available_kinds()[0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".q." in name or "W_Q" in name or "b_Q" in name:
                parameter.zero_()
    heads = metaint.scan(model, random_tokens(model))["heads"]
    for measure in attention.HEAD_MEASURES:
        if measure.name != "sink_rate":
            assert_close = torch.testing.assert_close
            score, even = (torch.as_tensor(heads[measure.name + p].values) for p in ("", "_uniform"))
            assert_close(score, even, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_intervals_hold_the_score_and_shrink_with_sequences(gpt2, repeated_scan):
    heads = repeated_scan["heads"]
    for name in ("previous_token", "entropy"):
        assert (heads[f"{name}_low"] <= heads[name]).all()
        assert (heads[name] <= heads[f"{name}_high"]).all()
    few, many = (metaint.scan(gpt2, random_tokens(gpt2, n, 20))["heads"] for n in (4, 64))
    width = [float((h["entropy_high"] - h["entropy_low"]).mean()) for h in (few, many)]
    assert width[1] < width[0] / 2
    assert metaint.scan(gpt2, random_tokens(gpt2, 1))["heads"]["entropy_low"].isnull().all()


def test_a_pass_that_the_owner_breaks_counts_where_it_came(gpt2):
    def fail(activation, hook):
        raise KeyError("the owner's own mistake")

    with metaint.attach(gpt2, metaint.HeadProbe()) as probe:
        with pytest.raises(KeyError):
            gpt2.run_with_hooks(random_tokens(gpt2), fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
        gpt2(random_tokens(gpt2))
    counts = probe.to_scan()["heads"]["entropy_count"]
    assert counts[0, 0] == 2 * counts[1, 0]  # the broken pass reached layer 0 alone


def test_passes_in_inference_mode_and_autocast_mix(gpt2, repeated, repeated_scan):
    with metaint.attach(gpt2, metaint.HeadProbe()) as probe:
        with torch.inference_mode():
            gpt2(repeated[:3])
        with torch.no_grad():
            gpt2(repeated[3:])
    assert_same(probe.to_scan(), repeated_scan)
    with torch.no_grad(), torch.autocast("cpu"), metaint.attach(gpt2, metaint.HeadProbe()) as probe:
        gpt2(repeated)
    assert_same(probe.to_scan(), repeated_scan, atol=2e-2, names=["previous_token", "entropy"])


def test_nan_is_named_with_its_layer():
    model = copy.deepcopy(build(available_kinds()[0]))
    metaint.audit(model)
    names = [
        n for n, p in model.named_parameters() if ("blocks.1" in n or "layers.1" in n or "h.1" in n) and p.ndim > 1
    ]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.fill_(float("nan"))
    with pytest.raises(ActivationError, match=r"blocks\.1\.attn\.hook_pattern holds NaN or infinity"):
        metaint.scan(model, random_tokens(model), [probe := metaint.HeadProbe()])
    assert probe.counts[0][:, :, 1].sum() == 0  # nothing of the broken layer was added


def test_a_probe_stays_with_its_model(gpt2):
    other = build("native-attn-only", n_layers=3) if hasattr(gpt2, "original_model") else None
    if other is None:
        pytest.skip("one builder is enough for this")
    probe = metaint.HeadProbe()
    metaint.scan(gpt2, random_tokens(gpt2), [probe])
    with pytest.raises(InputError, match="this HeadProbe has read a model of 2 layers x 4 heads"):
        metaint.scan(other, random_tokens(other), [probe])


def test_a_model_without_patterns_is_refused(gpt2):
    class Blind:
        @property
        def hook_dict(self):
            return {name: point for name, point in gpt2.hook_dict.items() if not name.endswith("hook_pattern")}

        def __getattr__(self, name):
            return getattr(gpt2, name)

        def __call__(self, *args, **kwargs):
            return gpt2(*args, **kwargs)

    with pytest.raises(
        HookAuditError, match=r"HeadProbe reads blocks\.0\.attn\.hook_pattern, which this model does not"
    ):
        metaint.HeadProbe().prepare(Blind())


def test_attach_needs_a_probe(gpt2):
    with pytest.raises(InputError, match="probes is empty"), metaint.attach(gpt2):
        pass


def test_kinds_alone_in_double_precision():
    """Whose sums of squares nothing else has walked over."""
    model = build("gpt2") if "gpt2" in available_kinds() else build(available_kinds()[0])
    tokens = repeated_tokens(96, 8, batch=2, ids=(5, 95))
    expected = metaint.scan(model, tokens, [metaint.HeadProbe(["first_token"])])["heads"]["first_token"]
    found = metaint.scan(model.to(torch.float64), tokens, [metaint.HeadProbe(["first_token"])])["heads"]["first_token"]
    assert found.values == pytest.approx(expected.values, abs=1e-6)


def windowed(kind, window):
    """A model whose layers see `window` keys back, by its shape; the patterns are given by hand."""
    model = build(kind)
    probe = metaint.HeadProbe()
    probe.prepare(model)
    probe._shape = dataclasses.replace(probe.shape, windows=(window,) * probe.shape.n_layers)
    return model, probe


def test_queries_that_a_window_keeps_from_position_0_do_not_count_for_it(gpt2):
    """A head that looks at position 0 wherever it can see it scores 1, and one that averages its window averages."""
    window, length = 8, 20
    keys = torch.arange(length)
    seen = (keys <= keys[:, None]) & (keys > keys[:, None] - window)
    even = seen / seen.sum(-1, keepdim=True)
    sink = even.clone()
    sink[:window] = 0
    sink[:window, 0] = 1
    pattern = torch.stack([sink, even, even, even]).expand(2, -1, -1, -1)
    tokens = torch.arange(2 * length).view(2, length) % 95
    watch = InputWatch()
    watch.begin(tokens, None)
    _, probe = windowed("gpt2", window)
    for name in probe.hook_names(probe.shape):
        probe.update(name, pattern, watch)
    heads = probe.to_dataset().isel(layer=0)
    assert float(heads["first_token"][0]) == pytest.approx(1)
    assert float(heads["first_token_count"][0]) == 2 * (window - 1)
    harmonic = sum(1 / (q + 1) for q in range(1, window)) / (window - 1)
    assert float(heads["first_token"][1]) == pytest.approx(harmonic)
    assert float(heads["first_token_uniform"][1]) == pytest.approx(harmonic)
    assert float(heads["averaging"][1]) == pytest.approx(1)
    assert float(heads["entropy"][1]) == pytest.approx(1)
    assert float(heads["previous_token_null_mean"][1]) == pytest.approx(float(heads["previous_token_uniform"][1]))


@pytest.mark.parametrize("padded", ["left", "right"])
def test_a_window_is_that_of_plain_python(padded):
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, : 3 if padded == "left" else 0] = False
    mask[0, 9 if padded == "right" else 12 :] = False
    context = Context(torch.arange(12), mask, torch.arange(12)[None], True, window=4)
    for q in range(12):
        seen = [k for k in range(12) if q - 4 < k <= q and mask[0, k]]
        assert context.visible[0, q].nonzero().squeeze(-1).tolist() == seen
        assert float(context.n_visible[0, q]) == max(1, len(seen))
        assert bool(context.sees_first[0, q]) == (q - 4 < int(context.first) <= q)
