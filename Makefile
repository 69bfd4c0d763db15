# CI uses these targets too. PYTHON=python3.12 make … selects another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
PYTEST := $(BIN)/python -m pytest
# Many tests wait for peers and disks, so there are more processes than cores. JOBS=0 has none.
JOBS := $(shell expr `nproc` + 2)

CORE_SOURCES := setup.py include/mailerq.h \
    $(wildcard mailerq/_core*.p* mailerq/_core*.cpp mailerq/*/_*.pyx)
HOT_MODULES := $(filter-out mailerq/_%,$(wildcard mailerq/*.pxd mailerq/*/*.pxd mailerq/*/*/*.pxd))
HOT_SOURCES := $(HOT_MODULES) $(HOT_MODULES:.pxd=.py)
missing = $(strip $(foreach module,$(1),$(if $(wildcard $(module).*.so),,$(module))))
CORE_MISSING := $(call missing,mailerq/_core mailerq/wire/_lines mailerq/mail/_canonical)
HOT_MISSING := $(call missing,$(HOT_MODULES:.pxd=))
HOT_BUILT := $(wildcard $(HOT_MODULES:.pxd=.*.so))
HOT_ORPHANS := $(foreach built,$(filter-out $(wildcard mailerq/_*.so mailerq/*/_*.so),\
    $(wildcard mailerq/*.so mailerq/*/*.so mailerq/*/*/*.so)),\
    $(if $(wildcard $(firstword $(subst ., ,$(built))).pxd),,$(built)))
