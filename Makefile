# Each target sets up .venv by itself. Needs python3 (3.11 or later) with python3-venv; uses uv where it is.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)

# pytest answers 5 when it ran nothing: an error here, as every other non-zero status.
PYTEST := $(BIN)/python -m pytest
ARGS   ?=
BENCH_PYTHON ?= $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help venv demo criu test check soak bench report docs format install uninstall clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## set up .venv with everything that development needs

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $$($(PYTHON) --version) is too old: gpusched needs 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
ifneq ($(UV),)
	@test -x $(BIN)/python || $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]'
else
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
endif
	@touch $@

demo: $(READY) ## an RLHF loop in Ray whose models do not fit together share a GPU by turns (simulated where there is none)
	$(BIN)/python -m ray_integration.demo $(ARGS)

criu: ## a CRIU of its own in PREFIX (.criu), for the disk tier; ARCHIVE=URL names the Debian archive to take it from
	@./scripts/make_criu.sh $(if $(ARCHIVE),--archive '$(ARCHIVE)') '$(or $(PREFIX),.criu)'

test: $(READY) ## the tests; needs no GPU (ARGS="-k name" passes options to pytest)
	@test "$$(id -u)" != 0 || ./scripts/make_criu.sh .criu || echo "make: the tests of the disk tier need the system's CRIU, then" >&2
ifeq ($(ARGS),)
	$(BIN)/python scripts/run_tests.py
else
	$(PYTEST) $(ARGS)
endif

check: $(READY) ## ruff, its formatter, mypy --strict and the architecture's contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(READY) ## every test with its full counts, the slow ones too; keeps the result
	@rm -f .soak.xml
	-GPUSCHED_SOAK=1 $(PYTEST) -m "slow or not slow" --junitxml=.soak.xml $(ARGS)
	$(BIN)/python scripts/soak_result.py .soak.xml
	$(BIN)/python benchmarks/report.py

bench: $(READY) ## every benchmark, then the report; needs a GPU (BENCH_PYTHON=PATH: one with PyTorch)
	@status=0; export PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}"; \
	for program in freeze_thaw cold_start hibernate line_rate preload_cost control_plane ray_calls rlhf_loop report; do \
	  $(BENCH_PYTHON) benchmarks/$$program.py || { status=1; echo "$$program did not succeed" >&2; }; \
	done; exit $$status

report: $(READY) ## the tables and plots of README.md and docs/, from benchmarks/results
	$(BIN)/python benchmarks/report.py

docs: $(READY) ## regenerate the documents that are made from the code
	$(BIN)/python scripts/make_docs.py

format: $(READY) ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# No .venv for these two: install.sh makes an environment of its own and leaves nothing of root's here.
install: ## install for all users of this machine, as root (ARGS=--no-driver-check; see ./install.sh --help)
	@./install.sh $(ARGS)

uninstall: ## take it away again, as root; configuration, state and logs stay
	@./install.sh --uninstall $(ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
