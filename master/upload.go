package master

// upload.go reads the input: a bare body, or the file of a form.

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	readAhead    = 2 << 20  // bytes of an upload that are read before they are needed
	readPiece    = 64 << 10 // bytes
	slowest      = 1 << 10  // bytes a second; what comes slower uses up Patience
	maxParts     = 1000
	maxField     = 4 << 10  // bytes of a form's field that is not the file
	drainBytes   = 64 << 20 // of an upload that is refused, so that its sender reads why
	drainTimeout = 2 * time.Second
)

// interrupt lets an answer leave while the input still comes: net/http would
// first wait for the rest of the body, which may never come. That rest must
// not be taken for the next request, so the connection ends with the answer.
func interrupt(w http.ResponseWriter) *http.ResponseController {
	control := http.NewResponseController(w)
	_ = control.EnableFullDuplex() // where it cannot be had, the answer comes after the input
	w.Header().Set("Connection", "close")
	return control
}

// refuse answers a request whose body was not looked at.
func refuse(w http.ResponseWriter, r *http.Request, p *wire.Problem) {
	if r.ContentLength != 0 {
		_ = interrupt(w).SetReadDeadline(time.Now().Add(drainTimeout)) // for the rest of the body, which net/http reads
	}
	p.Write(w)
}

// Names of the form field that holds the file. The second one is the thesis's.
var fileFields = []string{"file", "myfile"}

// upload is the input of a job. Its body is read ahead on a goroutine of its
// own: a small upload is then read to its end at once, and the server can tell
// when the client leaves.
type upload struct {
	length int64 // of the input, -1 when it is not known; set by begin
	src    io.Reader

	body    io.Reader // of the request, within its limit
	control *http.ResponseController
	total   int64 // bytes of the body that were announced, -1 if none were
	patient time.Duration

	pieces chan []byte
	free   chan []byte
	left   chan struct{} // closed when the job wants no more of it
	end    chan struct{} // closed when nobody reads any more
	read   atomic.Bool   // to its end, or to where it broke
	wg     sync.WaitGroup

	closing sync.Once
	err     error // why the pieces ended; written before they are closed
	piece   []byte
	held    []byte // the buffer that piece is part of
	count   atomic.Int64
}

// inputLimit is how long an input may be, and the variable that says so.
type inputLimit struct {
	bytes    int64
	variable string
}

// openUpload begins to read the body of r.
func openUpload(w http.ResponseWriter, r *http.Request, limit inputLimit, patience time.Duration) *upload {
	u := &upload{
		length: -1, control: http.NewResponseController(w), total: r.ContentLength, patient: patience,
		pieces: make(chan []byte, readAhead/readPiece), free: make(chan []byte, readAhead/readPiece+2),
		left: make(chan struct{}), end: make(chan struct{}),
	}
	u.body = r.Body
	if r.ContentLength > limit.bytes {
		u.err = limit.passed()
		u.body = nil
		close(u.pieces)
		return u
	}
	if r.Body == http.NoBody {
		// The server watches the connection already, and must not meet a deadline
		// there: it would take it for the end of the connection, and of the
		// context of each request that comes on it.
		u.err = io.EOF
		u.read.Store(true)
		close(u.pieces)
		return u
	}
	u.wg.Go(func() { u.ahead(limit) })
	return u
}

func (l inputLimit) passed() *wire.Problem {
	return wire.Refuse(http.StatusRequestEntityTooLarge, "input_too_large",
		fmt.Sprintf("the input is over the limit of %d bytes, which %s sets", l.bytes, l.variable)).Within(l.bytes)
}

// ahead reads the body into pieces until it ends, or nobody wants it.
func (u *upload) ahead(limit inputLimit) {
	defer close(u.pieces)
	defer u.read.Store(true)
	var read int64
	var waited time.Duration
	for {
		var buf []byte
		select {
		case buf = <-u.free:
		default:
			buf = make([]byte, readPiece)
		}
		begun := time.Now()
		left := min(u.patient, u.patient+time.Duration(read/slowest)*time.Second-waited)
		deadline := begun.Add(left)
		_ = u.control.SetReadDeadline(deadline) // a ResponseWriter that cannot has no slow clients
		select {
		case <-u.end: // close has set a deadline, and this one may have come after it
			u.err = errNotWanted
			return
		default:
		}
		n, err := u.body.Read(buf[:readPiece])
		waited += time.Since(begun)
		read += int64(n)
		u.count.Store(read)
		if read > limit.bytes {
			u.err = limit.passed()
			return
		}
		if n > 0 {
			select {
			case u.pieces <- buf[:n]:
			case <-u.end:
				u.err = errNotWanted
				return
			}
		}
		if err != nil {
			if u.err = u.judge(err); errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(deadline) {
				u.err = errNotWanted // it was the deadline that close has set
			}
			if u.err == io.EOF {
				// Nothing may time out any more: the server now watches for the client to leave.
				_ = u.control.SetReadDeadline(time.Time{})
			}
			return
		}
	}
}

