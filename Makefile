# `make run` starts the proxy, `make test` checks everything; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-unit test-proxy bench bench-memory bench-peers clean

run: .venv/installed
	@if [ -n "$$AIPROXY_CONFIG" ] || [ -f config.yaml ]; then \
	  exec $(BIN)/gunicorn wsgi:app; \
	else \
	  AIPROXY_CONFIG=config.example.yaml exec $(BIN)/gunicorn wsgi:app; \
	fi

test: .venv/installed-dev tests/typescript/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Tests without sockets; tests in process, with fake upstreams.
test-unit: .venv/installed-dev
	$(BIN)/python -m pytest tests/unit

test-proxy: .venv/installed-dev
	$(BIN)/python -m pytest tests/proxy

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The TypeScript SDK, where there is Node; its tests are skipped elsewhere.
tests/typescript/installed: tests/typescript/package-lock.json
	@if command -v npm >/dev/null; then \
	  npm ci --silent --no-audit --no-fund --prefix tests/typescript && touch $@; \
	else echo "npm is missing: the tests of the TypeScript SDK will be skipped"; fi

# Compares aiproxy with nginx and with the peers that are installed; bench/README.md tells more.
bench: .venv/installed bench/.venv/installed
	bench/.venv/bin/python -m bench $(BENCH)

bench-memory: .venv/installed
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
	rm -rf .venv tests/typescript/node_modules tests/typescript/installed
	rm -rf .mypy_cache .pytest_cache .ruff_cache bench/.venv bench/.build bench/peers/.venv bench/peers/node_modules
