# `make run` starts the proxy, `make test` checks everything; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test clean

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

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The TypeScript SDK, where there is Node; its tests are skipped elsewhere.
tests/typescript/installed: tests/typescript/package-lock.json
	@if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix tests/typescript; \
	  else echo "npm is missing: the tests of the TypeScript SDK will be skipped"; fi
	@touch $@

clean:
	rm -rf .venv tests/typescript/node_modules tests/typescript/installed
