package master_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/master"
)

func TestSameAnswerHoweverItIsSent(t *testing.T) {
	s := three(t)
	in := thesisText()
	if lines := strings.Count(in, "\n"); len(in) != 1654 || lines != 99 {
		t.Fatalf("the input has %d bytes and %d lines", len(in), lines)
	}
	right := want(in)
	file, fileType := form(t, field{"file", "cat.txt", in})
	thesis, thesisType := form(t, field{"note", "", "x"}, field{"myfile", "cat.txt", in}, field{"submit", "", "go"})
	ways := []struct{ name, body, header string }{
		{"bare body", in, "Content-Type: application/octet-stream"},
		{"no content type", in, "X-None: 1"},
		{"curl's default", in, "Content-Type: application/x-www-form-urlencoded"},
		{"text", in, "Content-Type: text/markdown; charset=utf-8"},
		{"field file", file, fileType},
		{"field myfile", thesis, thesisType},
	}
	sizes := []int{50, 100, 150, 300, 1653, 1654, 1655, 2000}
	for n := 1; n < 2000; n += 1 + n/6 {
		sizes = append(sizes, n)
	}
	for _, split := range []string{"lines", "bytes"} {
		for _, size := range sizes {
			for i, way := range ways {
				if i != size%len(ways) && size != 300 { // each way at many sizes, every way at one
					continue
				}
				a := s.do(t, fmt.Sprintf("?block=%d&split=%s", size, split), way.body, way.header)
				if a.status != http.StatusOK || a.body != right {
					t.Fatalf("%s, block %d, split %s: %d %q", way.name, size, split, a.status, a.body)
				}
				if split == "bytes" && a.header.Get("Sheaf-Blocks") != strconv.Itoa((len(in)+size-1)/size) {
					t.Errorf("%s, block %d: Sheaf-Blocks is %s", way.name, size, a.header.Get("Sheaf-Blocks"))
				}
			}
		}
	}
}

// Every size, but without the connections' cost: the body only.
func TestEveryBlockSize(t *testing.T) {
	s := three(t)
	in := thesisText()
	right := want(in)
	step := 1
	if testing.Short() {
		step = 37
	}
	for size := 1; size <= 2000; size += step {
		if size < 20 && size > 3 && size%5 != 0 {
			continue // many blocks, and no other case
		}
		if a := s.do(t, "?block="+strconv.Itoa(size), in); a.status != http.StatusOK || a.body != right {
			t.Fatalf("block %d: %d %q", size, a.status, a.body)
		}
	}
}

func TestInputs(t *testing.T) {
	s := three(t)
	for _, c := range []struct{ name, in string }{
		{"empty", ""},
		{"one byte", "x"},
		{"one line feed", "\n"},
		{"only line feeds", strings.Repeat("\n", 100_000)},
		{"no final line feed", "a b\nb"},
		{"crlf and lone cr", "a b\r\nb a\rc\r\n"},
		{"nul and bad utf-8", "a\x00 \xff\xfe a\x00\n\xff\xfe\n"},
		{"byte-order mark and utf-16", "\xef\xbb\xbfa \xff\xfea\x00\n\x00"},
		{"lone surrogate", "\xed\xa0\x80 a\n"},
		{"a long line", strings.Repeat("word ", 14_000) + "\na\n"},
		{"a long word", strings.Repeat("x", 70_000) + "\nx\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			body, kind := form(t, field{"file", "f", c.in})
			for _, query := range []string{"", "?block=7000", "?block=7000&split=bytes", "?block=7000&split=records&delimiter=%5Cx00"} {
				if a := s.do(t, query, c.in, "Content-Type: application/x-www-form-urlencoded"); a.status != 200 || a.body != want(c.in) {
					t.Errorf("body, %q: %d %.200q", query, a.status, a.body)
				}
				if a := s.do(t, query, body, kind); a.status != 200 || a.body != want(c.in) {
					t.Errorf("form, %q: %d %.200q", query, a.status, a.body)
				}
			}
			if c.in == "" {
				a := s.do(t, "", c.in, "Content-Type: text/plain")
				if a.header.Get("Sheaf-Blocks") != "0" || a.header.Get("Content-Length") != "0" {
					t.Errorf("headers of no block: %v", a.header)
				}
			}
		})
	}
}

