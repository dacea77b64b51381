import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

from metaint.errors import InputError
from metaint.measures import memory


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_rank(scores, target, last):
    """By sorting the candidates, the first of equals first."""
    order = sorted(range(last + 1), key=lambda j: (-scores[j], j))
    return order.index(target)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 50))
def test_ranks_equal_those_of_sorting(n_queries, n_candidates, seed):
    queries, candidates = draw(n_queries, 3, seed=seed).round(), draw(n_candidates, 3, seed=seed + 1).round()  # ties
    generator = torch.Generator().manual_seed(seed)
    reach = torch.randint(n_candidates, (n_queries,), generator=generator)
    targets = (torch.rand(n_queries, generator=generator) * (reach + 1)).long()
    found = memory.recall(queries, candidates, targets, reach)
    scores = (queries @ candidates.T).tolist()
    assert found.rank.tolist() == [
        plain_rank(s, t, r) for s, t, r in zip(scores, targets.tolist(), reach.tolist(), strict=True)
    ]
    assert found.chance == pytest.approx(sum(1 / (r + 1) for r in reach.tolist()) / n_queries)


def test_recall_is_argmax_in_chunks_and_whole(monkeypatch):
    queries, candidates = draw(40, 5), draw(40, 5, seed=1)
    whole = memory.recall(queries, candidates)
    assert torch.equal(whole.rank == 0, (queries @ candidates.T).argmax(1) == torch.arange(40))
    assert whole.share(40) == 1
    assert whole.share(5) == (whole.rank < 5).double().mean()
    assert whole.chance == pytest.approx(1 / 40)
    monkeypatch.setattr(memory, "_CHUNK", 100)
    assert torch.equal(memory.recall(queries, candidates).rank, whole.rank)


def test_ranks_of_many_candidates_are_counted_exactly_in_half_precision():
    queries, candidates = torch.ones(2, 1).bfloat16(), torch.linspace(1, 0, 3000)[:, None].bfloat16()
    found = memory.recall(queries, candidates, torch.tensor([2999, 1500]))
    scores = candidates[:, 0]
    assert found.rank.tolist() == [plain_rank(scores.tolist(), target, len(candidates) - 1) for target in (2999, 1500)]


def test_a_memory_of_orthonormal_embeddings_recalls_all_and_sums_by_concatenation():
    inputs, outputs = torch.linalg.qr(draw(24, 24))[0][:10], torch.linalg.qr(draw(24, 24, seed=1))[0][:10]
    W = inputs.T @ outputs
    assert memory.recall(inputs @ W, outputs).share() == 1
    halves = [inputs[i].T @ outputs[i] for i in (slice(5), slice(5, 10))]
    parts = [memory.recall(inputs @ half, outputs).share() for half in halves]
    assert all(part <= 0.6 for part in parts)  # half of them, and a tie or a rounding error
    both = memory.recall(torch.cat([inputs @ half for half in halves], 1), torch.cat([outputs, outputs], 1))
    assert both.share() == 1


def test_zeros_recall_the_first_candidate_alone_and_nan_nothing():
    assert memory.recall(torch.zeros(4, 2), torch.zeros(4, 2)).rank.tolist() == [0, 1, 2, 3]
    queries = torch.eye(3).double()
    queries[1] = math.nan
    assert memory.recall(queries, torch.eye(3).double()).share() == pytest.approx(2 / 3)
    candidates = torch.eye(3).double()
    candidates[2] = math.nan
    assert memory.recall(torch.eye(3).double(), candidates).share() == 0  # 1 against NaN is no recall


def test_targets_out_of_range_get_one_sentence():
    with pytest.raises(InputError, match=r"^targets and reach must hold, for each of 2 queries, a candidate from 0 to"):
        memory.recall(draw(2, 3), draw(2, 3, seed=1), torch.tensor([0, 2]))


