package local

// build.go makes programs of build contexts, where docker would make images of
// them: of what faas-cli build assembles, with a Go template whose function
// folder is a whole program, as that of sheaf-go is.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// BuildConfig says how functions are built on this machine. The zero value
// builds what is sent to POST /build, signed by a secret that is made.
type BuildConfig struct {
	// Dir is the folder in which faas-cli up --shrinkwrap leaves build contexts,
	// a folder for each function; "" means that none is looked for. It need not
	// exist. When a function is deployed whose image is not known otherwise, the
	// context that is named like the function is built, or else the one that is
	// named like the image, without what stands before its last slash and after
	// its colon.
	Dir string
	// SecretFile holds the secret that signs what is sent to POST /build; ""
	// means a random one, in the file that Stack.BuildSecretFile names.
	SecretFile string
	// Time is how long one build may take; 0 means 10 minutes.
	Time time.Duration
	// Parallel is how many builds run at once; 0 means 2. Others wait.
	Parallel int
}

// Validate says what in c cannot be used.
func (c BuildConfig) Validate() error {
	if c.SecretFile == "" {
		return nil
	}
	_, err := readSecret(c.SecretFile)
	return err
}

// readSecret reads the secret that signs builds, as faas-cli does: without white
// space around it.
func readSecret(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the secret of builds: %w", err)
	}
	if data = bytes.TrimSpace(data); len(data) == 0 {
		return nil, fmt.Errorf("the file %s, which must hold the secret of builds, is empty", file)
	}
	return data, nil
}

// A builder makes the programs of images, and knows those that it made.
type builder struct {
	cfg    BuildConfig
	p      *Provider // starts commands, and ends them
	store  *store
	known  func(image string) ([]string, error) // images that need no build
	secret []byte
	queue  chan struct{} // held by who sends a build
	slots  chan struct{} // held by builds that run

	mu sync.Mutex // held while the files of images change
}

const (
	buildTime     = 10 * time.Minute
	buildParallel = 2
	buildQueue    = 8 // that are sent, wait or run at once, by POST /build
	secretFile    = "payload-secret"
)

// newBuilder returns the builder of a stack, and the file that has its secret.
func newBuilder(cfg BuildConfig, p *Provider, s *store, known func(string) ([]string, error)) (*builder, string, error) {
	if cfg.Time <= 0 {
		cfg.Time = buildTime
	}
	if cfg.Parallel <= 0 {
		cfg.Parallel = buildParallel
	}
	b := &builder{cfg: cfg, p: p, store: s, known: known,
		queue: make(chan struct{}, buildQueue), slots: make(chan struct{}, cfg.Parallel)}
	file := cfg.SecretFile
	if file == "" {
		file = filepath.Join(s.dir, secretFile)
		if err := s.makeSecret(secretFile); err != nil {
			return nil, "", fmt.Errorf("make the secret of builds: %w", err)
		}
	}
	var err error
	if b.secret, err = readSecret(file); err != nil {
		return nil, "", err
	}
	return b, file, nil
}

// command says how a replica of an image is started.
func (b *builder) command(image string) ([]string, error) {
	argv, err := b.known(image)
	if err == nil {
		return argv, nil
	}
	if i, ok := b.built(image); ok {
		return []string{b.program(i.Program)}, nil
	}
	return nil, err
}

// builtImage is the file of an image.
type builtImage struct {
	Image   string `json:"image"`
	Program string `json:"program"` // names its file: the digest of what it was made of
}

// imageFile is the name of the file of an image.
func imageFile(image string) string {
	sum := sha256.Sum256([]byte(image))
	return hex.EncodeToString(sum[:16]) + ".json"
}

func (b *builder) program(name string) string { return b.store.path(programsFolder, name) }

// built reads what there is of an image.
func (b *builder) built(image string) (i builtImage, ok bool) {
	data, err := os.ReadFile(b.store.path(imagesFolder, imageFile(image)))
	if err != nil || json.Unmarshal(data, &i) != nil || i.Image != image || !isDigest(i.Program) {
		return i, false // a damaged file is as good as none: it can be built again
	}
	_, err = os.Stat(b.program(i.Program))
	return i, err == nil
}

