"""Buckets and samples of positions: the same sample in whatever batch and padding a sequence comes."""

import torch

from metaint.measures.positions import BUCKETS, position_bucket, sample_positions


def test_buckets():
    found = position_bucket(torch.tensor([0, 1, 3, 4, 15, 16, 63, 64, 1000]))
    assert [BUCKETS[i] for i in found] == ["0", "1-3", "1-3", "4-15", "4-15", "16-63", "16-63", "64+", "64+"]


def ranks_of(mask):
    return mask.long().cumsum(-1) - mask.long()


def test_a_sample_is_eligible_rising_and_repeatable():
    mask = torch.ones(3, 50, dtype=torch.bool)
    eligible = mask & (ranks_of(mask) > 0)
    index, there = sample_positions(ranks_of(mask), eligible, 10)
    assert there.all()
    assert (index.diff(dim=-1) > 0).all()
    assert (index > 0).all()
    assert torch.equal(index, sample_positions(ranks_of(mask), eligible, 10)[0])
    assert not torch.equal(index, sample_positions(ranks_of(mask), eligible, 10, seed=1)[0])


def test_padding_and_company_change_nothing():
    alone = torch.ones(1, 40, dtype=torch.bool)
    index, _ = sample_positions(ranks_of(alone), alone & (ranks_of(alone) > 0), 8)
    padded = torch.nn.functional.pad(alone, (7, 3))
    both = torch.cat([padded, torch.ones(1, 50, dtype=torch.bool)])
    there, _ = sample_positions(ranks_of(both), both & (ranks_of(both) > 0), 8)
    assert torch.equal(there[0] - 7, index[0])


def test_a_short_sequence_gives_what_it_has():
    eligible = torch.tensor([[False, True, True, False], [False, False, False, False]])
    positions = torch.arange(4).expand(2, -1)
    index, there = sample_positions(positions, eligible, 3)
    assert there.tolist() == [[True, True, False], [False, False, False]]
    assert index[0, :2].tolist() == [1, 2]
    assert index.max() < 4


def test_every_position_is_drawn_about_as_often():
    mask = torch.ones(1, 20, dtype=torch.bool)
    counts = torch.zeros(20)
    for seed in range(400):
        index, _ = sample_positions(ranks_of(mask), mask, 5, seed)
        counts[index[0]] += 1
    assert counts.min() > 60
    assert counts.max() < 145