var errNotWanted = errors.New("the job ended before its input was read")

func (u *upload) judge(err error) error {
	switch {
	case err == io.EOF:
		return io.EOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		return wire.Refuse(http.StatusRequestTimeout, wire.CodeSlow,
			fmt.Sprintf("the upload stalled for %v, which read_timeout sets, or came slower than 1 KiB a second", u.patient)).Within(u.patient.String())
	default:
		return wire.Refuse(http.StatusBadRequest, wire.CodeTruncated,
			fmt.Sprintf("the upload was cut after %d bytes: %v; send it again", u.count.Load(), err))
	}
}

// whole says whether the body was read to its end.
func (u *upload) whole() bool { return u.read.Load() && u.err == io.EOF }

// received is how many bytes of the body have come.
func (u *upload) received() int64 { return u.count.Load() }

// Read reads the input.
func (u *upload) Read(p []byte) (int, error) { return u.src.Read(p) }

// raw reads the pieces of the body.
type raw struct{ u *upload }

func (r raw) Read(p []byte) (int, error) {
	u := r.u
	for len(u.piece) == 0 {
		if u.held != nil {
			select {
			case u.free <- u.held:
			default:
			}
			u.held = nil
		}
		select {
		case piece, ok := <-u.pieces:
			if !ok {
				return 0, u.err
			}
			u.piece, u.held = piece, piece[:cap(piece)]
		case <-u.left:
			return 0, errNotWanted
		}
	}
	n := copy(p, u.piece)
	u.piece = u.piece[n:]
	return n, nil
}

// leave ends the job's reading, also one that waits for the client. It is
// called once.
func (u *upload) leave() { close(u.left) }

// refuse sends p at once, also to a client that is still sending.
func (u *upload) refuse(w http.ResponseWriter, p *wire.Problem) {
	if !u.whole() {
		interrupt(w)
	}
	p.Write(w)
	_ = u.control.Flush() // a client that left needs no answer
}

// drain reads on for a while after a refusal, so that a client that sends all
// before it reads comes to read it, and is not reset meanwhile.
func (u *upload) drain() {
	if u.body == nil {
		return
	}
	begun := time.Now()
	for n := int64(0); n < drainBytes && time.Since(begun) < drainTimeout; {
		select {
		case piece, ok := <-u.pieces:
			if !ok {
				return
			}
			n += int64(len(piece))
		case <-time.After(drainTimeout - time.Since(begun)):
			return
		}
	}
}

// broken returns why the upload broke, or nil if it did not. It ends the
// reading: it is for when the request's context has ended. net/http ends that
// as soon as a body cannot be read, which may be before the reader says why.
func (u *upload) broken() error {
	u.close()
	if p, ok := errors.AsType[*wire.Problem](u.err); ok {
		return p
	}
	return nil
}

// close ends the reading and waits for it.
func (u *upload) close() { u.closing.Do(u.stop) }

func (u *upload) stop() {
	close(u.end)
	if !u.read.Load() {
		_ = u.control.SetReadDeadline(time.Unix(1, 0)) // ends a read that hangs
	}
	u.wg.Wait()
	if !u.whole() { // net/http looks for the end of the body, and must not do so for ever
		_ = u.control.SetReadDeadline(time.Now().Add(drainTimeout))
	}
}

// accepted are the media types of a bare body; any text is accepted, too.
var accepted = []string{"application/octet-stream", "application/x-www-form-urlencoded", "application/json",
	"application/x-ndjson", "application/ndjson", "application/xml", "multipart/form-data", "text/*"}

