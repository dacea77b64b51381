"""What holds for every probe on every architecture, once: however a model is fed, and whatever befalls a pass."""

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import xarray as xr

import metaint
from metaint.errors import HookAuditError, InputError
from metaint.models.describe import shape_of
from metaint.probes.descents import Descent
from metaint.probes.probe import Probe
from metaint.probes.recurrence import RecurrenceProbe
from tests.builders import D_VOCAB, available_kinds, build

LENGTH, D = 12, 2
DESCENTS = {"gradient_step": Descent(1, torch.full((LENGTH,), 0.1, dtype=torch.float64))}
PROBES: dict[str, Callable[[], Probe]] = {
    "heads": metaint.HeadProbe,
    "outputs": lambda: metaint.OutputProbe(positions=5),
    "residual": lambda: metaint.ResidualProbe(positions=5),
    "inner": lambda: metaint.InnerProbe(positions=5),
    "saturation": lambda: metaint.SaturationProbe((0.5, 1, 4), positions=5),
    "memory": lambda: metaint.MemoryProbe(8),
    "weights": metaint.WeightProbe,
    "recurrence": lambda: RecurrenceProbe(DESCENTS),
}
KINDS = [kind for kind in ("gpt2", "llama", "gemma2", "native-gqa", "hooked") if kind in available_kinds()]
EVERY_PROBE = pytest.mark.parametrize("group", PROBES)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def model_of(kind):
    """Shared, and left as it was by every law."""
    model = build(kind)
    with torch.no_grad():
        model(TOKENS)  # a bridge wires hooks of its own in its first pass
    return model


