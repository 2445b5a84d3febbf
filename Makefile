# Two commands: `make demo` and `make test`. Everything they need is installed into .venv from requirements.lock.
PYTHON ?= python3
SEED ?= 42
BIN := .venv/bin

.PHONY: help demo test tests test-docs test-serving test-faults test-faults-long check lint types install bench bench-data \
	bench-growth bench-merge bench-scaling bench-peers test-gpu test-cluster bench-gpu gpu-dry-run \
	benchmark-fashion-mnist benchmark-easy-vqa benchmark-charts benchmark-emoji benchmark-documents \
	mutation coverage browser lock readmes docs compiled dist base-image images push image-index registry-is-named \
	demo-containers clean

help:  ## list all targets
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 34

demo: install  ## train a tiny MiniCPM-V to read digits: the whole pipeline on this machine (SEED=n for another start)
	@$(BIN)/minicpmv-finetune demo --seed $(SEED)

# Chromium is installed beside the packages, and types are checked while the tests run: mypy alone would leave the other
# core idle for more than a minute.
test:  ## lint, type check and the tests
	@$(MAKE) --no-print-directory -j 2 install browser
	@$(MAKE) --no-print-directory -j 2 lint types tests

tests:
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not faults_only and not docs_only"

test-docs: install browser  ## what the pages show, the examples, and what the benchmarks name
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/docs tests/examples tests/benchmarks

test-serving: install browser build/serving-venv/installed  ## `serve` and `chat` with the libraries of their extras
	build/serving-venv/bin/python -m pytest tests/serving tests/cli/test_serving.py

