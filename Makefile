# All the work is in tools/bootstrap.py, which also runs without make
PYTHON ?= python3

help:
	@echo "make demo   train on bundled data and show what averaging does   (options: make demo ARGS=--help)"
	@echo "make test   run all tests, notebooks included                    (options: make test ARGS='-k schedule')"
	@echo "make lint   hold the limits of CONTRIBUTING.md: columns, lengths of functions and classes, ..."
	@echo "The first run installs everything into .venv. Another Python: PYTHON=python3.12 make test"

demo test lint:
	@"$(PYTHON)" tools/bootstrap.py $@ $(ARGS)

.PHONY: help demo test lint