def draw(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Blocks that repeat, so that there is something to match and to recall.
TOKENS = torch.randint(5, D_VOCAB, (12, LENGTH // 2), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
# For sequences of vectors: what each token stands for.
VECTORS, MATRICES = draw(D_VOCAB, D, seed=1), draw(D_VOCAB, D, D, seed=2)


def feed(model, probe, tokens=TOKENS, mask=None):
    """One pass on these tokens and, for a RecurrenceProbe, what it was about."""
    stacked = probe.stacked if isinstance(probe, metaint.SaturationProbe) else torch.clone
    padding = {} if mask is None else {"attention_mask": stacked(mask)}
    with torch.no_grad(), metaint.attach(model, probe):
        logits = model(stacked(tokens), **padding)
    tell(probe, tokens, logits)
    return probe


def tell(probe, tokens, logits):
    if isinstance(probe, RecurrenceProbe):
        vectors = VECTORS[torch.cat([tokens, tokens[:, :1]], 1)]
        probe.read_predictions(vectors, MATRICES[tokens[:, 0]], logits.detach()[..., :D])


@functools.cache
def whole(group, kind) -> xr.Dataset:
    """What one pass on all tokens gives."""
    data = feed(model_of(kind), PROBES[group]()).to_dataset()
    assert data.data_vars
    return data


def assert_same(left: xr.Dataset, right: xr.Dataset, atol=1e-4, rtol=1e-4):
    assert left.attrs == right.attrs
    assert list(left.data_vars) == list(right.data_vars)
    for name in left.data_vars:
        a, b = (torch.tensor(data[name].values) for data in (left, right))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


# ---- parts and wholes -------------------------------------------------------------------------------------------


@EVERY_PROBE
@EVERY_KIND
@pytest.mark.parametrize("size", [1, 5])
def test_batches_of_any_size_give_the_same(group, kind, size):
    probe = PROBES[group]()
    for tokens in TOKENS.split(size):
        feed(model_of(kind), probe, tokens)
    assert_same(probe.to_dataset(), whole(group, kind))


@EVERY_PROBE
@EVERY_KIND
def test_merged_halves_are_the_whole_and_merging_with_nothing_changes_nothing(group, kind):
    first, second, empty = (PROBES[group]() for _ in range(3))
    feed(model_of(kind), first, TOKENS[:5]).to_dataset()  # whose numbers must not stay behind
    feed(model_of(kind), second, TOKENS[5:])
    first.merge_state(second)
    assert_same(first.to_dataset(), whole(group, kind))
    empty.merge_state(first)
    assert_same(empty.to_dataset(), whole(group, kind))
    first.merge_state(PROBES[group]())
    assert_same(first.to_dataset(), whole(group, kind))


@EVERY_PROBE
@EVERY_KIND
def test_a_cache_gives_what_a_pass_gives(group, kind):
    model, probe = model_of(kind), PROBES[group]()
    _, cache = model.run_with_cache(TOKENS)
    before = {name: value.clone() for name, value in cache.items() if torch.is_tensor(value)}
    probe.prepare(model)
    probe.read_weights(model)
    if group in ("saturation", "recurrence"):
        with pytest.raises(InputError, match=r"can't read a cache|holds a RecurrenceProbe"):
            metaint.read_cache(cache, TOKENS, probes=[probe])
        return
    metaint.read_cache(cache, TOKENS, probes=[probe])
    assert_same(probe.to_dataset(), whole(group, kind))
    for name, value in before.items():
        torch.testing.assert_close(cache[name], value, rtol=0, atol=0, equal_nan=True)


@EVERY_PROBE
@EVERY_KIND
def test_probes_side_by_side_read_what_each_reads_alone(group, kind):
    model, probes = model_of(kind), [PROBES[group]() for _ in range(2)]
    others = [PROBES[name]() for name in ("heads", "residual", "inner", "memory") if name != group]
    stacked = probes[0].stacked if group == "saturation" else torch.clone
    with torch.no_grad(), metaint.attach(model, probes[0], *others, probes[1]):
        logits = model(stacked(TOKENS))
    for probe in probes:
        tell(probe, TOKENS, logits)
        assert_same(probe.to_dataset(), whole(group, kind))
    for probe in others:
        assert_same(probe.to_dataset(), whole(probe.group, kind), atol=1e-3)


@EVERY_PROBE
@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(group, kind, side):
    if group == "recurrence":
        pytest.skip("sequences of vectors have no padding")
    model, tokens = model_of(kind), TOKENS[:4]
    padding, nothing = torch.full((4, 5), 1), torch.zeros(4, 5, dtype=torch.long)
    real = torch.ones_like(tokens)
    order = slice(None, None, -1 if side == "left" else 1)
    padded = torch.cat([tokens, padding][order], 1)
    mask = torch.cat([real, nothing][order], 1)
    try:
        plain = feed(model, PROBES[group](), tokens).to_dataset()
    except HookAuditError:
        pytest.skip("a model that this probe refuses")
    assert_same(feed(model, PROBES[group](), padded, mask).to_dataset(), plain, atol=2e-3, rtol=1e-3)


# ---- the state --------------------------------------------------------------------------------------------------


@EVERY_PROBE
@EVERY_KIND
def test_a_probe_starts_again_after_reset(group, kind):
    probe = feed(model_of(kind), PROBES[group](), TOKENS.flip(0)[:3])
    probe.reset()
    assert not probe.to_dataset().data_vars
    assert_same(feed(model_of(kind), probe).to_dataset(), whole(group, kind))


@EVERY_PROBE
@EVERY_KIND
def test_a_probe_can_go_to_another_process_and_come_back(group, kind):
    probe = pickle.loads(pickle.dumps(PROBES[group]()))
    probe = pickle.loads(pickle.dumps(feed(model_of(kind), probe, TOKENS[:5])))
    assert_same(feed(model_of(kind), probe, TOKENS[5:]).to_dataset(), whole(group, kind))


@EVERY_PROBE
@EVERY_KIND
def test_a_probe_sums_in_full_whatever_dtype_it_is_moved_to(group, kind):
    probe = feed(model_of(kind), PROBES[group]().to(torch.bfloat16), TOKENS[:5]).to(torch.float16).half()
    assert_same(feed(model_of(kind), probe, TOKENS[5:]).to_dataset(), whole(group, kind))


@EVERY_PROBE
def test_what_read_nothing_is_empty_and_has_no_shape(group):
    probe = PROBES[group]()
    assert not probe.to_scan()[group].data_vars
    name = type(probe).__name__
    with pytest.raises(InputError, match=rf"^this {name} has read no model: give it to metaint.scan or metaint.attach"):
        _ = probe.shape


# ---- no trace ---------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """All that a probe could leave behind in a model and in torch."""

    hooks: int
    training: list[bool]
    random: torch.Tensor
    grad: bool
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model):
        modules = list(model.modules())
        return cls(
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
            [module.training for module in modules],
            torch.random.get_rng_state(),
            torch.is_grad_enabled(),
            {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)},
        )

    def assert_same(self, model):
        now = Trace.of(model)
        assert (now.hooks, now.training, now.grad) == (self.hooks, self.training, self.grad)
        assert torch.equal(now.random, self.random)
        for name, value in self.tensors.items():
            assert torch.equal(now.tensors[name], value), name


@EVERY_PROBE
@pytest.mark.parametrize("kind", available_kinds())
def test_passes_and_scans_leave_no_trace(group, kind):
    model = model_of(kind)
    before = Trace.of(model)
    try:
        probe = feed(model, PROBES[group]())
    except HookAuditError:
        before.assert_same(model)
        pytest.skip("a model that this probe refuses")
    before.assert_same(model)
    assert not any(value.requires_grad for value in tensors_in(probe))
    if group == "recurrence":  # which metaint.recur feeds
        return
    model.train()
    try:
        before = Trace.of(model)
        metaint.scan(model, TOKENS, [PROBES[group]()])
        before.assert_same(model)
    finally:
        model.eval()


def tensors_in(probe):
    for value in probe.metric_state.values():
        yield from value if isinstance(value, list) else [value]


@EVERY_PROBE
@EVERY_KIND
def test_an_exception_at_any_hook_leaves_no_trace_and_the_probe_usable(group, kind):
    model, probe = model_of(kind), PROBES[group]()
    probe.prepare(model)
    before, update = Trace.of(model), probe.update
    for name in probe.hook_names(shape_of(model)):

        def fail(at, activation, watch, name=name):
            if at == name:
                raise ZeroDivisionError
            update(at, activation, watch)

        probe.update = fail
        with pytest.raises(ZeroDivisionError):
            feed(model, probe)
        before.assert_same(model)
    with pytest.raises(KeyError), metaint.attach(model, probe):
        raise KeyError
    before.assert_same(model)
    probe.update = update
    probe.reset()
    assert_same(feed(model, probe).to_dataset(), whole(group, kind))


@EVERY_PROBE
@EVERY_KIND
def test_outputs_and_gradients_of_the_owner_are_untouched(group, kind):
    model, probe = model_of(kind), PROBES[group]()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    plain = model(TOKENS)
    stacked = probe.stacked if group == "saturation" else torch.clone
    with metaint.attach(model, probe):
        read = model(stacked(TOKENS))[: len(TOKENS)]
    torch.testing.assert_close(read, plain, rtol=1e-4, atol=1e-4)
    left, right = (torch.autograd.grad(logits.square().mean(), parameter)[0] for logits in (read, plain))
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
