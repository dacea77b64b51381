"""Attention and token views in a real browser: values under the pointer, zoom, hostile text, several on a page."""

import re

import numpy as np
import pytest
import torch

from metaint.views.attention import canvas, patterns as attention
from metaint.views.attention.canvas import attention_canvas, canvas_script
from metaint.views.attention.patterns import show_attention
from metaint.views.attention.tokens import show_tokens
from metaint.views.drawing.view import View
from tests.views.attention.test_canvas import HOSTILE, patterns

needs_circuitsvis = pytest.mark.skipif(attention._bundle() is None, reason="circuitsvis is not installed")
PLOT, READ = ".metaint-attention .large canvas", ".metaint-attention output"
NAMES = [f"{layer}.{head}" for layer in range(12) for head in range(12)]


def view_of(given, heads=None, labels=None, **options):
    labels = labels or [f"w{i}" for i in range(given.shape[-1])]
    return View(attention_canvas(given, heads or NAMES[: len(given)], labels, **options), (canvas_script(),))


def drawn(page, count=1):
    page.locator(".metaint-attention .notes").nth(count - 1).wait_for()


def point(page, q, k, tokens, nth=0, shown=None):
    """Move to a cell, of so many `shown` of the tokens; the plot ends 1 pixel left of the canvas's right side."""
    plot = page.locator(PLOT).nth(nth)
    side, width = max(220, min(512, 28 * tokens)), plot.bounding_box()["width"]
    cell = side / (shown or tokens)
    plot.hover(position={"x": width - 1 - side + (k + 0.5) * cell, "y": 7 + (q + 0.5) * cell})


def told(page, q, k, tokens, nth=0, shown=None):
    """What is said of a cell: its tokens, then its weight and rounding error, or the floor and the average there."""
    point(page, q, k, tokens, nth, shown)
    words = page.locator(READ).nth(nth).inner_text()
    return words, [float(number) for number in re.findall(r"\d+\.\d+", words.rsplit(": ")[-1])]


