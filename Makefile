PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo demo-readme test test-slow lint bench gpu drawings results results-quick clean

demo: $(READY)  ## the main job on the embedded corpus; prints where its results are
	$(BIN)/ecif demo

demo-readme: demo  ## the table and the picture of the README, from the demo's own results
	$(BIN)/python -m jobs.demo.table runs/demo/run/summary.json README.md
	cp runs/demo/result.png docs/result.png

test: $(READY)  ## everything that a change must keep true; whole runs and faults come last, one at a time: each takes all cores
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/end_to_end --ignore tests/faults
	$(BIN)/pytest tests/end_to_end tests/faults

test-slow: $(READY)  ## also what takes long or needs a package registry
	$(BIN)/pytest -m "slow or network"

bench: $(READY)  ## ratios, measured side by side
	$(BIN)/pytest tests/benchmarks -m benchmark -s

gpu: $(READY)  ## the numbers and the rates of a GPU, where there is one
	$(BIN)/pytest tests/gpu -m gpu -s

FILTERS := tests/benchmarks/test_never_loses.py tests/benchmarks/test_noise.py
TABLES := $(BIN)/python -m tests.benchmarks.support.results docs/results.md

drawings: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[corpus]"
	$(BIN)/python -m tests.benchmarks.support.drawings

results: drawings  ## the tables of docs/results.md
	rm -rf runs/benchmarks/results
	failed=0; \
	$(BIN)/pytest $(FILTERS) -m benchmark -n 2 || failed=1; \
	$(BIN)/pytest tests/benchmarks/test_whole_models.py -m benchmark -s || failed=1; \
	$(TABLES) && exit $$failed

results-quick: drawings  ## some lines of them, printed
	$(BIN)/pytest $(FILTERS) -m benchmark -s -k "emoji-20-0 or icons-20-0 or mixture-0"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry ecif pipeline jobs
	$(BIN)/deptry tests --exclude none --ignore DEP002,DEP004  # tests need not use everything, and may use the dev extra

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[cluster,demo,dev]"
	touch $(READY)

clean:
	rm -rf .venv runs
