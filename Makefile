# make course   install, fetch the model, run every lesson (PROFILE=smoke|cpu|t4, LESSON=02)
# make lab      install, then JupyterLab at lesson 00
# make test     install, then ruff, unit tests, and every lesson with its exercises,
#               in two processes at once; WORKERS=0: in one
# make test-colab  all tests, slow ones of Colab too, on the packages of its image
# make lessons  the lessons' tests alone · make runs LESSON=02 · make readme
# make bench    30 minutes on a quiet machine; others' libraries in build/
# make links REPO=owner/name   name the repository everywhere · make clean
PYTHON ?= python3
PROFILE ?= cpu
LESSON ?=
TORCH_INDEX ?=
VENV ?= .venv
LAB_ARGS ?=
WORKERS ?= 2
PIP_ARGS = -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN = $(VENV)/bin/python -m
PYTEST = pytest -q -n $(WORKERS) --dist worksteal
STAMP = $(VENV)/.installed
COLAB = .venv-colab/bin/python -m
.PHONY: course lab test test-colab lessons bench runs readme links clean install

course: $(STAMP)
	$(RUN) maintenance.course --profile $(PROFILE) $(if $(LESSON),--lesson $(LESSON))

lab: $(STAMP)
	$(RUN) jupyterlab $(LAB_ARGS) notebooks/00_start_here.ipynb

test: $(STAMP)
	$(RUN) ruff check . && $(RUN) ruff format --check .
	$(RUN) $(PYTEST)

test-colab:
	$(PYTHON) -m venv .venv-colab
	$(COLAB) pip install $(subst constraints,constraints-colab,$(PIP_ARGS)) -e ".[dev]"
	$(COLAB) $(PYTEST)
	$(COLAB) pytest -q -m slow tests/platforms/test_colab.py

lessons: $(STAMP)
	$(RUN) $(if $(LESSON),pytest -q -k $(LESSON)_,$(PYTEST)) tests/lessons/test_notebooks.py

bench: $(STAMP) build/litgpt build/others
	COURSE_DEVICE=cpu $(RUN) maintenance.benchmarks

build/litgpt: maintenance/benchmarks/litgpt.txt
	rm -rf $@ && $(PYTHON) -m venv $@
	$@/bin/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $<
	@touch $@

build/others: maintenance/benchmarks/others.txt | $(STAMP)
	rm -rf $@ && $(RUN) pip install -q --no-deps --target $@ -r $<
	@touch $@

runs: $(STAMP)
	$(RUN) maintenance.runs $(LESSON)

readme: $(STAMP)
	$(RUN) maintenance.readme

links: export OLD = $(shell sed -n 's/^repository = "\(.*\)"/\1/p' pyproject.toml)
links:
	@perl -e 'exit $$ENV{REPO} !~ m#^[\w.-]+/[\w.-]+\z#' || { echo "usage: make links REPO=owner/name"; exit 2; }
	git grep -lF "$$OLD" | xargs perl -pi -e 's#\Q$$ENV{OLD}\E#$$ENV{REPO}#g'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + v + ": try make PYTHON=python3.12")'
	@echo "Installing into $(VENV); the first time downloads the packages and takes minutes."
	$(PYTHON) -m venv $(VENV) && $(RUN) pip install $(PIP_ARGS) -e ".[lessons,dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-colab build *.egg-info .pytest_cache .ruff_cache .hypothesis