@pytest.mark.parametrize("causal", [True, False])
def test_the_pointer_reads_weights_and_averages(open_page, monkeypatch, causal):
    monkeypatch.setattr(canvas, "_FLOORS", (40,))
    # Sharp heads, so that gaps are long; the floor leaves averages too.
    given = patterns(3, 40, 4.0, causal)
    page = open_page(view_of(given, start=7, causal=causal).html)
    drawn(page)
    page.click('button[title="head 0.2"]')
    assert page.locator(".large h4").inner_text() == "head 0.2"
    floor = (39.5 / 255) ** 2
    sure = unsure = 0
    # The key that each query looks at most, and the first one it looks at least.
    cells = [(q, int(k)) for q in (5, 17, 20, 39) for k in given[2, q, : q + 1].argsort()[[0, -1]]]
    for q, k in cells:
        words, numbers = told(page, q, k, 40)
        assert words.startswith(f"query {q + 7} “w{q}” → key {k + 7} “w{k}”: ")
        if given[2, q, k] >= floor:
            assert abs(numbers[0] - given[2, q, k]) <= numbers[1] * 1.1
            sure += 1
        else:
            assert numbers[0] == pytest.approx(floor, rel=0.05)
            block = np.s_[2, q // 16 * 16 : q // 16 * 16 + 16, k // 16 * 16 : k // 16 * 16 + 16]
            low = given[block][(given[block] < floor) & (np.tri(40, dtype=bool)[block[1:]] | (not causal))]
            assert numbers[1] == pytest.approx(low.mean(), rel=0.1)
            unsure += 1
    assert sure > 2
    assert unsure > 2
    if causal:
        assert told(page, 3, 30, 40)[0].endswith("comes later, so it can't be seen")


def test_a_region_is_zoomed_into_and_back(open_page):
    page = open_page(view_of(patterns(1, 40, 2.0)).html)
    drawn(page)
    point(page, 20, 10, 40)
    page.mouse.down()
    point(page, 29, 19, 40)
    page.mouse.up()
    words, _ = told(page, 0, 0, 40, shown=10)
    assert "query 20 “w20” → key 10 “w10”" in words
    page.click(".reset")
    assert "query 3 “w3” → key 2 “w2”" in told(page, 3, 2, 40)[0]


def test_views_share_a_page_and_leave_it_its_names(open_page):
    names = "() => Object.getOwnPropertyNames(window).filter(name => !/^\\d+$/.test(name)).sort()"
    before = open_page("<p>nothing</p>").evaluate(names)
    one, other = view_of(patterns(2, 12, 1.0, seed=1)), view_of(patterns(2, 12, 3.0, seed=2))
    # As notebooks put them there: each whole, one twice; scripts are made anew to make them run.
    page = open_page("<p>nothing</p>")
    insert = """html => {
        const output = document.createElement("div");
        output.innerHTML = html;
        for (const dead of output.querySelectorAll("script")) {
            const script = document.createElement("script");
            script.textContent = dead.textContent;
            dead.replaceWith(script);
        }
        document.body.append(output);
    }"""
    for view in (one, other, one):
        page.evaluate(insert, view.html)
    drawn(page, 3)
    assert page.evaluate(names) == before
    first, second, third = (told(page, 11, 4, 12, nth)[0] for nth in range(3))
    assert first == third != second
    page.evaluate(
        "() => document.querySelectorAll('.metaint-attention')[1]"
        ".dispatchEvent(new CustomEvent('metaint-head', { detail: '0.1' }))"
    )
    assert page.locator(".large h4").all_inner_texts() == ["head 0.0", "head 0.1", "head 0.0"]


def test_hostile_tokens_are_text(open_page, gpt2):
    tokens = [HOSTILE, "a", "b", HOSTILE]
    views = [view_of(patterns(2, 4, 1.0), labels=tokens), show_tokens(tokens, [1.0, -1.0, 0.0, 2.0])]
    if attention._bundle():
        views.append(attention._circuitsvis(patterns(2, 4, 1.0), ["0.0", "0.1"], tokens, True))
    page = open_page("".join(view.html for view in views))
    drawn(page)
    assert f"query 3 “{HOSTILE}” → key 0 “{HOSTILE}”" in told(page, 3, 0, 4)[0].replace("␣", " ")
    assert HOSTILE.replace(" ", "␣") in page.locator(".metaint-tokens").inner_text()
    if attention._bundle():
        page.locator(".metaint-circuitsvis canvas").nth(2).hover()
    assert page.locator("img").count() == 0


@needs_circuitsvis
def test_circuitsvis_draws_twice_from_one_script(open_page, gpt2, screenshots):
    views = [show_attention(gpt2, torch.arange(5, 17), heads) for heads in (["0.0", "0.1"], ["1.2"])]
    assert views[0].scripts == views[1].scripts
    page = open_page(views[0].html + views[1].body, "dark")
    hosts = page.locator(".metaint-circuitsvis")
    hosts.nth(1).locator("canvas").nth(1).wait_for()
    hosts.nth(0).locator("canvas").nth(2).wait_for()
    assert page.evaluate("() => typeof CircuitsVis") == "undefined"
    page.screenshot(path=screenshots / "circuitsvis.png", full_page=True)
    assert hosts.nth(0).get_by_text("0.1", exact=True).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_suit_the_background(open_page, screenshots, scheme):
    page = open_page(view_of(patterns(144, 64, 3.0)).html, scheme)
    drawn(page)
    first = "() => document.querySelector('.metaint-attention').shadowRoot.querySelector('button canvas')"
    pixels = page.evaluate(f"() => Array.from(({first})().getContext('2d').getImageData(0, 0, 32, 32).data)")
    shades = np.array(pixels).reshape(32, 32, 4)
    weights = patterns(144, 64, 3.0)[0]
    bright = shades[:, :, :3].sum(-1).astype(int)
    strongest = weights.reshape(32, 2, 32, 2).max((1, 3))
    low, high = bright[31, strongest[31].argmin()], bright[0, 0]
    assert (low > high) == (scheme == "light")
    assert shades[0, 31, 3] == 0
    page.screenshot(path=screenshots / f"heads-144-tokens-64-{scheme}.png", full_page=True)


def test_144_heads_of_512_tokens_are_drawn(open_page, screenshots):
    page = open_page(view_of(np.tile(patterns(6, 512, 20.0).astype(np.float32), (24, 1, 1))).html)
    drawn(page)
    assert page.locator(".metaint-attention button canvas").count() == 144
    page.click('button[title="head 11.4"]')
    assert "query 511 “w511” → key 0 “w0”" in told(page, 511, 0, 512)[0]
    page.screenshot(path=screenshots / "heads-144-tokens-512.png", full_page=True)


def test_one_head_and_values_of_tokens(open_page, screenshots):
    tokens = [" The", " cat", " sat", " on", " the", " mat", " and", " the", " cat", " sat", " again"]
    values = np.linspace(-2, 3, len(tokens))
    page = open_page(view_of(patterns(1, len(tokens), 2.0), labels=tokens).html + show_tokens(tokens, values).html)
    drawn(page)
    assert page.locator(".metaint-tokens span[title]").nth(3).get_attribute("title") == f"position 3: {values[3]:.4g}"
    assert page.locator(".heads").count() == 0
    page.screenshot(path=screenshots / "one-head.png", full_page=True)
