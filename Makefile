# make demo   the whole way on handwritten digits: tokenizer, pre-training, fine-tuning, a page to read
# make test   every test and check; what CI runs
# make check  ruff and mypy alone
# make bench  the digits' table; other results name their command in their first lines (not part of make test)
# make chaos  200 kills, 50 stops, full disks, damaged files, NaNs (4 to 10 min; make test does a few of each)
# make chaos-embed  200 kills of beit embed on 5,000 pictures (minutes)
# make soak   64 threads at one engine for a minute, by torch and by OpenVINO
# Each sets up .venv first. `make demo DEMO_ARGS=--fast` takes under a minute.

PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# What Python compiles at its first import is kept, whatever the shell says: to compile all that pip installs
# takes a minute.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check bench chaos chaos-embed soak clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/beit demo $(DEMO_ARGS)

# A process a core, one thread each: two that share threads wait for each other. Parts and commands apart: the
# second run begins with as little memory in use as a user's command does. The checks, which one core does, beside.
test: .venv/installed
	$(MAKE) --no-print-directory check & checking=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_TWO) --ignore tests/commands && \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_TWO) tests/commands; tested=$$?; \
	wait $$checking && exit $$tested

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/demo_seeds.py --out runs/demo_seeds

chaos: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

chaos-embed: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos_embed.py

soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_engine.py --seconds 60
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_engine.py --seconds 60 --runtime openvino

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[all,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
