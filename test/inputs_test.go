package test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// bad is one bad input, and what must come of it.
type bad struct {
	row  string // of the catalogue of inputs
	name string
	send func(*rig) said // as it comes in
	code int             // HTTP status, or exit code
	err  string          // the code of the refusal; "" where there is none
	says []string        // parts of the sentence
}

// rig is what inputs are sent to.
type rig struct {
	t      *testing.T
	front  string // URL
	worker string // URL of a replica
	nats   *nats.Conn
	keys   string // folder with files of keys
}

// problem is a refusal, as it must look.
type problem struct {
	Type, Title, Code, Detail, Param, Job string
	Status                                int
	Limit                                 any
}

// post is a request to a path of the front. Headers are name, value, ...
func post(path, body string, header ...string) func(*rig) said {
	return call(http.MethodPost, path, body, header...)
}

func call(method, path, body string, header ...string) func(*rig) said {
	return func(r *rig) said { return r.http(r.front, method, path, body, header...) }
}

// straight is a request to the worker's own address.
func straight(method, path, body string, header ...string) func(*rig) said {
	return func(r *rig) said { return r.http(r.worker, method, path, body, header...) }
}

func (r *rig) http(base, method, path, body string, header ...string) said {
	req, err := http.NewRequestWithContext(r.t.Context(), method, base, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.URL.Opaque = path // as it stands, not cleaned
	for i := 0; i < len(header); i += 2 {
		if header[i+1] == "" {
			req.Header[header[i]] = nil
			continue
		}
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.answered(resp, answer)
}

func (r *rig) answered(resp *http.Response, body []byte) said {
	s := said{code: resp.StatusCode, out: string(body)}
	if resp.StatusCode >= 400 && strings.HasPrefix(resp.Header.Get("Content-Type"), wire.ContentType) {
		s.err = string(body)
	}
	if resp.StatusCode == http.StatusMethodNotAllowed && resp.Header.Get("Allow") == "" {
		r.t.Error("405 without Allow")
	}
	return s
}

// raw sends bytes to the front, or to the worker, and waits.
func raw(where, text string) func(*rig) said { return sent(where, text, false) }

// cut sends bytes, and says that no more come.
func cut(where, text string) func(*rig) said { return sent(where, text, true) }

func sent(where, text string, cut bool) func(*rig) said {
	return func(r *rig) said {
		base := r.front
		if where == "worker" {
			base = r.worker
		}
		c, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			r.t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		_, _ = io.WriteString(c, text) // it may be refused before its end
		if cut {
			_ = c.(*net.TCPConn).CloseWrite()
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			r.t.Fatalf("no answer: %v", err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body) // the connection may break behind the answer
		return r.answered(resp, body)
	}
}

// typed is a command line; FILE stands for a file.
func typed(stdin string, args ...string) func(*rig) said {
	return func(r *rig) said {
		list := append([]string(nil), args...)
		for i, a := range list {
			if a == "FILE" {
				list[i] = filepath.Join(r.keys, "input")
			}
		}
		return cli(r.t, stdin, list...)
	}
}

// env is a function that is started in an environment that it cannot use.
func env(function string, vars ...string) func(*rig) said {
	return func(r *rig) said {
		cmd := exec.CommandContext(r.t.Context(), binary, "function", function)
		cmd.Env = []string{"secret_mount_path=" + r.keys, "sheaf_listen=127.0.0.1:0", "nats_url=nats://127.0.0.1:1"}
		for i := 0; i < len(vars); i += 2 {
			cmd.Env = append(cmd.Env, vars[i]+"="+vars[i+1])
		}
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		code := 0
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			code = e.ExitCode()
		} else if err != nil {
			r.t.Fatal(err)
		}
		return said{code: code, out: out.String(), err: errs.String()}
	}
}

// message is a request to a topic.
func message(topic, body string, header ...string) func(*rig) said {
	return func(r *rig) said {
		m := &nats.Msg{Subject: topic, Data: []byte(body), Header: nats.Header{}}
		for i := 0; i < len(header); i += 2 {
			m.Header.Set(header[i], header[i+1])
		}
		a, err := r.nats.RequestMsg(m, 30*time.Second)
		if err != nil {
			return said{err: err.Error(), out: err.Error()}
		}
		return said{out: string(a.Data), err: a.Header.Get("Sheaf-Code")}
	}
}

const b61, b62 = "0123456789012345678901234567890123456789012345678901234567890", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// form is a multipart body with its header.
func form(parts ...string) (body string, header []string) {
	for _, p := range parts {
		disposition, content, _ := strings.Cut(p, "|")
		body += "--B\r\nContent-Disposition: form-data; " + disposition + "\r\n\r\n" + content + "\r\n"
	}
	return body + "--B--\r\n", []string{"Content-Type", "multipart/form-data; boundary=B"}
}

func zipped(text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, text)
	_ = z.Close()
	return b.String()
}

// badInputs is the table. Of an HTTP refusal the status, the code and the form
// are checked, and that the sentence says what stands here; of a command or an
// environment the exit code and one line; of a message the code of the answer.
func badInputs() []bad {
	const master, small, jobs = "/function/master", "/function/small", "/function/master/jobs"
	long := strings.Repeat("v", 3000)
	var all []bad
	add := func(row, name string, send func(*rig) said, code int, err string, says ...string) {
		all = append(all, bad{row, name, send, code, err, says})
	}
	asForm := func(path string, parts ...string) func(*rig) said {
		body, header := form(parts...)
		return post(path, body, header...)
	}
	const file = `name="file"; filename="f"|a b`

	// B1 to B8: where the input is.
	add("B1", "no body", post(master, ""), 400, "missing_input", "file")
	add("B1", "a form of nothing", post(master, "--B--\r\n", "Content-Type", "multipart/form-data; boundary=B"), 400, "missing_input", "none")
	add("B2", "a file of no bytes", asForm(master, `name="file"; filename="f"|`), 200, "")
	add("B3", "a form without boundary", post(master, "a b", "Content-Type", "multipart/form-data"), 400, "bad_multipart", "boundary")
	add("B3", "a form that is none", post(master, "a b", "Content-Type", "multipart/form-data; boundary=B"), 400, "bad_multipart")
	add("B4", "another field", asForm(master, `name="upload"; filename="f"|a`), 400, "missing_input", `"upload"`)
	add("B4", "a field that is no file", asForm(master, `name="note"|a`), 400, "missing_input", `"note"`)
	add("B5", "two files", asForm(master, file, file), 400, "too_many_inputs", "one")
	add("B5", "file and myfile", asForm(master, file, `name="myfile"; filename="f"|a`), 400, "too_many_inputs")
	add("B6", "1,001 parts", asForm(master, append(strings.Split(strings.Repeat(`name="x"|y#`, 1000), "#")[:1000], file)...), 413, "too_many_parts", "1000")
	add("B7", "NUL in a file name", asForm(master, "name=\"file\"; filename=\"a\x00b\"|a b"), 400, "bad_multipart")
	for _, name := range []string{"../../etc/passwd", `..\\..\\x`, "..", "/etc/passwd", "\u202eexe.txt", strings.Repeat("n", 5000), "%00", "C:\\\\x", "a/../../b"} {
		add("B8", "file name "+name[:min(12, len(name))], asForm(master, `name="file"; filename="`+name+`"|a b a`), 200, "", "a 2")
	}

	// B9 to B16: how it comes.
	head := func(path, headers, body string) string {
		return "POST " + path + " HTTP/1.1\r\nHost: m\r\n" + headers + "\r\n\r\n" + body
	}
	add("B9", "a length over max_input", raw("", head(small, "Content-Length: 99999999999", "")), 413, "input_too_large", "300000", "max_input")
	add("B9", "a length 1 over max_input", post(small, strings.Repeat("x", 300_001)), 413, "input_too_large", "300000")
	add("B10", "chunks over max_input", raw("", head(small, "Transfer-Encoding: chunked", "493e2\r\n"+strings.Repeat("y ", 150_001)+"\r\n0\r\n\r\n")), 413, "input_too_large", "300000")
	add("B11", "a body that is cut", cut("", head(master, "Content-Length: 1000", "a b c\n")), 400, "truncated_upload", "master")
	add("B11", "a worker's block that is cut", cut("worker", head("/", "Content-Length: 1000", "a b c\n")), 400, "truncated_upload")
	add("B12", "bare line feeds between chunks", raw("", head(master, "Transfer-Encoding: chunked", "5\nhello\n0\n\n")), 400, "truncated_upload")
	add("B12", "a chunk size that is none", raw("", head(master, "Transfer-Encoding: chunked", "5\r\nhello\r\nzz\r\n")), 400, "truncated_upload", "master")
	add("B12", "chunks without an end", cut("", head(master, "Transfer-Encoding: chunked", "5\r\nhello\r\n")), 400, "truncated_upload")
	add("B13", "a length beside chunks", raw("", head(master, "Content-Length: 99\r\nTransfer-Encoding: chunked", "3\r\na b\r\n0\r\n\r\n")), 200, "")
	for _, where := range []string{"front", "worker"} {
		for name, h := range map[string]string{"two lengths": "Content-Length: 3\r\nContent-Length: 4", "a negative length": "Content-Length: -1", "a length 1e3": "Content-Length: 1e3",
			"a blank before a colon": "Content-Length : 3", "a signed length": "Content-Length: +3", "two hosts": "Host: n\r\nContent-Length: 0"} {
			add("B14", name+" at the "+where, raw(where, head("/", h, "abcd")), 400, "")
		}
		add("B14", "no host at the "+where, raw(where, "POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), 400, "")
		add("B15", "an encoding that is none at the "+where, raw(where, head("/", "Transfer-Encoding: xchunked", "")), 501, "")
		add("B16", "2 MiB of headers at the "+where, raw(where, head("/", "X: "+strings.Repeat("x", 2<<20)+"\r\nContent-Length: 0", "")), 431, "")
	}

	// B17 to B24: what is asked.
	add("B17", "a URL of 8 KiB and more", post(master+"?block="+strings.Repeat("1", 8300), "a"), 414, "uri_too_long", "8192")
	for _, kind := range []string{"image/png", ";;", "multipart/mixed; boundary=B", "x/" + long, "application/x-www-form-urlencoded-not"} {
		add("B18", "type "+kind[:min(20, len(kind))], post(master, "a", "Content-Type", kind), 415, "media_type_not_supported", "text/*")
	}
	for _, coding := range []string{"gzip", "br", "gzip, gzip", "deflate", "zstd", "identity, gzip", "x"} {
		add("B19", "coding "+coding, post(master, zipped("a b"), "Content-Encoding", coding), 415, "encoding_not_supported")
	}
	add("B20", "a gzip bomb", post(master, zipped(strings.Repeat("a", 20<<20)), "Content-Encoding", "gzip"), 415, "encoding_not_supported")
	add("B21", "a cut gzip", post(master, zipped("a b")[:10], "Content-Encoding", "gzip"), 415, "encoding_not_supported")
	for _, accept := range []string{"image/png", "x/" + long, "application/xml, image/*"} {
		add("B22", "accept "+accept[:min(20, len(accept))], post(master, "a", "Accept", accept), 406, "not_acceptable", "text/plain")
	}
	for _, method := range []string{"GET", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		add("B23", method+" the master", call(method, master, ""), 405, "method_not_allowed", "POST")
		add("B23", method+" a worker", straight(method, "/", ""), 405, "method_not_allowed", "POST")
	}
	add("B23", "PUT a job", call("PUT", jobs, ""), 405, "method_not_allowed")
	add("B23", "POST a job's result", call("POST", jobs+"/x/result", ""), 405, "method_not_allowed")
	for _, path := range []string{"/x", "/../etc/passwd", "/%2e%2e%2fworker", "/" + long, "/jobs/x/y"} {
		add("B24", "master "+path[:min(16, len(path))], post(master+path, "a"), 404, "not_found")
	}
	add("B24", "a worker's path", straight("POST", "/x", "a"), 404, "not_found")
	add("B24", "a path of the front", call("GET", "/nowhere", ""), 404, "not_found")

	// B25, B26, B53 to B55: jobs and their keys.
	for _, id := range []string{"..", "..%2f..%2fx", "a%00b", strings.Repeat("i", 65), "a%20b", "%2e%2e", "*", "%3E", "a.b"} {
		add("B25", "job "+id[:min(12, len(id))], call("GET", jobs+"/"+id, ""), 400, "bad_job_id", "64")
	}
	add("B26", "a job that is not there", call("GET", jobs+"/nobody", ""), 404, "job_not_found", "nobody")
	add("B26", "the result of none", call("GET", jobs+"/nobody/result", ""), 404, "job_not_found")
	add("B26", "the events of none", call("GET", jobs+"/nobody/events", ""), 404, "job_not_found")
	add("B26", "cancel none", call("DELETE", jobs+"/nobody", ""), 404, "job_not_found")
	add("B26", "redrive none", call("POST", jobs+"/nobody/redrive", ""), 404, "job_not_found")
	add("B26", "list in an unknown state", call("GET", jobs+"?state=lost", ""), 422, "", "state")
	add("B26", "list no jobs", call("GET", jobs+"?limit=0", ""), 422, "", "limit")
	add("B53", "a key with another body", func(r *rig) said {
		r.http(r.front, "POST", jobs, "one", "Idempotency-Key", "conflict")
		return r.http(r.front, "POST", jobs, "two", "Idempotency-Key", "conflict")
	}, 409, "idempotency_conflict")
	add("B53", "a key with other parameters", func(r *rig) said {
		r.http(r.front, "POST", jobs+"?block=1", "one", "Idempotency-Key", "conflict-2")
		return r.http(r.front, "POST", jobs+"?block=2", "one", "Idempotency-Key", "conflict-2")
	}, 409, "idempotency_conflict")
	add("B53", "an async call's ID with another body", func(r *rig) said {
		r.http(r.front, "POST", "/async-function/worker", "one", "X-Call-Id", "conflict-3")
		return r.http(r.front, "POST", "/async-function/worker", "two", "X-Call-Id", "conflict-3")
	}, 409, "idempotency_conflict")
	add("B54", "the same key and body", func(r *rig) said {
		a := r.http(r.front, "POST", jobs, "same", "Idempotency-Key", "twice")
		b := r.http(r.front, "POST", jobs, "same", "Idempotency-Key", "twice")
		if id := regexp.MustCompile(`"id":"[^"]*"`); a.code != 202 && a.code != 200 || id.FindString(a.out) == "" || id.FindString(a.out) != id.FindString(b.out) {
			r.t.Errorf("%+v\n%+v", a, b)
		}
		return said{code: map[bool]int{true: 200, false: b.code}[b.code == 202 || b.code == 200]}
	}, 200, "")
	for name, key := range map[string]string{"of 256": strings.Repeat("k", 256), "with a letter beyond ASCII": "k\u00e9y", "with a tab": "k\ty"} {
		add("B55", "a key "+name, post(jobs, "a", "Idempotency-Key", key), 400, "bad_parameter", "255")
		add("B55", "an async ID "+name, post("/async-function/worker", "a", "X-Call-Id", key), 400, "bad_parameter", "255")
	}

	// B27 to B31: block size, split, delimiter.
	q := func(row, name, query string, code int, err string, says ...string) {
		add(row, name, post(small+"?"+query, "a b c\nd e f\n"), code, err, says...)
	}
	for _, v := range []string{"abc", "", "1.5", "1e400", "1e3", "0x10", "1%20000", "5x", long} {
		q("B27", "block "+v[:min(10, len(v))], "block="+v, 400, "bad_parameter", "whole number")
	}
	for _, v := range []string{"0", "-1", "9223372036854775808", "1048577", "2MiB", "9000000000000000000kB", "-9223372036854775809"} {
		q("B28", "block "+v, "block="+v, 422, "out_of_range", "1", "1048576")
	}
	add("B29", "too many blocks of bytes", post(small+"?block=16&split=bytes", thesisText()), 422, "too_many_blocks", "100", "block=17")
	add("B29", "too many blocks of lines", post(small+"?block=1", strings.Repeat("a\n", 101)), 422, "too_many_blocks", "100", "block=")
	for _, v := range []string{"words", "", "LINES", "lines,bytes", long} {
		q("B30", "split "+v[:min(10, len(v))], "split="+v, 422, "unknown_split", "lines, bytes")
	}
	for name, v := range map[string]string{"empty": "", "with an unknown escape": "%5Cq", "with a cut escape": "%5Cx4", "that ends in a backslash": "a%5C"} {
		q("B31", "delimiter "+name, "split=records&delimiter="+v, 422, "bad_delimiter", "1 to 16")
	}
	q("B31", "delimiter of 17 bytes", "split=records&delimiter=01234567890123456", 422, "bad_delimiter", "16")
	for name, v := range map[string]string{"two bytes": "ab", "a quote": "%22", "a line feed": "%5Cn"} {
		q("B31", "field separator: "+name, "split=csv&delimiter="+v, 422, "bad_delimiter")
	}
	q("B31", "delimiter of lines", "delimiter=x", 400, "bad_parameter", "records")
	add("B32", "a line of 290 kB", post(small+"?block=300", strings.Repeat("x", 290_000)), 200, "", "1")
	add("B32", "a line of 17 MiB", post(master+"?block=300", "a\n"+strings.Repeat("x", 17<<20)), 422, "record_too_long", "byte 2", "16777216", "split=bytes")
	for name, in := range map[string]string{"NULs": "a\x00b \x00\n", "invalid UTF-8": "\xff\xfe a\xc3\n", "a lone surrogate": "\xed\xa0\x80 a", "a BOM": "\xef\xbb\xbfa b", "UTF-16": "a\x00 \x00b\x00",
		"CRLF": "a b\r\nc\r\n", "lone CRs": "a\rb\rc", "mixed line ends": "a\r\nb\nc\rd", "no last line end": "a b\nc", "only line ends": strings.Repeat("\n", 10_000), "one byte": "x",
		"the block's size": strings.Repeat("x", 7), "one more": strings.Repeat("x", 8), "one less": strings.Repeat("x", 6), "one blank": " "} {
		add("B33-38", name, func(r *rig) said {
			s := r.http(r.front, "POST", master+"?block=7", in)
			if s.out != sequential(in) {
				r.t.Errorf("got %q, want %q", s.out, sequential(in))
			}
			return s
		}, 200, "")
	}
	add("B32", "csv with an open quote", post(master+"?split=csv", "a,b\n\"c,d\n"), 422, "malformed_input", "byte 4")
	add("B32", "json that is cut", post(master+"?split=json", "{\"a\":1}\n{\"b\":"), 422, "malformed_input", "byte 8")
	add("B32", "json without an end", post(master+"?split=json", "[1,2"), 422, "malformed_input")

	// B39 to B44, and the other parameters.
	for _, v := range []string{"0", "-1", "51", "1000000", "18446744073709551616"} {
		q("B39", "workers "+v, "workers="+v, 422, "out_of_range", "50")
	}
	for _, v := range []string{"many", "", "1.5", "1e2"} {
		q("B39", "workers "+v, "workers="+v, 400, "bad_parameter", "workers")
	}
	for _, v := range []string{"w/../admin", "%2e%2e%2fadmin", "a%20b", "Worker", b61 + "abc", "-a", "a-", "", "a.b.c", "worker%0A", "a%3Fb%3Dc", "w%23", "w_x", "%C3%A9"} {
		q("B40", "function "+v[:min(10, len(v))], "function="+v, 422, "bad_function_name", "63")
	}
	for _, v := range []string{"..%2fadmin", "Worker", b62, "a_b", "-a"} {
		add("B40", "deploy "+v[:min(10, len(v))], post("/system/functions", fmt.Sprintf(`{"service":%q,"image":"sheaf/worker"}`, v)), 422, "bad_function_name", "63")
	}
	add("B40", "a path to another function", call("POST", "/function/master/..%2f..%2fworker", "a"), 404, "")
	add("B41", "a function that is not deployed", post(master+"?function=nobody", "a"), 404, "function_not_found", `"nobody"`)
	add("B41", "call one that is not deployed", post("/function/nobody", "a"), 404, "function_not_found", "nobody")
	add("B41", "queue for one that is not deployed", post("/async-function/nobody", "a"), 404, "function_not_found")
	add("B41", "a function without replicas", post("/function/hasty?function=none", "a"), 503, "no_replicas")
	add("B42", "kube-system", post(master+"?function=worker.kube-system", "a"), 403, "namespace_not_allowed", `"kube-system"`, "openfaas-fn")
	add("B42", "another namespace", post(master+"?function=worker.dev", "a"), 403, "namespace_not_allowed")
	add("B43", "the master itself", post(master+"?function=master", "a"), 422, "depth_exceeded", `"master"`)
	add("B43", "the master itself, with its namespace", post(master+"?function=master.openfaas-fn", "a"), 422, "depth_exceeded")
	for _, v := range []string{"5", "NaN", "", "5%20s", "soon", "1h1"} {
		q("B44", "timeout "+v, "timeout="+v, 400, "bad_parameter", "30s")
	}
	for _, v := range []string{"-5s", "0s", "1000h", "25h", "1ns"} {
		q("B44", "timeout "+v, "timeout="+v, 422, "out_of_range", "1ms", "24h")
	}
	q("", "an unknown parameter", "blok=300", 400, "bad_parameter", `"blok"`)
	q("", "a parameter twice", "block=1&block=2", 400, "bad_parameter", "twice")
	q("", "a query that cannot be read", "block=%zz", 400, "bad_parameter", "query")
	q("", "a semicolon", "block=1;split=bytes", 400, "bad_parameter")
	q("", "an unknown route", "route=pigeon", 422, "unknown_route", "direct")
	q("", "an unknown verify", "verify=maybe", 422, "unknown_verify", "require")
	q("", "an unknown output", "output=xml", 422, "unknown_output", "json")
	for _, v := range []string{"x", "1.5", "", "%25"} {
		q("", "tolerate "+v, "tolerate="+v, 400, "bad_parameter", "5%")
	}
	for _, v := range []string{"-1", "101%25"} {
		q("", "tolerate "+v, "tolerate="+v, 422, "out_of_range", "from 0")
	}

	// B45 and B46: callbacks. That names are looked at again is in package local.
	for _, u := range []string{"x", "//h/x", "file:///etc/passwd", "gopher://1.2.3.4/", "ftp://1.2.3.4/", "http://", "http:///x", "http://u:p@1.2.3.4/", "http://1.2.3.4:0/", "http://1.2.3.4:70000/", "javascript:alert(1)"} {
		add("B45", "callback "+u, post("/async-function/worker", "a", "X-Callback-Url", u), 400, "bad_callback_url", "https://example.com/done")
	}
	for _, host := range []string{"169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "[::ffff:10.0.0.1]", "[fc00::1]", "[fe80::1]", "[64:ff9b::a00:1]", "224.0.0.1"} {
		add("B46", "callback to "+host, post("/async-function/worker", "a", "X-Callback-Url", "http://"+host+"/x"), 403, "callback_not_allowed", "allow-list")
	}

	// B49 to B52, B58, B68: signatures, at a worker that takes nothing else.
	strict := "/function/strict"
	mac := strings.Repeat("ab", 32)
	add("B49", "no signature", post(strict, "a"), 401, "signature_missing", "sheaf_key_file")
	add("B58", "a stranger's plain block", post(strict, "a", "Sheaf-Job", "j", "Sheaf-Block", "0"), 401, "signature_missing")
	for name, v := range map[string]string{"wrong": "t=1,n=0123456789abcdef.1,v1=" + mac, "sha1": "sha1=" + mac[:40], "short": "t=1,n=0123456789abcdef.1,v1=ab", "not hexadecimal": "t=1,n=0123456789abcdef.1,v1=" + strings.Repeat("zz", 32),
		"long": long, "another version": "t=1,n=0123456789abcdef.1,v2=" + mac, "the time alone": "t=1"} {
		add("B50", "a signature that is "+name, post(strict, "a", wire.Signature, v), 401, "signature_invalid", "sheaf_key_file")
		add("B50", "at a lax worker, one that is "+name, post("/function/worker", "a", wire.Signature, v), 401, "signature_invalid")
	}
	add("B50", "two signatures", post(strict, "a", wire.Signature, "t=1,n=0123456789abcdef.1,v1="+mac, wire.Signature, "t=1,n=0123456789abcdef.2,v1="+mac), 401, "signature_invalid")
	signed := func(key string, age time.Duration, times int) func(*rig) said {
		return func(r *rig) said {
			if key == "" {
				text, err := os.ReadFile(filepath.Join(r.keys, "data", "signing-key"))
				if err != nil {
					r.t.Fatal(err)
				}
				key = string(text)
			}
			s, err := wire.NewSigner([]byte(key))
			if err != nil {
				r.t.Fatal(err)
			}
			digest := wire.Sum([]byte("a b"))
			header, _ := s.Sign(wire.Envelope{Job: "j"}, "strict.openfaas-fn", digest, time.Now().Add(-age))
			var last said
			for range times {
				last = r.http(r.front, "POST", strict, "a b", "Sheaf-Job", "j", wire.Digest, digest, wire.Signature, header)
			}
			return last
		}
	}
	add("B50", "a right signature", signed("", 0, 1), 200, "")
	add("B51", "6 minutes old", signed("", 6*time.Minute, 1), 401, "signature_expired", "5m0s")
	add("B51", "6 minutes ahead", signed("", -6*time.Minute, 1), 401, "signature_expired", "5m0s")
	add("B52", "sent twice", signed("", 0, 2), 409, "replayed")
	add("B68", "two keys, both wrong", signed("sixteen bytes, or more\nand another one, too\n", 0, 1), 401, "signature_invalid")

	// B56, B57: options of the provider's API.
	for name, body := range map[string]string{"broken": `{"service":`, "no object": `[]`, "a tail": `{"service":"x","image":"sheaf/worker"} x`, "deep": strings.Repeat("[", 10_001), "nothing": ""} {
		add("B56", "JSON that is "+name, post("/system/functions", body), 400, "bad_json")
	}
	add("B57", "8 MiB of options", post("/system/functions", `{"service":"`+strings.Repeat("x", 8<<20)+`"}`), 413, "")

	// B59 to B62: a worker's envelope.
	for name, h := range map[string][2]string{"block -1": {"Sheaf-Block", "-1"}, "block x": {"Sheaf-Block", "x"}, "attempt 1.5": {"Sheaf-Attempt", "1.5"}, "a huge attempt": {"Sheaf-Attempt", "99999999999"},
		"deadline 10s": {"Sheaf-Deadline", "10s"}, "epoch -1": {"Sheaf-Epoch", "-1"}, "an addressee without a function": {"Sheaf-To", "r1"}, "an addressee without a replica": {"Sheaf-To", "worker/"}, "a job of 65": {"Sheaf-Job", strings.Repeat("j", 65)}} {
		add("B61", name, straight("POST", "/", "a", h[0], h[1]), 400, "bad_envelope", h[0])
	}
	add("B61", "rank over size", straight("POST", "/", "a", "Sheaf-Rank", "4", "Sheaf-Size", "4"), 400, "bad_envelope", "Sheaf-Rank")
	add("B60", "another digest", straight("POST", "/", "a", wire.Digest, wire.Sum([]byte("b"))), 400, "block_damaged")
	add("B60", "another replica's", straight("POST", "/", "a", "Sheaf-To", "worker/another"), 421, "wrong_replica", "another")
	add("B60", "another function's", straight("POST", "/", "a", "Sheaf-To", "other/x"), 421, "wrong_replica")
	add("B28", "a block over the worker's max_block", post("/function/narrow", strings.Repeat("x", 1001)), 413, "block_too_large", "1000", "max_block")

	// B64: messages.
	add("B64", "an empty message", message("words", ""), 0, "empty_message")
	add("B64", "a topic of nobody", message("nobody.at.all", "a"), 0, "nats: no responders available for request")
	add("B64", "a message that the function refuses", message("words.small", strings.Repeat("x", 300_001)), 0, "calls_failed", "300000")
	add("B64", "a redrive of nothing", message("sheaf.redrive", "nothing.here"), 0, "", "0")

	// B66: environments. What they are told is one line.
	for _, v := range []struct{ function, name, value, says string }{
		{"worker", "max_inflight", "abc", "whole number"}, {"worker", "max_inflight", "-1", "from 0"}, {"worker", "max_inflight", "1.5", "whole number"},
		{"worker", "port", "0", "65535"}, {"worker", "port", "70000", "65535"}, {"worker", "port", "http", "65535"}, {"worker", "max_block", "0", "from 1"}, {"worker", "max_block", "1MiB", "whole number"},
		{"worker", "read_timeout", "soon", "duration"}, {"worker", "read_timeout", "-1s", "duration"}, {"worker", "exec_timeout", "5 minutes", "duration"}, {"worker", "write_timeout", "x", "duration"},
		{"worker", "healthcheck_interval", "1e", "duration"}, {"worker", "sheaf_listen", "localhost", "host:port"}, {"worker", "sheaf_listen", ":::", "host:port"},
		{"worker", "sheaf_unsigned", "maybe", "refuse or accept"}, {"worker", "sheaf_key_file", "missing", "can be read"}, {"worker", "sheaf_key_file", "empty", "not empty"}, {"worker", "sheaf_key_file", "short", "16 bytes"},
		{"worker", "sheaf_key_file", "three", "two lines"}, {"worker", "sheaf_key_file", "/nowhere/key", "can be read"}, {"worker", "sheaf_key_file", "good", "sheaf_function"},
		{"master", "max_input", "0", "from 1"}, {"master", "max_input", "1e9", "whole number"}, {"master", "max_blocks", "many", "whole number"}, {"master", "max_workers", "1048577", "1048576"}, {"master", "max_jobs", "0", "from 1"},
		{"master", "max_result", "64MiB", "whole number"}, {"master", "job_memory", "1.5", "whole number"}, {"master", "replica_wait", "5 minutes", "duration"}, {"master", "replica_inflight", "0", "from 1"},
		{"master", "parallel_jobs", "0", "from 1"}, {"master", "max_queued", "x", "whole number"}, {"master", "job_ttl", "-1h", "duration"}, {"master", "worker_function", "w/../admin", "name of a function"}, {"master", "worker_function", "Worker", "name of a function"},
		{"master", "gateway_url", "gateway:8080", "URL"}, {"master", "gateway_url", "ftp://gateway", "URL"}, {"master", "nats_url", "nats://%zz", "nats_url"}, {"master", "nats_creds", "missing", "can be read"}, {"master", "nats_creds", "short", "nkey"},
	} {
		add("B66", v.function+" "+v.name+"="+v.value, env(v.function, v.name, v.value), 2, "", v.name, v.says)
	}

	// B67: stack files and deployments; B4x of the command line.
	for name, d := range map[string][3]string{
		"an unknown image":      {`{"service":"x","image":"nobody/here"}`, "400", "unknown_image"},
		"a secret that is none": {`{"service":"x","image":"sheaf/worker","secrets":["nosuch"]}`, "400", "unknown_secret"},
		"a bad scale label":     {`{"service":"x","image":"sheaf/worker","labels":{"com.openfaas.scale.min":"x"}}`, "400", "bad_parameter"},
		"a scale over the max":  {`{"service":"x","image":"sheaf/worker","labels":{"com.openfaas.scale.min":"5","com.openfaas.scale.max":"2"}}`, "400", "bad_parameter"},
	} {
		add("B67", "deploy "+name, post("/system/functions", d[0]), 400, d[2])
	}
	for _, c := range []struct {
		name, stdin string
		args        []string
		code        int
		says        string
	}{
		{"no command", "", nil, 2, "no command given"},
		{"unknown command", "", []string{"scatter"}, 2, `command "scatter" is not known`},
		{"no file", "", []string{"run"}, 2, "run needs a file"},
		{"two files", "", []string{"run", "FILE", "FILE"}, 2, "takes one file"},
		{"a file that is not there", "", []string{"run", "nosuch.txt"}, 1, "nosuch.txt"},
		{"a folder", "", []string{"run", "."}, 1, "is a folder"},
		{"unknown flag", "", []string{"run", "--blok", "3", "FILE"}, 2, "-blok"},
		{"block of letters", "", []string{"run", "--block", "abc", "FILE"}, 2, `"abc" is not a whole number of bytes`},
		{"block of half a byte", "", []string{"run", "--block", "1.5", "FILE"}, 2, `"1.5" is not a whole number of bytes`},
		{"block 0", "", []string{"run", "--block", "0", "FILE"}, 2, "must be from 1 byte to 64 MiB"},
		{"negative block", "", []string{"run", "--block", "-1", "FILE"}, 2, "must be from 1 byte to 64 MiB"},
		{"block over the limit", "", []string{"run", "--block", "65MiB", "FILE"}, 2, "must be from 1 byte to 64 MiB"},
		{"block over any limit", "", []string{"run", "--block", "9223372036854775808", "FILE"}, 2, "must be from 1 byte"},
		{"no worker", "", []string{"run", "--workers", "0", "FILE"}, 2, "must be from 1 to 1000"},
		{"negative workers", "", []string{"run", "--workers", "-1", "FILE"}, 2, "must be from 1 to 1000"},
		{"a million workers", "", []string{"run", "--workers", "1000000", "FILE"}, 2, "must be from 1 to 1000"},
		{"unknown split", "", []string{"run", "--split", "words", "FILE"}, 2, "must be one of lines, bytes, records, csv, json"},
		{"unknown route", "", []string{"run", "--route", "pigeon", "FILE"}, 2, "must be one of direct, gateway"},
		{"unknown output", "", []string{"run", "--output", "xml", "FILE"}, 2, "must be one of text, json"},
		{"kill without a place", "", []string{"run", "--kill", "2", "FILE"}, 2, "must be K@P%"},
		{"kill of standard input", "a", []string{"run", "--kill", "2@50%", "-"}, 2, "needs a file"},
		{"delimiter with lines", "", []string{"run", "--delimiter", "x", "FILE"}, 2, "delimiter is for --split records and --split csv"},
		{"an empty delimiter", "", []string{"run", "--split", "records", "--delimiter", "", "FILE"}, 2, "must not be empty"},
		{"a file that cannot be read", "", []string{"run", "/proc/self/mem"}, 1, "/proc/self/mem"},
		{"kill in a file without a size", "", []string{"run", "--kill", "1@50%", "/proc/version"}, 2, "whose size is known"},
		{"delimiter too long", "", []string{"run", "--split", "records", "--delimiter", "12345678901234567", "FILE"}, 1, "over the limit of 16"},
		{"broken CSV", "a,\"b\n", []string{"run", "--split", "csv", "-"}, 1, "no closing quote"},
		{"broken JSON", "[1,,2]", []string{"run", "--split", "json", "-"}, 1, "lacks an element"},
		{"no gateway there", "", []string{"run", "--gateway", "http://127.0.0.1:1", "FILE"}, 1, "connection refused"},
		{"gateway that is no URL", "", []string{"run", "--gateway", "localhost", "FILE"}, 2, "is not a URL"},
		{"ps without a stack", "", []string{"ps", "--gateway", "http://127.0.0.1:1"}, 1, "sheaf up starts one"},
		{"up with an argument", "", []string{"up", "now"}, 2, "takes no argument"},
		{"up at no port", "", []string{"up", "--port", "70000"}, 2, "must be from 0 to 65535"},
	} {
		add("CLI", c.name, typed(c.stdin, c.args...), c.code, "", "sheaf: ", c.says)
	}
	return all
}

// Whatever comes in that cannot be is refused with its status, its code and one
// clear sentence, and what comes after it works.
func TestBadInputs(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"empty": "", "short": "hunter2\n", "three": strings.Repeat("sixteen bytes, or more\n", 3), "good": "sixteen bytes, or more\n", "input": "a b\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	base, nc := upTopics(t, "--workers", "1", "--data", filepath.Join(dir, "data"))
	r := &rig{t: t, front: base, nats: nc, keys: dir}
	small := map[string]string{"max_input": "300000", "max_block": "1048576", "max_blocks": "100", "max_workers": "50"}
	r.deploy("small", "sheaf/master", 1, small, "words.small")
	r.deploy("hasty", "sheaf/master", 1, map[string]string{"replica_wait": "200ms"}, "")
	r.deploy("strict", "sheaf/worker", 1, map[string]string{"sheaf_unsigned": "refuse"}, "")
	r.deploy("narrow", "sheaf/worker", 1, map[string]string{"max_block": "1000"}, "")
	r.deploy("none", "sheaf/worker", 0, nil, "")
	r.worker = r.replica("worker")
	cases := badInputs()
	if len(cases) < 250 {
		t.Errorf("the table has %d cases", len(cases))
	}
	t.Logf("%d cases", len(cases))
	for _, c := range cases {
		t.Run(strings.TrimSpace(c.row+" "+c.name), func(t *testing.T) {
			r := *r
			r.t = t
			got := c.send(&r)
			if got.code != c.code {
				t.Fatalf("%d, want %d: %.300s %.300s", got.code, c.code, got.err, got.out)
			}
			c.check(t, got)
		})
	}
	if status, body := ask(t, http.MethodPost, base+"/function/master", "a b a\n"); status != http.StatusOK || body != sequential("a b a\n") {
		t.Errorf("a job after it all: %d %s", status, body)
	}
}

// check looks at how an input is refused.
func (c bad) check(t *testing.T, got said) {
	text := got.out + got.err
	if strings.HasPrefix(strings.TrimSpace(got.err), "{") {
		var p problem
		if err := json.Unmarshal([]byte(got.err), &p); err != nil {
			t.Fatalf("%v: %s", err, got.err)
		}
		text = p.Detail
		if p.Status != got.code || c.err != "" && p.Code != c.err || p.Code == "" || p.Title == "" || p.Type == "" || p.Detail == "" {
			t.Errorf("it is %+v, want %d %s", p, c.code, c.err)
		}
		if len(p.Detail) > 600 || strings.ContainsAny(p.Detail, "\n\r\x1b") {
			t.Errorf("no one sentence: %.700q", p.Detail)
		}
	} else if c.err != "" && c.code >= 400 {
		t.Errorf("no problem: %.300s", got.out)
	} else if c.code == 0 && c.err != "" && got.err != c.err {
		t.Errorf("the code is %q, want %q: %.300s", got.err, c.err, got.out)
	}
	for _, s := range c.says {
		if !strings.Contains(text, s) {
			t.Errorf("it does not say %q: %.300s", s, text)
		}
	}
	if c.code < 10 && c.code > 0 {
		if got.out != "" {
			t.Errorf("standard output has %q", got.out)
		}
		if c.row == "B66" && strings.Count(got.err, "\n") != 1 {
			t.Errorf("not one line: %q", got.err)
		}
	}
	for _, never := range []string{"goroutine ", ".go:", "hunter2", "/root/", "panic"} {
		if strings.Contains(text, never) {
			t.Errorf("it says %q: %.300s", never, text)
		}
	}
}

func (r *rig) deploy(name, image string, replicas int, vars map[string]string, topic string) {
	r.t.Helper()
	spec := map[string]any{"service": name, "image": image, "envVars": vars, "labels": map[string]string{"com.openfaas.scale.min": fmt.Sprint(replicas)}}
	if topic != "" {
		spec["annotations"] = map[string]string{"topic": topic}
	}
	body, err := json.Marshal(spec)
	if err != nil {
		r.t.Fatal(err)
	}
	if status, answer := ask(r.t, http.MethodPost, r.front+"/system/functions", string(body)); status != http.StatusAccepted && status != http.StatusOK {
		r.t.Fatalf("deploy %s: %d %s", name, status, answer)
	}
	if replicas > 0 {
		r.replica(name)
		return
	}
	if status, answer := ask(r.t, http.MethodPost, r.front+"/system/scale-function/"+name, `{"serviceName":"`+name+`","replicas":0}`); status >= 300 {
		r.t.Fatalf("scale %s: %d %s", name, status, answer)
	}
}

// replica waits for a ready replica of a function, and returns its address.
func (r *rig) replica(name string) (address string) {
	r.t.Helper()
	within(r.t, time.Minute, name, func() bool {
		_, body := ask(r.t, http.MethodGet, r.front+"/system/replicas/"+name, "")
		var v struct {
			Replicas []struct{ URL, State string }
		}
		if json.Unmarshal([]byte(body), &v) != nil || len(v.Replicas) == 0 || v.Replicas[0].State != "ready" {
			return false
		}
		address = v.Replicas[0].URL
		return true
	})
	return address
}
