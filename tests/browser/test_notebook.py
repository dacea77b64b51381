"""Views and figures as outputs of an executed notebook: exported to HTML and opened with the network off."""

import pytest

CELLS = """import metaint, plotly, torch
plotly.io.renderers.default = "notebook"  # or the exporter, which draws no figures itself, leaves them out
from metaint.toys.embedded import boot_toy
from metaint.views.attention.patterns import show_attention
from metaint.views.attention.tokens import show_tokens
from metaint.views.groups.heads import plot_heads
shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "n_ctx": 32, "d_vocab": 20}
model = boot_toy(shape, device="cpu")
tokens = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
---
show_attention(model, tokens[0])
---
show_attention(model, tokens[0], how="canvas")
---
show_tokens(["</script><img src=x onerror=alert(1)>", "b"], [0.5, -1])
---
plot_heads(metaint.scan(model, tokens))
"""


@pytest.mark.slow
def test_an_executed_notebook_shows_every_view(browser, tmp_path, screenshots):
    pytest.importorskip("transformer_lens.model_bridge", reason="the toy is a bridge")
    nbformat, nbclient, nbconvert = (pytest.importorskip(name) for name in ("nbformat", "nbclient", "nbconvert"))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS.split("---")]
    nbclient.NotebookClient(notebook, timeout=120).execute()
    page_file = tmp_path / "notebook.html"
    page_file.write_text(nbconvert.HTMLExporter().from_notebook_node(notebook)[0], "utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1100, "height": 900})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.goto(page_file.as_uri(), wait_until="domcontentloaded")
    page.locator(".metaint-circuitsvis canvas").first.wait_for()
    page.locator(".metaint-attention .notes").wait_for()
    page.locator(".js-plotly-plot .heatmaplayer").first.wait_for(state="attached")
    assert "onerror=alert" in page.locator(".metaint-tokens").inner_text()
    page.screenshot(path=screenshots / "notebook.png", full_page=True)
    context.close()
    # What the exporter's own page asks of the network (its mathematics, its loader) is left aside.
    assert [message for message in wrong if "MathJax" not in message and "require" not in message] == []
