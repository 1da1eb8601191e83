.DEFAULT_GOAL := help
.PHONY: help install test test-lower test-gpu demo bench lint format ci

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: ## install with everything the demos and tests need
	python -m pip install -e ".[dev]"

test: ## the CPU tests (as CI)
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist worksteal

test-lower: ## the CPU tests on the lowest versions that pyproject.toml allows, in a virtual environment of their own
	python -m venv .venv-lower
	python .ci/requirements.py lowest | .venv-lower/bin/python -m pip install -q -r /dev/stdin
	.venv-lower/bin/python -m pip install -q --no-deps -e .
	OMP_NUM_THREADS=1 .venv-lower/bin/python -m pytest -n auto --dist worksteal

test-gpu: ## the tests that need a CUDA device
	python -m pytest -m gpu

demo: ## the three demos at full length, against their time and quality targets
	python -m pytest -m slow tests/test_demo.py -s

bench: ## the torch form of the scan against the plain loop, on this CPU
	python benchmarks/cpu_scan.py

lint: ## ruff, as CI
	ruff check .
	ruff format --check .

format: ## let ruff rewrite
	ruff check --fix .
	ruff format .

ci: ## what continuous integration runs
	bash .ci/run
