package main

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/worker"
)

func TestWorker(t *testing.T) {
	srv := httptest.NewServer(&worker.Handler{Func: wordcount.Count})
	defer srv.Close()
	resp, err := srv.Client().Post(srv.URL, "text/plain", strings.NewReader(" a b a "))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "a 2\nb 1\n" {
		t.Errorf("the result is %q, %v", got, err)
	}
}
