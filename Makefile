# Everything is one line away; `make help` lists it.

GO       ?= go
PREFIX   ?= /usr/local
BINDIR   ?= $(PREFIX)/bin
SBINDIR  ?= $(PREFIX)/sbin
MANDIR   ?= $(PREFIX)/share/man
DATADIR  ?= $(PREFIX)/share
DOCDIR   ?= $(DATADIR)/doc/cgmanager
SYSCONFDIR ?= /etc
SYSTEMDUNITDIR ?= $(PREFIX)/lib/systemd/system
LXCDIR   ?= /usr/share/lxc
# The system bus and polkit read these, wherever the programs are.
DBUSDIR  ?= /usr/share/dbus-1
POLKITDIR ?= /usr/share/polkit-1
# What starts the daemon: systemd, openrc, sysv, runit, or nothing.
INIT     ?= systemd
# Where no version control tells it, the version that the programs say they are.
VERSION  ?=
FUZZTIME ?= 1m

BUILD := $(CURDIR)/build
# The linter is built from source by the Go module proxy's checksums, once.
LINTER_VERSION := v2.15.0
LINTER := $(BUILD)/tools/golangci-lint-$(LINTER_VERSION)
# What tests may not skip: see Require in test/harness and cgfs/cgtest.
REQUIRE := root,v1,v2,userns
# One package at a time: daemons of two would both act on the RemoveOnEmpty marks
# of this machine, and the kernel takes one writer of cgroups at a time.
ONE := -p 1

# More for go test, such as -v.
TESTFLAGS ?=

.PHONY: help all build test test-short test-vm race lint fuzz bench man generate install deb check clean run

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

all: build man ## build the programs and the man pages

build: ## build the programs into build/
	CGO_ENABLED=0 $(GO) build -trimpath $(if $(VERSION),-ldflags '-X cgmanager/cmd/version.release=$(VERSION)') -o $(BUILD)/ ./cmd/...

run: build ## start the daemon in the foreground on its real sockets (root)
	@if [ "$$(id -u)" != 0 ]; then echo "make run: needs root, the daemon writes the host's cgroups: sudo make run" >&2; exit 1; fi
	@echo "Talk to it from another shell:   $(BUILD)/cgm status"
	@echo "Run something in a cgroup:       $(BUILD)/cgm run demo --set memory.limit=100M -- sh"
	@echo "Stop it:                         Ctrl-C"
	@exec $(BUILD)/cgmanager

test: ## install what the tests need and run all of them (root)
	@if [ "$$(id -u)" != 0 ]; then echo "make test: needs root for cgroups and namespaces: sudo make test (or make test-short)" >&2; exit 1; fi
	@.ci/deps
	$(GO) build ./...
	CGM_REQUIRE=$(REQUIRE) $(GO) test $(ONE) -timeout 30m $(TESTFLAGS) ./...

test-short: ## run the tests that any user can run, in seconds
	$(GO) test -short -timeout 2m ./...

test-vm: ## run the kernel's tests in virtual machines of every cgroup layout (root); KINDS="unified hybrid"
	@test/vm/run $(KINDS)

# The detector allocates, and takes memory: what bounds the watchdog's is left out.
race: ## run the tests of test-short under the race detector, but for the end-to-end tests
	$(GO) test -race -short -skip '^TestKernelWatchdog(Grants|Figures|AllocatesNothing)$$'  $(ONE) -timeout 5m $$($(GO) list ./... | grep -v /test/)

lint: $(LINTER) ## gofmt, go vet and golangci-lint
	$(GO) vet ./...
	$(LINTER) run

$(LINTER):
	@echo "building golangci-lint $(LINTER_VERSION), once"
	@mkdir -p $(@D)
	GOBIN=$(@D) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINTER_VERSION)
	@mv $(@D)/golangci-lint $@

fuzz: ## fuzz every target for FUZZTIME (1m), as many at once as there are cores
	@.ci/fuzz $(FUZZTIME)

bench: build ## start the daemon and print its figures beside their floors (root)
	$(GO) run ./test/bench

man: ## generate the man pages from docs/man/*.md and the commands themselves
	$(GO) test -count=1 -run '^TestManPages$$' ./cmd/cgm -update