func isDigest(s string) bool {
	sum, err := hex.DecodeString(s)
	return err == nil && len(sum) == sha256.Size
}

// contextOf finds the build context of a function, by the rule of BuildConfig.
func (b *builder) contextOf(service, image string) (dir string, looked []string) {
	if b.cfg.Dir == "" {
		return "", nil
	}
	name := path.Base(image)
	name, _, _ = strings.Cut(name, "@")
	name, _, _ = strings.Cut(name, ":")
	for _, n := range []string{service, name} {
		if !functionName.MatchString(n) {
			continue
		}
		dir := filepath.Join(b.cfg.Dir, n)
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			return dir, nil
		}
		if !slices.Contains(looked, dir) {
			looked = append(looked, dir)
		}
	}
	return "", looked
}

// prepare sees to it that there is an image for a function that is about to be
// deployed: it builds the one that it has a context of, if it shall be built now.
func (b *builder) prepare(spec types.FunctionDeployment, build bool) error {
	if _, err := b.known(spec.Image); err == nil {
		return nil
	}
	dir, looked := b.contextOf(spec.Service, spec.Image)
	if dir == "" {
		_, err := b.command(spec.Image)
		switch {
		case err == nil:
			return nil
		case len(looked) > 0:
			err = fmt.Errorf("%w; nor was it built here, and there is no build context %s, which faas-cli up --shrinkwrap --skip-push leaves where it runs (sheaf up --build-dir names another folder)",
				err, strings.Join(looked, " or "))
		}
		return unknownImage(err)
	}
	if !build {
		return nil
	}
	err := b.build(b.p.ctx, func(w *contextWriter) (buildOrder, error) {
		return buildOrder{Image: spec.Image}, w.copy(dir)
	}, func(line string) { b.p.log.Debug("build", "image", spec.Image, "says", line) })
	if err != nil {
		return wire.Refuse(http.StatusBadRequest, "build_failed", fmt.Sprintf("the build of %s in %s failed: %v", spec.Image, dir, err)).About("image")
	}
	return nil
}

// buildOrder says what a build is for.
type buildOrder struct {
	Image     string            `json:"image"`
	BuildArgs map[string]string `json:"buildArgs"`
	Platforms []string          `json:"platforms"`
}

// Build arguments that a Go build takes: the ARGs of the template's Dockerfile.
var buildArgs = []string{"GOFLAGS", "GONOSUMDB", "GOPROXY"}

var (
	errEnding    = errors.New("the stack is about to end")
	errBuildTime = errors.New("the build took too long")
)

// errNotGo is said of contexts of other templates.
var errNotGo = errors.New("sheaf builds contexts of Go templates such as sheaf-go, whose folder function is a program with a go.mod, and this is none; " +
	"build it with docker for OpenFaaS, or run its program here with sheaf up --programs")

// build unpacks a context and makes the program of its image; the gate is that
// its tests pass. say is told what happens, line by line.
func (b *builder) build(ctx context.Context, unpack func(*contextWriter) (buildOrder, error), say func(line string)) (err error) {
	if !b.p.enter() {
		return errEnding
	}
	defer b.p.wg.Done()
	ctx, cancel := context.WithTimeoutCause(ctx, b.cfg.Time, fmt.Errorf("%w: over %v", errBuildTime, b.cfg.Time))
	defer cancel()
	defer context.AfterFunc(b.p.ctx, cancel)()
	select {
	case b.slots <- struct{}{}:
		defer func() { <-b.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	work, err := os.MkdirTemp(b.store.path(buildsFolder, ""), "")
	if err != nil {
		return err
	}
	defer func() {
		if e := os.RemoveAll(work); e != nil {
			b.p.log.Error("folder of a build is left", "folder", work, "err", e)
		}
	}()
	root, err := os.OpenRoot(work)
	if err != nil {
		return err
	}
	defer root.Close()
	w := &contextWriter{root: root, sums: map[string][sha256.Size]byte{}}
	order, err := unpack(w)
	if err != nil {
		return err
	}
	env, unused := buildEnv(order.BuildArgs)
	for _, name := range unused {
		say(fmt.Sprintf("build argument %s is not used here", name))
	}
	digest := w.digest(env)
	if _, err := os.Stat(b.program(digest)); err == nil {
		say("nothing has changed since it was built")
		return b.name(order.Image, digest)
	}
	if err := b.compile(ctx, filepath.Join(work, "function"), env, say); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}
	if err := os.Rename(filepath.Join(work, "handler"), b.program(digest)); err != nil {
		return err
	}
	return b.name(order.Image, digest)
}

// compile does what the template's Dockerfile does.
func (b *builder) compile(ctx context.Context, dir string, env []string, say func(string)) error {
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		return errNotGo
	}
	tool, err := exec.LookPath("go")
	if err != nil {
		return fmt.Errorf("there is no Go tool on the PATH of sheaf, which builds functions with it; install Go 1.26, or start sheaf with a PATH that has it: %w", err)
	}
	var kind string
	if err := b.run(ctx, dir, env, func(line string) { kind = line }, tool, "list", "-f", "{{.Name}}", "."); err != nil {
		return err
	}
	if kind != "main" {
		return errNotGo
	}
	for _, args := range [][]string{{"test", "./..."}, {"build", "-ldflags", "-s -w", "-o", "../handler", "."}} {
		say("go " + strings.Join(args, " "))
		if err := b.run(ctx, dir, env, say, tool, args...); err != nil {
			return err
		}
	}
	return nil
}