func TestFileNamesAreOnlyLabels(t *testing.T) {
	s := three(t)
	for _, name := range []string{"../../etc/passwd", `..\..\x`, "..", ".", "/", "\u202egnp.exe", strings.Repeat("n", 5000), "a b;c", `q"q`, "CON", "%00"} {
		t.Run(fmt.Sprintf("%.20q", name), func(t *testing.T) {
			body, kind := form(t, field{"file", name, "a b a\n"})
			if a := s.do(t, "", body, kind); a.status != 200 || a.body != "a 2\nb 1\n" {
				t.Errorf("answer is %d %q", a.status, a.body)
			}
		})
	}
}

func TestParametersAsFields(t *testing.T) {
	s := three(t)
	in := thesisText()
	body, kind := form(t, field{"block", "", "300"}, field{"split", "", "bytes"}, field{"file", "f", in})
	a := s.do(t, "", body, kind)
	if a.status != 200 || a.body != want(in) || a.header.Get("Sheaf-Blocks") != "6" {
		t.Errorf("answer is %d %q, %s blocks", a.status, a.body, a.header.Get("Sheaf-Blocks"))
	}
	body, kind = form(t, field{"split", "", "bytes"}, field{"file", "f", in})
	if a := s.do(t, "?block=100", body, kind); a.body != want(in) || a.header.Get("Sheaf-Blocks") != "17" {
		t.Errorf("query and field: %d %q, %s blocks", a.status, a.body, a.header.Get("Sheaf-Blocks"))
	}
}

func TestHeaders(t *testing.T) {
	s := three(t)
	for accept, media := range map[string]string{"text/plain": "text/plain; charset=utf-8", "application/json": "application/json"} {
		a := s.do(t, "?block=300&split=bytes", thesisText(), "Accept: "+accept)
		for name, pattern := range map[string]string{
			"Sheaf-Job":      `^[0-9a-f]{16}$`,
			"Sheaf-Blocks":   `^6$`,
			"Sheaf-Replicas": `^[123]$`,
			"Sheaf-Elapsed":  `^[0-9]+\.[0-9]{3}ms$`,
			"Content-Type":   "^" + regexp.QuoteMeta(media) + "$",
			"Content-Length": fmt.Sprintf("^%d$", len(a.body)),
		} {
			if got := a.header.Get(name); !regexp.MustCompile(pattern).MatchString(got) {
				t.Errorf("%s: %s is %q, want %s", accept, name, got, pattern)
			}
		}
		sum := sha256.Sum256([]byte(a.body))
		if got, want := a.header.Get("Content-Digest"), "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":"; got != want {
			t.Errorf("%s: Content-Digest is %s, want %s", accept, got, want)
		}
		if a.header.Get("Connection") == "close" {
			t.Errorf("%s: a good job ended its connection", accept)
		}
	}
}

func TestJSON(t *testing.T) {
	s := three(t)
	a := s.do(t, "?block=4&split=bytes", "a <b> a \xff\xff \xfe \xff", "Accept: application/json")
	if a.status != 200 || a.body != "{\"a\": 2, \"\ufffd\": 2, \"<b>\": 1, \"\ufffd\ufffd\": 1}\n" {
		t.Errorf("answer is %d %q", a.status, a.body)
	}
}

// ndjson reads the lines of a streamed answer.
func ndjson(t *testing.T, body string) (lines []map[string]any) {
	t.Helper()
	for line := range strings.Lines(body) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		lines = append(lines, m)
	}
	return lines
}

