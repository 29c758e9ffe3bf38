# `make run` starts the proxy, `make test` checks everything; both set up a virtual environment first.
# `make test PYTHON=python3.13` uses another Python, in a virtual environment of its own.
PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: run test test-unit test-proxy bench bench-memory bench-peers clean

run: $(VENV)/installed
	@if [ -n "$$AIPROXY_CONFIG" ] || [ -f config.yaml ]; then \
	  exec $(BIN)/gunicorn wsgi:app; \
	else \
	  AIPROXY_CONFIG=config.example.yaml exec $(BIN)/gunicorn wsgi:app; \
	fi

test: $(VENV)/installed-dev tests/typescript/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Tests without sockets; tests in process, with fake upstreams.
test-unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/unit

test-proxy: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/proxy

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("aiproxy needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The TypeScript SDK, where there is Node; its tests are skipped elsewhere.
tests/typescript/installed: tests/typescript/package-lock.json
	@if command -v npm >/dev/null; then \
	  npm ci --silent --no-audit --no-fund --prefix tests/typescript && touch $@; \
	else echo "npm is missing: the tests of the TypeScript SDK will be skipped"; fi

# Compares aiproxy with nginx and with the peers that are installed; bench/README.md tells more.
bench: $(VENV)/installed bench/.venv/installed
	bench/.venv/bin/python -m bench $(BENCH)

bench-memory: $(VENV)/installed
	$(PYTHON) -m bench.memory

bench/.venv/installed: bench/requirements.txt
	$(PYTHON) -m venv bench/.venv
	bench/.venv/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@touch $@

# Half a GB, for comparison only. LiteLLM last: where it cannot be had the others are in place.
bench-peers:
	npm ci --silent --no-audit --no-fund --prefix bench/peers
	$(PYTHON) -m venv bench/peers/.venv
	bench/peers/.venv/bin/pip install --quiet --disable-pip-version-check -r bench/peers/requirements.txt

clean:
	rm -rf .venv .venv-* tests/typescript/node_modules tests/typescript/installed
	rm -rf .mypy_cache .pytest_cache .ruff_cache bench/.venv bench/.build bench/peers/.venv bench/peers/node_modules
