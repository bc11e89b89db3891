# Everything runs in a virtual environment of its own, .venv, with the versions that CI tested.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NODES ?= 1
MINUTES ?= 10

.PHONY: help install demo test test-unit fuzz lint format bench kafka kafka-down constraints clean

help: ## show this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]" --group dev
	@touch $@

install: $(VENV)/.installed ## make .venv with streamproc, its extras and the tools of its tests

demo: install ## stream 1,797 handwritten digits through a broker and a model
	$(BIN)/streamproc demo

test: install ## every test; those that need Kafka are skipped where Java or Maven is missing
	$(BIN)/python -m pytest

test-unit: install ## the tests that take milliseconds
	$(BIN)/python -m pytest tests/unit

fuzz: install ## fuzz wire format, settings and decoding; MINUTES=10 each, TARGET=wire|settings|decoding, SEED=1
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
	$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET)) $(if $(SEED),--seed $(SEED))

lint: install ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff write the code as it wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## the parent's CPU per record against a bare aiokafka loop
	$(BIN)/python -m benchmarks.passthrough

kafka: install ## start Apache Kafka from its jars on port 9092; NODES=3 for a cluster
	$(BIN)/python deploy/kafka/kafka.py up --nodes $(NODES)

kafka-down: install ## stop it
	$(BIN)/python deploy/kafka/kafka.py down

constraints: install ## write the installed versions to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip | grep '==' > constraints.txt

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
