# Everything from a fresh checkout: each target makes its environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo toy test test-fast notebooks pictures lint bench test-tl3 test-tl2 clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/metaint demo

# The demo's model, made where there is none yet.
toy: .venv/installed
	@$(BIN)/python -c "import metaint; metaint.open_model('toy')" 2>/dev/null || $(BIN)/metaint demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest

test-fast: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not hub"

# Each notebook from its first cell to its last, on the toy.
notebooks: toy
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks

# The README's pictures of them; needs Chromium.
pictures: toy
	$(BIN)/python notebooks/pictures.py

bench: .venv/installed
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/residual.py
	$(BIN)/python benchmarks/saturation.py
	$(BIN)/python benchmarks/bigram.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/real.py

# TransformerLens 3.9: HookedTransformer and the bridge side by side.
.venv-tl3/installed: pyproject.toml constraints-tl3.txt
	$(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/pip install -q -c constraints-tl3.txt -e ".[dev]"
	touch $@

test-tl3: .venv-tl3/installed
	.venv-tl3/bin/python -m pytest -m "not slow and not hub"

# TransformerLens 2.18. Its metadata caps pandas below what xarray needs, although they work together: hence --no-deps.
.venv-tl2/installed: pyproject.toml constraints-tl2.txt
	$(PYTHON) -m venv .venv-tl2
	.venv-tl2/bin/pip install -q --no-deps -r constraints-tl2.txt
	.venv-tl2/bin/pip install -q --no-deps -e .
	touch $@

test-tl2: .venv-tl2/installed
	.venv-tl2/bin/python -m pytest -m "not slow and not hub"

clean:
	rm -rf .venv .venv-tl3 .venv-tl2