func TestResultsAsTheyCome(t *testing.T) {
	s := three(t)
	in := thesisText()
	a := s.do(t, "?block=300", in, "Accept: application/x-ndjson")
	if a.status != 200 || a.header.Get("Content-Type") != "application/x-ndjson" || a.header.Get("Sheaf-Job") == "" {
		t.Fatalf("answer is %d %v", a.status, a.header)
	}
	lines := ndjson(t, a.body)
	total, seen, bytes := map[string]int64{}, map[float64]bool{}, 0.0
	for _, l := range lines[:len(lines)-1] {
		seen[l["block"].(float64)] = true
		bytes += l["bytes"].(float64)
		if l["verified"] != true || l["attempts"].(float64) < 1 || !strings.HasPrefix(l["replica"].(string), "w") {
			t.Errorf("line %v", l)
		}
		for w, n := range l["result"].(map[string]any)["counts"].(map[string]any) {
			total[w] += int64(n.(float64))
		}
	}
	if !maps.Equal(total, sequential([]byte(in))) {
		t.Errorf("the blocks' counts come to %v", total)
	}
	last := lines[len(lines)-1]
	if last["done"] != true || last["blocks"] != float64(len(lines)-1) || last["blocks"] != float64(len(seen)) ||
		last["bytes"] != float64(len(in)) || last["bytes"] != bytes || last["block_size"] != 300.0 || last["unverified"] != 0.0 {
		t.Errorf("summary is %v after %d lines of %v bytes", last, len(lines)-1, bytes)
	}
}

type event struct{ name, data string }

func events(t *testing.T, body string) (list []event) {
	t.Helper()
	var e event
	scan := bufio.NewScanner(strings.NewReader(body))
	scan.Buffer(nil, 1<<24)
	for scan.Scan() {
		line := scan.Text()
		if name, ok := strings.CutPrefix(line, "event: "); ok {
			e.name = name
		} else if data, ok := strings.CutPrefix(line, "data: "); ok {
			e.data += data + "\n"
		} else if line == "" {
			list = append(list, e)
			e = event{}
		} else {
			t.Fatalf("line %q is no field of an event", line)
		}
	}
	return list
}

func TestEvents(t *testing.T) {
	s := three(t)
	in := thesisText()
	for output, right := range map[string]string{"": want(in), "&output=text": want(in),
		"&output=json": s.do(t, "", in, "Accept: application/json").body} {
		a := s.do(t, "?block=100"+output, in, "Accept: text/event-stream")
		list := events(t, a.body)
		if a.status != 200 || a.header.Get("Content-Type") != "text/event-stream" || len(list) < 3 {
			t.Fatalf("answer is %d %q", a.status, a.body)
		}
		progress, tail := list[:len(list)-2], list[len(list)-2:]
		done := -1.0
		for _, e := range progress {
			var p map[string]any
			if err := json.Unmarshal([]byte(e.data), &p); err != nil || e.name != "progress" {
				t.Fatalf("event %v: %v", e, err)
			}
			if p["blocks_done"].(float64) < done || p["bytes_total"] != float64(len(in)) {
				t.Errorf("progress goes from %v to %v", done, p)
			}
			done = p["blocks_done"].(float64)
		}
		var sum map[string]any
		if err := json.Unmarshal([]byte(tail[1].data), &sum); err != nil {
			t.Fatal(err)
		}
		if tail[0] != (event{"result", right}) {
			t.Errorf("result is %v, want %q", tail[0], right)
		}
		if tail[1].name != "done" || sum["done"] != true || sum["blocks"] != done || sum["bytes"] != float64(len(in)) {
			t.Errorf("the end is %v, the last progress told %v blocks", tail[1], done)
		}
	}
	if a := s.do(t, "", "", "Content-Type: text/plain", "Accept: text/event-stream"); !strings.HasSuffix(a.body, "\n\n") ||
		!strings.Contains(a.body, "event: result\n\nevent: done\n") {
		t.Errorf("events of no input: %q", a.body)
	}
}

// While nothing comes back, the events still tell what has come in.
func TestProgressOfAnUpload(t *testing.T) {
	s := three(t)
	c := s.dial(t, "POST /?block=1MiB HTTP/1.1\r\nHost: m\r\nAccept: text/event-stream\r\nContent-Length: 100\r\n\r\n0123456789")
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("no progress of an upload that stalls: %v", err)
		}
		if strings.Contains(line, `"bytes_received":10,`) {
			return
		}
	}
}

