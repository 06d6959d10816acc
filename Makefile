# `make up` serves, `make test` tests; both set up what they need in .venv.
.DEFAULT_GOAL := up
.PHONY: up test test-triton lint bench soak clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check -q
export PYTHONUNBUFFERED := 1

up: .venv/stamp-serve
	@exec $(BIN)/inferfleet up $(ARGS)

# fleets whose leases and timers are under test wait more than they compute, and share cores with their like alone;
# threads that wait must not take what other tests compute with
FLEETS := tests/faults tests/browser $(addprefix tests/conformance/test_,first_hour.py footprint.py readme.py)
SHARED := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile

test: .venv/stamp-test .venv/stamp-clients
	@ops/test_packages.sh
ifdef ARGS
	$(BIN)/python -m pytest -m "not soak" $(ARGS)
else
	$(SHARED) $(FLEETS:%=--ignore=%) --ignore=tests/triton
	$(SHARED) $(FLEETS)
endif

# GPU kernels on a CPU: what they compute in Triton's interpreter, then what its compiler makes of them
test-triton: .venv/stamp-triton
	OMP_WAIT_POLICY=passive TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/triton --ignore=tests/triton/ahead $(ARGS)
	$(BIN)/python -m pytest -n 2 tests/triton/ahead

lint: .venv/stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/stamp-test
	$(BIN)/python -m ops.bench $(ARGS)

soak: .venv/stamp-test .venv/stamp-clients
	@ops/test_packages.sh
	$(BIN)/python -m pytest -m soak --timeout 7200 $(ARGS)

clean:
	rm -rf .venv .inferfleet .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt --upgrade pip setuptools

# torch comes first and alone, so that nothing else chooses its build
.venv/stamp-serve: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[worker]'
	touch $@

.venv/stamp-test: pyproject.toml constraints.txt .venv/stamp-serve
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

.venv/stamp-triton: .venv/stamp-test
	$(PIP) install -c constraints.txt -e '.[triton]'
	touch $@

# the official clients, each in an environment of its own as its users have it
.venv/stamp-clients: Makefile | .venv/bin/python
	for client in openai==3.52.0 huggingface_hub==2.4.0 text-generation==0.7.0; do \
		folder=.venv/clients/$${client%%==*}; \
		$(PYTHON) -m venv $$folder && $$folder/bin/python -m pip --disable-pip-version-check install -q --upgrade pip && \
		$$folder/bin/python -m pip --disable-pip-version-check -q install $$client || exit 1; \
	done
	touch $@
