package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/worker"
)

// A worker function is a Func and this main:
//
//	func main() { worker.Main(shout) }
//
// Anything that speaks HTTP may call it.
func ExampleHandler() {
	shout := func(_ context.Context, b sheaf.Block) ([]byte, error) {
		if len(b.Data) == 0 {
			return nil, worker.Reject(errors.New("there is nothing to shout"))
		}
		return bytes.ToUpper(b.Data), nil
	}
	srv := httptest.NewServer(&worker.Handler{Func: shout})
	defer srv.Close()
	for _, block := range []string{"the first block", ""} {
		resp, err := srv.Client().Post(srv.URL, "text/plain", strings.NewReader(block))
		if err != nil {
			fmt.Println(err)
			return
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		fmt.Println(resp.Status, string(body), err)
	}
	// Output:
	// 200 OK THE FIRST BLOCK <nil>
	// 422 Unprocessable Entity {"type":"about:blank","title":"Unprocessable Entity","status":422,"code":"block_rejected","detail":"there is nothing to shout"}
	//  <nil>
}
