"""Circuits in a real browser: scores under pointer and focus, heads that enlarge their patterns, hostile text."""

import pytest
import torch

from metaint.views.circuit.graph import show_circuit
from tests.views.attention.test_canvas import HOSTILE
from tests.views.circuit.circuits import CIRCUITS, add_head, empty, of_gpt2, small
from tests.views.circuit.test_graph import hostile

TOKENS = torch.arange(5, 29)
PANEL = ".metaint-circuit .panel"
# Texts that reach out of the box or port they belong to, and pairs of texts that overlap, within the same picture.
CLASHES = """() => {
    const wrong = [], box = (e) => e.getBoundingClientRect();
    for (const part of document.querySelectorAll(".part")) {
        const { left, right, top, bottom } = box(part.querySelector(".box"));
        for (const text of part.querySelectorAll("text")) {
            const at = box(text);
            const out = at.left < left || at.right > right || at.top < top || at.bottom > bottom + 16;
            if (out) wrong.push(text.textContent);
        }
    }
    const texts = [...document.querySelectorAll(".layers text")].map((e) => [e.textContent, box(e)]);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
        const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        // Lines of text have room for accents above and below.
        const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) - 5;
        if (across > 0 && down > 0) wrong.push(`${a} / ${b}`);
    }));
    return wrong;
}"""


def part(page, name, nth=0):
    return page.locator(f'.metaint-circuit [data-name="{name}"]').nth(nth)


def patterns_drawn(page, count=1):
    page.locator(".metaint-attention .notes").nth(count - 1).wait_for()


