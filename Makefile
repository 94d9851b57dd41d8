# Two commands do everything on a fresh machine: make demo, make test. A third measures it: make bench.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

.PHONY: setup demo test lint format docs bench bench-memory bench-surgery clean

setup: $(READY)

# The environment alone: uv comes from pip, everything else from uv under constraints.txt. Bytecode is compiled once,
# because every reader and actor imports on its own: scvi-tools takes 9 CPU-seconds with it and 30 without.
$(READY): pyproject.toml constraints.txt .python-version
	@$(PYTHON) -c 'import sys; want = open(".python-version").read().strip(); have = "%d.%d" % sys.version_info[:2]; sys.exit(0 if have == want else "make setup needs Python " + want + ", and $(PYTHON) is " + have + ". Name another: make setup PYTHON=python" + want)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: setup
	$(BIN)/scviaduct demo

# Files of tests are shared out among a few processes, each with a Ray of its own: on two cores that takes half the time.
test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What the benchmarks compare with. A peer that does not install is left out: the results name it, and why.
$(PEERS): $(READY)
	for peer in annbatch zarrs tiledbsoma-ml lancedb usearch tiledb-vector-search; do \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $$peer || echo "$$peer is left out"; \
	done
	touch $(PEERS)

# Every benchmark, about an hour on two cores: results in benchmarks/results. ARGS="--quick", ARGS="--only reading".
bench: $(PEERS)
	$(BIN)/python -m benchmarks $(ARGS)

# Cost and peak memory of runs over 50k to 800k cells, the whole process tree counted.
bench-memory: setup
	$(BIN)/python -m benchmarks --only scaling

# CPU-seconds and label accuracy of surgery by adapters, against one surgery of scvi-tools for each query batch.
bench-surgery: setup
	$(BIN)/python -m benchmarks.surgery

clean:
	rm -rf .venv site
