# Every target sets up what it needs; nothing is done twice. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
PY := $(VENV)/bin/python
GPUS ?= 0
# One process, or one per GPU.
LAUNCH := $(if $(filter-out 0 1,$(GPUS)),$(VENV)/bin/torchrun --nproc_per_node=$(GPUS),$(PY))
ARGS ?=
TABLES = data=$(or $(DATA:glyph50=glyphs),glyphs) seeds=$(or $(SEEDS),1) $(if $(FIRST_SEED),first_seed='$(FIRST_SEED)') $(if $(RECORDS),records='$(RECORDS)')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest test-slow test-chaos test-gpu lint train finetune eval predict report figures data check-data glyphs table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 tables results bench gpu clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/stamp  ## create .venv and install loce into it (PYTHON=python3.12 chooses the interpreter)

# The stamp is as new as the last finished installation; a changed pyproject.toml makes it old.
$(VENV)/stamp: pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(create_venv); }
	@echo "Installing loce and what it needs into $(VENV) (the first time: some minutes, several GB, most of it torch)"
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

define create_venv
command -v $(PYTHON) >/dev/null || \
	{ echo "$(PYTHON) not found; loce needs Python >= 3.10: make setup PYTHON=/path/to/python3"; exit 2; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "loce needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) --version 2>&1): make setup PYTHON=python3.12"; exit 2; }; \
$(PYTHON) -m venv $(VENV) || \
	{ echo "$(VENV) could not be created; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
endef

demo: setup  ## stage 1, then LOCE and a control, on data drawn here: table and figures in runs/ (6 min, 2 cores)
	$(PY) scripts/demo.py $(ARGS)

test: setup  ## the test suite, in JOBS=2 processes of one thread each
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(or $(JOBS),2) --dist loadfile -m 'not slow and not gpu' $(ARGS)

test-oldest: $(OLDEST)/stamp  ## the test suite with the oldest torch and torchvision of pyproject.toml, in .venv-oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(or $(JOBS),2) --dist loadfile -m 'not slow and not gpu' $(ARGS)

# "torch>=2.11" is installed as torch==2.11.*, so that what is promised stands in one place.
$(OLDEST)/stamp: pyproject.toml
	@$(OLDEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check -e '.[dev]' \
		$$(sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",$$/\1==\2.*/p' pyproject.toml)
	@touch $@

test-slow: setup  ## tests that take minutes
	$(PY) -m pytest -m 'slow and not gpu' $(ARGS)

test-chaos: setup  ## kill and stop a small training 35 times; it must equal one in peace (15 min or more)
	$(PY) scripts/chaos.py $(ARGS)

test-gpu: setup  ## tests that need a CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

train: setup  ## stage 1 on LVIS v1 (GPUS=8, CONFIG=stage1.yaml, ARGS="train.lr=0.01 ...")
	$(LAUNCH) scripts/train.py $(or $(CONFIG),stage1.yaml) $(ARGS)

finetune: setup  ## stage 2, LOCE, from runs/stage1 (GPUS=8, CONFIG=loce.yaml, ARGS=...)
	$(LAUNCH) scripts/finetune.py $(or $(CONFIG),loce.yaml) $(ARGS)

eval: setup  ## evaluate the newest run, or CKPT=..., or a results file: PRED=results.json ANN=annotations.json (GPUS=8)
	$(if $(PRED),$(PY),$(LAUNCH)) scripts/evaluate.py $(if $(CKPT),checkpoint='$(CKPT)') $(if $(PRED),results='$(PRED)') \
		$(if $(ANN),annotations='$(ANN)') $(ARGS)

predict: setup  ## draw what a model finds (CKPT=run folder or file, IMAGES=file or folder, OUT=predictions)
	$(PY) scripts/predict.py $(if $(CKPT),'$(CKPT)') $(if $(IMAGES),'$(IMAGES)') $(if $(OUT),output='$(OUT)') $(ARGS)

report: setup  ## equilibrium report, one HTML file, of the newest run, or RUN="runs/a runs/b" (ARGS="output=x.html")
	$(PY) scripts/report.py $(RUN) $(ARGS)

figures: setup  ## the paper's Figures 1 and 4, PNG and PDF, of RUN="runs/a runs/b": run or evaluation folders
	$(PY) scripts/figures.py $(RUN) $(ARGS)

glyphs: setup  ## draw Glyph-LVIS, the demo's data (OUT=runs/glyphs50 CLASSES=50)
	$(PY) scripts/make_glyphs.py out=$(or $(OUT),runs/glyphs50) classes=$(or $(CLASSES),50) $(ARGS)

table1:  ## the paper's Table 1 (2 to 5: the others; 6 to 10: ours): trains what is missing (DATA=glyphs|glyph100|lvis, SEEDS=1, GPUS=8)
table1 table2 table3 table4 table5 table6 table7 table8 table9 table10: setup
	$(PY) scripts/tables.py table=$(@:table%=%) $(TABLES) gpus=$(GPUS) $(ARGS)

tables: setup  ## all of them, then results (DATA, SEEDS, GPUS; RECORDS=folder)
	$(PY) scripts/tables.py table=1 'also=[2,3,4,5,6]' $(TABLES) gpus=$(GPUS) $(ARGS)
	$(MAKE) results

results: setup  ## what the finished rows show: all tables over seeds, the paper's claims, a figure (OUT=folder)
	$(PY) scripts/results.py $(TABLES) $(if $(OUT),out='$(OUT)') $(if $(README),readme='$(README)') $(ARGS)

bench: setup  ## ours against torchvision's and the usual way, in one table (SIZE=small to try; DEVICE=cuda)
	$(PY) benchmarks/bench.py size=$(or $(SIZE),full) device=$(or $(DEVICE),auto) $(ARGS)

gpu: setup  ## is it right on a GPU, and how fast: tests, waits, speed and memory, demo in MINUTES=10 (DEVICE=cpu SIZE=small to try)
	$(PY) benchmarks/gpu.py size=$(or $(SIZE),full) device=$(or $(DEVICE),auto) minutes=$(or $(MINUTES),10) $(ARGS)

data: setup  ## fetch LVIS annotations and COCO images, 20 GB (VERSION=0.5|coco, OUT=data, ARGS="only=annotations")
	$(PY) scripts/fetch_data.py version=$(or $(VERSION),1.0) out=$(or $(OUT),data) $(ARGS)

check-data: setup  ## check a data set read-only (DATA=CONFIG.yaml, or DATA=annotations.json IMAGES=folder)
	$(PY) scripts/check_data.py $(DATA) $(if $(IMAGES),images='$(IMAGES)') $(ARGS)

clean:  ## remove caches of tools and builds; never runs/, data/ or .venv
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