const (
	maxBuildLine = 4 << 10
	maxBuildLog  = 1 << 20
	buildTail    = 12 // lines of a failure's error
)

// run runs one command of a build, in a process group of its own.
func (b *builder) run(ctx context.Context, dir string, env []string, say func(string), tool string, args ...string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(tool, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, in, in
	ps, err := b.p.spawn.start(cmd)
	in.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", tool, err)
	}
	b.p.guard.began(ps.pid)
	alive := context.AfterFunc(ctx, ps.kill)
	var tail []string
	var reader sync.WaitGroup
	reader.Go(func() {
		said := 0
		lines := bufio.NewReaderSize(out, maxBuildLine)
		for {
			line, err := lines.ReadSlice('\n')
			if text := trimEOL(line); text != "" {
				if tail = append(tail, text); len(tail) > buildTail {
					tail = tail[1:]
				}
				switch said += len(line); {
				case said <= maxBuildLog:
					say(text)
				case said-len(line) <= maxBuildLog:
					say("(the rest is left out)")
				}
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
		}
	})
	err = cmd.Wait()
	alive()
	ps.kill() // what it left behind
	b.p.guard.ended(ps.pid)
	_ = out.SetReadDeadline(time.Now().Add(pipeTimeout))
	reader.Wait()
	if err != nil {
		return fmt.Errorf("go %s: %w: %s", args[0], err, strings.Join(tail, "; "))
	}
	return nil
}

// buildEnv is the environment of a build's commands: as a function's, with what
// the Go tool itself wants. Arguments that it does not know are unused.
func buildEnv(args map[string]string) (env, unused []string) {
	set := map[string]string{"GOFLAGS": "-mod=mod -trimpath"} // what go.sum lacks is checked by the checksum database
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		switch upper := strings.ToUpper(name); {
		case strings.HasPrefix(name, "GO"), strings.HasSuffix(upper, "_PROXY"), strings.HasPrefix(name, "SSL_CERT_"),
			slices.Contains([]string{"PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"}, name):
			if value != "" {
				set[name] = value
			}
		}
	}
	for name, value := range args {
		switch {
		case value == "": // as faas-cli sends ADDITIONAL_PACKAGE
		case slices.Contains(buildArgs, name):
			set[name] = value
		default:
			unused = append(unused, name)
		}
	}
	maps.Copy(set, map[string]string{"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local"})
	delete(set, "GOOS") // it runs here
	delete(set, "GOARCH")
	delete(set, "GOCOVERDIR")
	for _, name := range slices.Sorted(maps.Keys(set)) {
		env = append(env, name+"="+set[name])
	}
	slices.Sort(unused)
	return env, unused
}

// maxImages is how many images are kept that no function has.
const maxImages = 32

