# Every target works in a fresh clone: the virtual environment .venv is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Other releases of Triton, whose machine code the tests check too. There are wheels for Linux only.
ifeq ($(shell uname -s),Linux)
TRITONS := $(patsubst %,.triton/%/.ready,$(shell cat tests/bench/triton_releases.txt))
endif

.PHONY: demo test check census format bench newcomer clean

demo: $(READY)
	$(BIN)/ditq demo --out runs/demo

# One thread a process: two pytest workers on two cores, and tiny models gain nothing from more.
test: $(READY) $(TRITONS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Machine code of every kernel and architecture against its budget, with the installed Triton; then, with the others, of
# what changed since it was counted; then every launch of every op over a driver that does nothing. Needs no GPU.
census: $(READY) $(TRITONS)
	$(BIN)/ditq bench census --check
	for release in $(TRITONS:/.ready=); do PYTHONPATH=$$release $(BIN)/ditq bench census --check \
	    --known bench/results/census.csv --update-known || exit 1; done
	for target in 80 86 89 90 120; do $(BIN)/python -m ditq_bench.census.launched $$target || exit 1; done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/ditq bench kernels --out runs/bench

# What a newcomer meets: empty environment, wheel, every code block and wrong line, pages in a browser. Tens of minutes.
newcomer: $(READY)
	$(BIN)/python .ci/newcomer

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

.triton/%/.ready: $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-compile --target $(@D) triton==$*
	touch $@

clean:
	rm -rf $(VENV) .triton runs build *.egg-info
