# make demo    train a whole system on bundled digits and look at it (four to five minutes on two cores)
# make test    install what the tests need and run them
# make test-pythons  the same under each newer Python that is found: python3.12, python3.13 …
# make lint    formatting, lint and types
# make fuzz    damage inputs of every reader for ten minutes; finds are saved in out/fuzz
PYTHON ?= python3.11
PIP = .venv/bin/python -m pip install --quiet -c constraints.txt
# Two processes with a file of tests each: a test computes on one thread, and a process takes 1 to 2 GB.
WORKERS ?= 2

.PHONY: demo test test-pythons lint fuzz

# A stamp a set of extras: pip runs again only when the dependencies change. The install is editable, so that what
# runs is what stands in src/.
.venv/demo.stamp: pyproject.toml constraints.txt | .venv
	$(PIP) -e .
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv
	$(PIP) -e '.[test]'
	touch $@ .venv/demo.stamp

.venv/dev.stamp: pyproject.toml constraints.txt | .venv
	$(PIP) -e '.[dev]'
	touch $@ .venv/test.stamp .venv/demo.stamp

.venv:
	$(PYTHON) -m venv .venv

demo: .venv/demo.stamp
	.venv/bin/smalti train demo

test: .venv/test.stamp
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

# A name on PATH need not run: a version manager's stand-in refuses where another version is chosen.
test-pythons:
	@found=; for minor in 12 13 14 15; do \
	  python=python3.$$minor; venv=.venv/of-$$python; \
	  if ! $$python -c "" 2>/dev/null; then echo "SKIPPED: $$python is not on PATH, or does not run"; continue; fi; \
	  found=1; echo "$$python:"; \
	  [ -x $$venv/bin/python ] || $$python -m venv $$venv || exit 1; \
	  $$venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test]' || exit 1; \
	  $$venv/bin/python -m pytest -n $(WORKERS) --dist loadfile || exit 1; \
	done; [ "$$found" ] || echo "SKIPPED: there is no newer Python"

lint: .venv/dev.stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

fuzz: .venv/test.stamp
	.venv/bin/python tests/fuzz/run.py --seconds 600