def told(page):
    """The heading and the rows of the panel."""
    terms, values = (page.locator(f"{PANEL} {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return page.locator(f"{PANEL} strong").inner_text(), dict(zip(terms, values, strict=True))


def test_the_pointer_reads_parts_and_paths(open_page):
    page = open_page(show_circuit(small()).html)
    assert not page.locator(PANEL).is_visible()
    part(page, "1.0").hover()
    heading, rows = told(page)
    assert heading == "head 1.0"
    assert rows["effect of ablating (mean)"] == "+4.99 nats (95 %: 4.89 to 5.09)"
    assert rows["induction"] == "0.663 of its attention"
    lit = page.locator(".metaint-circuit .on").evaluate_all("all => all.map((e) => Object.values(e.dataset).join())")
    assert sorted(lit) == ["0.0", "0.0,1.0", "1.0", "1.0,logits", "embedding", "embedding,1.0", "logits"]
    # A thin line can be met beside it.
    line = page.locator('[data-from="embedding"][data-to="0.0"] .line').bounding_box()
    page.mouse.move(line["x"] + line["width"] / 2 + 4, line["y"] + line["height"] / 2)
    heading, rows = told(page)
    assert heading == "embedding → 0.0, by values"
    assert rows["share of all heads"] == "140 %, helpful"
    page.mouse.move(5, 5)
    assert not page.locator(PANEL).is_visible()
    assert page.locator("svg.lit").count() == 0


def test_the_panel_stays_within_the_window_and_off_what_it_tells_of(open_page):
    page = open_page(show_circuit(CIRCUITS["dense"]()).html, size=(1200, 700))
    names = page.locator(".part").evaluate_all("all => all.map((e) => e.dataset.name)")
    for name in names:
        part(page, name).hover()
        box, panel = part(page, name).bounding_box(), page.locator(PANEL).bounding_box()
        assert panel["x"] > box["x"] + box["width"] / 2
        assert panel["x"] + panel["width"] <= 1200
        assert panel["y"] >= 0
        assert panel["y"] + panel["height"] <= 700


def test_the_keyboard_reads_and_enlarges(open_page, gpt2):
    page = open_page(show_circuit(of_gpt2(), gpt2, TOKENS).html)
    patterns_drawn(page)
    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(told(page)[0] if page.locator(PANEL).is_visible() else "")
    assert seen[1:4] == ["head 0.1", "head 1.2", "head 1.3"]
    assert "" not in seen
    assert seen[5:] == ["0.1 → 1.2, by keys", "0.1 → 1.3, by values"]
    page.keyboard.press("Escape")
    assert not page.locator(PANEL).is_visible()
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    assert told(page)[0] == "head 1.2"
    page.keyboard.press("Enter")
    assert page.locator(".large h4").inner_text() == "head 1.2"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator(".large h4").inner_text() == "head 1.3"
    assert part(page, "1.3").get_attribute("aria-label").startswith("head 1.3; labels: none; effect of ablating")


def test_a_click_enlarges_a_head_in_its_own_view(open_page, gpt2):
    view = show_circuit(of_gpt2(), gpt2, TOKENS)
    # As notebooks and reports put them there: whole, or the script once.
    page = open_page(view.html + view.body + view.html)
    patterns_drawn(page, 3)
    headings = page.locator(".large h4")
    part(page, "1.3", 1).click()
    part(page, "1.2", 2).click()
    assert headings.all_inner_texts() == ["head 0.1", "head 1.3", "head 1.2"]
    pressed = page.locator('.part[aria-pressed="true"]').evaluate_all("all => all.map((e) => e.dataset.name)")
    assert pressed == ["0.1", "1.3", "1.2"]
    # Heads chosen among the patterns are marked in the circuit, too.
    page.locator('button[title="head 1.2"]').nth(0).click()
    assert part(page, "1.2", 0).get_attribute("aria-pressed") == "true"
    assert part(page, "1.2", 0).evaluate("e => getComputedStyle(e).cursor") == "pointer"
    assert part(page, "logits", 0).evaluate("e => getComputedStyle(e).cursor") == "default"


def test_views_leave_the_page_its_names(open_page, gpt2):
    names = "() => Object.getOwnPropertyNames(window).filter(name => !/^\\d+$/.test(name)).sort()"
    before = open_page("<p>nothing</p>").evaluate(names)
    page = open_page(show_circuit(of_gpt2(), gpt2, TOKENS).html)
    patterns_drawn(page)
    assert page.evaluate(names) == before


def test_without_a_model_a_click_does_nothing(open_page):
    page = open_page(show_circuit(small()).html)
    before = page.content()
    part(page, "1.0").click()
    page.keyboard.press("Enter")
    page.mouse.move(5, 5)
    assert part(page, "1.0").get_attribute("role") == "img"
    assert part(page, "1.0").evaluate("e => getComputedStyle(e).cursor") == "default"
    assert page.locator('[role="button"], [aria-pressed]').count() == 0
    assert page.content().count("<canvas") == before.count("<canvas") == 0


def test_hostile_text_is_inert(open_page):
    page = open_page(show_circuit(hostile()).html)
    part(page, "0.0").hover()
    heading, rows = told(page)
    assert heading == "head 0.0"
    assert rows["labels"].startswith(HOSTILE)
    page.locator(".part").nth(2).hover()
    assert told(page)[0] == f"head 1.0{HOSTILE}"
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator(".metaint-circuit h4").inner_text()


def test_without_scripts_it_is_a_picture_with_titles(open_page, screenshots):
    page = open_page(show_circuit(small()).html, scripts=False)
    assert page.locator(PANEL).count() == 0
    assert page.locator(".part title").count() == 4
    assert page.locator(".path title").nth(2).text_content().startswith("0.0 → 1.0, by keys\neffect of cutting")
    page.screenshot(path=screenshots / "circuit-without-scripts.png", full_page=True)


def test_the_legend_and_the_panel_suit_dark_pages(open_page):
    found = []
    for scheme in ("light", "dark"):
        page = open_page(show_circuit(small()).html, scheme)
        part(page, "0.0").hover()
        styles = [(PANEL, "backgroundColor"), ('[data-to="1.0"] .line', "stroke")]
        found.append([page.locator(where).first.evaluate(f"e => getComputedStyle(e).{of}") for where, of in styles])
    assert found == [["rgb(255, 255, 255)", "rgb(0, 114, 178)"], ["rgb(29, 37, 48)", "rgb(86, 180, 233)"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_no_text_overlaps_or_leaves_its_box(open_page, screenshots, name, scheme):
    page = open_page(show_circuit(CIRCUITS[name]()).html, scheme, size=(1000, 800))
    assert page.evaluate(CLASHES) == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1000
    page.screenshot(path=screenshots / f"circuit-{name}-{scheme}.png", full_page=True)


def test_wide_names_stay_in_their_boxes(open_page, screenshots):
    graph = empty()
    for i, label in enumerate(["W" * 30, "漢字" * 20, "i" * 40, "previous_token, sink, induction", "MMWW mmww"]):
        add_head(graph, f"0.{10**i}", 0.1, label)
    page = open_page(show_circuit(graph).html)
    assert page.evaluate(CLASHES) == []
    page.screenshot(path=screenshots / "circuit-names.png", full_page=True)


def test_a_circuit_above_its_patterns(open_page, gpt2, screenshots):
    page = open_page(show_circuit(of_gpt2(), gpt2, TOKENS).html, size=(1000, 800))
    patterns_drawn(page)
    part(page, "1.2").click()
    page.screenshot(path=screenshots / "circuit-patterns.png", full_page=True)
    assert page.locator(".large h4").inner_text() == "head 1.2"