BUILD_EXT := $(BIN)/python setup.py --quiet build_ext --inplace
PLUGINS := $(patsubst plugins/%.c,build/plugins/%.so,$(wildcard plugins/*.c)) \
           $(patsubst plugins/%.cpp,build/plugins/%.so,$(wildcard plugins/*.cpp))
FUZZSECONDS := 60
PLUGIN_FLAGS := -O2 -g -fPIC -shared -Wall -Wextra -Iinclude

export PYTHON PIP_ROOT_USER_ACTION := ignore
# Compiling the tests takes a twentieth of the suite's time: keep the result for the next run.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: run ready test build debug assertions bench soak fuzz lint docs asan clean help python again
.DELETE_ON_ERROR:

run: python ## set up and start a server to try; RUNARGS=--smtp-port=2600 changes settings
	@PYTHONPATH=. $(PYTHON) tools/run --check $(RUNARGS)
	@$(MAKE) --no-print-directory ready
	@exec $(BIN)/python tools/run $(RUNARGS)

# If any module is compiled, compile all, because they could be stale. Otherwise compile none, which
# is faster.
ready: $(if $(HOT_BUILT),build,$(VENV)/.core $(VENV)/.installed) $(PLUGINS)

test: $(VENV)/.test build $(PLUGINS) ## run the whole test suite; PYTESTARGS="-k config" runs a part
	$(PYTEST) --numprocesses=$(JOBS) --dist=worksteal $(PYTESTARGS)

build: $(VENV)/.core $(VENV)/.hot $(VENV)/.installed ## make .venv/bin/mailerq, compiled for speed

debug: $(VENV)/.test ## run the suite on extensions with assertions and on uncompiled modules
	@rm -f $(VENV)/.core $(VENV)/.hot $(HOT_MODULES:.pxd=.*.so)
	@mkdir -p build && touch build/debug
	MQ_DEBUG=1 $(BUILD_EXT) --force
	$(PYTEST) $(PYTESTARGS)

assertions: $(VENV)/.test ## run the tests of plugins on a debug build, in a copy of this tree
	@rm -rf build/copy && mkdir -p build/copy
	@cp -R $(filter-out build dist var,$(wildcard *)) build/copy
	@find build/copy -name '*.so' -delete
	cd build/copy && MQ_DEBUG=1 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace --force
	cd build/copy && $(abspath $(BIN))/python -m pytest tests/plugins $(PYTESTARGS)

bench: $(VENV)/.test build ## measure, and compare with installed peers; BENCHARGS=--full takes longer
	$(BIN)/python benches/targets.py --json build/bench.json --plot benches/relay.svg $(BENCHARGS)

soak: $(VENV)/.test build ## run the tests that take minutes
	$(PYTEST) -m soak --timeout=3600 $(PYTESTARGS)

fuzz: $(VENV)/.test build ## search for input that breaks the server machine, for FUZZSECONDS=60
	-@$(call needs,fuzz) || echo "atheris cannot be installed here"
	$(BIN)/python tests/fuzz/server.py --seconds $(FUZZSECONDS)

lint: $(VENV)/.lint ## run ruff, mypy --strict, cython-lint, and check layers and file sizes
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint mailerq
	$(BIN)/python tools/check_tree.py

docs: $(VENV)/.base ## update the tables in docs/ from the tables of the program
	$(BIN)/python tools/docs.py

asan: $(VENV)/.test ## run the tests of the extensions under AddressSanitizer and UBSan
	@rm -f $(VENV)/.core $(VENV)/.hot $(HOT_MODULES:.pxd=.*.so)
	@mkdir -p build && touch build/debug
	MQ_DEBUG=1 MQ_SANITIZE=address,undefined $(BUILD_EXT) --force
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	    $(PYTEST) tests/plugins tests/test_core_sockets.py tests/wire/test_framing.py \
	        tests/net/test_stream.py tests/engine/test_plugin_events.py $(PYTESTARGS)

clean: ## remove build results; .venv and var stay
	rm -rf build dist *.egg-info mailerq/_core.[ch] mailerq/*.so mailerq/*/*.so mailerq/*/*/*.so \
	    $(VENV)/.core $(VENV)/.hot
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find mailerq tests tools benches -name __pycache__ -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

# Set-up. A file in .venv marks a finished step, which is repeated if its inputs are newer.

needs = $(BIN)/python tools/requirements.py $(1) >$(VENV)/needs.txt && \
        $(PIP) install --requirement $(VENV)/needs.txt

python:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "mailerq needs Python 3.11 or newer: apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mailerq needs Python 3.11 or newer; set PYTHON, here is `$(PYTHON) -V`"; exit 1; }

$(VENV)/bin/python: | python
	@tools/packages build
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.base: pyproject.toml tools/packages tools/requirements.py | $(VENV)/bin/python
	@tools/packages build
	@echo "Installing the dependencies of mailerq into $(VENV)"
	@$(call needs,build-system dependencies terminal)
	@touch $@

$(VENV)/.core: $(CORE_SOURCES) $(if $(CORE_MISSING),again) | $(VENV)/.base
	@echo "Compiling the extensions"
	@MQ_UNCOMPILED=1 $(BUILD_EXT) $(if $(wildcard build/debug),--force)
	@rm -f build/debug
	@touch $@

$(VENV)/.hot: $(HOT_SOURCES) setup.py $(if $(strip $(HOT_MISSING) $(HOT_ORPHANS)),again) \
    | $(VENV)/.core
	@echo "Compiling the modules that every message goes through"
	@rm -f $(HOT_ORPHANS)
	@$(BUILD_EXT)
	@touch $@

again:

$(VENV)/.installed: pyproject.toml tools/install | $(VENV)/.base
	@$(BIN)/python tools/install
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@tools/packages test
	@echo "Installing the dependencies of the tests"
	@$(call needs,test bench)
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	@$(call needs,lint css postgresql)
	@touch $@

build/plugins/%.so: plugins/%.c include/mailerq.h
	@mkdir -p $(@D)
	$(CC) $(PLUGIN_FLAGS) -std=c99 $< -o $@ $(LDLIBS)

build/plugins/%.so: plugins/%.cpp include/mailerq.h
	@mkdir -p $(@D)
	$(CXX) $(PLUGIN_FLAGS) -std=c++17 $< -o $@ $(LDLIBS)

build/plugins/tag.so build/plugins/mimegen.so: LDLIBS := -ljson-c
build/plugins/auth.so: LDLIBS := -pthread -lcrypt
