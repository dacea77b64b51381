"""Arguments of the wrong type or size: every public function answers with one sentence that names the argument."""

import math
from pathlib import Path

import pytest
import torch

import metaint
from metaint.errors import InputError, MetaintError, door
from metaint.tasks import repeated_tokens
from metaint.toys.small import small_transformer

TOKENS = torch.arange(10).repeat(3, 2)
SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 32, "d_vocab": 50, "n_ctx": 32}
JUNK = [
    None,
    "",
    "zz",
    -1,
    1.5,
    math.nan,
    [],
    {},
    object(),
    torch.zeros(0),
    True,
    ["9.9"],
    [None],
    b"x",
    Path("/nope/x"),
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Public functions, each with arguments that do."""
    folder = tmp_path_factory.mktemp("arguments")
    model = small_transformer(norm="pre", **SIZES)
    probes = [metaint.HeadProbe(), metaint.OutputProbe(), metaint.ResidualProbe(), metaint.InnerProbe()]
    scan = metaint.scan(model, TOKENS, probes)
    metaint.save(scan, folder / "scan.zarr")
    fed = {"model": model, "tokens": TOKENS, "batch_size": 2, "seed": 0}
    return {
        metaint.scan: {**fed, "probes": None, "attributes": {}, "attention_mask": torch.ones_like(TOKENS)},
        metaint.audit: {"model": model, "refresh": False},
        metaint.label_heads: {"scan": scan, "thresholds": {"sink": 0.3}, "margin": 0.1, "deviations": 3.0},
        metaint.telling_heads: {"scan": scan, "most": 3},
        metaint.save: {"scan": scan, "path": folder / "again.zarr"},
        metaint.load: {"path": folder / "scan.zarr"},
        metaint.ablate: {**fed, "parts": ["0.0"], "how": "zero", "metric": "in_context_loss"},
        metaint.check_circuit: {**fed, "heads": ["0.0"], "random": 2},
        metaint.scan_metric: {"variable": "entropy", "layers": [0], "heads": None, "tau": None},
        metaint.HeadProbe: {"measures": ["induction"]},
        metaint.OutputProbe: {"kinds": None, "positions": 4, "seed": 0},
        metaint.default_tokens: {"model": model, "batch": 2, "seed": 0},
        metaint.text_tokens: {"model": model, "text": "words", "length": 8, "windows": 2, "seed": 0},
        metaint.plot_heads: {"scan": scan, "scores": ["entropy"]},
        metaint.plot_residual: {"scans": scan},
        metaint.plot_inner: {"scans": scan},
        metaint.plot_outputs: {"scan": scan},
        metaint.show_attention: {"model": model, "tokens": TOKENS[0], "heads": ["0.0"]},
        metaint.tables_of: {"scan": scan},
        metaint.fresh_model: {"model": model, "seed": 0},
        metaint.open_model: {"model": "toy", "revision": None, "checkpoint": None, "dtype": "float32"},
        metaint.ov_recall: {"model": model, "heads": ["0.0"]},
        metaint.scaled: {"model": model, "c": 2.0, "select": "all"},
        repeated_tokens: {"vocab": 50, "length": 5, "repeats": 2, "batch": 2, "bos": None, "ids": None, "seed": 0},
    }


def test_no_argument_of_the_wrong_type_or_size_ends_in_a_raw_exception(calls):
    tried, raw = 0, []
    for function, arguments in calls.items():
        for name in arguments:
            for junk in JUNK:
                tried += 1
                try:
                    function(**{**arguments, name: junk})
                except MetaintError:
                    continue
                except TypeError as error:
                    if name not in str(error):
                        raw.append((function.__name__, name, junk, repr(error)))
                except Exception as error:
                    raw.append((function.__name__, name, junk, repr(error)))
    assert tried > 1000
    assert raw == []


@door
def halved(model: object, number: int, words: list[str] | None = None) -> float:
    if number == 13:
        raise RuntimeError("a fault of our own")
    return number / 2 + len(words or "")


def test_a_wrong_type_is_named_only_where_it_led_to_a_failure():
    assert halved(None, 3) == 1.5
    assert halved(None, 3.0) == 1.5  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^number is 'three': give an int\.$") as caught:
        halved(None, "three")  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(InputError, match=r"^words is 7: give list\[str\] \| None\.$"):
        halved(None, 3, 7)  # type: ignore[arg-type]


def test_a_fault_that_is_not_an_arguments_stays_what_it_is():
    with pytest.raises(RuntimeError, match="a fault of our own"):
        halved(None, 13)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'number'"):
        halved(None)  # type: ignore[call-arg]
