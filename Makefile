# ckagent. `make demo` and `make test` are all a newcomer needs; both install what
# is missing on Debian 12 and say so first.

export PATH := $(PATH):/usr/local/go/bin
GO       ?= go
PREFIX   ?= /usr/local
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS  := -s -w -X main.version=$(VERSION)


.PHONY: build install test demo bench torture fuzz lint generate deps clean

build: deps
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

# The policies go to where alone they are run from.
install: build
	install -D -m 0755 bin/ckagent $(DESTDIR)$(PREFIX)/bin/ckagent
	install -D -m 0644 tools/install/ckagent.service $(DESTDIR)$(PREFIX)/lib/systemd/system/ckagent.service
	install -D -m 0644 docs/daemon.md $(DESTDIR)$(PREFIX)/share/doc/ckagent/daemon.md
	bin/ckagent policy install bin/ckagent-policy-* --policy-dir $(DESTDIR)$(PREFIX)/lib/ckagent/policies

demo: build
	@echo "everything else goes to ./demo and ./.cache"
	./bin/ckagent demo --dir demo

# Everything, as root: unit tests, tests on real QEMU guests, the race detector on
# what is concurrent, the lint, and that the committed eBPF objects are current.
test: build lint
	.ci/test

bench: build
	$(GO) run ./tools/bench/cmd/bench

torture: build
	.ci/torture

fuzz: deps
	.ci/fuzz

lint: deps
	@test -z "$$(gofmt -l agent bpf cmd plugins restore tools uffd 2>/dev/null)" || { gofmt -l agent bpf cmd plugins restore tools uffd; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

generate: deps
	$(GO) generate ./bpf/... ./plugins/... ./agent/api/...

deps:
	@tools/install/install.sh

clean:
	rm -rf bin demo