# With the locked packages. Gradio is not one of them: it needs an older Pillow, and `make test` would install 130 MB for
# one page.
build/serving-venv/installed: .venv/installed
	$(PYTHON) -m venv build/serving-venv
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(build/serving-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/locked.pth
	build/serving-venv/bin/python -m pip install -q --disable-pip-version-check --no-compile gradio==6.31.0 openai==3.57.0
	touch $@

test-faults: install browser  ## kill each step at three moments, and fuzz each reader with 2,000 inputs
	FAULT_MOMENTS=3 $(BIN)/python -m pytest -n 2 --dist worksteal -m faults_only
	FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults/test_fuzz.py

test-faults-long: install browser  ## the same with twenty moments and 12,500 inputs
	FAULT_MOMENTS=20 FUZZ_EXAMPLES=12500 $(BIN)/python -m pytest -n 2 --timeout 7200 tests/faults

test-gpu: install  ## on a machine with a GPU: the claims of docs/gpu.md that a tiny model can show
	$(BIN)/python -m pytest -n 8 tests/gpu

bench-gpu: install  ## on a machine with a GPU: tokens per second, MFU and memory at the published sizes
	$(BIN)/python benchmarks/gpu.py

gpu-dry-run: install  ## each published model and recipe on a GPU that computes nothing: devices, waits and memory
	$(BIN)/python benchmarks/gpu_dry_run.py

test-cluster: install  ## against a real Kubeflow Pipelines: docs/testing-on-a-cluster.md (SMOKE=1 for the short part)
	CLUSTER_TESTS=1 $(BIN)/python -m pytest --timeout 3600 tests/cluster_real$(if $(SMOKE),/test_smoke.py)

check: install lint types  ## lint and type check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy minicpmv_finetune tests benchmarks images docs examples

install: .venv/installed  ## install the locked packages and this project into .venv

# -qq hides pip's warnings about mirrors; errors are still shown. All files are compiled, by all cores instead of pip's
# one: where PYTHONDONTWRITEBYTECODE is set, as in many container images, each of the hundreds of processes of demo and
# tests would otherwise compile torch and transformers for itself, which takes longer than to import them. The last
# command ignores the few files that are templates and no Python.
.venv/installed: requirements.lock pyproject.toml
	@echo "Installing the locked packages into .venv (about 7 GB; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

bench: install  ## time training steps with and without each speed-up
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

bench-scaling: install  ## time how training grows with samples, slices and length
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --only scaling

bench-peers: install build/peers/ms-swift/bin/swift build/peers/trl/installed  ## time ms-swift and TRL on the same data
	$(BIN)/python benchmarks/peers.py --swift build/peers/ms-swift/bin/swift --trl build/peers/trl/bin/python

build/peers/ms-swift/bin/swift:
	$(PYTHON) -m venv build/peers/ms-swift
	build/peers/ms-swift/bin/python -m pip install -q --disable-pip-version-check ms-swift==4.6.0 torchvision

build/peers/trl/installed:
	$(PYTHON) -m venv build/peers/trl
	build/peers/trl/bin/python -m pip install -q --disable-pip-version-check trl==1.16.0 peft torchvision pillow \
		transformers==$$(sed -n 's/^transformers==\([^ ]*\).*/\1/p' requirements.lock)
	touch $@

bench-merge: install  ## time the merge of a 4 GB model against copying it
	$(BIN)/python benchmarks/merge.py

bench-data: install  ## time preparing, reading and moving data against other tools
	$(BIN)/python benchmarks/data.py

bench-growth: install  ## time and memory of the steps with 10,000 and 100,000 samples, or SAMPLES="…"
	$(BIN)/python benchmarks/growth.py --samples $(or $(SAMPLES),10000 100000)

benchmark-fashion-mnist: install  ## on clothes in ten classes, Debian's dataset-fashion-mnist
	$(BIN)/python benchmarks/on_public_data.py fashion-mnist --seed $(SEED)

benchmark-easy-vqa: install  ## on shapes and colors, PyPI's easy-vqa
	$(BIN)/python benchmarks/on_public_data.py easy-vqa --seed $(SEED)

benchmark-charts: install  ## on charts of PyPI's vega-datasets
	$(BIN)/python benchmarks/on_public_data.py charts --seed $(SEED)

benchmark-emoji: install  ## on names and groups of npm's openmoji
	$(BIN)/python benchmarks/on_public_data.py emoji --seed $(SEED)

benchmark-documents: install  ## on receipts and tables in four languages, drawn with Debian's fonts
	$(BIN)/python benchmarks/on_public_data.py documents --seed $(SEED)

mutation: install  ## mutation test of six files, 1,095 mutants (an hour)
	OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/mutation.py

# Outside .venv, so that the locked packages stay as they are; processes that a test starts find it by PYTHONPATH.
coverage: export PYTHONPATH := $(CURDIR)/build/coverage
coverage: install browser build/coverage/sitecustomize.py  ## report lines and branches that no test reaches, started processes included
	rm -rf build/coverage/data && mkdir build/coverage/data
	$(BIN)/python -m coverage run -m pytest -n 2 --dist worksteal -m "not faults_only"
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

build/coverage/sitecustomize.py:
	$(BIN)/python -m pip install -q --disable-pip-version-check --target build/coverage coverage==7.17.4
	echo "import coverage; coverage.process_startup()" > $@

browser:  ## install Chromium, in which tests open the reports
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; }

lock:  ## resolve the newest versions and write requirements.lock
	$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install -qq pip-tools
	build/lock/bin/pip-compile -q --extra dev --generate-hashes --allow-unsafe --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --strip-extras \
		--output-file requirements.lock pyproject.toml

readmes: install  ## write the README of each step from its component, and the tables of environment variables, inputs and recipes
	$(BIN)/python docs/component_readmes.py
	$(BIN)/python docs/environment_table.py
	$(BIN)/python docs/inputs_table.py
	$(BIN)/python docs/recipes_table.py
	$(BIN)/python docs/training_flags.py

# The site needs no torch: the API reference is read from the source, not imported.
docs: build/docs-venv/installed  ## build the documentation site into build/site; a warning ends the build
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict

build/docs-venv/installed: Makefile
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install -q --disable-pip-version-check mkdocs==1.6.1 mkdocs-material==9.8.2 \
		mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 griffelib==2.4.1
	touch $@

