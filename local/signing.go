package local

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Files of a store.
const (
	signingKeyFile = "signing-key" // with which functions sign blocks and results
	natsSeedFile   = "nats-"       // with a role behind it: what logs in to NATS; another one after each start
)

// signingKey returns the file of the stack's signing key, and makes it when it
// is not there.
func (s *store) signingKey() (path string, err error) {
	path = s.path("", signingKeyFile)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("signing key: %w", err)
	}
	var key [32]byte
	_, _ = rand.Read(key[:]) // never fails: crypto/rand ends the program instead
	if err := s.write("", signingKeyFile, append(hex.AppendEncode(nil, key[:]), '\n')); err != nil {
		return "", fmt.Errorf("signing key: %w", err)
	}
	return path, nil
}
