# What there is to run; `make` alone says so. Everything happens in .venv, which the first target that needs it makes.
BIN := .venv/bin
.PHONY: help demo test test-chaos test-cluster test-grid test-faults slurm-sandbox slurm-sandbox-down lint clean bootstrap

help:
	@echo "make demo   convert a small real model on this machine's CPU, with a report (12 minutes on 2 cores)"
	@echo "make test   everything CI checks: lint, then the tests"
	@echo "make test-grid   every kind of training under every parallel layout (10 minutes on 2 cores)"
	@echo "make test-faults   kills processes that train together or convert, twenty times each (12 minutes on 2 cores)"
	@echo "make test-cluster   every fault of workers and drivers on a real Ray and a real Slurm"
	@echo "make test-chaos   the demo's pipeline on a real Slurm, a random fault every 20 s, ten times (two hours on 2 cores)"
	@echo "make slurm-sandbox   a real Slurm of four nodes on this machine, to try recipes on (root on Debian; 15 seconds)"
	@echo "make slurm-sandbox-down   stops it"
	@echo "make lint   ruff, mypy and the import rules of the rooms"
	@echo "make clean  remove .venv and caches; runs/ stays"

bootstrap:
	@scripts/bootstrap.sh

demo: bootstrap
	@$(BIN)/halo demo

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Tests are many small processes, which mostly import and wait: two at a time, and no threads of their own.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# The subset that `make test` runs covers every layout and every kind; here is every pair, and more layouts.
test-grid: export OMP_NUM_THREADS ?= 1
test-grid: bootstrap
	$(BIN)/pytest -m grid -rP tests/halo_jobs/test_parallel_training.py tests/halo_jobs/test_resume_layouts.py

# `make test` kills three times, and one process of a whole `halo run` on Slurm (test_slurm_runs.py).
test-faults: export OMP_NUM_THREADS ?= 1
test-faults: bootstrap
	$(BIN)/pytest -m faults -rP tests/halo_jobs/test_faults.py tests/halo_jobs/test_worker.py
	HALO_CONVERT_KILLS=20 $(BIN)/pytest -rP tests/tools/test_conversion_faults.py -k kill_9

# A few of them are in `make test`.
test-cluster: export OMP_NUM_THREADS ?= 1
test-cluster: bootstrap
	$(BIN)/pytest -m cluster tests/cluster tests/halo_jobs

# HALO_CHAOS_RUNS: how often; HALO_TEST_SEED: which faults, and when.
test-chaos: export OMP_NUM_THREADS ?= 1
test-chaos: bootstrap
	$(BIN)/pytest -m chaos -s tests/halo_jobs/test_chaos.py

slurm-sandbox: bootstrap
	@$(BIN)/python -m scripts.slurm_sandbox up

slurm-sandbox-down: bootstrap
	@$(BIN)/python -m scripts.slurm_sandbox down

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
