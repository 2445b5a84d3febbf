# Two commands: `make demo` and `make test`. Everything they need is installed into .venv from requirements.lock.
PYTHON ?= python3
SEED ?= 42
BIN := .venv/bin

.PHONY: help demo test check install bench-merge bench-data browser lock readmes clean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 24

demo: install  ## teach a tiny MiniCPM-V to read digits: the whole pipeline, here (SEED=n for another start)
	@$(BIN)/minicpmv-finetune demo --seed $(SEED)

test: install browser check  ## lint, type check and all tests
	$(BIN)/python -m pytest -n 2

check: install  ## lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy components pipelines

install: .venv/installed  ## install the locked packages and this project into .venv

# -qq keeps an installer's warnings about mirrors out of the first impression; its errors still show.
.venv/installed: requirements.lock pyproject.toml
	@echo "Installing the locked packages into .venv (about 7 GB; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

bench-merge: install  ## time merging a 4 GB model against copying it
	$(BIN)/python benchmarks/merge.py

bench-data: install  ## time preparing, reading and moving data against the usual ways
	$(BIN)/python benchmarks/data.py

browser:  ## install Chromium, in which the tests open the reports
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; }

lock:  ## resolve the newest versions anew and write requirements.lock
	$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install -qq pip-tools
	build/lock/bin/pip-compile -q --extra dev --generate-hashes --allow-unsafe --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --strip-extras \
		--output-file requirements.lock pyproject.toml

readmes: install  ## write each step's README from its component
	$(BIN)/python -m minicpmv_finetune.pipelines.component_readmes

clean:  ## remove what was built
	rm -rf build dist .venv *.egg-info
