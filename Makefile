# The commands of the project. Each sets up $(VENV) by itself: Python >= 3.10 with pip is all it needs.
PYTHON ?= python3
# pinned, newest or oldest: versions of requirements/$(STACK).txt, in an environment of their own.
STACK  ?= pinned
VENV   ?= .venv$(patsubst -pinned,,-$(STACK))
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LINKS  := .links/chunkwise
PINS   := requirements/$(STACK).txt

# PIP_EXTRA="--index-url …" takes torch from another index, e.g. one with CPU-only builds.
PIP_EXTRA ?=

JOBS      ?= 2
# One torch thread per pytest worker: more would oversubscribe the cores.
PYTEST    := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal
# `make test-all` has long campaigns too (marker `long`), and every plan in the interpreter.
SHORT     := and not long
EVERY     :=
DEMO      ?=
TRAIN     ?=
BENCH     ?=

.PHONY: setup demo train wheel test test-all test-cpu test-interpreter test-gpu lint format bench docs site linkcheck audit clean
.DELETE_ON_ERROR:

setup: $(READY)

# `python3 -m venv` lacks ensurepip on some distributions: then pip installs itself into it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "chunkwise needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install -q pip; }

$(READY): pyproject.toml $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_EXTRA) -r $(PINS)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) -e '.[dev,docs]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/mqar.py $(DEMO)

# A language model on real text; resumes what is in out/lm.
train: $(READY)
	$(BIN)/python -m examples.train_lm $(TRAIN)

# sdist and wheel, in dist/; the wheel is installed in a fresh environment and used.
wheel: $(READY)
	$(BIN)/python -m tests.wheel

# Both halves run even if one fails; the exit status says whether one did.
test: $(READY)
	@$(MAKE) --no-print-directory --keep-going test-cpu test-interpreter

test-all: $(READY)
	@$(MAKE) --no-print-directory --keep-going SHORT= EVERY=--every-plan test-cpu test-interpreter

test-cpu: $(READY)
	$(PYTEST) -m 'not interpreter and not gpu $(SHORT)'

# Triton's interpreter replaces the compiler for the whole process, so its tests have their own.
test-interpreter: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -m 'interpreter $(SHORT)' $(EVERY)

# For a machine with a GPU; one worker, which no other disturbs in its timings and memory.
test-gpu: $(READY)
	$(BIN)/pytest -m gpu

lint: $(READY) links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.links $(BIN)/mypy -p chunkwise -p benchmarks -m examples.mqar -m examples.serving \
	    -m examples.train_lm -m examples.evaluate_lm \
	    -m docs.tables -m docs.pictures -m docs.gallery -m docs.matrix

# The packages live in top-level folders (pyproject.toml); type checkers want them as one tree.
.PHONY: links
links:
	@rm -rf .links && mkdir -p $(LINKS)
	@cd $(LINKS) && ln -s ../../api/*.py ../../api/py.typed ../../api/integrations . && \
	    for d in dsl codegen autotune runtime report; do ln -s ../../$$d $$d; done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(BENCH)

# Runs every block of the documents and rewrites what they print; then the site.
docs: $(READY)
	for made in tables pictures gallery matrix commands api; do $(BIN)/python -m docs.$$made || exit 1; done
	$(BIN)/python docs/regenerate.py
	@$(MAKE) --no-print-directory site

# Spelling, links, and the pages as out/site/index.html; no network.
site: $(READY)
	$(BIN)/typos docs README.md CHANGELOG.md
	$(BIN)/pytest tests/test_docs.py -k 'links or targets'
	$(BIN)/sphinx-build -W --keep-going -q -d out/doctrees docs out/site

# Links of the pages to other sites; it needs a network, so that no test and no CI runs it.
linkcheck: $(READY)
	$(BIN)/sphinx-build -b linkcheck -q -d out/doctrees docs out/linkcheck

# Compiles every emitted kernel for every target, without a GPU.
audit: $(READY)
	$(BIN)/chunkwise audit

clean:
	rm -rf $(VENV) .links out build dist *.egg-info