func TestAccept(t *testing.T) {
	s := three(t)
	const text, object, lines, stream = "text/plain; charset=utf-8", "application/json", "application/x-ndjson", "text/event-stream"
	for _, c := range []struct{ accept, want string }{
		{"", text},
		{"*/*", text},
		{"text/*", text},
		{"text/plain;charset=utf-8", text},
		{"application/json", object},
		{"APPLICATION/JSON", object},
		{"application/*", object},
		{"application/x-ndjson", lines},
		{"text/event-stream", stream},
		{"text/html, */*", text},
		{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", text},
		{"application/json, text/plain", text},
		{"application/json, text/plain;q=0.9", object},
		{"text/plain;q=0.1, application/x-ndjson;q=0.2", lines},
		{"text/*;q=0.5, text/event-stream", stream},
		{"text/plain;q=0, */*", object},
		{"text/plain;q=0, application/json;q=0, */*;q=0.1", lines},
		{"*/*;q=0.1, text/event-stream;q=0.2", stream},
		{"nonsense, application/json", object},
		{"text/plain;q=0", ""},
		{"*/*;q=0", ""},
		{"text/html", ""},
		{"image/png, application/xml", ""},
		{"nonsense", ""},
		{"text/plain;q=0.0, application/json;q=0.000", ""},
	} {
		t.Run(c.accept, func(t *testing.T) {
			a := s.do(t, "", "a\n", "Accept: "+c.accept)
			if c.want == "" {
				refused(t, a, http.StatusNotAcceptable, "not_acceptable", text[:10], object, lines, stream)
			} else if got := a.header.Get("Content-Type"); a.status != 200 || got != c.want {
				t.Errorf("answer is %d %s, want %s", a.status, got, c.want)
			}
		})
	}
	t.Run("two headers", func(t *testing.T) {
		a := s.do(t, "", "a\n", "Accept: text/html", "Accept: application/json")
		if got := a.header.Get("Content-Type"); got != object {
			t.Errorf("answer is %d %s", a.status, got)
		}
	})
}

func TestUnverified(t *testing.T) {
	s := start(t, []http.Handler{plain, plain})
	in := thesisText()
	lines := ndjson(t, s.do(t, "?block=300", in, "Accept: application/x-ndjson").body)
	last := lines[len(lines)-1]
	if last["done"] != true || last["unverified"] != float64(len(lines)-1) || lines[0]["verified"] != false {
		t.Errorf("summary is %v after %d lines", last, len(lines)-1)
	}
	if a := s.do(t, "?block=300", in); a.body != want(in) {
		t.Errorf("answer of plain functions is %d %q", a.status, a.body)
	}
	p := refused(t, s.do(t, "?block=300&verify=require", in), http.StatusFailedDependency, "unverified_results", "Content-Digest")
	if p.Job == "" || p.Missing == nil {
		t.Errorf("refusal is %+v", p)
	}
}

func TestAutoBlock(t *testing.T) {
	for n, want := range map[int64]int{-1: 256 << 10, 0: 1 << 10, 1654: 1 << 10, 16 << 10: 1 << 10, 32 << 10: 2 << 10, 1 << 30: 1 << 20} {
		if got := master.AutoBlock(n); got != want {
			t.Errorf("AutoBlock(%d) is %d, want %d", n, got, want)
		}
	}
}

func TestWorkersAreAskedFor(t *testing.T) {
	var asked string
	s := three(t, func(h *master.Handler) {
		h.AtLeast = func(_ context.Context, function string, n int) (int, error) {
			asked = fmt.Sprint(function, n)
			return 0, errors.New("the watcher is away")
		}
	})
	begun := time.Now()
	if a := s.do(t, "?workers=7", "a b a\n"); a.status != 200 || a.body != "a 2\nb 1\n" || asked != "worker7" {
		t.Errorf("answer is %d %q; asked for %q", a.status, a.body, asked)
	}
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
}
