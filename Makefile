# Targets for people; `make help` lists them. Everything lives in one virtual environment.

# Any Python from 3.11 on: make demo PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where to get torch from, if not from where pip gets all else: see docs/install.md, "Without a GPU".
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo check quick timed test slow hostile coverage lab lab-gpu notebooks playground site slides lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/.ready ## fine-tune a real language model with LoRA and in full, side by side
	$(BIN)/lora-lab demo $(ARGS)

# The course and what guards the rest: seconds each.
QUICK := $(patsubst %,tests/%.py,test_lora test_layers test_variants test_inject test_methods test_rank test_task \
  test_history test_train tasks/test_arrays tasks/test_python_docs system/test_files \
  guards/test_layering guards/test_links guards/test_package)

check: $(VENV)/.ready-test ## lint and the quick unit tests, side by side, in less than a minute: before each commit
	$(MAKE) --jobs=2 lint quick

quick: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' $(QUICK) $(ARGS)

# A lesson that measures times on one core. Lint, the quick tests and these take the other one meanwhile.
TIMED := notebooks/05_speed.ipynb
BESIDE := tests/adapters tests/analysis

timed: $(VENV)/.ready-test
	$(BIN)/lora-lab fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TIMED)

# A tenth of the tests takes more than half of the time: these are marked slow, and have a target of their own.
test: $(VENV)/.ready-test ## lint, the unit tests that are not slow, and every cell of every notebook
	$(MAKE) --jobs=2 timed lint quick QUICK='$(QUICK) $(BESIDE)'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m 'not slow' $(TIMED:%=--ignore=%) $(QUICK:%=--ignore=%) $(BESIDE:%=--ignore=%) notebooks tests $(ARGS)

slow: $(VENV)/.ready-test ## the slow unit tests: after a change of what they test, and before a release
	$(BIN)/lora-lab fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --dist=loadfile -m slow tests $(ARGS)

hostile: $(VENV)/.ready-test ## read 3,000 damaged files, new ones each time, and kill two kinds of save 200 times each
	OMP_NUM_THREADS=1 LORA_LAB_HOSTILE=3000 LORA_LAB_KILLS=200 $(BIN)/python -m pytest -q --numprocesses=2 tests/hostile tests/system/test_kills.py $(ARGS)

coverage: $(VENV)/.ready-test ## print which lines and branches of the package the unit tests miss
	$(BIN)/lora-lab fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --dist=loadfile tests $(ARGS) --cov

lint: $(VENV)/.ready-test ## check style, notebooks too, and the types of the package
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m basedpyright --pythonpath $(BIN)/python

# The learner's copy of the lessons: ignored by git, and never overwritten where it was changed.
LESSONS ?= my_lessons

lab: $(VENV)/.ready ## open your copy of the lessons in JupyterLab, with the exercises for you to solve
	$(BIN)/lora-lab fetch
	$(BIN)/lora-lab course $(LESSONS)
	$(BIN)/jupyter lab "$$(ls $(LESSONS)/[0-9]*.ipynb | head -n 1)" $(ARGS)

lab-gpu: $(VENV)/.ready-test ## run every lesson at full effort on a GPU; assertions only, nothing compared
	LORA_LAB_DEVICE=cuda LORA_LAB_EFFORT=full $(BIN)/python -m pytest -q --override-ini="addopts=-ra" --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 notebooks

notebooks: $(VENV)/.ready-test ## run the lessons again and store their outputs in place
	$(BIN)/python notebooks/execute.py $(ARGS)

playground: $(VENV)/.ready ## write the page in which LoRA is trained live: build/playground.html
	$(BIN)/lora-lab playground build/playground.html --write

site: $(VENV)/.ready-docs ## build the site from the stored lessons, in about a minute: build/site/html/index.html
	$(BIN)/python docs/site/build.py $(ARGS)

slides: $(VENV)/.ready-docs ## write slides of each lesson from its stored outputs, in seconds: build/slides/00_first_look.html
	$(BIN)/python docs/site/slides.py $(ARGS)

clean: ## remove the virtual environment (the model stays in its cache)
	rm -rf $(VENV)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lora_lab needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; say which one to use: make demo PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(if $(TORCH_INDEX),-m pip install --index-url $(TORCH_INDEX) torch,lora_lab/system/torch_build.py)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
