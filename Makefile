# `make demo` and `make test` set up everything they need in .venv; nothing else has to be run first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal

# Workers share the processors: a thread each, or they wait for one another. `make two-threads` has two.
export OMP_NUM_THREADS ?= 1

# The test files of each word; a word that has none is an error.
tests = $(foreach word,$(1),$(or $(shell find tests -name 'test_*$(word)*.py'),$(error no tests of $(word))))

.PHONY: demo test lint types suite browser slices no-avx512 no-c two-threads inductor slow docs format clean

demo: $(VENV)/.installed-demo
	$(BIN)/normprop demo

test: lint types suite

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

suite: $(VENV)/.installed-dev browser
	$(PYTEST)

# A browser for tests of interactive pages: where there is none, root on Debian installs one; elsewhere those tests are skipped.
browser:
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } \
	|| echo "no Chromium, and none could be installed: tests of pages in a browser are skipped"

# Parts of the suite as on other machines, those that the machine makes a difference to.
slices: no-avx512 no-c two-threads inductor

# The library's own compiled functions, torch's, oneDNN's; torch.compile keeps what it compiled, whatever that was for.
no-avx512: $(VENV)/.installed-dev
	CFLAGS=-march=haswell ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 $(PYTEST) \
		$(call tests,memory_format models training nn_reference fold promises own_network scales rectifier_lane \
		activation_lane directions keep_calibrated segments)

no-c: $(VENV)/.installed-dev
	NORMPROP_NATIVE=0 $(PYTEST) \
		$(call tests,native scales rectifier_lane activation_lane directions accumulation calibrate \
		fold promises own_network)

two-threads: $(VENV)/.installed-dev
	OMP_NUM_THREADS=2 $(BIN)/pytest $(call tests,memory_format models training native scales rectifier_lane segments)

inductor: $(VENV)/.installed-dev
	$(PYTEST) --inductor

# The whole zoo of networks, and the paper's experiments at their smallest.
slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# The documentation site, into site/; a warning is an error.
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --quiet

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch and torchvision first, by their own names: a resolver that meets them as somebody's dependency may pick a pair that does not fit.
$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache
