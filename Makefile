# make demo   train a small backbone and AdaFuse adapters on this machine's CPU, decode with both, show who used which expert
# make test   the quick tests       make test-slow   the others       make test-all   both, in less time than one after the other
# make check   lint, format and types        make goldens   compare with transformers and PEFT
#
# Each makes .venv first, with Python 3.12 or newer. EXTRAS=dev,cuda installs JAX for NVIDIA GPUs. Bytecode is compiled when a
# module is first imported: that of all the packages would take half of an installation's time.

EXTRAS ?= dev
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3 python \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv/bin/python

GOLDENS_VENV := .venv-torch/requirements.txt

.PHONY: demo test test-slow test-all check format goldens clean

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.12 or newer on PATH or in pyenv's versions;" \
		"install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -qq --no-compile --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

$(GOLDENS_VENV): tests/goldens/requirements.txt
	tests/goldens/environment.sh

demo: .venv/installed
	$(VENV) -m examples.skills

# Each worker takes a run of neighbouring tests, which share fixtures and compiled programs. Huge pages, where the C library
# and the kernel have them: a real model's step on the CPU spends half of its time on faults of new pages otherwise.
PYTEST := JAX_PLATFORMS=cpu GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(VENV) -m pytest -q -n 2 --dist worksteal --durations=10

test: .venv/installed
	$(PYTEST) -m 'not slow'

test-slow: .venv/installed
	$(PYTEST) -m slow

test-all: .venv/installed
	$(PYTEST)

check: .venv/installed
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

format: .venv/installed
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

goldens: .venv/installed $(GOLDENS_VENV)
	tests/goldens/check.sh

clean:
	rm -rf .venv .venv-torch demo
