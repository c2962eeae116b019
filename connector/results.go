package connector

import (
	"encoding/json"
	"errors"
	"unicode/utf8"
)

// MediaType is that of a set of results.
const MediaType = "application/vnd.sheaf.results+json"

// Headers of messages and of their answers. All names that begin with Sheaf-
// stay between a sender and the connector.
const (
	HeaderReply     = "Sheaf-Reply"     // subject that the answer shall go to
	HeaderResults   = "Sheaf-Results"   // "set": the answer shall be a set, whatever it holds
	HeaderFunctions = "Sheaf-Functions" // the only functions that shall be called, separated by commas
	HeaderFunction  = "Sheaf-Function"  // in an answer that is one function's: its name
	HeaderStatus    = "Sheaf-Status"    // in such an answer: the function's status
	HeaderCode      = "Sheaf-Code"      // in an answer that tells of a failure: what kind
)

// Codes of sets.
const (
	codeEmpty    = "empty_message"
	codeNoMatch  = "no_function_matched"
	codeFailed   = "calls_failed"
	codeTooLarge = "answer_too_large"
	codeEnding   = "connector_ends"
)

// Results is the set of what came of one message, as the answer tells it.
type Results struct {
	Topic string `json:"topic"`
	// Code says what kind of failure the whole had; "" when every function did
	// its work.
	Code    string   `json:"code,omitempty"`
	Error   string   `json:"error,omitempty"` // a sentence
	Results []Result `json:"results"`         // sorted by function
}

// A Result is what came of one function's call.
type Result struct {
	Function string  `json:"function"` // with its namespace
	OK       bool    `json:"ok"`
	Status   int     `json:"status,omitempty"`  // of HTTP; 0 when nothing answered
	Replica  string  `json:"replica,omitempty"` // its ID, of a sheaf function
	Rank     *int    `json:"rank,omitempty"`    // when every replica got the message
	Attempts int     `json:"attempts"`
	Millis   float64 `json:"elapsed_ms"` // of the last attempt
	Type     string  `json:"content_type,omitempty"`
	// Body is the answer if it is UTF-8, and otherwise Base64 is.
	Body   string `json:"body,omitempty"`
	Base64 []byte `json:"base64,omitempty"`
	Error  string `json:"error,omitempty"`
	// Receipts are one for each replica of the view, in rank order, when every
	// replica got the message; a missing one has an error that says why.
	Receipts []Result `json:"receipts,omitempty"`

	header map[string][]string // of the answer
	body   []byte
}

// take takes over an answer.
func (r *Result) take(status int, header map[string][]string, body []byte) {
	r.OK, r.Status, r.header, r.body = true, status, header, body
	if v := header["Content-Type"]; len(v) > 0 {
		r.Type = v[0]
	}
	if utf8.Valid(body) {
		r.Body = string(body)
	} else {
		r.Base64 = body
	}
}

func (s Results) failed() []Result {
	var list []Result
	for _, r := range s.Results {
		if !r.OK {
			list = append(list, r)
		}
	}
	return list
}

func (s Results) encode() []byte {
	body, err := json.Marshal(s)
	if err != nil { // nothing in it can be unmarshalable
		return []byte(`{"code":"` + codeFailed + `","error":"the results could not be written","results":[]}`)
	}
	return append(body, '\n')
}

func redriven(n int, err error) []byte {
	answer := struct {
		Redriven int    `json:"redriven"`
		Error    string `json:"error,omitempty"`
	}{Redriven: n}
	if err != nil {
		answer.Error = err.Error()
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return nil
	}
	return append(body, '\n')
}

var (
	errNoBus    = errors.New("NATS is not there yet")
	errNoTopics = errors.New("the gateway has not told yet which topics functions are bound to")
)
