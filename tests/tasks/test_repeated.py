import pytest
import torch

from metaint.errors import InputError
from metaint.tasks import repeated_tokens


def test_copies_are_equal_and_ids_different_inside_one():
    tokens = repeated_tokens(100, length=30, repeats=3, batch=4)
    assert tokens.shape == (4, 90)
    assert tokens.dtype == torch.int64
    copies = tokens.view(4, 3, 30)
    assert (copies == copies[:, :1]).all()
    assert all(len(set(copy.tolist())) == 30 for copy in copies[:, 0])
    assert len({tuple(row.tolist()) for row in tokens}) == 4


def test_whole_vocabulary_can_be_used():
    tokens = repeated_tokens(7, length=7, repeats=1, batch=3)
    assert (tokens.sort(dim=1).values == torch.arange(7)).all()


def test_bos_stands_in_front_and_is_never_drawn():
    tokens = repeated_tokens(21, length=20, batch=50, bos=5)
    assert tokens.shape == (50, 41)
    assert (tokens[:, 0] == 5).all()
    assert (tokens[:, 1:] != 5).all()


@pytest.mark.parametrize("ids", [(10, 20), list(range(10, 20)) * 2, torch.arange(10, 20)])
def test_ids_narrow_the_draw(ids):
    tokens = repeated_tokens(100, length=10, repeats=1, batch=2, ids=ids)
    assert (tokens.sort(dim=1).values == torch.arange(10, 20)).all()


def test_every_id_is_as_likely():
    tokens = repeated_tokens(10, length=5, repeats=1, batch=4000)
    share = torch.bincount(tokens.flatten(), minlength=10) / 4000
    assert (share - 0.5).abs().max() < 0.04  # five standard deviations


def test_seed_decides_and_global_state_stays():
    before = torch.random.get_rng_state()
    first, again, other = (repeated_tokens(100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"length": 0}, "length is 0: give a whole number of at least 1."),
        ({"batch": 2.5}, "batch is 2.5: give a whole number of at least 1."),
        (
            {"length": 101},
            "length is 101, but only 100 different ids can be drawn: give a length of at most 100 or more ids.",
        ),
        (
            {"length": 100, "bos": 0},
            "length is 100, but only 99 different ids can be drawn: give a length of at most 99 or more ids.",
        ),
        ({"bos": 100}, "bos is 100, outside the vocabulary 0..99: give an id inside it."),
        (
            {"ids": (50, 101)},
            "ids is (50, 101): give a range (low, high) with 0 <= low < high <= 100, or a list of ids.",
        ),
        (
            {"ids": [1, 100]},
            "ids reach from 1 to 100, outside the vocabulary 0..99: give ids inside it.",
        ),
        (
            {"ids": [0.5]},
            "ids has 1 dimensions of torch.float32: give one dimension of whole numbers, or (low, high).",
        ),
        ({"ids": "abc"}, "ids is of type str: give a range (low, high) or a list of ids."),
    ],
)
def test_bad_input_gets_one_sentence(options, sentence):
    with pytest.raises(InputError) as caught:
        repeated_tokens(100, **options)
    assert str(caught.value) == sentence
