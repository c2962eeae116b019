package wire

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A Problem is a refusal: the body of RFC 9457, with a code for programs and a
// sentence for people that says what was wrong, the limit, and how to change
// it. A Problem is an error.
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Code   string `json:"code"`
	Detail string `json:"detail"`
	Param  string `json:"param,omitempty"`
	Limit  any    `json:"limit,omitempty"`
	Job    string `json:"job,omitempty"`
	// Missing lists blocks without a result.
	Missing any `json:"missing,omitempty"`
	// Retry is how long to wait before another try; 0 sends no Retry-After.
	Retry time.Duration `json:"-"`
}

// maxDetail is how long a detail may be, in bytes: it may hold the error of a
// handler, and whoever reads a refusal reads only the beginning.
const maxDetail = 2048

// Refuse returns a Problem.
func Refuse(status int, code, detail string) *Problem {
	if len(detail) > maxDetail {
		detail = strings.ToValidUTF8(detail[:maxDetail-3], "") + "..."
	}
	return &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Code: code, Detail: detail}
}

// About names the parameter that is at fault.
func (p *Problem) About(param string) *Problem {
	p.Param = param
	return p
}

// Within says which limit was passed.
func (p *Problem) Within(limit any) *Problem {
	p.Limit = limit
	return p
}

// After asks the caller to wait.
func (p *Problem) After(d time.Duration) *Problem {
	p.Retry = d
	return p
}

// Error returns the sentence.
func (p *Problem) Error() string { return p.Detail }

// ContentType is the media type of a Problem.
const ContentType = "application/problem+json"

// Write sends p as the answer.
func (p *Problem) Write(w http.ResponseWriter) {
	body, err := json.Marshal(p)
	if err != nil { // a Limit that is not JSON: a bug, not a reason to say nothing
		body = []byte(`{"type":"about:blank","status":500,"detail":"a refusal could not be written"}`)
	}
	body = append(body, '\n')
	h := w.Header()
	h.Set("Content-Type", ContentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set(Code, p.Code)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Del("Content-Encoding")
	if p.Retry > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(p.Retry.Seconds()))))
		h.Set(RetryMS, strconv.FormatInt(p.Retry.Milliseconds(), 10))
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(body) // nobody is left to be told
}
