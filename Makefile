# Two commands set everything up on a machine with Python 3.11 and pip.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CORES ?= all
CHROMIUM ?= chromium
TESTS ?= not slow and not long
BIN := .venv/bin

.PHONY: help demo test lint bench doctor picture clean
help: ## say what can be done
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: .venv/installed ## set up, run the whole pipeline on the embedded world, say where the report is
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) --quiet rules
	@echo
	@echo "The report: $(CURDIR)/results/shapes/report.html"

test: .venv/installed-test ## set up, pass the tests; TESTS="not long" adds the slow ones, as .ci/run does
	PYTHONDONTWRITEBYTECODE= PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "$(TESTS)" \
		-n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

lint: .venv/installed-test ## check style, types and rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

bench: .venv/installed-test ## measure sampling, scoring and training beside plain loops over diffusers
	$(BIN)/python -m benchmarks.run

doctor: .venv/installed ## say what is wrong with the installation, the processes and the results
	$(BIN)/python -m stages.doctor

# Chromium asks for --no-sandbox when root runs it, as in a container; the page is ours.
picture: ## make the README's picture of the report, by headless Chromium, from the demo's run
	@test -s results/shapes/report.html || { echo "no report yet: make demo"; exit 1; }
	$(CHROMIUM) --headless=new --no-sandbox --hide-scrollbars --force-device-scale-factor=1 \
		--window-size=1160,1330 --screenshot="$(CURDIR)/docs/images/report.png" \
		"file://$(CURDIR)/results/shapes/report.html"

clean: ## remove the environment; results stay
	rm -rf .venv

.venv/installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q "$(TORCH)"
	@$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/installed-test: .venv/installed
	@$(BIN)/python -m pip install -q -e ".[test]"
	@# only its tokenizer is read, so none of what it depends on (torchvision) comes along
	@$(BIN)/python -m pip install -q --no-deps "open_clip_torch>=3.3,<4"
	@touch $@
