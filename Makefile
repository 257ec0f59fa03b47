# Each target makes .venv when it isn't there. Needs Python 3.11+ with pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PROCESSES ?= 2

.PHONY: install demo test test-oldest check docs pictures bench gpu leaderboard ablations toyworld compressor clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kvpack demo --output demo-output

test: $(STAMP)
	$(BIN)/python -m pytest -m "" -n $(PROCESSES) --dist worksteal

# With the oldest versions that pyproject.toml allows; of torch that is a build of several gigabytes.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	.venv-oldest/bin/python -m pytest -m "" -n $(PROCESSES) --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(STAMP)
	$(BIN)/python -m benchmarks.pictures

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# At most eight minutes on a card; writes runs/gpu.json to send back. Without a card: python -m benchmarks.gpu --tiny
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

leaderboard: $(STAMP)
	$(BIN)/python -m benchmarks.leaderboard $(if $(SMOKE),--smoke,--processes $(PROCESSES))
	$(if $(SMOKE),,$(BIN)/python -m benchmarks.leaderboard --seconds 600 --subjects packforcing --processes $(PROCESSES))

ablations: $(STAMP)
	$(BIN)/python -m benchmarks.ablations $(if $(SMOKE),--smoke,--processes $(PROCESSES))

toyworld: $(STAMP)
	$(BIN)/python -m benchmarks.toyworld $(if $(SMOKE),--smoke)

TOY := kvpack/data/toyworld
CLIPS := runs/compressor/clips
ENCODE := $(BIN)/python -m benchmarks.toyworld.encode --vae $(TOY)/vae
TRAIN := train-compressor --model $(TOY) --base-model kvpack-toyworld --max-sequence-length 16 --cpu --save-every 50 \
	--learning-rate 2e-3 --schedule cosine --stack packforcing

# What ships, on clips of 20 seconds, whose chunks attend one to sixteen compressed blocks, as in a long video: 70 minutes
# on two cores. Then the learned branch alone, on clips of 8 seconds, with up to four blocks.
compressor: $(STAMP)
	test -e $(CLIPS)-80/latents-1.txt || $(ENCODE) --out $(CLIPS)-80 --clips 800 --frames 80 --seed 50000000
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node 2 -m kvpack $(TRAIN) \
		--data $(CLIPS)-80 --frames 80 --batch 4 --chunks 4 --steps 800 --warmup 30 --denoising-steps 3 \
		--branches dual --output runs/compressor/dual
	test -e $(CLIPS)/latents-1.txt || $(ENCODE) --out $(CLIPS) --clips 1600 --frames 32 --seed 30000000
	$(BIN)/kvpack $(TRAIN) --data $(CLIPS) --frames 32 --batch 8 --steps 1300 --warmup 50 --denoising-steps 6 \
		--branches hr --output runs/compressor/hr
	$(BIN)/python -m benchmarks.compressors --trained runs/compressor/hr runs/compressor/dual

clean:
	rm -rf .venv build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
