# make run, make test, make bench and the longer tests: each sets up what it needs, once, and prints
# the plain commands that it runs, so that they can be typed by hand too.

PYTHON ?= python3
MAKEFLAGS += --no-print-directory
MODEL = bin/chat-llama.bin
IN = . .venv/bin/activate &&
# two processes at once, each with a file's tests in their order; a crash is not tried again
WORKERS ?= 2
PYTEST = python3 -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0
SOURCES = CMakeLists.txt $(wildcard lib/*.[ch] lib/*/*.[ch] lib/*/*.cu lib/*/*.cuh)

.PHONY: run test test-long soak tokenizers arm64 cuda asan tsan fuzz bench
run: .venv/requirements build/built $(MODEL)
	$(IN) python3 run.py "Richard Feynman was a "

test: .venv/requirements-dev build/built
	$(IN) $(PYTEST)

# the random texts of the suite, 50 times as many for each vocabulary
tokenizers: .venv/requirements-dev build/built
	$(IN) python3 -m pytest tests/test_random_texts.py --texts 100000

# the passkey at lengths that take minutes; 1,000 openings and 10,000 texts that leave nothing
# behind, by the process's size and once more by LeakSanitizer
test-long: export LLAMA_TEST_LONG = 1
test-long: .venv/requirements-dev build/built
	$(IN) python3 -m pytest tests/test_passkey.py tests/test_memory.py
	$(MAKE) asan TESTS=tests/test_memory.py

# random use for TIME seconds, each answer against an engine without a history
soak: .venv/requirements-dev build/built
	$(IN) PYTHONPATH=. python3 tests/soak.py --time $(TIME)

# the suite's share of arm64 alone; says what it lacks, where it lacks a cross compiler or qemu
arm64: .venv/requirements-dev build/built
	$(IN) python3 -m pytest -rs tests/test_neon.py

# the suite's share of CUDA alone, on the CPU: kernels, whole models, and under AddressSanitizer and
# ThreadSanitizer, with planted faults that these must find (tests/cuda_on_cpu/)
cuda: .venv/requirements-dev build/built
	$(IN) python3 -m pytest tests/test_cuda.py tests/test_cuda_layers.py

# the suite, or TESTS of it, with gcc's sanitizers in the C code: of memory, leaks and undefined
# behaviour; of races. Python is not built with them: they are loaded before it, its own allocator
# is off, and what it leaks itself does not count
asan: SANITIZER = address
asan: RUNTIME = libasan.so
asan: MARKS = not limits_memory and not other_build
asan: PLUGIN = -p leaks
asan: ALSO = failing
asan: OPTIONS = PYTHONPATH=tests UBSAN_OPTIONS=print_stacktrace=1 \
  ASAN_OPTIONS=leak_check_at_exit=0:handle_sigbus=0:
tsan: SANITIZER = thread
tsan: RUNTIME = libtsan.so
tsan: MARKS = not limits_memory and not other_build and not forks
tsan: OPTIONS = TSAN_OPTIONS=ignore_noninstrumented_modules=1:handle_sigbus=0:
asan tsan: REPORT = $(CURDIR)/build/$(SANITIZER)/report
asan tsan: .venv/requirements-dev
	$(IN) CC=gcc cmake -S . -B build/$(SANITIZER) -DSANITIZER=$(SANITIZER)
	$(IN) cmake --build build/$(SANITIZER) --target llama $(ALSO) --parallel
	rm -f $(REPORT).*
	$(IN) LD_PRELOAD="$$(gcc -print-file-name=$(RUNTIME)) $$(gcc -print-file-name=libstdc++.so)" \
	  PYTHONMALLOC=malloc LLAMA_LIBRARY=$(CURDIR)/build/$(SANITIZER)/libllama.so \
	  $(OPTIONS)allocator_may_return_null=1:log_path=$(REPORT) \
	  python3 -m pytest --capture=sys $(PLUGIN) -m "$(MARKS)" $(TESTS) || { cat $(REPORT).*; exit 1; }
	! grep -hs -B9 -A9 $(CURDIR)/lib/ $(REPORT).*

# every reader of files and the sampler under libFuzzer, TIME seconds each, two at once, chance
# beginning anywhere or at SEED; wants clang
TIME ?= 60
SEED ?= 0
fuzz: .venv/fuzz build/fuzz/built
	$(IN) python3 tests/fuzz/run.py --time $(TIME) --seed $(SEED)

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
