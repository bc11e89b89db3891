# Everything runs in a virtual environment of its own, .venv, with the versions that CI tested.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NODES ?= 1
RECORDS ?= 5000000
RATE ?= 2000
DELIVERY ?= both
JOBS ?= 2
chaos: SEED ?= 1
chaos: MINUTES ?= 2
fuzz: MINUTES ?= 10

.PHONY: help install demo test test-unit chaos fuzz lint audit promtool format bench soak kafka kafka-down browser constraints clean

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

test: install ## every test, JOBS=2 at a time; those that need Kafka are skipped where Java or Maven is missing
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-unit: install ## the tests that take milliseconds
	$(BIN)/python -m pytest tests/unit

chaos: install ## break things for a while and compare; SEED=1 MINUTES=2 RATE=2000 DELIVERY=both
	$(BIN)/python -m tests.chaos.run --seed $(SEED) --minutes $(MINUTES) --rate $(RATE) --delivery $(DELIVERY)

fuzz: install ## fuzz wire, settings, decoding and formats; MINUTES=10 each, TARGET=wire|settings|decoding|formats, SEED=1
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
	$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET)) $(if $(SEED),--seed $(SEED))

lint: install ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: install ## known vulnerabilities of the dependencies; says so where no database can be reached
	$(BIN)/python deploy/audit/audit.py

promtool: ## put Debian's promtool into build/bin, for the tests of the alert rules
	deploy/prometheus/promtool.sh build/bin

format: install ## let ruff write the code as it wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## every peer, two bare loops and streamproc in turns: 20 minutes, one table; WORKLOAD=json-223 for a part
	$(BIN)/python -m benchmarks.throughput $(if $(WORKLOAD),--workload $(WORKLOAD))

soak: install ## resident memory over RECORDS=5000000 records, and once more with workers killed; a graph of each in build/
	@mkdir -p build
	$(BIN)/python -m benchmarks.soak --records $(RECORDS) --out build/soak
	$(BIN)/python -m benchmarks.soak --records $(RECORDS) --workers 2 --kill-every-s 3 --out build/soak-deaths

kafka: install ## start Apache Kafka from its jars on port 9092; NODES=3 for a cluster
	$(BIN)/python deploy/kafka/kafka.py up --nodes $(NODES)

kafka-down: install ## stop it
	$(BIN)/python deploy/kafka/kafka.py down

browser: ## Chromium of Debian's packages, unless one is there, for the tests that look at pages; needs root
	@command -v chromium || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; }

constraints: install ## write the installed versions to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip | grep '==' > constraints.txt

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