// forget removes the oldest images that no function has, and returns the
// programs of those that are left. b.mu is held.
func (b *builder) forget(but string) (programs map[string]bool, err error) {
	files, err := b.store.names(imagesFolder)
	if err != nil {
		return nil, err
	}
	deployed := map[string]bool{but: true}
	for _, f := range b.p.Functions() {
		deployed[f.Image] = true
	}
	type idle struct {
		file, program string
		since         time.Time
	}
	var others []idle
	programs = map[string]bool{}
	for _, name := range files {
		path := b.store.path(imagesFolder, name)
		var i builtImage
		data, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(data, &i) != nil {
			continue // as in built
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if deployed[i.Image] {
			programs[i.Program] = true
		} else {
			others = append(others, idle{name, i.Program, info.ModTime()})
		}
	}
	slices.SortFunc(others, func(x, y idle) int { return x.since.Compare(y.since) })
	for len(others) > maxImages {
		if err := b.store.remove(imagesFolder, others[0].file); err != nil {
			return nil, err
		}
		others = others[1:]
	}
	for _, o := range others {
		programs[o.program] = true
	}
	return programs, nil
}

// name makes a program that of an image, and removes those of no image.
func (b *builder) name(image, program string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	data, err := json.Marshal(builtImage{image, program})
	if err != nil {
		return err
	}
	if err := b.store.write(imagesFolder, imageFile(image), data); err != nil {
		return err
	}
	used, err := b.forget(image)
	if err != nil {
		return err
	}
	programs, err := b.store.names(programsFolder)
	if err != nil {
		return err
	}
	for _, name := range programs {
		if !used[name] {
			if err := b.store.remove(programsFolder, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// Limits of a build context.
const (
	maxContextFiles = 10_000
	maxContextBytes = 256 << 20
	maxContextPath  = 1 << 10
)

// A contextWriter writes a build context into a folder that it cannot leave.
type contextWriter struct {
	root  *os.Root
	count int // of files and folders
	bytes int64
	sums  map[string][sha256.Size]byte // of files, by mode and name
}

// errContext says what is wrong with a build context.
type errContext struct{ error }

func badContext(format string, a ...any) error { return errContext{fmt.Errorf(format, a...)} }

func (w *contextWriter) dir(name string) error {
	if err := w.check(name); err != nil {
		return err
	}
	return w.root.MkdirAll(name, 0o700)
}

func (w *contextWriter) check(name string) error {
	switch w.count++; {
	case len(name) > maxContextPath || !filepath.IsLocal(name):
		return badContext("the build context has a file %.80q, which is not a path within it of up to %d bytes", name, maxContextPath)
	case w.count > maxContextFiles:
		return badContext("the build context has more than %d files and folders", maxContextFiles)
	}
	return nil
}

// file writes one file; only whether it can be executed is kept of its mode.
func (w *contextWriter) file(name string, mode os.FileMode, data io.Reader) (err error) {
	if err := w.check(name); err != nil {
		return err
	}
	if err := w.root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	mode = 0o600 | mode&0o100
	f, err := w.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if errors.Is(err, os.ErrExist) {
		return badContext("the build context has the file %.80q twice", name)
	}
	if err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(data, maxContextBytes-w.bytes+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if w.bytes += n; w.bytes > maxContextBytes {
		return badContext("the build context has more than %d bytes", maxContextBytes)
	}
	w.sums[fmt.Sprintf("%o %s", mode, name)] = [sha256.Size]byte(sum.Sum(nil))
	return nil
}

// copy writes what is in a folder, as it is now.
func (w *contextWriter) copy(dir string) error {
	from, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer from.Close()
	return fsWalk(from, func(name string, info os.FileInfo) error {
		switch {
		case info.IsDir():
			return w.dir(name)
		case !info.Mode().IsRegular():
			return badContext("the build context has %q, which is neither a file nor a folder", name)
		}
		f, err := from.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return w.file(name, info.Mode(), f)
	})
}

// digest names what was written, and the settings of a build.
func (w *contextWriter) digest(env []string) string {
	h := sha256.New()
	for _, v := range env {
		if strings.HasPrefix(v, "GO") {
			fmt.Fprintf(h, "%q\n", v)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.sums)) {
		fmt.Fprintf(h, "%q %x\n", name, w.sums[name])
	}
	return hex.EncodeToString(h.Sum(nil))
}
