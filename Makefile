# `make` alone lists the targets. The environment is set up once, in .venv, with the exact versions
# of constraints.txt; it is made again only when what it was made from changes (scripts/set_up.sh).
# What only tests and lint need comes with the first of them.

PYTHON   ?= python3
MODEL    ?= sample
REVISION ?=
DEVICE   ?=
BUILD_DIR ?=
RECIPE   ?=
PROMPT   ?= Tell me a story about a fox.
REPO_ID  ?=
ARTIFACT ?=
ARGS     ?=

ifdef model
$(error Variables are in capitals: write MODEL=$(model))
endif

# A word that is no target was meant as the value of a variable; make would see that only after the
# targets before it were made, with the default model.
TARGETS := quantize test verify prompt push reproduce bench lint format docs clean help venv dev-venv named
stray   := $(strip $(filter-out $(TARGETS),$(MAKECMDGOALS)))
ifneq ($(stray),)
target   := $(firstword $(filter $(TARGETS),$(MAKECMDGOALS)))
variable := $(or $(if $(filter prompt,$(target)),PROMPT),$(if $(filter reproduce,$(target)),ARTIFACT),MODEL)
word     := $(subst ','\'',$(stray))
remedy   := $(if $(target),Give it as a variable: make $(target) $(variable)="$(word)",To see all: make help)
$(shell echo 'Error: $(word) is no target. $(remedy)' >&2)
$(error Nothing was made)
endif

VENV := .venv
BIN  := $(VENV)/bin

build_dir = $(if $(BUILD_DIR),--build-dir '$(BUILD_DIR)')
device    = $(if $(DEVICE),--device '$(DEVICE)')
settings  = $(build_dir) $(if $(RECIPE),--recipe '$(RECIPE)') $(device)

# A prompt may hold any quotes: it reaches the shell through the environment.
export PROMPT

.DEFAULT_GOAL := help
.PHONY: $(TARGETS)

##@ The job

quantize: named venv  ## download, quantize, serialize and verify MODEL
	$(strip $(BIN)/nf4 build '$(MODEL)' $(if $(REVISION),--revision '$(REVISION)') $(settings)) $(ARGS)

verify: named venv  ## hold the artifact of MODEL against its 16-bit source again
	$(strip $(BIN)/nf4 verify '$(MODEL)' $(settings)) $(ARGS)

prompt: named venv  ## answer PROMPT with the newest artifact of MODEL (a tag will do), or with BUILD_DIR
	@$(BIN)/nf4 prompt '$(or $(BUILD_DIR),$(MODEL))' "$$PROMPT" $(device) $(ARGS)

reproduce: venv  ## derive ARTIFACT (a folder, a model or a tag) again and compare every byte
	@if [ -z '$(ARTIFACT)' ]; then \
	  echo "Error: which one? make reproduce ARTIFACT=NAME [ARGS='--source DIR']" >&2; exit 2; \
	fi
	$(BIN)/nf4 reproduce '$(ARTIFACT)' $(ARGS)

push: named venv  ## publish the artifact of MODEL as REPO_ID on the Hub (ARGS=--dry-run lists it)
	@if [ -z '$(REPO_ID)' ]; then \
	  echo "Error: where to? make push REPO_ID=ORG/NAME [ARGS=--dry-run]" >&2; exit 2; \
	fi
	$(strip $(BIN)/nf4 push '$(MODEL)' --repo-id '$(REPO_ID)' $(build_dir)) $(ARGS)

##@ Work on the project

test: dev-venv  ## run the tests, three files at a time (ARGS go to pytest)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder \
	  --max-worker-restart 1 $(ARGS)

lint: dev-venv  ## check style, types, who imports whom, and the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck
	$(BIN)/zizmor --offline --quiet --persona auditor .

format: dev-venv  ## put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: dev-venv  ## make the site of docs/ in build/site; a warning or a dead link is an error
	@$(BIN)/python -m sphinx --builder html --quiet --fail-on-warning --keep-going \
	  --doctree-dir build/doctrees $(ARGS) docs build/site
	@echo "build/site/index.html"

bench: dev-venv  ## run every scripts/bench/bench_*.py
	@set -- scripts/bench/bench_*.py; \
	if [ ! -f "$$1" ]; then \
	  echo "Error: there is no scripts/bench/bench_*.py yet, so nothing was measured." >&2; exit 1; \
	fi; \
	for script in "$$@"; do \
	  echo "$(BIN)/python $$script $(ARGS)"; \
	  $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

clean:  ## delete caches and every build under artifacts/ (keeps .venv; asks nothing)
	find artifacts -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find pipeline scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables, as in `make quantize MODEL=tiiuae/falcon-7b-instruct`\n'
	@printf '  %-10s %s\n' \
	  MODEL     'Hub id, local folder, or "sample", which comes with the package  [$(MODEL)]' \
	  REVISION  'branch, tag or commit of a Hub model' \
	  DEVICE    'auto, cpu or cuda[:N]' \
	  BUILD_DIR 'the build folder, if not the one of its own that each recipe has' \
	  RECIPE    'TOML file with everything that shapes the bytes' \
	  PROMPT    'what `make prompt` asks' \
	  ARTIFACT  'what `make reproduce` derives again: a folder, a model or a tag' \
	  REPO_ID   'ORG/NAME, where `make push` sends to' \
	  ARGS      'anything else for the command underneath' \
	  PYTHON    'the interpreter to make .venv with, 3.11 or newer  [$(PYTHON)]'

# Of the environments, a second is the first with more in it: what a command needs is set up by it.
venv:
	@scripts/set_up.sh '$(PYTHON)' '$(VENV)' run

dev-venv:
	@scripts/set_up.sh '$(PYTHON)' '$(VENV)' dev

named:
	@if [ -z '$(strip $(MODEL))' ]; then \
	  echo "Error: MODEL is empty. Name a Hub id, a local folder or sample:" \
	    "make $(firstword $(MAKECMDGOALS)) MODEL=sample" >&2; exit 2; \
	fi
