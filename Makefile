# `make` lists the targets. All of them use .venv, which the first target that needs it creates.
BIN := .venv/bin
.PHONY: help demo test test-chaos test-cluster test-grid test-faults test-wheel mutants slurm-sandbox slurm-sandbox-down lint clean bootstrap

help:
	@echo "make demo                convert a small real model on this machine's CPU (8 minutes on 2 cores)"
	@echo "make test                lint and tests: what every change must pass"
	@echo "make lint                ruff, mypy and the import rules between packages"
	@echo "make test-wheel          build the wheel and run the demo from it, outside the repository"
	@echo "make test-grid           every kind of training under every parallel layout (10 minutes on 2 cores)"
	@echo "make test-faults         kill processes that train or convert, twenty times each (12 minutes on 2 cores)"
	@echo "make test-cluster        every fault of workers and drivers on a real Ray and a real Slurm"
	@echo "make mutants             random one-line faults in the code, and how many the tests miss (an hour on 2 cores)"
	@echo "make test-chaos          ten runs on a real Slurm with a random fault every 20 s (two hours on 2 cores)"
	@echo "make slurm-sandbox       start a real Slurm of four nodes on this machine (root on Debian; 15 seconds)"
	@echo "make slurm-sandbox-down  stop it"
	@echo "make clean               remove .venv, caches and build outputs; runs/ stays"

bootstrap:
	@scripts/bootstrap.sh

demo: bootstrap
	@$(BIN)/halo demo

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The tests start many small processes, which mostly import and wait: two at a time, each with one thread.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# `make test` covers every layout and every kind of training; this covers every pair, and more layouts.
test-grid: bootstrap
	$(BIN)/pytest -m grid -rP tests/halo_jobs/test_parallel_training.py tests/halo_jobs/test_resume_layouts.py

# `make test` kills processes three times; here also a rank, a driver and a job of a whole run on Slurm, and a sweep on Ray.
test-faults: bootstrap
	$(BIN)/pytest -m faults -rP tests/halo_jobs/test_faults.py tests/halo_jobs/test_worker.py tests/halo_jobs/test_slurm_runs.py \
		tests/halo_jobs/test_sweep_backends.py
	HALO_CONVERT_KILLS=20 $(BIN)/pytest -rP tests/tools/test_conversion_faults.py -k kill_9

# `make test` runs a few of these.
test-cluster: bootstrap
	$(BIN)/pytest -m cluster tests/cluster tests/halo_jobs

# HALO_CHAOS_RUNS sets the number of runs, HALO_TEST_SEED the faults.
test-chaos: bootstrap
	$(BIN)/pytest -m chaos -s tests/halo_jobs/test_chaos.py

test-wheel: bootstrap
	$(BIN)/pytest -m wheel tests/test_wheel.py

# An hour on 2 cores. Test results, not tests: nothing fails when mutants survive.
mutants: bootstrap
	@mkdir -p build
	$(BIN)/python benchmarks/mutants.py build/mutants.json

slurm-sandbox: bootstrap
	@$(BIN)/python -m scripts.slurm_sandbox up

slurm-sandbox-down: bootstrap
	@$(BIN)/python -m scripts.slurm_sandbox down

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
