# Kubernest. `make help` lists what there is to do. Caches live outside the checkout, keyed by content.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export KUBERNEST_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kubernest
export CARGO_TARGET_DIR ?= $(KUBERNEST_CACHE)/target
export PATH := $(KUBERNEST_CACHE)/tools/bin:$(PATH)
export CARGO_TERM_COLOR ?= never

# Kubernetes versions that node images are built of. The test bed itself always runs v1.35.4.
VERSIONS ?= v1.35.4 v1.34.4
COMPONENTS := $(sort kubernetes-v1.35.4 $(addprefix kubernetes-,$(VERSIONS))) etcd containerd multus coredns flannel helm
BINARIES := kubernest-operator kubernest-api kubernest-ingress kubernest-node kubernest-launcher kubernest-guest
step := tests/tools/step

.PHONY: help
help: ## Show this
	@echo 'usage: make TARGET'; echo
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'
	@echo; echo 'Everything that is built is kept in $$KUBERNEST_CACHE (default ~/.cache/kubernest).'

.PHONY: deps
deps: ## Install what is needed, by package name (root)
	@$(step) deps tests/tools/deps
	@tests/tools/own-target

.PHONY: components
components: deps ## Build the upstream parts (Kubernetes, etcd, containerd …)
	@$(step) components vm-images/components/build $(COMPONENTS)

.PHONY: binaries
binaries: deps ## Build Kubernest's own programs
	@# The test bed's with them: apart, cargo would build their common dependencies twice.
	@$(step) binaries cargo build --release --locked $(addprefix -p ,$(BINARIES) kubernest-testbed)
	@# The CNI plugin runs on hosts of any C library, so it brings its own.
	@$(step) cni-plugin cargo rustc --release --locked -p kubernest-cni -- -C target-feature=+crt-static

.PHONY: testbed
testbed: components binaries ## Build all that the test bed needs
	@:

.PHONY: images
images: binaries components ## Build the container images and node images
	@$(step) images vm-images/build-images
	@$(step) node-images vm-images/node-image/build --guest $(CARGO_TARGET_DIR)/release/kubernest-guest $(VERSIONS)

.PHONY: demo
demo: ## Raise an outer cluster, install Kubernest, make a tenant cluster, show how to use both
	@tests/tools/demo

.PHONY: down
down: ## Take the demo's clusters down; leaves nothing behind, and names other test beds that were kept
	@tests/tools/down

.PHONY: generate
generate: deps ## Write generated files (CRDs, chart copies, list of components)
	@tests/tools/generate write

.PHONY: check
check: deps ## Formatting, lints, licences and advisories, generated files
	@$(step) fmt cargo fmt --all --check
	@$(step) shellcheck tests/tools/shellcheck
	@$(step) clippy cargo clippy --locked --workspace --all-targets -- -D warnings
	@$(step) deny cargo deny --log-level error check bans licenses sources
	@$(step) generated tests/tools/generate check

.PHONY: unit
unit: components ## Unit, architecture and integration tests (the real API server, HAProxy, netlink, libvirt)
	@$(step) tests cargo nextest run --locked --workspace -E 'not test(/e2e_/)'

.PHONY: e2e
e2e: images testbed ## End-to-end tests on a real outer cluster of their own
	@$(step) e2e tests/tools/with-testbed e2e tests/tools/e2e

.PHONY: story
story: images testbed ## End-to-end stories whose name has NAME, all without; the cluster stays for the next one
	@KEEP=1 tests/tools/with-testbed story cargo nextest run --locked --profile e2e -p kubernest-e2e --no-capture \
		-E 'binary(/$(NAME)/) or test(/$(NAME)/)'

.PHONY: bench
bench: images testbed ## Measure time, memory and writes next to the same work without Kubernest
	@$(step) bench-build cargo build --release --locked -p kubernest-bench
	@$(step) bench tests/tools/bench

.PHONY: test
test: ## Every check and test; what CI runs
	@rm -f $(KUBERNEST_CACHE)/steps
	@$(MAKE) --no-print-directory deps components check unit e2e
	@$(step) --report

