# make demo | test | test-slurm | demo-slurm | chaos | lint: each sets up .venv from constraints.txt when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test test-slurm demo-slurm chaos lint clean

$(STAMP): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sfa_dist needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,torchcodec]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m sfa_dist.tools.demo_data --out data/demo
	$(BIN)/deepspeed --num_accelerators 2 sfa_dist/train.py --recipe recipes/demo.yaml

# A test whose processes stand still is run once more, and told in the summary (R) and among the warnings.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -raR --reruns 1 --only-rerun 'did not end in' $(PYTEST_OPTIONS)

# A real Slurm of four nodes in network namespaces of this machine; nothing of it is left afterwards.
test-slurm: $(STAMP)
	tests/slurm/cluster.sh install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slurm -raR --reruns 1 --only-rerun 'did not (end|come) in' $(PYTEST_OPTIONS) tests/slurm

# The demo to its accuracy under that Slurm, on 2 and 4 nodes under both engines: 40 CPU-minutes.
demo-slurm: $(STAMP)
	tests/slurm/cluster.sh install
	$(BIN)/python -m pytest -s -m slurm_demo tests/slurm

chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos
	$(BIN)/sfa chaos --rounds 50 --thorough

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
