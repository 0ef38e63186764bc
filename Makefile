# The five commands that a contributor needs. `make` lists them.
.PHONY: help install test slow check ci
help:     ## list the commands
	@grep -E '^[a-z]+: *##' Makefile | sed -E 's/: *## /\t/'
install:  ## install the package, its tests and its checks into the current environment
	pip install -c constraints.txt -e '.[dev]'
test:     ## run the default tests, with their coverage
	pytest --cov=heterodox --cov-report=term:skip-covered
slow:     ## run the tests that are too long for every change
	pytest -m slow -n 0
check:    ## check style, types and import contracts
	ruff check && ruff format --check && pyrefly check && lint-imports
ci:       ## do all of it in a fresh clone of the last commit
	bash .ci/run
