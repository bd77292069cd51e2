# make run, make test, make bench and the longer tests: each sets up what it needs, once, and prints
# the plain commands that it runs, so that they can be typed by hand too.

PYTHON ?= python3
MAKEFLAGS += --no-print-directory
MODEL = bin/chat-llama.bin
IN = . .venv/bin/activate &&
SOURCES = CMakeLists.txt $(wildcard lib/*.[ch] lib/*/*.[ch] lib/*/*.cu lib/*/*.cuh)

.PHONY: run test test-long tokenizers arm64 fuzz bench
run: .venv/requirements build/built $(MODEL)
	$(IN) python3 run.py "Richard Feynman was a "

test: .venv/requirements-dev build/built
	$(IN) python3 -m pytest

# the random texts of the suite, 50 times as many for each vocabulary
tokenizers: .venv/requirements-dev build/built
	$(IN) python3 -m pytest tests/test_random_texts.py --texts 100000

# the passkey at lengths that take minutes
test-long: .venv/requirements-dev build/built
	$(IN) LLAMA_TEST_LONG=1 python3 -m pytest tests/test_passkey.py

# the suite's share of arm64 alone; says what it lacks, where it lacks a cross compiler or qemu
arm64: .venv/requirements-dev build/built
	$(IN) python3 -m pytest -rs tests/test_neon.py

# every reader of files and the sampler under libFuzzer, TIME seconds each, two at once; wants clang
TIME ?= 60
fuzz: .venv/fuzz build/fuzz/built
	$(IN) python3 tests/fuzz/run.py --time $(TIME)

bench: .venv/requirements build/built $(MODEL)
	$(IN) python3 -m llama.bench

# the last file that venv makes: where it stopped half-way, it runs again
.venv/bin/activate:
	@$(PYTHON) -c 'import llama' # says so if this Python is too old
	$(PYTHON) -m venv .venv

.venv/requirements: requirements.txt | .venv/bin/activate
	$(IN) pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/requirements-dev: requirements-dev.txt requirements.txt | .venv/bin/activate
	$(IN) pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/requirements

.venv/fuzz: .venv/requirements-dev
	$(IN) pip install --disable-pip-version-check atheris
	@touch $@

build/fuzz/built: $(SOURCES) $(wildcard tests/fuzz/*.c) | .venv/requirements
	$(IN) cmake -S . -B build/fuzz -DFUZZ=ON -DCMAKE_C_COMPILER=clang
	$(IN) cmake --build build/fuzz --parallel
	@touch $@

build/built: $(SOURCES) | .venv/requirements
	mkdir -p build
	$(IN) cd build && cmake .. && cmake --build . --parallel
	@touch $@

$(MODEL): | .venv/requirements
	$(IN) python3 export.py
