package sheaf_test

import (
	"errors"
	"io"
	"testing"

	"github.com/sheaf-project/sheaf"
)

func TestErrors(t *testing.T) {
	t.Parallel()
	block := func(i int) *sheaf.BlockError {
		return &sheaf.BlockError{Index: i, Offset: 100, Bytes: 50, Attempts: 1, Err: io.ErrUnexpectedEOF}
	}
	poison := block(3)
	poison.Poison, poison.Replicas, poison.Attempts = true, []string{"a", "b", "c"}, 3
	for _, test := range []struct {
		err  error
		want string
	}{
		{&sheaf.CallError{Fault: sheaf.FaultTask, Status: 500, From: "r1", Err: io.ErrUnexpectedEOF},
			"replica r1: task failed: status 500: unexpected EOF"},
		{&sheaf.CallError{Fault: sheaf.FaultLost, Err: io.ErrUnexpectedEOF}, "lost: unexpected EOF"},
		{&sheaf.CallError{Fault: 99, Err: io.ErrUnexpectedEOF}, "unknown: unexpected EOF"},
		{&sheaf.RankError{Rank: 2, Replica: "r2", Attempts: 2, Err: io.ErrUnexpectedEOF},
			"rank 2 (replica r2) after 2 attempts: unexpected EOF"},
		{block(1), "block 1 (bytes 100 to 150) after 1 attempt: unexpected EOF"},
		{poison, "block 3 (bytes 100 to 150) after 3 attempts: took down 3 replicas: unexpected EOF"},
		{&sheaf.PartialError{Missing: []*sheaf.BlockError{block(1)}, Done: 9, Total: 10},
			"9 of 10 blocks have a result; missing: block 1 (bytes 100 to 150) after 1 attempt: unexpected EOF"},
		{&sheaf.PartialError{Missing: []*sheaf.BlockError{block(1), block(2)}, Done: 9, Total: -1},
			"9 blocks have a result; missing: block 1 (bytes 100 to 150) after 1 attempt: unexpected EOF (and 1 block more)"},
		{&sheaf.PartialError{Missing: []*sheaf.BlockError{block(1), block(2), block(3)}, Total: -1},
			"0 blocks have a result; missing: block 1 (bytes 100 to 150) after 1 attempt: unexpected EOF (and 2 blocks more)"},
	} {
		if got := test.err.Error(); got != test.want {
			t.Errorf("error\n%s\nwant\n%s", got, test.want)
		}
		if !errors.Is(test.err, io.ErrUnexpectedEOF) {
			t.Errorf("%q does not wrap its cause", test.err)
		}
	}
}
