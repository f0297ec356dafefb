# Needs make, a POSIX shell and Python 3.11 or newer; everything else goes into .venv.

# A Python to make .venv with; empty: the first of python3, python3.13 … that is new enough.
PYTHON ?=
# Package index to take torch from, for its CPU or a certain CUDA build; empty: whatever pip takes by default.
TORCH_INDEX ?=
# Processes that run the tests.
JOBS ?= 2

ifndef OUT
OUT := runs/pathfinder-tiny-$(shell date +%Y%m%d-%H%M%S)
endif

BIN := .venv/bin
INTEROP := .venv/interop/bin/python
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Each worker of the tests gets one thread: more would fight over the cores. Slow tests go to them by file (loadfile): what the tests of a file share,
# such as a run of two workers, takes a minute to make, and is then made once.
# Their files are made in memory where Linux has at least 4 GiB free for that: a disk makes them wait a third of the time.
MEMORY := $(shell free=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}'); [ "$${free:-0}" -gt 4194304 ] && [ -w /dev/shm ] && echo /dev/shm)
PYTEST := $(if $(MEMORY),PYTEST_DEBUG_TEMPROOT=$(MEMORY)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# Without the compiled files of the last start, each process of the tests compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk 'match($$0, /^[a-z-]+:.*## /) && match($$0, /:.*## /) {printf "  make %-13s %s\n", substr($$0, 1, RSTART - 1), substr($$0, RSTART + RLENGTH)}' Makefile

setup: .venv/.setup ## make .venv with what the recipes need

demo: setup ## train SeqBoat on small images of contours and evaluate it; OUT=FOLDER sets the run folder
	@$(BIN)/python -m sma.recipes.seqboat_lra --task pathfinder --preset tiny --seed 2 --out "$(OUT)"

sweep: .venv/.tune ## search for the best sparsity and width of SeqBoat on a small ListOps; options by ARGS, such as ARGS="--samples 4"
	@$(BIN)/python -m sma.tune --task listops --preset tiny --samples 16 $(ARGS)

test: .venv/.dev ## run the fast tests
	@$(PYTEST) -m "not slow"

test-all: test .venv/.scatter .venv/.interop ## the fast tests, then the slow ones: trainings, killed processes, torch-scatter, compilers, the wheel, other libraries
	@$(PYTEST) -m slow --dist loadfile
	@OMP_NUM_THREADS=1 $(INTEROP) -m pytest -m "not extras" tests/test_interop

test-extras: .venv/.interop ## all tests with transformers and torchvision, including the heavy ones
	@OMP_NUM_THREADS=1 $(INTEROP) -m pytest tests/test_interop

bench: setup ## time one layer at several lengths and activation rates; options by ARGS, such as ARGS="--device cuda"
	@$(BIN)/python -m benchmarks.layer $(ARGS)

bench-stream: setup ## time one token of a stream after a thousand to a million tokens; options by ARGS, such as ARGS="--batch 1"
	@$(BIN)/python -m benchmarks.stream $(ARGS)

bench-routing: setup ## time the cost of routing and the work that it saves; options by ARGS, such as ARGS="--device cuda"
	@$(BIN)/python -m benchmarks.routing $(ARGS)

docs: site ## build the site into build/site; dead links and undocumented public names are errors

docs-serve: docs ## build the site and serve it at http://127.0.0.1:8000
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site 8000

notebooks: .venv/.dev ## run docs/notebooks and write their outputs into them
	@OMP_NUM_THREADS=1 $(BIN)/python .ci/run_notebooks.py $(ARGS)

check: lint types rules site ## format, lint, types, architecture rules, contents of the wheel, the site; -j 2 uses two cores

lint: .venv/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --output-format concise .

types: .venv/.dev
	@$(BIN)/python .ci/check_types.py

rules: .venv/.dev
	@$(BIN)/python -m pytest -q -m "not slow" tests/test_architecture.py tests/test_packaging.py tests/test_site.py

site: .venv/.dev
	@$(BIN)/python .ci/build_site.py

mutations: .venv/.dev ## change the code as tests/mutations.yaml says, one mistake at a time: each must fail a test
	@$(BIN)/python .ci/mutations.py $(ARGS)

lowest: .venv/.dev ## run the tests of the core with its oldest allowed dependencies; TORCH=1 includes torch
	@TORCH="$(TORCH)" $(BIN)/python .ci/lowest.py $(ARGS)

release: .venv/.release ## build the distribution in dist/, check it, try it in fresh environments; publishes nothing
	@TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python .ci/release.py

clean: ## remove .venv, build outputs and caches; keeps runs/ and data/
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv installs, so an interrupted one is made again.
$(BIN)/pip:
	@found=; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Python 3.11 or newer is required, and $(or $(PYTHON),python3) is older or missing; install it, or give its path: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "making .venv with $$("$$found" --version)"; \
	"$$found" -m venv .venv >/dev/null 2>&1 || { \
	    rm -rf .venv; \
	    echo "$$found cannot make a virtual environment: install its module venv (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; \
	}

# torch by itself, because an index that has one build of torch need not have the other packages.
.venv/.setup: pyproject.toml constraints.txt | $(BIN)/pip
	@if [ -n "$(TORCH_INDEX)" ]; then \
	    echo "installing torch from $(TORCH_INDEX)"; \
	    $(PIP) install -qq --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch; \
	fi
	@echo "installing sma and what its recipes need: some minutes the first time"
	@$(PIP) install -qq -c constraints.txt -e '.[recipes]'
	@touch $@
	@echo "ready: activate it with  . $(BIN)/activate  or see make help"

.venv/.tune: .venv/.setup
	@echo "installing Ray and Optuna"
	@$(PIP) install -qq -c constraints.txt -e '.[tune]'
	@touch $@

.venv/.dev: .venv/.setup
	@echo "installing what the tests and checks need"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.release: .venv/.dev
	@echo "installing what checks a distribution"
	@$(PIP) install -qq -c constraints.txt -e '.[release]'
	@touch $@

# An environment of its own, which sees .venv: where torchvision is built for another build of torch, its import fails, and so does that of torchmetrics.
.venv/.interop: .venv/.dev
	@echo "installing transformers and torchvision in .venv/interop"
	@$(BIN)/python -m venv .venv/interop
	@packages() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	    echo "import site; site.addsitedir('$$(packages $(BIN)/python)')" > "$$(packages $(INTEROP))/environment.pth"
	@$(INTEROP) -m pip --disable-pip-version-check install -qq -c constraints.txt 'sparse-modular-activation[interop]'
	@touch $@

# It has no wheel for this torch and is compiled against the installed one, once per version of torch and Python; with
# ninja on all cores.
.venv/.scatter: .venv/.dev
	@wheels="$${XDG_CACHE_HOME:-$$HOME/.cache}/sma/torch-$$($(BIN)/python -c 'import torch; print(torch.__version__)')"; \
	install() { $(PIP) install -qq --force-reinstall --no-index --no-deps --find-links "$$wheels" -c constraints.txt torch-scatter; }; \
	install 2>/dev/null || { \
	    echo "building torch-scatter: 2 to 9 minutes, and only the first time"; \
	    $(PIP) install -qq -c constraints.txt ninja; \
	    PATH="$$PWD/$(BIN):$$PATH" $(PIP) wheel -qq --no-build-isolation --use-pep517 --no-deps --wheel-dir "$$wheels" -c constraints.txt torch-scatter && install; \
	}
	@touch $@

.PHONY: help setup demo sweep test test-all test-extras bench bench-stream bench-routing docs docs-serve notebooks check lint types rules site mutations lowest release clean
.DELETE_ON_ERROR:
