# Each target makes .venv when it isn't there. Needs Python 3.11+ with pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PROCESSES ?= 2

.PHONY: install demo test check bench leaderboard ablations toyworld compressor clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kvpack demo --output demo-output

test: $(STAMP)
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python -m benchmarks

leaderboard: $(STAMP)
	$(BIN)/python -m benchmarks.leaderboard $(if $(SMOKE),--smoke,--processes $(PROCESSES))
	$(if $(SMOKE),,$(BIN)/python -m benchmarks.leaderboard --seconds 600 --subjects packforcing --processes $(PROCESSES))

ablations: $(STAMP)
	$(BIN)/python -m benchmarks.ablations $(if $(SMOKE),--smoke,--processes $(PROCESSES))

toyworld: $(STAMP)
	$(BIN)/python -m benchmarks.toyworld $(if $(SMOKE),--smoke)

TOY := kvpack/data/toyworld
TRAIN := --model $(TOY) --data runs/compressor/clips --base-model kvpack-toyworld --max-sequence-length 16 --cpu \
	--frames 32 --batch 8 --steps 1300 --learning-rate 2e-3 --schedule cosine --warmup 50 --denoising-steps 6

# An hour and a half: clips of 8 seconds, of which the last four chunks attend one to four compressed blocks.
compressor: $(STAMP)
	test -e runs/compressor/clips/latents-1.txt || $(BIN)/python -m benchmarks.toyworld.encode \
		--vae $(TOY)/vae --out runs/compressor/clips --clips 1600 --frames 32 --seed 30000000
	$(BIN)/kvpack train-compressor $(TRAIN) --branches dual --output runs/compressor/dual
	$(BIN)/kvpack train-compressor $(TRAIN) --branches hr --output runs/compressor/hr
	$(BIN)/python -m benchmarks.compressors --trained runs/compressor/dual runs/compressor/hr

clean:
	rm -rf .venv build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
