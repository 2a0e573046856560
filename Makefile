# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
SEEDS ?= 1
UMM ?= show_o
DATASET ?=
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the installed package is made from: a change here means installing again.
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo tiny test faults fuzz gpu-test bench doctor docs clean

demo: $(READY)
	$(BIN)/reca demo $(if $(DATASET),--dataset $(DATASET)) --umm $(UMM) --seeds $(SEEDS)

# Train, evaluate beside the base model, compare and export, from random weights, to see that all of it runs.
tiny: $(READY)
	$(BIN)/reca train $(UMM)_tiny train.steps=20
	$(BIN)/reca eval toy runs/$(UMM)_tiny --against base --limit 42
	$(BIN)/reca compare base runs/$(UMM)_tiny
	$(BIN)/reca export runs/$(UMM)_tiny --out runs/$(UMM)_tiny/export --card

# A file's tests stay in one process, which makes what they share once.
test: $(READY)
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile

faults: $(READY)
	$(BIN)/python -m tests.faults.kills

# The tests of tests/fuzz with inputs by the ten thousand, other ones each time; the last lines tell how many.
fuzz: $(READY)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/fuzz

gpu-test: $(READY)
	$(BIN)/python -m pytest tests -m gpu

bench: $(READY)
	$(BIN)/python -m benchmarks

doctor: $(READY)
	$(BIN)/reca doctor

# The site in build/site. It is made from the sources in a small environment of its own, without torch.
docs: build/docs-env/.ready
	NO_MKDOCS_2_WARNING=1 build/docs-env/bin/mkdocs build --strict
	@echo "open build/site/index.html"

build/docs-env/.ready: pyproject.toml
	$(PYTHON) -m venv build/docs-env
	build/docs-env/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	build/docs-env/bin/python -m pip install --quiet --group docs
	touch $@

# The torch of a system's Python is used, if it has one; otherwise $(TORCH) is installed first, so nothing else picks a
# version. An activated environment's torch cannot be used: --system-site-packages passes on the packages of the base alone.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "reca needs Python 3.10 or newer, and $(PYTHON) is "\
	+ sys.version.split()[0] + ": give another, as in make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12")'
	if $(PYTHON) -c 'import sys, torch; sys.exit(sys.prefix != sys.base_prefix)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet '$(TORCH)'; fi
	touch $@

# gradio asks for Pillow below 13 and runs with 13, whose resizing the golden pixels were recorded with: pip is told last.
# Python 3.10 has no Pillow 13, and tests of those pixels are skipped there. The pip of Python 3.10.0 to 3.10.2 cannot
# install an editable package that is built by a pyproject.toml.
$(READY): $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet 'pip>=21.3'
	$(BIN)/python -m pip install --quiet --editable '.[dev,log,serve,emoji]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade 'pillow>=13; python_version >= "3.11"'
	$(BIN)/reca doctor
	touch $@

clean:
	rm -rf $(VENV) build
	find . -name '*.so' -not -path './.venv/*' -delete
