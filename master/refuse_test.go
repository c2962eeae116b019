package master_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/master"
)

// TestBadInput goes through the bad inputs that a master can meet: each is
// refused with a sentence, and the next job works.
func TestBadInput(t *testing.T) {
	const maxInput = 300_000
	s := three(t, func(h *master.Handler) {
		h.MaxInput, h.MaxBlock, h.MaxBlocks, h.MaxWorkers = maxInput, 1<<20, 100, 50
		h.Patience = 300 * time.Millisecond
	})
	in := thesisText()
	long := strings.Repeat("v", 3000)
	formOf := func(fields ...field) [2]string {
		body, header := form(t, fields...)
		return [2]string{body, header}
	}
	file := field{"file", "f", in}
	good := formOf(file)
	unclosed, _, _ := strings.Cut(good[0], in)
	boundary := strings.TrimPrefix(good[1], "Content-Type: multipart/form-data; boundary=")
	parts := make([]field, 1000)
	for i := range parts {
		parts[i] = field{"x", "", "y"}
	}
	many := formOf(append(parts, file)...)
	manyAfter := formOf(append([]field{file}, parts...)...)
	named := func(disposition string) [2]string {
		return [2]string{"--B\r\nContent-Disposition: " + disposition + "\r\n\r\na b\r\n--B--\r\n", "Content-Type: multipart/form-data; boundary=B"}
	}
	post := func(head, body string) string {
		return "POST / HTTP/1.1\r\nHost: m\r\n" + head + "\r\n\r\n" + body
	}
	for _, c := range []struct {
		name    string
		method  string    // POST when empty
		target  string    // path and query
		form    [2]string // body and Content-Type header; in, with none, when empty
		headers []string
		raw     string // sent instead of all that
		end     bool   // of sending, after raw

		status int
		code   string
		param  string
		says   []string
	}{
		// B1 to B8: where the input is.
		{name: "no body", raw: post("Content-Length: 0", ""), status: 400, code: "missing_input", says: []string{"file"}},
		{name: "no file part", form: formOf(field{"note", "", "x"}), status: 400, code: "missing_input", says: []string{`"note"`, "file"}},
		{name: "form of nothing", form: [2]string{"--B--\r\n", "Content-Type: multipart/form-data; boundary=B"}, status: 400, code: "missing_input", says: []string{"none"}},
		{name: "form without boundary", form: [2]string{in, "Content-Type: multipart/form-data"}, status: 400, code: "bad_multipart", says: []string{"boundary"}},
		{name: "not a form", form: [2]string{in, "Content-Type: multipart/form-data; boundary=B"}, status: 400, code: "bad_multipart"},
		{name: "a form of one long line", form: [2]string{strings.Repeat("x", 9000), "Content-Type: multipart/form-data; boundary=B"}, status: 400, code: "bad_multipart"},
		{name: "wrong field name", form: formOf(field{"upload", "f", in}), status: 400, code: "missing_input", says: []string{`"upload"`, "myfile"}},
		{name: "two files", form: formOf(file, file), status: 400, code: "too_many_inputs", says: []string{"one"}},
		{name: "file and myfile", form: formOf(file, field{"myfile", "f", in}), status: 400, code: "too_many_inputs"},
		{name: "1001 parts before the file", form: many, status: 413, code: "too_many_parts", says: []string{"1000"}},
		{name: "1001 parts after the file", form: manyAfter, status: 413, code: "too_many_parts", says: []string{"1000"}},
		{name: "NUL in the file name", form: named("form-data; name=\"file\"; filename=\"a\x00b\""), status: 400, code: "bad_multipart"},
		{name: "parameter after the file", form: formOf(file, field{"block", "", "10"}), status: 400, code: "bad_parameter", param: "block", says: []string{"after"}},
		{name: "parameter in field and query", target: "/?block=10", form: formOf(field{"block", "", "10"}, file), status: 400, code: "bad_parameter", param: "block", says: []string{"twice"}},
		{name: "a long field", form: formOf(field{"block", "", strings.Repeat("1", 5000)}, file), status: 400, code: "bad_parameter", param: "block", says: []string{"4096"}},
		{name: "a bad field", form: formOf(field{"block", "", "abc"}, file), status: 400, code: "bad_parameter", param: "block", says: []string{`"abc"`}},

		// B9 to B12: how the input comes.
		{name: "Content-Length over max_input", raw: post("Content-Length: 99999999999", ""), status: 413, code: "input_too_large", says: []string{"300000", "max_input"}},
		{name: "Content-Length a little over max_input", raw: post("Content-Length: 300001", "some"), status: 413, code: "input_too_large", says: []string{"300000"}},
		{name: "Content-Length over max_input, 100-continue", raw: post("Content-Length: 300001\r\nExpect: 100-continue", ""), status: 413, code: "input_too_large"},
		{name: "chunked over max_input", raw: post("Transfer-Encoding: chunked", "493e1\r\n"+strings.Repeat("y ", 150_001)), status: 413, code: "input_too_large", says: []string{"300000"}},
		{name: "form over max_input", form: formOf(field{"file", "f", strings.Repeat("y ", 150_001)}), status: 413, code: "input_too_large"},
		{name: "body shorter than Content-Length", raw: post("Content-Length: 1000", "a b c\n"), end: true, status: 400, code: "truncated_upload", says: []string{"6 bytes"}},
		{name: "form shorter than Content-Length", raw: post("Content-Length: 9999\r\n"+good[1], good[0][:len(good[0])-40]), end: true, status: 400, code: "truncated_upload"},
		{name: "form that ended, body that did not", raw: post("Content-Length: 9999\r\n"+good[1], good[0]), end: true, status: 400, code: "truncated_upload"},
		{name: "form without closing boundary", form: [2]string{unclosed + in, good[1]}, status: 400, code: "truncated_upload"},
		{name: "form cut in the boundary", form: [2]string{unclosed + in + "\r\n--" + boundary[:20], good[1]}, status: 400, code: "truncated_upload"},
		{name: "bare line feed as chunk framing", raw: post("Transfer-Encoding: chunked", "5\nhello\n0\n\n"), status: 400, code: "truncated_upload"},
		{name: "damaged chunk size", raw: post("Transfer-Encoding: chunked", "5\r\nhello\r\nzz\r\n"), status: 400, code: "truncated_upload", says: []string{"5 bytes"}},
		{name: "chunks without an end", raw: post("Transfer-Encoding: chunked", "5\r\nhello\r\n"), end: true, status: 400, code: "truncated_upload"},
		{name: "an upload that stalls", raw: post("Content-Length: 1000", "a b c\n"), status: 408, code: "upload_too_slow", says: []string{"300ms", "read_timeout"}},
		{name: "a form that stalls", raw: post("Content-Length: 9999\r\n"+good[1], unclosed), status: 408, code: "upload_too_slow", says: []string{"read_timeout"}},
		{name: "a form that stalls after its end", raw: post("Content-Length: 9999\r\n"+good[1], good[0]), status: 408, code: "upload_too_slow"},

		// B17 to B24: what is asked.
		{name: "long URL", target: "/?block=" + strings.Repeat("1", 8200), status: 414, code: "uri_too_long", says: []string{"8192"}},
		{name: "content type", headers: []string{"Content-Type: image/png"}, status: 415, code: "media_type_not_supported", says: []string{`"image/png"`, "text/*"}},
		{name: "content type that is none", headers: []string{"Content-Type: ;;"}, status: 415, code: "media_type_not_supported"},
		{name: "multipart of another kind", headers: []string{"Content-Type: multipart/mixed; boundary=B"}, status: 415, code: "media_type_not_supported"},
		{name: "long content type", headers: []string{"Content-Type: x/" + long}, status: 415, code: "media_type_not_supported"},
		{name: "gzip", headers: []string{"Content-Encoding: gzip"}, status: 415, code: "encoding_not_supported", says: []string{`"gzip"`}},
		{name: "br", headers: []string{"Content-Encoding: br"}, status: 415, code: "encoding_not_supported"},
		{name: "two layers", headers: []string{"Content-Encoding: gzip, gzip"}, status: 415, code: "encoding_not_supported"},
		{name: "two layers, the first one none", headers: []string{"Content-Encoding: identity", "Content-Encoding: gzip"}, status: 415, code: "encoding_not_supported"},
		{name: "accept", headers: []string{"Accept: image/png"}, status: 406, code: "not_acceptable", says: []string{`"image/png"`, "text/plain"}},
		{name: "long accept", headers: []string{"Accept: x/" + long}, status: 406, code: "not_acceptable"},
		{name: "GET", method: "GET", status: 405, code: "method_not_allowed", says: []string{"POST", "GET"}},
		{name: "PUT", method: "PUT", status: 405, code: "method_not_allowed"},
		{name: "DELETE", method: "DELETE", status: 405, code: "method_not_allowed"},
		{name: "OPTIONS", method: "OPTIONS", status: 405, code: "method_not_allowed"},
		{name: "a method nobody knows", method: strings.Repeat("X", 3000), status: 405, code: "method_not_allowed"},
		{name: "unknown path", target: "/jobs", status: 404, code: "not_found", says: []string{`"/jobs"`}},
		{name: "path with dots", target: "/../etc/passwd", status: 404, code: "not_found"},
		{name: "escaped path", target: "/%2e%2e%2fworker", status: 404, code: "not_found"},
		{name: "long path", target: "/" + long, status: 404, code: "not_found"},
		{name: "unknown path while sending", raw: "POST /x HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\nabc", status: 404, code: "not_found"},
		{name: "wrong method while sending", raw: "PUT / HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\nabc", status: 405, code: "method_not_allowed"},
		{name: "bad parameter while sending", raw: "POST /?block=0 HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\nabc", status: 422, code: "out_of_range", param: "block"},
		{name: "query that cannot be read", target: "/?block=%zz", status: 400, code: "bad_parameter", says: []string{"query"}},
		{name: "query with a semicolon", target: "/?block=1;split=bytes", status: 400, code: "bad_parameter"},
		{name: "unknown parameter", target: "/?blok=300", status: 400, code: "bad_parameter", param: "blok", says: []string{`"blok"`, "block"}},
		{name: "parameter twice", target: "/?block=1&block=2", status: 400, code: "bad_parameter", param: "block", says: []string{"twice"}},
		{name: "of two faults always the first by name", target: "/?zz=1&yy=1&xx=1", status: 400, code: "bad_parameter", param: "xx"},

		// B27 to B31: block size, split, delimiter.
		{name: "block abc", target: "/?block=abc", status: 400, code: "bad_parameter", param: "block", says: []string{`"abc"`}},
		{name: "block empty", target: "/?block=", status: 400, code: "bad_parameter", param: "block"},
		{name: "block 1.5", target: "/?block=1.5", status: 400, code: "bad_parameter", param: "block"},
		{name: "block 1e400", target: "/?block=1e400", status: 400, code: "bad_parameter", param: "block"},
		{name: "block long", target: "/?block=" + long, status: 400, code: "bad_parameter", param: "block"},
		{name: "block 0", target: "/?block=0", status: 422, code: "out_of_range", param: "block", says: []string{`"0"`, "1", "1048576"}},
		{name: "block -1", target: "/?block=-1", status: 422, code: "out_of_range", param: "block"},
		{name: "block 2^63", target: "/?block=9223372036854775808", status: 422, code: "out_of_range", param: "block"},
		{name: "block 9e18 kB", target: "/?block=9000000000000000000kB", status: 422, code: "out_of_range", param: "block"},
		{name: "block over max_block", target: "/?block=1048577", status: 422, code: "out_of_range", param: "block", says: []string{"1048576"}},
		{name: "too many blocks of bytes", target: "/?block=16&split=bytes", status: 422, code: "too_many_blocks", param: "block", says: []string{"104", "100", "block=17"}},
		{name: "too many blocks of lines", target: "/?block=1", headers: []string{}, form: [2]string{strings.Repeat("a\n", 101), "Content-Type: text/plain"}, status: 422, code: "too_many_blocks", param: "block", says: []string{"100", "block="}},
		{name: "too many blocks of a form", target: "/?block=1&split=bytes", form: good, status: 422, code: "too_many_blocks", param: "block", says: []string{"larger"}},
		{name: "unknown split", target: "/?split=words", status: 422, code: "unknown_split", param: "split", says: []string{`"words"`, "lines, bytes"}},
		{name: "empty split", target: "/?split=", status: 422, code: "unknown_split", param: "split"},
		{name: "delimiter empty", target: "/?split=records&delimiter=", status: 422, code: "bad_delimiter", param: "delimiter", says: []string{"1 to 16"}},
		{name: "delimiter of 17 bytes", target: "/?split=records&delimiter=01234567890123456", status: 422, code: "bad_delimiter", param: "delimiter", says: []string{"16"}},
		{name: "delimiter, bad escape", target: "/?split=records&delimiter=%5Cq", status: 422, code: "bad_delimiter", param: "delimiter"},
		{name: "delimiter, cut escape", target: "/?split=records&delimiter=%5Cx4", status: 422, code: "bad_delimiter", param: "delimiter"},
		{name: "delimiter, escape without end", target: "/?split=records&delimiter=a%5C", status: 422, code: "bad_delimiter", param: "delimiter"},
		{name: "delimiter of csv, two bytes", target: "/?split=csv&delimiter=ab", status: 422, code: "bad_delimiter", param: "delimiter"},
		{name: "delimiter of csv, a quote", target: "/?split=csv&delimiter=%22", status: 422, code: "bad_delimiter", param: "delimiter"},
		{name: "delimiter of lines", target: "/?delimiter=x", status: 400, code: "bad_parameter", param: "delimiter"},

		// B39 to B44: workers, function, timeout, and the other words.
		{name: "workers 0", target: "/?workers=0", status: 422, code: "out_of_range", param: "workers", says: []string{`"0"`, "50"}},
		{name: "workers -1", target: "/?workers=-1", status: 422, code: "out_of_range", param: "workers"},
		{name: "workers 1000000", target: "/?workers=1000000", status: 422, code: "out_of_range", param: "workers"},
		{name: "workers 2^64", target: "/?workers=18446744073709551616", status: 422, code: "out_of_range", param: "workers"},
		{name: "workers many", target: "/?workers=many", status: 400, code: "bad_parameter", param: "workers"},
		{name: "workers empty", target: "/?workers=", status: 400, code: "bad_parameter", param: "workers"},
		{name: "function with a path", target: "/?function=w/../admin", status: 422, code: "bad_function_name", param: "function", says: []string{`"w/../admin"`, "63"}},
		{name: "function with an escaped path", target: "/?function=%2e%2e%2fadmin", status: 422, code: "bad_function_name", param: "function"},
		{name: "function with a space", target: "/?function=a%20b", status: 422, code: "bad_function_name", param: "function"},
		{name: "function in upper case", target: "/?function=Worker", status: 422, code: "bad_function_name", param: "function"},
		{name: "function of 64", target: "/?function=" + strings.Repeat("a", 64), status: 422, code: "bad_function_name", param: "function"},
		{name: "function with a hyphen first", target: "/?function=-a", status: 422, code: "bad_function_name", param: "function"},
		{name: "function with a hyphen last", target: "/?function=a-", status: 422, code: "bad_function_name", param: "function"},
		{name: "function empty", target: "/?function=", status: 422, code: "bad_function_name", param: "function"},
		{name: "function with two dots", target: "/?function=a.b.c", status: 422, code: "bad_function_name", param: "function"},
		{name: "function with a line feed", target: "/?function=worker%0A", status: 422, code: "bad_function_name", param: "function"},
		{name: "function with a query", target: "/?function=a%3Fb%3Dc", status: 422, code: "bad_function_name", param: "function"},
		{name: "the master itself", target: "/?function=master", status: 422, code: "depth_exceeded", param: "function", says: []string{`"master"`}},
		{name: "the master itself with its namespace", target: "/?function=master.openfaas-fn", status: 422, code: "depth_exceeded", param: "function"},
		{name: "another namespace", target: "/?function=worker.kube-system", status: 403, code: "namespace_not_allowed", param: "function", says: []string{`"kube-system"`, "openfaas-fn"}},
		{name: "timeout 5", target: "/?timeout=5", status: 400, code: "bad_parameter", param: "timeout", says: []string{`"5"`, "30s"}},
		{name: "timeout NaN", target: "/?timeout=NaN", status: 400, code: "bad_parameter", param: "timeout"},
		{name: "timeout empty", target: "/?timeout=", status: 400, code: "bad_parameter", param: "timeout"},
		{name: "timeout -5s", target: "/?timeout=-5s", status: 422, code: "out_of_range", param: "timeout", says: []string{"1ms", "24h"}},
		{name: "timeout 0s", target: "/?timeout=0s", status: 422, code: "out_of_range", param: "timeout"},
		{name: "timeout 1000h", target: "/?timeout=1000h", status: 422, code: "out_of_range", param: "timeout"},
		{name: "route", target: "/?route=carrier-pigeon", status: 422, code: "unknown_route", param: "route", says: []string{"direct"}},
		{name: "route that is not there", target: "/?route=gateway", status: 422, code: "unknown_route", param: "route", says: []string{"direct"}},
		{name: "verify", target: "/?verify=maybe", status: 422, code: "unknown_verify", param: "verify"},
		{name: "output", target: "/?output=xml", status: 422, code: "unknown_output", param: "output", says: []string{`"xml"`, "json"}},

		// What a splitter meets.
		{name: "csv with an open quote", target: "/?split=csv", form: [2]string{"a,b\n\"c,d\n", "Content-Type: text/csv"}, status: 422, code: "malformed_input", says: []string{"byte 4", "quote"}},
		{name: "json that is cut", target: "/?split=json", form: [2]string{"{\"a\":1}\n{\"b\":", "Content-Type: application/json"}, status: 422, code: "malformed_input", says: []string{"byte 8"}},
		{name: "json array without an end", target: "/?split=json", form: [2]string{"[1,2", "Content-Type: application/json"}, status: 422, code: "malformed_input"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var a answer
			if c.raw != "" {
				begun := time.Now()
				conn := s.dial(t, c.raw)
				if c.end {
					if err := conn.CloseWrite(); err != nil {
						t.Fatal(err)
					}
				}
				a = receive(t, conn)
				if d := time.Since(begun); d > 1500*time.Millisecond {
					t.Errorf("the refusal took %v", d)
				}
				if err := conn.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ENOTCONN) {
					t.Fatal(err)
				}
				ended(t, conn)
			} else {
				body, headers := in, c.headers
				if c.form[1] != "" {
					body, headers = c.form[0], []string{c.form[1]}
				}
				if c.method == "" {
					c.method = http.MethodPost
				}
				req, err := http.NewRequestWithContext(t.Context(), c.method, s.url, strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if c.target != "" {
					req.URL.Opaque = c.target // as it stands, not cleaned
				}
				for _, h := range headers {
					name, value, _ := strings.Cut(h, ": ")
					req.Header.Add(name, value)
				}
				resp, err := s.client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				if a, err = read(resp); err != nil {
					t.Fatal(err)
				}
			}
			p := refused(t, a, c.status, c.code, c.says...)
			if p.Param != c.param && c.param != "" {
				t.Errorf("param is %q, want %q", p.Param, c.param)
			}
			if c.status == http.StatusMethodNotAllowed && a.header.Get("Allow") != "POST" {
				t.Errorf("Allow is %q", a.header.Get("Allow"))
			}
			s.works(t)
		})
	}
}