COMPILED := minicpmv_finetune/pipelines/compiled
MLFLOW := minicpmv_finetune/kubeflow/manifests/mlflow.yaml
PROFILES := $(patsubst k8s/profiles/%.yaml,%,$(wildcard k8s/profiles/*.yaml))

compiled: install  ## compile both pipelines for each profile into minicpmv_finetune/pipelines/compiled
	for profile in $(PROFILES); do for pipeline in finetune retrain; do \
		name=$$profile; test $$pipeline = finetune || name=$$profile.$$pipeline; \
		options="--pipeline $$pipeline --profile k8s/profiles/$$profile.yaml"; \
		$(BIN)/minicpmv-finetune compile $(COMPILED)/$$name.yaml $$options && \
		$(BIN)/minicpmv-finetune compile $(COMPILED)/$$name.objects.yaml --objects $$options || exit 1; \
	done; done
	{ sed 1q $(MLFLOW); $(BIN)/kubectl kustomize k8s/stock; } > build/mlflow.yaml && cp build/mlflow.yaml $(MLFLOW)

dist:  ## build the source distribution and the wheel into dist
	rm -rf dist
	test -x build/dist-venv/bin/pyproject-build || \
		{ $(PYTHON) -m venv build/dist-venv && build/dist-venv/bin/python -m pip install -qq build==1.6.1; }
	build/dist-venv/bin/python -m build --outdir dist .

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
IMAGES := data trainer

# Its tag is the release of Debian, so that another release is another image, and one that is there is built once.
BASE := $(shell cat images/base)
base-image:  ## build the base image that images/base names, from Debian's packages (as root)
	rm -rf build/base && mkdir -p build
	debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates $(lastword $(subst :, ,$(BASE))) build/base
	tar -C build/base -c . | podman import - $(BASE) && rm -rf build/base

images: install $(if $(filter push,$(MAKECMDGOALS)),registry-is-named)  ## build the container images, with their software bills of materials in build/images
	rm -rf build/lib build/images/*.whl && mkdir -p build/images
	podman image exists $(BASE) || $(MAKE) base-image
	$(BIN)/python -m pip wheel -qq --no-deps --wheel-dir build/images .
	test -x build/sbom/bin/cyclonedx-py || \
		{ $(PYTHON) -m venv build/sbom && build/sbom/bin/python -m pip install -qq cyclonedx-bom; }
	for image in $(IMAGES); do \
		$(BIN)/python images/requirements.py $$image > build/images/$$image.txt && \
		build/sbom/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
			--output-file build/images/$$image.cdx.json build/images/$$image.txt && \
		buildah build --layers --isolation chroot $(BUILD_OPTIONS) --file images/Dockerfile \
			--build-arg BASE=$$(podman image inspect --format '{{.Id}}' $(BASE)) \
			--build-arg VARIANT=$$image --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
			--tag minicpmv-finetune/$$image:$(VERSION) . || exit 1; \
	done
	for image in $(IMAGES); do podman run --rm minicpmv-finetune/$$image:$(VERSION) || exit 1; done

# `make images push REGISTRY=…` in one call: build, then push. Each machine builds for its own architecture; a TAG with
# the architecture's name, and image-index afterwards, make one image of several.
TAG ?= $(VERSION)
ARCHITECTURES ?= amd64 arm64
push: registry-is-named $(if $(filter images,$(MAKECMDGOALS)),images)  ## push the container images to REGISTRY, and write it into k8s/components/images
	for image in $(IMAGES); do \
		podman push minicpmv-finetune/$$image:$(VERSION) docker://$(REGISTRY)/$$image:$(TAG) || exit 1; \
	done
	sed -i 's|newName: .*/\([a-z]*\)$$|newName: $(REGISTRY)/\1|' k8s/components/images/kustomization.yaml
	@echo "Manifests name $(REGISTRY) now; for pipelines: export MINICPMV_FINETUNE_REGISTRY=$(REGISTRY), or --registry"

image-index: registry-is-named  ## make one image of those that were pushed with TAG=VERSION-ARCHITECTURE
	for image in $(IMAGES); do \
		podman manifest create --amend $(REGISTRY)/$$image:$(VERSION) \
			$(foreach architecture,$(ARCHITECTURES),docker://$(REGISTRY)/$$image:$(VERSION)-$(architecture)) && \
		podman manifest push --all $(REGISTRY)/$$image:$(VERSION) docker://$(REGISTRY)/$$image:$(VERSION) || exit 1; \
	done

registry-is-named:
	@test -n "$(REGISTRY)" || { echo "REGISTRY is missing: make images push REGISTRY=registry.example.com/team" >&2; exit 2; }

demo-containers: install  ## run the demonstration in the container images, with artifacts on an S3 server
	$(BIN)/python images/demo_containers.py build/demo-containers

clean:  ## remove what was built
	rm -rf build dist .venv *.egg-info
