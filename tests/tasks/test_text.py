import pytest
import torch

from metaint.errors import InputError
from metaint.tasks import python_prose, read_text, text_windows
from metaint.tasks.text import fold_prose


class CharacterModel:
    """Tokens are code points, cut at the context length as TransformerLens does unless told otherwise."""

    n_ctx = 16

    def __init__(self):
        self.cfg = self

    def to_tokens(self, text, prepend_bos=True, truncate=True):
        assert not prepend_bos
        return torch.tensor([[ord(c) for c in (text[: self.n_ctx] if truncate else text)]])


class OlderModel(CharacterModel):
    def to_tokens(self, text, prepend_bos=True):
        return super().to_tokens(text, prepend_bos)


TEXT = "".join(chr(97 + i % 26) for i in range(205))


@pytest.mark.parametrize("kind", [CharacterModel, OlderModel])
def test_windows_are_the_text_in_order_beyond_the_context_length(kind):
    windows = text_windows(kind(), TEXT, length=10)
    assert windows.shape == (20, 10)
    assert "".join(map(chr, windows.flatten().tolist())) == TEXT[:200]


def test_batch_bos_and_seed():
    model = CharacterModel()
    everything = text_windows(model, TEXT, length=10)
    assert torch.equal(text_windows(model, TEXT, length=10, batch=3), everything[:3])
    with_bos = text_windows(model, TEXT, length=11, bos=1)
    assert torch.equal(with_bos[:, 1:], everything)
    assert (with_bos[:, 0] == 1).all()
    before = torch.random.get_rng_state()
    some = text_windows(model, TEXT, length=10, batch=5, seed=3)
    assert torch.equal(some, text_windows(model, TEXT, length=10, batch=5, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(some) == 5
    assert {tuple(row.tolist()) for row in some} <= {tuple(row.tolist()) for row in everything}
    assert not torch.equal(some, everything[:5])


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("", {}, "text is empty: give a string that is not empty."),
        (b"abc", {}, "text is of type bytes: give a string that is not empty."),
        (
            "abc",
            {"length": 5},
            "text has 3 tokens, fewer than the 5 that one window of length 5 needs: "
            "give a longer text or a smaller length.",
        ),
        ("abc", {"length": 0}, "length is 0: give at least 1, so that a token of the text fits."),
        ("abc", {"length": 1, "bos": 0}, "length is 1: give at least 2, so that a token of the text fits."),
        ("abc", {"length": 2, "batch": 0}, "batch is 0: give at least 1, or None for every window."),
    ],
)
def test_bad_input_gets_one_sentence(text, options, sentence):
    with pytest.raises(InputError) as caught:
        text_windows(CharacterModel(), text, **options)
    assert str(caught.value) == sentence


def test_read_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffäöü\n".encode())
    assert read_text(path) == "äöü\n"
    assert read_text(str(path)) == "äöü\n"


@pytest.mark.parametrize(
    ("data", "middle"),
    [
        (None, "which does not exist: give a text file in UTF-8."),
        (b"", "which holds no text: give a file that is not empty."),
        (b" \n", "which holds no text: give a file that is not empty."),
        (b"ab\0cd", "a binary file (it holds zero bytes): give a text file in UTF-8."),
        (b"ab\xff", "which is not UTF-8 (byte 2): give a text file in UTF-8."),
    ],
)
def test_read_text_refuses_in_one_sentence(tmp_path, data, middle):
    path = tmp_path / "a.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert str(caught.value) == f"path is {str(path)!r}, {middle}"


def test_read_text_refuses_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"can't be read \(is a directory\): give a text file\.$"):
        read_text(tmp_path)


def test_python_prose_is_long_english():
    prose = python_prose()
    assert len(prose) > 300_000
    assert "the" in prose.split()


def test_fold_prose():
    assert fold_prose("A  b\n\n\nC----d “e” 11 ll (())") == "a b\nc-d e 11 ll ()"
    folded = fold_prose(python_prose())
    assert 60 <= len(set(folded)) <= 70
    assert fold_prose(folded) == folded
