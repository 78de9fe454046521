# Both commands do all their set-up: they need Python 3.11 or newer, pip, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BROWSER := .venv/.browser

.PHONY: demo test test-all lint evidence-claims evidence-selection evidence-grpo

demo: $(STAMP)
	$(BIN)/selector demo

test: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest

test-all: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

# trainings of at most SECONDS at a time; the same command again continues and writes the table anew
MODEL ?= embedded
WORKERS ?= 1
GPUS ?= 0
SECONDS ?= 540
EVIDENCE = $(BIN)/python benchmarks/evidence
SHARED_OUT = --workers $(WORKERS) --gpus $(GPUS) --seconds $(SECONDS)

evidence-selection: $(STAMP)
	$(EVIDENCE)/selection.py pool --model $(MODEL) --data "$(DATA)"
	$(EVIDENCE)/selection.py score --model $(MODEL)
	$(EVIDENCE)/selection.py tune --model $(MODEL) $(SHARED_OUT)
	$(EVIDENCE)/selection.py train --model $(MODEL) $(SHARED_OUT)
	$(EVIDENCE)/selection.py table --model $(MODEL)

evidence-grpo: $(STAMP)
	$(EVIDENCE)/grpo.py warm
	$(EVIDENCE)/grpo.py tune $(SHARED_OUT)
	$(EVIDENCE)/grpo.py train $(SHARED_OUT)
	$(EVIDENCE)/grpo.py table

# labelled data in DATA, checkpoints in MODELS; killed and begun again, it goes on with the scoring where it was
evidence-claims: $(STAMP)
	$(EVIDENCE)/claims.py rows --data "$(DATA)" --out runs/claims
	for model in $(MODELS); do $(EVIDENCE)/claims.py score --model $$model --out runs/claims || exit; done
	$(EVIDENCE)/claims.py table --data "$(DATA)" --out runs/claims

# torch goes first and pinned: this release has a small CPU build, which the other packages then accept
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[faiss-cpu,trl,plots,dev]'
	touch $(STAMP)

# the report is tested in a real browser and with axe-core, where these are at hand or can be had; tests say when they are not
$(BROWSER): $(STAMP)
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq >/dev/null && apt-get install -qq -y chromium >/dev/null; } || echo "no Chromium: tests of the report's page are skipped"
	@test -d node_modules/axe-core || { command -v npm >/dev/null && npm install --no-save --silent axe-core >/dev/null; } \
		|| echo "no axe-core: its accessibility rules are skipped"
	@touch $(BROWSER)
