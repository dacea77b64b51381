"""The compact patterns against a plain decoder, their size, and that no text gets out of its attribute."""

import base64
import json
import math
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from metaint.errors import InputError
from metaint.views.attention import canvas
from metaint.views.attention.canvas import BLOCK, attention_canvas, canvas_script

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


class Elements(HTMLParser):
    """The elements of a fragment of HTML, in order, each with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def view_of(body):
    """The facts and the bytes that a view was given."""
    attributes = Elements(body).found[0][1]
    return json.loads(attributes["data-view"]), zlib.decompress(base64.b64decode(attributes["data-pattern"]))


def decoded(body):
    """Weights and averages [head, token, token] of a view, cell by cell; NaN where the other holds."""
    view, data = view_of(body)
    n, entries = len(view["labels"]), sum(view["counts"])
    cells = [(q, k) for q in range(n) for k in range(q + 1 if view["causal"] else n)]
    across = math.ceil(n / BLOCK)
    averages = iter(data[2 * entries :])
    weights, means = np.full((2, len(view["heads"]), n, n), np.nan)
    entry = 0
    for head, count in enumerate(view["counts"]):
        blocks = [[(next(averages) / 255) ** 2 * view["floor"] for _ in range(across)] for _ in range(across)]
        for q, k in cells:
            means[head, q, k] = blocks[q // BLOCK][k // BLOCK]
        at = -1
        for i in range(entry, entry + count):
            at += data[i]
            if data[entries + i]:
                weights[(head, *cells[at])] = (data[entries + i] / 255) ** 2
                means[(head, *cells[at])] = np.nan
        entry += count
    assert entry == entries
    assert next(averages, None) is None
    return weights, means


def patterns(heads, tokens, sharpness, causal=True, seed=0):
    """Softmaxes of random scores."""
    generator = np.random.default_rng(seed)
    scores = sharpness * generator.normal(size=(heads, tokens, tokens))
    scores = np.where(np.tri(tokens, dtype=bool) | (not causal), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def labels(count):
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sharpness", [0.0, 2.0, 30.0])
def test_weights_are_kept_to_8_bits_of_their_square_root(causal, sharpness):
    # Of sharp heads over 40 tokens most gaps are longer than a byte can tell.
    given = patterns(3, 40, sharpness, causal)
    kept, means = decoded(attention_canvas(given, ["0.0", "0.1", "1.0"], labels(40), causal=causal))
    seen = np.broadcast_to(np.tri(40, dtype=bool) | (not causal), given.shape)
    below = given < (0.5 / 255) ** 2
    assert (np.isnan(kept) == (below | ~seen)).all()
    assert (np.isnan(means) == (~below | ~seen)).all()
    error = np.abs(kept - given)[~np.isnan(kept)]
    assert (error <= np.sqrt(given[~np.isnan(kept)]) / 255 + 4e-6).all()


@pytest.mark.parametrize("causal", [True, False])
def test_weights_below_a_floor_are_averages_of_their_block(causal, monkeypatch):
    monkeypatch.setattr(canvas, "_FLOORS", (40,))
    given = patterns(2, 40, 1.5, causal)
    body = attention_canvas(given, ["0.0", "0.1"], labels(40), causal=causal)
    kept, means = decoded(body)
    floor = view_of(body)[0]["floor"]
    assert floor == pytest.approx((39.5 / 255) ** 2)
    seen = np.broadcast_to(np.tri(40, dtype=bool) | (not causal), given.shape)
    assert (np.isnan(kept) == ((given < floor) | ~seen)).all()
    for head in range(2):
        for q in range(0, 40, BLOCK):
            for k in range(0, 40, BLOCK):
                block = (head, slice(q, q + BLOCK), slice(k, k + BLOCK))
                low = given[block][(given[block] < floor) & seen[block]]
                shown = np.unique(means[block][~np.isnan(means[block])])
                if len(low):
                    assert len(shown) == 1
                    # Half of one of 255 steps in the square root of mean / floor.
                    assert abs(math.sqrt(shown[0]) - math.sqrt(low.mean())) <= math.sqrt(floor) / 510 + 1e-9


def test_144_heads_of_512_tokens_take_at_most_2_megabytes():
    # Diffuse heads with a sink and a preference for what is near, which compress far worse than random models' do.
    generator, n = np.random.default_rng(0), 512
    scores = 1.5 * generator.normal(size=(16, n, n)) - 0.02 * (np.arange(n)[:, None] - np.arange(n))
    scores[:, :, 0] += generator.uniform(2, 9, size=(16, 1))
    weights = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf)).astype(np.float32)
    given = np.tile(weights / weights.sum(-1, keepdims=True), (9, 1, 1))
    body = attention_canvas(given, [f"{i // 12}.{i % 12}" for i in range(144)], labels(n))
    view, _ = view_of(body)
    assert 1e6 < len((canvas_script() + body).encode()) <= 2e6
    # What is averaged is small all the same.
    assert view["averaged"]
    assert view["floor"] < 0.02
    assert (given * (given >= view["floor"])).sum(-1).mean() > 0.5


def test_more_room_keeps_smaller_weights():
    given = patterns(4, 128, 1.0)
    floors = []
    for megabytes in (0.03, 0.05, 1.0):
        body = attention_canvas(given, ["0.0", "0.1", "0.2", "0.3"], labels(128), megabytes=megabytes)
        assert len((canvas_script() + body).encode()) <= megabytes * 1e6
        floors.append(view_of(body)[0]["floor"])
    assert floors[0] > floors[1] > floors[2] == pytest.approx((0.5 / 255) ** 2)


def test_trying_floors_on_some_heads_first_changes_nothing(monkeypatch):
    given = patterns(6, 64, 1.0)
    names = [f"0.{i}" for i in range(6)]
    plain = attention_canvas(given, names, labels(64), megabytes=0.03)
    monkeypatch.setattr(canvas, "_MANY", 6000)
    assert attention_canvas(given, names, labels(64), megabytes=0.03) == plain


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError) as caught:
        attention_canvas(patterns(1, 20, 1.0), ["0.0"], labels(20), megabytes=0.001)
    assert str(caught.value) == (
        "1 head of 20 tokens do not fit into 0.001 megabytes: choose fewer heads or a window, or allow more."
    )


def test_labels_stay_in_their_attribute():
    body = attention_canvas(patterns(1, 2, 1.0), ["0.0"], [HOSTILE, "b"])
    assert [tag for tag, _ in Elements(body).found] == ["div", "script"]
    assert view_of(body)[0]["labels"] == [HOSTILE, "b"]
    assert body.count("</script>") == 1


def test_the_script_asks_for_nothing_from_outside():
    script = canvas_script()
    assert script.count("</script>") == 1
    for way in ("http", "fetch(", "import(", "eval(", "XMLHttpRequest", "innerHTML"):
        assert way not in script
