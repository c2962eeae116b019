package local

// build_api.go is OpenFaaS's Function Builder API: faas-cli up --remote-builder
// sends a build context, and is told how its build goes.

import (
	"archive/tar"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	maxBuildBody   = 128 << 20       // bytes
	buildBodyTime  = 2 * time.Minute // for them to arrive
	buildWriteTime = 10 * time.Second
	// The files of a request, beside what is in the folder context.
	buildConfigFile  = "com.openfaas.docker.config"
	buildSecretsFile = "com.openfaas.secrets"
	signatureHeader  = "X-Build-Signature"
)

// buildResult is a line of the answer, or all of it.
type buildResult struct {
	Log    []string `json:"log"`
	Image  string   `json:"image"`
	Status string   `json:"status"`
	Error  string   `json:"error,omitempty"`
}

// ServeHTTP builds what the request's body, a tar archive, holds. The body must
// be signed by the secret, because what it holds is run here.
func (b *builder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case b.queue <- struct{}{}:
		defer func() { <-b.queue }()
	default:
		wire.Refuse(http.StatusServiceUnavailable, "builder_busy",
			fmt.Sprintf("%d builds run or wait already; try again later", buildQueue)).Within(buildQueue).After(5 * time.Second).Write(w)
		return
	}
	expect(w, buildBodyTime)
	archive, p := b.receive(r)
	if p != nil {
		expect(w, refusalTimeout)
		p.Write(w)
		return
	}
	defer func() {
		_ = archive.Close() // it has no name any more
	}()
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // not every ResponseWriter can
	answer := newBuildAnswer(w, strings.Contains(r.Header.Get("Accept"), "application/x-ndjson"))
	var image string
	err := b.build(r.Context(), func(w *contextWriter) (buildOrder, error) {
		order, err := unpackTar(w, archive)
		if err == nil {
			err = b.check(order)
		}
		if err == nil {
			image = order.Image
			answer.begin()
		}
		return order, err
	}, answer.say)
	switch bad := (errContext{}); {
	case err == nil:
		answer.end(buildResult{Image: image, Status: "success"})
	case errors.As(err, &bad):
		wire.Refuse(http.StatusBadRequest, "bad_build_context", err.Error()).Write(w)
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil: // nobody waits for an answer
	default:
		b.p.log.Info("build failed", "image", image, "err", err)
		answer.end(buildResult{Image: image, Status: "failed", Error: err.Error()})
	}
}

// receive stores the body of a request in a file without a name, and checks its
// signature.
func (b *builder) receive(r *http.Request) (_ *os.File, p *wire.Problem) {
	tooLarge := wire.Refuse(http.StatusRequestEntityTooLarge, "build_context_too_large",
		fmt.Sprintf("the build context is over the limit of %d bytes", maxBuildBody)).Within(maxBuildBody)
	unsigned := wire.Refuse(http.StatusUnauthorized, "bad_build_signature",
		"the request is not signed by the secret of this builder; send it with faas-cli up --remote-builder URL --payload-secret FILE, with the file that sheaf up names")
	if r.ContentLength > maxBuildBody {
		return nil, tooLarge
	}
	sent, err := hex.DecodeString(strings.TrimPrefix(r.Header.Get(signatureHeader), "sha256="))
	if err != nil || len(sent) != sha256.Size {
		return nil, unsigned
	}
	f, err := os.CreateTemp(b.store.path(buildsFolder, ""), "")
	if err != nil {
		return nil, notKept("build context", err)
	}
	defer func() {
		if p != nil {
			_ = f.Close() // as below
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, notKept("build context", err)
	}
	mac := hmac.New(sha256.New, b.secret)
	n, err := io.Copy(io.MultiWriter(f, mac), io.LimitReader(r.Body, maxBuildBody+1))
	switch {
	case errors.As(err, new(*fs.PathError)):
		return nil, notKept("build context", err)
	case err != nil:
		return nil, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, fmt.Sprintf("the build context could not be read to its end: %v", err))
	case n > maxBuildBody:
		return nil, tooLarge
	case !hmac.Equal(sent, mac.Sum(nil)):
		return nil, unsigned
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, notKept("build context", err)
	}
	return f, nil
}