// begin finds the input in the body, and takes parameters from the fields of a
// form that come before it.
func (u *upload) begin(r *http.Request, ps params) *wire.Problem {
	if e := strings.Join(r.Header.Values("Content-Encoding"), ", "); e != "" && !strings.EqualFold(e, "identity") {
		return wire.Refuse(http.StatusUnsupportedMediaType, "encoding_not_supported",
			fmt.Sprintf("Content-Encoding %q is not accepted; send the input as it is", wire.Cut(e)))
	}
	kind := r.Header.Get("Content-Type")
	if kind == "" {
		if r.ContentLength == 0 {
			return wire.Refuse(http.StatusBadRequest, "missing_input",
				"there is no input; send it as the body (curl --data-binary @FILE) or as the form field file (curl -F file=@FILE)")
		}
		kind = "application/octet-stream"
	}
	media, attrs, err := mime.ParseMediaType(kind)
	if err != nil || !slices.Contains(accepted, media) && !strings.HasPrefix(media, "text/") {
		return wire.Refuse(http.StatusUnsupportedMediaType, "media_type_not_supported",
			fmt.Sprintf("Content-Type %q is not accepted; accepted are %s", wire.Cut(kind), strings.Join(accepted, ", "))).Within(accepted)
	}
	if u.body == nil {
		return u.err.(*wire.Problem)
	}
	if media == "multipart/form-data" {
		return u.form(multipart.NewReader(raw{u}, attrs["boundary"]), attrs["boundary"], ps)
	}
	u.src = raw{u}
	u.length = u.total
	return nil
}

func badForm(err error) *wire.Problem {
	if p, ok := errors.AsType[*wire.Problem](err); ok {
		return p
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, "the form was cut; send it again")
	}
	return wire.Refuse(http.StatusBadRequest, "bad_multipart", fmt.Sprintf("the form cannot be read: %v", err))
}

// form finds the file among the parts of a form.
func (u *upload) form(parts *multipart.Reader, boundary string, ps params) *wire.Problem {
	if boundary == "" {
		return wire.Refuse(http.StatusBadRequest, "bad_multipart", "Content-Type multipart/form-data has no boundary")
	}
	var names []string
	for n := 1; ; n++ {
		part, err := parts.NextRawPart()
		if err == io.EOF {
			found := "none"
			if len(names) > 0 {
				found = strings.Join(names[:min(len(names), 10)], ", ")
			}
			return wire.Refuse(http.StatusBadRequest, "missing_input",
				fmt.Sprintf("the form has no field %s with a file; its fields are: %s", strings.Join(fileFields, " or "), found))
		}
		if err != nil {
			return badForm(err)
		}
		if n > maxParts {
			return tooManyParts()
		}
		name := part.FormName()
		if slices.Contains(fileFields, name) {
			u.src = &filePart{body: raw{u}, part: part, parts: parts, n: n}
			u.length = -1
			return nil
		}
		names = append(names, fmt.Sprintf("%q", wire.Cut(name)))
		if part.FileName() != "" || !slices.Contains(parameters, name) {
			continue // told if there is no file
		}
		value, err := io.ReadAll(io.LimitReader(part, maxField+1))
		if err != nil {
			return badForm(err)
		}
		if len(value) > maxField {
			return bad(name, "form field %s is over %d bytes", name, maxField)
		}
		if p := ps.set(name, string(value)); p != nil {
			return p
		}
	}
}

func tooManyParts() *wire.Problem {
	return wire.Refuse(http.StatusRequestEntityTooLarge, "too_many_parts",
		fmt.Sprintf("the form has more than %d parts", maxParts)).Within(maxParts)
}

// filePart reads the file of a form, and at its end what follows it: nothing
// may that would change the job.
type filePart struct {
	body  io.Reader // that holds the form
	part  *multipart.Part
	parts *multipart.Reader
	n     int
	err   error
}

func (f *filePart) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.part.Read(p)
	if err == io.EOF {
		err = f.rest()
	} else if err != nil {
		err = badForm(err)
	}
	f.err = err
	return n, err
}

// rest returns io.EOF when the form ends as it should, and the body with it.
func (f *filePart) rest() error {
	for {
		part, err := f.parts.NextRawPart()
		if err == io.EOF {
			if _, err := io.Copy(io.Discard, f.body); err != nil {
				return err
			}
			return io.EOF
		}
		if err != nil {
			return badForm(err)
		}
		if f.n++; f.n > maxParts {
			return tooManyParts()
		}
		switch name := part.FormName(); {
		case slices.Contains(fileFields, name):
			return wire.Refuse(http.StatusBadRequest, "too_many_inputs", "the form has more than one file; send one job for each")
		case slices.Contains(parameters, name):
			return bad(name, "form field %s comes after the file, and must come before it", name)
		}
	}
}
