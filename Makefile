# Everything a fresh machine with Python and make needs: `make serve` and `make test` each work by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= demo
PORT   ?= 8000
ARGS   ?=
# the demo model calls tools (docs/tools.md)
DEMO_FLAGS := $(if $(filter demo,$(MODEL)),--enable-auto-tool-choice --tool-call-parser hermes)
# pytest workers: one more than two cores have, as tests wait for time limits and for other processes; the engine
# tests use two threads each
JOBS   ?= 3

ROOM   ?= core

.PHONY: help serve chat test lint format typecheck wheel bench mutants clean

help:
	@echo "make serve    serve the bundled demo model on port $(PORT) (MODEL=…, PORT=…, ARGS='…')"
	@echo "make chat     talk to it from another terminal"
	@echo "make test     install everything and run the test suite"
	@echo "make lint     ruff, mypy, import-linter"
	@echo "make format   ruff format"
	@echo "make wheel    wheels with the CPU kernels compiled ahead, and the source distribution, in dist/"
	@echo "make mutants  break ROOM=core in small ways, and see that its tests tell (ARGS='--sample 300')"
	@echo "make bench    run the comparisons of benchmarks/ (long)"

# torch first and with its own bounds: it is the one large download, and what comes after must not replace it
$(VENV)/.engine: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[engine]"
	-$(BIN)/python -m penstock.kernels.cpu.build  # with a compiler: twice as fast; without one: a message
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[engine,dev]"
	@touch $@

serve: $(VENV)/.engine
	@echo
	@echo "  When the server is ready, in another terminal:"
	@echo
	@echo "    make chat                              # or: $(BIN)/penstock chat --url http://localhost:$(PORT)/v1"
	@echo "    curl http://localhost:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "      -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is PagedAttention?\"}]}'"
	@echo
	@exec $(BIN)/penstock serve $(MODEL) --port $(PORT) $(DEMO_FLAGS) $(ARGS)

chat: $(VENV)/.engine
	@exec $(BIN)/penstock chat --url http://localhost:$(PORT)/v1

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev
	$(BIN)/python tools/wheel/build.py $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run

mutants: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[mutants]"
	$(BIN)/python tools/mutants/run.py --room $(ROOM) $(ARGS)

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