// unpackTar unpacks an archive as faas-cli makes it.
func unpackTar(w *contextWriter, archive io.Reader) (order buildOrder, err error) {
	found := false
	for in := tar.NewReader(archive); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return order, badContext("the build context is not a tar archive: %v", err)
		}
		name := path.Clean(h.Name)
		within, inContext := strings.CutPrefix(name, "context/")
		regular := h.Typeflag == tar.TypeReg
		switch {
		case name == buildSecretsFile:
			return order, badContext("the request has build secrets, which this builder does not take; build without build_secrets")
		case name == buildConfigFile && regular && !found:
			found = true
			data, err := io.ReadAll(io.LimitReader(in, 1<<20))
			if err == nil {
				err = json.Unmarshal(data, &order)
			}
			if err != nil {
				return order, badContext("%s of the build context is not the JSON that is expected: %v", buildConfigFile, err)
			}
		case name == "context" && h.Typeflag == tar.TypeDir:
		case inContext && h.Typeflag == tar.TypeDir:
			if err := w.dir(within); err != nil {
				return order, err
			}
		case inContext && regular:
			if err := w.file(within, h.FileInfo().Mode(), in); err != nil {
				if errors.Is(err, io.ErrUnexpectedEOF) {
					err = badContext("the build context was cut: %v", err)
				}
				return order, err
			}
		default:
			return order, badContext("the build context has %.80q, which is no file or folder of the folder context", h.Name)
		}
	}
	if !found {
		return order, badContext("the build context lacks %s, which names the image", buildConfigFile)
	}
	return order, nil
}

// check refuses what cannot be built here.
func (b *builder) check(order buildOrder) error {
	if order.Image == "" || len(order.Image) > 512 || strings.ContainsFunc(order.Image, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return badContext("%q is not the name of an image", wire.Cut(order.Image))
	}
	if _, err := b.known(order.Image); err == nil {
		return badContext("the image %s is this provider's own; give yours another name", order.Image)
	}
	here := runtime.GOOS + "/" + runtime.GOARCH
	if len(order.Platforms) > 0 && !slices.Contains(order.Platforms, here) {
		return badContext("the image is for %s, and what is built here runs here, on %s", strings.Join(order.Platforms, ", "), here)
	}
	return nil
}

// buildAnswer tells how a build goes: as it goes, or at its end.
type buildAnswer struct {
	w       http.ResponseWriter
	control *http.ResponseController
	stream  bool
	begun   bool
	log     []string
}

func newBuildAnswer(w http.ResponseWriter, stream bool) *buildAnswer {
	return &buildAnswer{w: w, control: http.NewResponseController(w), stream: stream, log: []string{}}
}

// begin says that the request is taken.
func (a *buildAnswer) begin() {
	a.begun = true
	if a.stream {
		a.w.Header().Set("Content-Type", "application/x-ndjson")
		a.w.WriteHeader(http.StatusOK)
	}
}

func (a *buildAnswer) say(line string) {
	line = strings.ToValidUTF8(line, "\ufffd")
	if !a.stream {
		a.log = append(a.log, line)
		return
	}
	a.send(buildResult{Log: []string{line}, Status: "in_progress"})
}

func (a *buildAnswer) send(r buildResult) {
	_ = a.control.SetWriteDeadline(time.Now().Add(buildWriteTime)) // a client that does not read must not hold a build
	data, err := json.Marshal(r)
	if err != nil {
		return // it is strings
	}
	_, _ = a.w.Write(append(data, '\n')) // a client that left ends the build
	_ = a.control.Flush()
}

// end tells how it ended. A build that failed before it began, because of this
// machine, is told in the same way.
func (a *buildAnswer) end(r buildResult) {
	if !a.begun {
		a.begin()
	}
	if !a.stream {
		a.w.Header().Set("Content-Type", "application/json")
	}
	r.Log = a.log
	a.send(r)
}

// build passes a build on to the builder, if there is one.
func (f *Front) build(w http.ResponseWriter, r *http.Request) {
	switch {
	case f.builder == nil:
		notFound(w, r)
	case !fromHere(r):
		foreignHost(w)
	default:
		f.builder.ServeHTTP(w, r)
	}
}

// publicKey says that build secrets cannot be sealed for this builder.
func (f *Front) publicKey(w http.ResponseWriter, r *http.Request) {
	if f.builder == nil {
		notFound(w, r)
		return
	}
	wire.Refuse(http.StatusNotImplemented, "no_build_secrets", "this builder takes no build secrets; build without build_secrets").Write(w)
}

// fsWalk calls visit for all that is in a folder, in order, but for the folder.
func fsWalk(root *os.Root, visit func(name string, info os.FileInfo) error) error {
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return visit(name, info)
	})
}