// ended checks that a connection ends and brings no second answer.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	rest, err := io.ReadAll(c)
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		t.Errorf("the connection stays open")
	}
	if strings.Contains(string(rest), "HTTP/1.1") {
		t.Errorf("a second answer came: %q", rest)
	}
}

// What net/http itself refuses, or pins, before the master sees it.
func TestFraming(t *testing.T) {
	s := three(t)
	for _, c := range []struct {
		name, raw string
		status    int
	}{
		{"two Content-Lengths", "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400},
		{"negative Content-Length", "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: -1\r\n\r\n", 400},
		{"Content-Length 1e3", "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 1e3\r\n\r\n", 400},
		{"space before a colon", "POST / HTTP/1.1\r\nHost: m\r\nContent-Length : 3\r\n\r\nabc", 400},
		{"no Host", "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 400},
		{"Transfer-Encoding xchunked", "POST / HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: xchunked\r\n\r\n", 501},
		{"Content-Length and chunks", "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n3\r\na b\r\n0\r\n\r\n", 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			if a := receive(t, s.dial(t, c.raw)); a.status != c.status {
				t.Errorf("answer is %d %q, want %d", a.status, a.body, c.status)
			}
			s.works(t)
		})
	}
}

// A client that drips stays connected, and is refused all the same.
func TestSlowDrip(t *testing.T) {
	s := three(t, func(h *master.Handler) { h.Patience = 200 * time.Millisecond })
	c := s.dial(t, "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 100000\r\n\r\n")
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				if _, err := c.Write([]byte("x")); err != nil {
					return
				}
			}
		}
	}()
	begun := time.Now()
	refused(t, receive(t, c), http.StatusRequestTimeout, "upload_too_slow", "200ms", "1 KiB a second")
	if d := time.Since(begun); d > 2*time.Second {
		t.Errorf("the refusal took %v", d)
	}
	ended(t, c)
	close(stop)
	<-stopped
	s.works(t)
}

// What has come does not buy the time to stall: a fast start, then nothing.
func TestStallAfterMuch(t *testing.T) {
	s := three(t, func(h *master.Handler) { h.Patience = 300 * time.Millisecond })
	c := s.dial(t, "POST /?block=64KiB HTTP/1.1\r\nHost: m\r\nContent-Length: 100000000\r\n\r\n"+strings.Repeat("a b\n", 256<<10))
	begun := time.Now()
	refused(t, receive(t, c), http.StatusRequestTimeout, "upload_too_slow")
	if d := time.Since(begun); d > 3*time.Second {
		t.Errorf("a stall was taken for %v, and may last 300ms", d)
	}
}

// A client that sends all before it reads comes to read the refusal.
func TestRefusalOfALargeUpload(t *testing.T) {
	s := three(t)
	body := strings.Repeat("a b\n", 1<<20) // 4 MiB
	for _, c := range []struct {
		query, code string
		status      int
	}{{"/?block=0", "out_of_range", 422}, {"/?function=master", "depth_exceeded", 422}} {
		conn := s.dial(t, fmt.Sprintf("POST %s HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n%s", c.query, len(body), body))
		refused(t, receive(t, conn), c.status, c.code)
	}
	s.works(t)
}
