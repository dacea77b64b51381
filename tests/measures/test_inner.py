"""Inner losses and gradients: closed forms against autograd, and the identities of the final norm."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from metaint.measures import inner
from metaint.measures.inner import Norm, Readout, Translator, inner_gradient, read_path

D, V, N = 16, 50, 9


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def readout_of(kind="layer", cap=None, gain=True, eps=1e-5, scale=1.0, bias=True):
    norm = None
    if kind is not None:
        norm = Norm(kind, eps, draw(D, seed=1) + 1 if gain else None, draw(D, seed=2) if gain else None)
    return Readout(draw(D, V, seed=3), draw(V, seed=4) if bias else None, norm, scale, cap)


def plain_logits(readout, z):
    """The logits as one would write them down, for autograd to differentiate."""
    x, norm = z, readout.norm
    if norm is not None and norm.kind == "layer":
        x = layer_norm(x, (D,), norm.gain, norm.bias, norm.eps)
    elif norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        x = x * norm.gain + norm.bias if norm.gain is not None else x
    logits = x @ readout.weight
    logits = (logits if readout.bias is None else logits + readout.bias) * readout.scale
    return logits if readout.soft_cap is None else readout.soft_cap * torch.tanh(logits / readout.soft_cap)


def autograd(readout, z, targets):
    z = z.clone().requires_grad_()
    loss = cross_entropy(plain_logits(readout, z), targets, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


READOUTS = [
    readout_of(kind, cap, gain, scale=scale)
    for kind in (None, "layer", "rms")
    for cap in (None, 5.0)
    for gain in (True, False)
    for scale in (1.0, 0.25)
]


@pytest.mark.parametrize("readout", READOUTS)
def test_the_gradient_is_autograd_s(readout):
    z, y = draw(N, D, seed=7), tokens(N)
    loss, gradient = inner_gradient(readout, z, y)
    wanted_loss, wanted = autograd(readout, z, y)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-10)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_norm_the_gradient_along_z_is_entropy_less_loss(bias):
    readout = readout_of(None, bias=bias)
    z, y = draw(N, D, seed=8), tokens(N, seed=1)
    loss, gradient = inner_gradient(readout, z, y)
    log_p = plain_logits(readout, z).log_softmax(-1)
    drift = -(z * gradient).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if bias:  # what the bias contributes to either is no work of z
        b = readout.bias
        entropy_less_loss = (log_p.gather(1, y[:, None])[:, 0] - b[y]) - (log_p.exp() * (log_p - b)).sum(-1)
        torch.testing.assert_close(drift, entropy_less_loss, rtol=1e-9, atol=1e-9)
    else:
        torch.testing.assert_close(drift, entropy - loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_through_a_norm_the_gradient_is_across_z_so_that_any_descent_lengthens_it(kind):
    readout, z, y = readout_of(kind, eps=0.0), draw(N, D, seed=9), tokens(N, seed=2)
    _, g = inner_gradient(readout, z, y)
    assert ((z * g).sum(-1).abs() < 1e-6 * z.norm(dim=-1) * g.norm(dim=-1)).all()
    eta = 0.3
    grown = (z - eta * g).square().sum(-1)
    torch.testing.assert_close(grown, z.square().sum(-1) + eta**2 * g.square().sum(-1), rtol=1e-10, atol=1e-10)
    if kind == "layer":
        assert (g.sum(-1).abs() < 1e-9 * g.norm(dim=-1)).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_longer_stream_predicts_the_same_and_has_a_flatter_loss(kind):
    readout, z, y = readout_of(kind, eps=0.0), draw(N, D, seed=10), tokens(N)
    torch.testing.assert_close(readout.logits(7 * z), readout.logits(z))
    torch.testing.assert_close(inner_gradient(readout, 7 * z, y)[1], inner_gradient(readout, z, y)[1] / 7)


def test_a_constant_added_to_all_logits_changes_nothing():
    readout, z, y = readout_of(), draw(N, D), tokens(N)
    centred = dataclasses.replace(readout, weight=readout.weight - readout.weight.mean(-1, keepdim=True))
    for a, b in zip(inner_gradient(readout, z, y), inner_gradient(centred, z, y), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("readout", [readout_of(), readout_of("rms", 5.0), readout_of(None)])
@pytest.mark.parametrize("budget", [1, 4000, 1 << 20])
def test_a_path_is_read_as_one_point_and_step_at_a_time(readout, budget):
    points = [draw(N, D, seed=20 + i) for i in range(4)]
    steps = [(0, 1), (0, 3), (2, 3)]
    targets = torch.stack([tokens(N, seed=5), tokens(N, seed=6)], -1)
    found = read_path(readout, points, steps, targets, budget=budget)
    final = plain_logits(readout, points[-1]).log_softmax(-1)
    for i, z in enumerate(points):
        log_p = plain_logits(readout, z).log_softmax(-1)
        for k in range(2):
            torch.testing.assert_close(found.loss[i, :, k], -log_p.gather(1, targets[:, k : k + 1])[:, 0])
        rows = zip(log_p.tolist(), targets[:, 0].tolist(), strict=True)
        rank = torch.tensor([sum(other > row[y] for other in row) + 1 for row, y in rows])
        assert torch.equal(found.rank[i].long(), rank)
        torch.testing.assert_close(found.entropy[i], -(log_p.exp() * log_p).sum(-1))
        torch.testing.assert_close(found.kl[i], (final.exp() * (final - log_p)).sum(-1), rtol=1e-9, atol=1e-9)
    for s, (start, stop) in enumerate(steps):
        step = points[stop] - points[start]
        for k in range(2):
            g = autograd(readout, points[start], targets[:, k])[1]
            torch.testing.assert_close(found.descent[s, :, k], -(g * step).sum(-1))
            torch.testing.assert_close(found.agreement[s, :, k], -torch.cosine_similarity(g, step, dim=-1))
            torch.testing.assert_close(found.rate[s, :, k], -(g * step).sum(-1) / g.square().sum(-1))
    norms = [autograd(readout, z, targets[:, 0])[1].norm(dim=-1) for z in points]
    for i in (0, 2, 3):
        torch.testing.assert_close(found.gradient_norm[i], norms[i])
    assert found.gradient_norm[1].isnan().all()  # no step starts there


def test_a_translator_stands_before_the_readout():
    readout, z, y = readout_of(), draw(N, D), tokens(N, 1)
    matrix, shift = draw(D, D, seed=30), draw(D, seed=31)
    found = read_path(readout, [z, z + 1], [(0, 1)], y, [Translator(matrix, shift), None])
    leaf = z.clone().requires_grad_()
    loss = cross_entropy(plain_logits(readout, leaf @ matrix + shift), y[:, 0], reduction="none")
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(found.loss[0, :, 0], loss.detach())
    torch.testing.assert_close(found.gradient_norm[0], gradient.norm(dim=-1))
    torch.testing.assert_close(found.descent[0, :, 0], -gradient.sum(-1))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_narrow_weights_are_widened_a_block_at_a_time(cap, monkeypatch):
    monkeypatch.setattr(inner, "_CAST_BYTES", 7 * D * 4)  # seven columns
    wide = readout_of(cap=cap)
    narrow = dataclasses.replace(wide, weight=wide.weight.bfloat16())
    same = dataclasses.replace(wide, weight=narrow.weight.float())
    z, y = draw(N, D, dtype=torch.float32), tokens(N)
    for a, b in zip(inner_gradient(narrow, z, y), inner_gradient(same, z, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # A view makes nothing, and the unembedding is there already.
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_gone_through_in_chunks(dtype):
    vocabulary, n = 128_000, 200
    readout = Readout(draw(8, vocabulary).to(dtype), None, Norm("rms", 1e-5))
    points = [draw(n, 8, seed=i, dtype=torch.float32) for i in range(2)]
    targets = torch.randint(vocabulary, (n, 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _Largest() as largest:
        read_path(readout, points, [(0, 1)], targets)
    assert largest.bytes <= inner.BUDGET / 2
    assert largest.bytes > inner.BUDGET / 4  # the mode does see what is made


def test_the_most_likely_token_is_of_rank_1_however_products_round():
    readout = Readout(draw(64, 3000, dtype=torch.float32), None, Norm("rms", 1e-5))
    points = [draw(200, 64, seed=i, dtype=torch.float32) for i in range(2)]
    best = readout.logits(points[1]).argmax(-1, keepdim=True)
    assert torch.equal(read_path(readout, points, [(0, 1)], best, budget=1 << 19).rank[1], torch.ones(200))


def test_large_logits_that_come_late_lose_nothing_of_what_came_before():
    readout = dataclasses.replace(readout_of(None), weight=readout_of().weight * torch.linspace(1, 40, V))
    z, y = draw(N, D), tokens(N, 1)
    found = read_path(readout, [z + 1, z], [(0, 1)], y, budget=1)  # a column at a time
    loss, gradient = autograd(readout, z, y[:, 0])
    torch.testing.assert_close(found.loss[1, :, 0], loss)
    torch.testing.assert_close(found.gradient_norm[1], gradient.norm(dim=-1))


def test_a_step_of_no_length_agrees_with_nothing():
    z = draw(N, D)
    found = read_path(readout_of(), [z, z.clone()], [(0, 1)], tokens(N, 1))
    assert torch.equal(found.agreement, torch.zeros(1, N, 1, dtype=torch.float64))
    assert torch.equal(found.kl, torch.zeros(2, N, dtype=torch.float64))
