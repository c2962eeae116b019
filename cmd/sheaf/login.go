package main

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/local"
)

// user is who logs in to a local stack, as at OpenFaaS's own gateway.
const user = "admin"

// newLogin returns the login of a new stack, with the password that is in the
// file, or a random one, and the start of the command that logs in. A password
// from a file is not shown.
func newLogin(passwordFile string) (local.Auth, string, error) {
	if passwordFile == "" {
		password := rand.Text()
		return local.Auth{User: user, Password: password},
			fmt.Sprintf("echo %s | faas-cli login --username %s --password-stdin", password, user), nil
	}
	data, err := os.ReadFile(passwordFile)
	if err != nil {
		return local.Auth{}, "", usagef("--password-file: %w", err)
	}
	password := strings.TrimSpace(string(data)) // as faas-cli does
	if password == "" {
		return local.Auth{}, "", usagef("--password-file is %q, which is empty, and must hold a password", passwordFile)
	}
	return local.Auth{User: user, Password: password},
		fmt.Sprintf("faas-cli login --username %s --password-stdin < %s", user, passwordFile), nil
}

// newClient returns a client of a gateway, with the login that faas-cli has
// saved for it.
func newClient(gatewayURL string) (*gateway.Client, error) {
	name, password, err := savedLogin(gatewayURL)
	if err != nil {
		return nil, err
	}
	client, err := gateway.NewClient(gatewayURL, name, password)
	if err != nil {
		return nil, usageError{err}
	}
	return client, nil
}

// logins is the file in which faas-cli saves logins.
type logins struct {
	Auths []struct {
		Gateway string
		Auth    string // its kind
		Token   string
	}
}

// savedLogin looks for the gateway in faas-cli's file, which is written for the
// gateway's URL as it was typed, in lower case and without a slash at the end.
// Logins of other kinds than basic are for editions that sheaf cannot log in to.
func savedLogin(gatewayURL string) (name, password string, err error) {
	path := loginsFile()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("read faas-cli's logins: %w", err)
	}
	var saved logins
	if err := yaml.Unmarshal(data, &saved); err != nil {
		return "", "", fmt.Errorf("faas-cli's logins in %s are damaged; log in again with faas-cli login", path)
	}
	for _, l := range saved.Auths {
		if l.Gateway != strings.ToLower(strings.TrimRight(gatewayURL, "/")) || l.Auth != "basic" {
			continue
		}
		both, err := base64.StdEncoding.DecodeString(l.Token)
		name, password, ok := strings.Cut(string(both), ":")
		if err != nil || !ok {
			return "", "", fmt.Errorf("faas-cli's login for %s in %s is damaged; log in again with faas-cli login", l.Gateway, path)
		}
		return name, password, nil
	}
	return "", "", nil
}

// loginsFile is where faas-cli looks, too.
func loginsFile() string {
	dir := os.Getenv("OPENFAAS_CONFIG")
	if ci := os.Getenv("CI"); dir == "" && (ci == "true" || ci == "1") {
		dir = ".openfaas"
	}
	if dir == "" {
		dir = "~/.openfaas"
	}
	if rest, ok := strings.CutPrefix(dir, "~"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return "" // there is no such file, and so no login
		}
		dir = filepath.Join(home, rest)
	}
	return filepath.Join(dir, "config.yml")
}
