# Two commands matter: `make demo` and `make test`. Both do all set-up on a fresh Debian or Ubuntu and are quick the second time.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# Node 24 of ours first, so that npm and everything below run under it whatever the system has.
export PATH := $(CURDIR)/.cache/node/bin:$(CURDIR)/node_modules/.bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

# A bare CI job may come without one, and the caches live there.
ifndef HOME
export HOME := $(shell getent passwd $$(id -u) | cut -d: -f6)
endif

NODE := .cache/node/bin/node
MODULES := node_modules/.package-lock.json
BUNDLE := dist/.built
SOURCES := images/bundle.ts images/bpf.ts images/handover.js images/absent.cjs $(shell find appliance -name '*.ts' -o -name '*.[ch]' 2>/dev/null)
HOST := tests/lab/host.sh
# Network namespaces and containers need root; with-engine also brings a Docker engine for as long as the command runs.
AS_ROOT := $(HOST) as-root
WITH_ENGINE := $(HOST) as-root tests/lab/engine.sh run --

help: ## this text
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 24

build: $(BUNDLE) ## the program, dist/detour.js, and what the images hold, dist/image

check: $(MODULES) ## lint, types, unit and loop tests; needs no privileges
	@node tests/lab/suite.ts lint types unit loop

test: packages packages-vm build kubernetes ## every test; with CI=true all of them and nothing skipped
	@$(WITH_ENGINE) tests/lab/all.sh test

test-netns: packages build ## tests in network namespaces of their own: real nft, real Multipath TCP
	@$(AS_ROOT) node tests/lab/suite.ts netns

test-vm: packages packages-vm build ## tests on the kernel of Debian 13, in a VM: delay, loss, WireGuard
	@$(AS_ROOT) node tests/lab/suite.ts vm

test-containers: packages build ## tests with the images
	@$(WITH_ENGINE) tests/lab/all.sh test-containers

test-k8s: packages build kubernetes ## tests in a real Kubernetes cluster; the first time brings it, in some minutes
	@$(WITH_ENGINE) tests/lab/all.sh test-k8s

images: packages build ## detour-router:dev and detour-client:dev
	@$(WITH_ENGINE) tests/lab/all.sh images

demo: packages build ## a transfer over two paths that loses the direct one; writes out/demo
	@$(WITH_ENGINE) tests/lab/all.sh demo

bench: packages packages-bench build ## measures what is promised, in ten minutes (FULL=1: all of it, an hour); writes out/bench
	@$(AS_ROOT) node tests/bench/run.ts $(if $(FULL),--full)

lab: packages build ## lists experiments; SCENARIO=NAME plays one and writes out/lab/NAME (TRIALS=3, WAYS=tcp,nat)
	@$(AS_ROOT) node tests/lab/lab.ts $(SCENARIO) $(if $(TRIALS),--trials $(TRIALS)) $(if $(WAYS),--ways $(WAYS))

clean: ## removes what was built (dist, out); `make clean-all` also what was fetched
	rm -rf dist out

clean-all: clean ## ... node_modules, Node, the engine's store, the base image, the VM's kernel and Kubernetes
	@$(AS_ROOT) tests/lab/engine.sh stop --purge
	rm -rf node_modules .cache
	$(AS_ROOT) rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/detour"

.PHONY: help build check test test-netns test-vm test-containers test-k8s kubernetes images demo bench lab clean clean-all packages packages-vm packages-bench tools

# Checks for commands, so it costs nothing when all are there.
packages:
	@$(HOST) packages build lab docker

packages-vm:
	@$(HOST) packages vm

packages-bench:
	@$(HOST) packages bench

# The programs of test clusters: built once, kept in the cache.
kubernetes: packages
	@$(HOST) packages cluster
	@$(AS_ROOT) tests/lab/cluster.sh build >/dev/null

tools:
	@$(HOST) packages build

$(NODE): package-lock.json $(HOST)
	@$(HOST) node .cache/node
	@touch -h $@

# npm writes this file last, and it names what is installed.
$(MODULES): package-lock.json | $(NODE)
	@echo "setup: installing the npm packages of the lock file into node_modules" >&2
	@npm ci --no-progress --loglevel=error
	@touch $@

$(BUNDLE): $(MODULES) $(SOURCES) package.json | tools
	@echo "build: dist/detour.js" >&2
	@node images/bundle.ts
	@touch $@
