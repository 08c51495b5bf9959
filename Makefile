# The verbs that someone types daily. `make demo` and `make test` do their own
# set-up and need root (namespaces, TAP devices, packet sockets).

GO      ?= go
DESTDIR ?=
PREFIX  ?= /usr/local
SBIN     = $(DESTDIR)$(PREFIX)/sbin
LIB      = $(DESTDIR)$(PREFIX)/lib/missiu
MAN5     = $(DESTDIR)$(PREFIX)/share/man/man5
MAN8     = $(DESTDIR)$(PREFIX)/share/man/man8
UNITS    = $(DESTDIR)$(PREFIX)/lib/systemd/system

# The only version of the linter; `go run` fetches it once.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Seconds for each fuzz target.
FUZZTIME ?= 20s

# Flags of test/bench, such as --systems or --works.
BENCHFLAGS ?=

.PHONY: missiu setup test unit e2e demo demo-tun demo-inline lint race fuzz bench bench-quick bench-ike microbench lab install clean

missiu:
	@mkdir -p bin
	$(GO) build -trimpath -o bin/missiu ./cmd/missiu
	$(GO) build -trimpath -o bin/ike ./cmd/ike
	$(GO) build -trimpath -o bin/loadConfig ./cmd/loadconfig
	@ln -sf loadConfig bin/loadconfig
	@if command -v $(CC) >/dev/null; then $(MAKE) --no-print-directory bin/pfkey-preload.so; fi

# For key daemons of others; the rest needs no C compiler.
bin/pfkey-preload.so: scripts/pfkey-preload/pfkey-preload.c
	@mkdir -p bin
	$(CC) -std=gnu11 -O2 -Wall -Wextra -Werror -fPIC -fvisibility=hidden -shared -o $@ $< -ldl

setup:
	@scripts/setup

test: setup
	$(GO) vet ./...
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory e2e

# Everything that needs no root.
unit:
	@GO=$(GO) scripts/test -timeout 10m $$($(GO) list ./... | grep -v /test/e2e)

# Whole systems in network namespaces, against independent peers; needs root.
e2e: missiu
	@GO=$(GO) scripts/test -count=1 -timeout 75m -p 1 -v ./test/e2e/...

demo: setup missiu
	@scripts/demo

# Two gateways with a TUN each.
demo-tun: setup missiu
	@scripts/demo tun

# Two hosts with missiu between interface and stack.
demo-inline: setup missiu
	@scripts/demo inline

# Two namespaces with the product running, to play with; `scripts/lab down` ends it.
lab: setup missiu
	@scripts/lab up

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo 'lint: gofmt the files above' >&2; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

race:
	$(GO) test -race -timeout 20m $$($(GO) list ./... | grep -v /test/e2e)

fuzz:
	@scripts/fuzz $(FUZZTIME)

# missiu beside other tunnels, into results/; needs root and some 15 minutes. The second one takes
# less than three minutes.
bench:
	@scripts/setup --bench
	$(GO) build -o bin/bench ./test/bench
	bin/bench $(BENCHFLAGS)

bench-quick:
	@$(MAKE) --no-print-directory bench BENCHFLAGS='--quick $(BENCHFLAGS)'

# ike beside charon as responders to many peers; the number is that of the peers. Needs root.
bench-ike: setup
	BENCH_IKE=$${BENCH_IKE:-10000} $(GO) test -count=1 -v -timeout 15m -run '^TestIKELoad$$' ./test/e2e

microbench:
	$(GO) test -run '^$$' -bench . -benchmem $$($(GO) list ./... | grep -v /test/e2e)

install: missiu
	install -d $(SBIN) $(UNITS) $(MAN5) $(MAN8) $(DESTDIR)/etc/missiu
	install -m 755 bin/missiu bin/ike bin/loadConfig $(SBIN)
	ln -sf loadConfig $(SBIN)/loadconfig
	install -m 644 cmd/*/*.5 $(MAN5)
	install -m 644 cmd/*/*.8 scripts/pfkey-preload/*.8 $(MAN8)
	if [ -e bin/pfkey-preload.so ]; then \
		install -d $(LIB) && install -m 755 bin/pfkey-preload.so $(LIB) || exit 1; \
	fi
	for u in missiu@.service ike.service; do \
		sed 's,@SBIN@,$(PREFIX)/sbin,g' systemd/$$u >$(UNITS)/$$u && chmod 644 $(UNITS)/$$u || exit 1; \
	done

clean:
	rm -rf bin