@pytest.mark.parametrize("causal", [False, True])
def test_previous_position_recall_is_the_published_formula(causal):
    P, W_Q, W_K = draw(9, 6), draw(6, 4, seed=1), draw(6, 4, seed=2)
    hits = []
    for i in range(8):
        scores = [float(P[i + 1] @ W_Q @ W_K.T @ P[j]) for j in range(i + 1 if causal else 8)]
        hits.append(max(range(len(scores)), key=scores.__getitem__) == i)
    found = memory.previous_position_recall(P, W_Q, W_K, causal)
    assert found.share() == sum(hits) / 8
    assert found.chance == pytest.approx(sum(1 / (i + 1) for i in range(8)) / 8 if causal else 1 / 8)


def test_previous_position_mass():
    P, W_Q, W_K = draw(6, 6), draw(6, 4, seed=1), draw(6, 4, seed=2)
    total = 0.0
    for t in range(1, 6):
        weights = [math.exp(float(P[t] @ W_Q @ W_K.T @ P[s]) / 3) for s in range(t + 1)]
        total += weights[t - 1] / sum(weights) / 5
    mass, uniform = memory.previous_position_mass(P, W_Q, W_K, 3)
    assert mass == pytest.approx(total)
    assert memory.previous_position_mass(P, 0 * W_Q, W_K, 3) == pytest.approx((uniform, uniform))


def test_relative_recall_finds_the_lag_a_rotation_was_made_for():
    angles = torch.arange(5).double()
    rotation = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).view(5, 2, 2)
    key = torch.tensor([1.0, 0.0]).double()
    ahead = rotation[1] @ key  # what a query is at which a key one back scores highest
    queries = torch.stack([ahead, 3 * ahead, key])  # the last looks at itself
    found = memory.relative_recall(queries, key, rotation)
    assert (found.rank == 0).tolist() == [True, True, False]
    assert found.chance == pytest.approx(1 / 5)
    assert memory.relative_recall(queries, key, torch.eye(2).double().expand(5, 2, 2)).share() == 0  # ties: itself


def test_output_gradient_equals_autograd_and_is_the_memory_of_class_means():
    inputs, outputs, targets = draw(30, 5), draw(6, 4, seed=1), torch.arange(30) % 6
    W = draw(5, 4, seed=2).requires_grad_()
    cross_entropy(inputs @ W @ outputs.T, targets).backward()
    assert torch.allclose(memory.output_gradient(inputs, outputs, targets, W.detach()), W.grad, atol=1e-12)
    first = -memory.output_gradient(inputs, outputs, targets, torch.zeros(5, 4).double())
    means = torch.stack([inputs[targets == k].mean(0) for k in range(6)])
    assert torch.allclose(first, (means - inputs.mean(0)).T @ outputs / 6, atol=1e-12)


def test_key_query_gradient_equals_autograd():
    queries, keys, values, targets = draw(12, 5), draw(12, 7, 5, seed=1), draw(12, 7, 6, seed=2), torch.arange(12) % 6
    W = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    attention = (torch.einsum("nq,qd,nsd->ns", queries, W, keys) / 3).softmax(-1)
    cross_entropy(torch.einsum("ns,nsk->nk", attention, values), targets).backward()
    assert torch.allclose(memory.key_query_gradient(queries, keys, values, targets, 3), W.grad, atol=1e-12)


def test_bigram_divergence():
    logits, pi = draw(4, 5), draw(4, 5, seed=1).softmax(-1)
    pi[0] = torch.tensor([1, 0, 0, 0, 0])  # zeros count for nothing
    pi[1] = torch.tensor([0.5, 0.5, 0, 0, 0])
    for i in range(4):
        p = logits[i].softmax(-1)
        expected = sum(float(a * (a / b).log()) for a, b in zip(pi[i], p, strict=True) if a > 0)
        assert memory.bigram_divergence(logits, pi)[i].item() == pytest.approx(expected)
    assert torch.allclose(memory.bigram_divergence(pi[2:].log() + 3, pi[2:]), torch.zeros(2).double(), atol=1e-12)
