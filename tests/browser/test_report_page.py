"""A report in a real browser: opens offline, sorts and filters, shows a head at a click, and takes texts for texts."""

import numpy as np
import pytest

import metaint
from tests.views.circuit.circuits import of_gpt2
from tests.views.groups.test_heads import planted

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def page(open_page, gpt2, repeated, tmp_path):
    """A report whose model, tokens and circuit carry hostile names."""
    scan = planted(3, 12)
    scan["heads"]["previous_token"][0, 10] = 0.7
    for end in ("low", "high"):
        scan["heads"][f"previous_token_{end}"][0, 10] = 0.7
    scan["heads"]["first_token_uniform"][:] = np.nan
    scan.attrs["model"] = HOSTILE
    circuit = of_gpt2()
    circuit.nodes["1.2"]["labels"] = HOSTILE
    views = {
        HOSTILE: metaint.show_circuit(circuit, gpt2, repeated[0, :24]),
        "Attention": metaint.show_attention(gpt2, repeated[0, :24], ["0.0", "1.1"], how="circuitsvis"),
        "Tokens": metaint.show_tokens([HOSTILE, "b"], [0.5, -1]),
    }
    return open_page(scan.metaint.report(tmp_path / "report.html", views))


def cells(page, i):
    return page.locator(f".sortable tbody tr:visible td:nth-child({i + 1})").all_inner_texts()


def sort_by(page, i):
    page.locator(".sortable th button").nth(i).click()


def test_a_click_sorts_and_a_text_filters(page):
    assert sorted(cells(page, 0)) == ["0.1", "0.10", "1.0", "2.11"]
    sort_by(page, 2)
    assert cells(page, 2) == ["0.950", "0.900", "0.800", "0.700"]
    assert page.locator(".sortable th").nth(2).get_attribute("aria-sort") == "descending"
    sort_by(page, 2)
    assert cells(page, 2) == ["0.700", "0.800", "0.900", "0.950"]
    sort_by(page, 0)
    assert cells(page, 0) == ["0.1", "0.10", "1.0", "2.11"]  # by layer and head, not as numbers
    uniform = page.locator(".sortable th button").all_inner_texts().index("uniform")
    sort_by(page, uniform)
    assert cells(page, uniform) == ["0.030", "0.030", "0.030", "–"]
    page.locator("input.filter").fill("INDUCTION")
    assert cells(page, 1) == ["induction"]
    assert page.locator(".count").inner_text() == "1 of 4 shown"


def test_a_click_on_a_head_of_the_circuit_shows_its_pattern(page, screenshots):
    page.locator(".metaint-attention .notes").wait_for()
    for head in ("1.3", "0.1"):
        page.locator(f'.metaint-circuit .part[data-name="{head}"]').click()
        assert page.locator(".metaint-attention .large h4").inner_text() == f"head {head}"
    page.locator(".metaint-circuitsvis canvas").first.wait_for()
    page.screenshot(path=screenshots / "report.png", full_page=True)


def test_hostile_texts_are_shown_as_texts(page):
    page.locator(".metaint-circuitsvis canvas").first.wait_for()
    page.locator(".js-plotly-plot .heatmaplayer").first.wait_for(state="attached")
    assert page.locator("h1").inner_text() == f"metaint: {HOSTILE}"
    assert page.locator("nav li").nth(2).inner_text() == HOSTILE
    assert "onerror=alert" in page.locator(".metaint-tokens").inner_text()
    page.locator('.metaint-circuit .part[data-name="1.2"]').hover()
    assert "<img src=x" in page.locator(".metaint-circuit .panel").inner_text()
    assert page.locator("img").count() == 0