generate: man ## regenerate what is made from the code: man pages, docs/KEYS.md
	$(GO) test -count=1 -run '^TestKeysDoc$$' ./cgfs -update

install: build ## install under DESTDIR and PREFIX, and what INIT (systemd, openrc, sysv, runit) starts
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR) $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man5 $(DESTDIR)$(MANDIR)/man8 $(DESTDIR)$(DOCDIR)/docs
	install -m 0755 $(BUILD)/cgm $(DESTDIR)$(BINDIR)/
	install -m 0755 $(BUILD)/cgmanager $(BUILD)/cgproxy $(DESTDIR)$(SBINDIR)/
	ln -sf $(if $(filter $(dir $(BINDIR)),$(dir $(SBINDIR))),../$(notdir $(BINDIR)),$(BINDIR))/cgm $(DESTDIR)$(SBINDIR)/rtkitctl
	install -m 0644 docs/man/*.1 $(DESTDIR)$(MANDIR)/man1/
	install -m 0644 docs/man/*.5 $(DESTDIR)$(MANDIR)/man5/
	install -m 0644 docs/man/*.8 $(DESTDIR)$(MANDIR)/man8/
	install -d $(DESTDIR)$(DATADIR)/bash-completion/completions $(DESTDIR)$(DATADIR)/zsh/site-functions $(DESTDIR)$(DATADIR)/fish/vendor_completions.d
	$(BUILD)/cgm completion bash > $(DESTDIR)$(DATADIR)/bash-completion/completions/cgm
	$(BUILD)/cgm completion zsh > $(DESTDIR)$(DATADIR)/zsh/site-functions/_cgm
	$(BUILD)/cgm completion fish > $(DESTDIR)$(DATADIR)/fish/vendor_completions.d/cgm.fish
	install -m 0644 README.md CHANGELOG.md LICENSE $(DESTDIR)$(DOCDIR)/
	install -m 0644 docs/*.md $(DESTDIR)$(DOCDIR)/docs/
	packaging/licenses $(DESTDIR)$(DOCDIR)/licenses
	install -d $(DESTDIR)$(LXCDIR)/config $(DESTDIR)$(LXCDIR)/hooks
	install -m 0644 packaging/lxc/config/*.conf $(DESTDIR)$(LXCDIR)/config/
	install -m 0755 packaging/lxc/hooks/* $(DESTDIR)$(LXCDIR)/hooks/
	install -d $(DESTDIR)$(DBUSDIR)/system.d $(DESTDIR)$(DBUSDIR)/system-services $(DESTDIR)$(POLKITDIR)/actions
	install -m 0644 packaging/dbus-1/system.d/*.conf $(DESTDIR)$(DBUSDIR)/system.d/
	sed 's,/usr/sbin/cg,$(SBINDIR)/cg,' packaging/dbus-1/system-services/org.freedesktop.RealtimeKit1.service >$(DESTDIR)$(DBUSDIR)/system-services/org.freedesktop.RealtimeKit1.service
	chmod 0644 $(DESTDIR)$(DBUSDIR)/system-services/org.freedesktop.RealtimeKit1.service
	install -m 0644 packaging/polkit-1/actions/*.policy $(DESTDIR)$(POLKITDIR)/actions/
	[ -e '$(DESTDIR)$(SYSCONFDIR)/cgmanager/realtime.toml' ] || install -D -m 0644 packaging/realtime.toml '$(DESTDIR)$(SYSCONFDIR)/cgmanager/realtime.toml'
	for i in $(INIT); do \
		DESTDIR='$(DESTDIR)' SBINDIR='$(SBINDIR)' SYSCONFDIR='$(SYSCONFDIR)' SYSTEMDUNITDIR='$(SYSTEMDUNITDIR)' packaging/init $$i || exit 1; \
	done

deb: ## build the Debian package into build/, and have lintian look at it (root, to install what that needs)
	packaging/deb $(VERSION)

check: ## what continuous integration runs: lint, race, fuzz, test
	.ci/run

clean: ## remove build/
	rm -rf $(BUILD)
