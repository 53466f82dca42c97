# Each target sets up .venv by itself. On Windows, CONTRIBUTING.md has the same commands without make.
PYTHON ?= python3
PROMPT ?= crying face
export PROMPT

BIN := .venv/bin
READY := .venv/.ready
PROJECTS := pyproject.toml codec/pyproject.toml $(wildcard adapters/*/pyproject.toml)

.PHONY: demo test lint bench docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py --prompt "$$PROMPT"

test: lint
	# NVIDIA's parts that can be tested without a GPU. A PyTorch for CUDA brings its own Triton.
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -c "import triton, nvidia.libnvcomp" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		triton==3.8.0 nvidia-libnvcomp-cu13==6.0.0.12
	$(BIN)/python tests/comfy/install.py
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	printf '%s\n' linux win32 darwin | xargs -P 3 -I{} $(BIN)/mypy --platform {} --cache-dir .mypy_cache/{}
	$(BIN)/lint-imports --no-cache

bench: $(READY)
	$(BIN)/python -m benchmarks.step

docs: $(READY)
	$(BIN)/python docs/_generate.py

clean:
	rm -rf .venv build codec/build adapters/*/build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): $(PROJECTS) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[dev]" -e codec -e adapters/flux2 -e adapters/klein -e adapters/ltx
	touch $@
