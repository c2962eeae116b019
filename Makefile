# sheaf: make prints this help.

.DEFAULT_GOAL := help
.PHONY: help kills build test race check lint fmt fuzz bench rooms thesis memory sim scale readme template proxy worker languages vuln sbom deps images chart chart-readme

help: ## Print this
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build the sheaf command into bin/
	go build -trimpath -o bin/sheaf ./cmd/sheaf

test: ## Run the tests, as the README says
	go test ./...

race: ## Run the tests with the race detector
	go test -race ./...

check: ## Exactly what CI runs
	.ci/run

lint: ## gofmt, vet, staticcheck, go fix, go.mod
	@test -z "$$(gofmt -l .)" || { echo "gofmt would change:"; gofmt -l .; exit 1; }
	go vet ./...
	go vet -tags memory,languages,machine ./test
	go tool staticcheck ./...
	go fix -diff ./...
	go mod tidy -diff
	cd charts && go vet ./... && go tool staticcheck ./... && go fix -diff ./... && go mod tidy -diff

fmt: ## Format the code
	gofmt -w .

FUZZ ?= 60s
fuzz: ## Fuzz what parses, a minute each (FUZZ=10s)
	@grep -rn '^func Fuzz' --include=*_test.go . | sed 's|/[^/]*_test.go:.*func \(Fuzz[A-Za-z]*\).*| \1|' | sort -u | \
		while read room name; do echo "$$room $$name"; go test $$room -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ) || exit 1; done

bench: build ## Measure sheaf beside its peers: bin/bench.json, bench.html, docs/PERFORMANCE.md
	bin/sheaf bench --json bin/bench.json --html bin/bench.html --markdown docs/PERFORMANCE.md

rooms: ## Run the benchmarks of the rooms
	go test -run '^$$' -bench . -benchmem . ./direct ./internal/schedule ./internal/wire ./internal/serve ./functions/wordcount

thesis: ## Print the thesis's table with our times beside it
	go test ./test -run '^$$' -bench Thesis -benchtime 1x

.PHONY: ranks
ranks: ## Call ranks 10,000 times through a gateway while the function is scaled
	go test ./local -run RanksWhileScaling -rank-calls 10000 -v -count=1

memory: ## Send 1 GiB through sheaf run and print peak memory
	go test ./test -tags memory -run Memory -v -count=1

SEEDS ?= 1000000
sim: ## Simulate SEEDS seeds (1,000,000) of the scheduler, of jobs and masters, and of watchers
	go test ./internal/schedule -run TestSimulation -seeds $(SEEDS) -v -timeout 3h
	go test ./job -run 'TestSimulation$$' -seeds $(SEEDS) -v -timeout 3h
	go test ./registry -run 'TestSimulation$$' -seeds $(SEEDS) -v -timeout 3h

JOBS ?= 500
KILL ?= 100ms
MASTER ?= 5s
NATS ?= 20s
SEED ?= 0
SOAK = -soak.jobs $(JOBS) -soak.kill $(KILL) -soak.master $(MASTER) -soak.nats $(NATS) -soak.seed $(SEED) -v -count=1 -timeout 2h
.PHONY: soak
soak: ## Run JOBS jobs (500) while workers (each KILL, 100ms), masters (MASTER, 5s) and NATS (NATS, 20s) fail; SEED repeats it
	go test ./test -run 'TestSoak$$' $(SOAK)

.PHONY: reliability
reliability: ## Run the soak, simulations and fault suites, and write docs/RELIABILITY.md anew
	go run ./test/reliability -jobs $(JOBS) -kill $(KILL) -master $(MASTER) -nats $(NATS) -seed $(SEED)

.PHONY: faults
faults: ## Run jobs on a disk that is full; it mounts one, which takes root
	go test ./test -tags machine -run TestDiskFull -v -count=1 -timeout 10m

kills: ## Kill masters at each step that they store, and each 300ms while JOBS jobs (500) run
	go test ./test -run 'TestSoak$$|TestMasterDiesAtEachStep' $(SOAK) -soak.master 300ms -soak.nats 0

scale: ## Simulate the scheduler with 10,000 replicas and 1,000,000 blocks
	go test ./internal/schedule -run TestScale -scale -v

readme: ## Write the output that README.md and docs show anew (with FAAS_CLI, that of faas-cli too)
	go test ./test -count=1 -run TestReadme -args -update

template: ## Write the template's go.mod and go.sum anew
	go test ./test -run TestTemplateIsTidy -update -count=1

proxy: ## Serve this checkout as a published module; eval "$(make -s proxy)"
	@unset GOPROXY GOMODCACHE GOFLAGS GONOSUMDB; \
	go test ./test -run TestWriteProxy -proxy "$$(go env GOPATH)/sheaf$(CURDIR)" -count=1 -v | grep ^export

worker: ## Build the worker as for an image, and print its size
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o bin/worker ./functions/worker
	@wc -c bin/worker

SERVER ?=
OWNER ?= sheaf
TAG ?= latest
images: ## Make the container images, without a container engine, in build/images; PUSH=1 pushes them to SERVER/OWNER
	go run -C charts ./cmd/images -prefix "$(if $(SERVER),$(SERVER)/)$(OWNER)/" -tag "$(TAG)" $(if $(PUSH),-push) $(IMAGES)

chart: ## Test the helm chart: lint, rendering, rights, network policies
	go test -C charts ./...

chart-readme: ## Write the table of values in the chart's README anew
	go test -C charts . -run TestReadmeTable -count=1 -args -update

languages: ## Run the workers of docs/ANY-LANGUAGE.md, with python3 and node
	go test ./test -tags languages -run TestLanguages -count=1 -timeout 3m

.PHONY: mutants
mutants: ## Plant bugs in our own code, and print which test catches each
	go run ./test/mutants

VULNDB ?=
vuln: ## Look for known vulnerabilities; VULNDB=FOLDER takes a copy of the database
	go run golang.org/x/vuln/cmd/govulncheck@v1.1.4 $(if $(VULNDB),-db file://$(abspath $(VULNDB))) ./cmd/... ./functions/...

sbom: build ## Write the bill of materials of bin/sheaf (CycloneDX) beside it
	go run ./test/sbom bin/sheaf > bin/sheaf.cdx.json

.PHONY: test-kubernetes
test-kubernetes: ## Test on the Kubernetes of KUBECONFIG, with LOAD_IMAGE and RESTART_APISERVER; docs/KUBERNETES.md says how
	cd charts && go vet -tags kubernetes ./kubernetes/... && go test -tags kubernetes ./kubernetes -v -count=1 -timeout 90m

deps: ## What the project needs beyond Go: python3 and node, for make languages
	go mod download
	@command -v python3 >/dev/null && command -v node >/dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends python3 nodejs; }
