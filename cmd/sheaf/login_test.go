package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The file is as faas-cli 0.18.12 writes it.
const loginsOfFaasCLI = `auths:
  - gateway: http://127.0.0.1:8080
    auth: basic
    token: YWRtaW46YTpi
  - gateway: https://faas.example
    auth: oauth2
    token: abc
    options:
      - name: x
        value: "y"
  - gateway: http://bad.example
    auth: basic
    token: '!'
  - gateway: http://half.example
    auth: basic
    token: YWRtaW4=
`

func TestSavedLogin(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("OPENFAAS_CONFIG", dir)
	path := filepath.Join(dir, "config.yml")
	if name, _, err := savedLogin("http://127.0.0.1:8080"); name != "" || err != nil {
		t.Errorf("no file: %q, %v", name, err)
	}
	if err := os.WriteFile(path, []byte(loginsOfFaasCLI), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ gateway, name, password, says string }{
		{"http://127.0.0.1:8080", "admin", "a:b", ""},
		{"http://127.0.0.1:8080/", "admin", "a:b", ""},
		{"HTTP://127.0.0.1:8080", "admin", "a:b", ""},
		{"http://localhost:8080", "", "", ""},
		{"http://127.0.0.1:8081", "", "", ""},
		{"https://faas.example", "", "", ""},
		{"http://bad.example", "", "", "faas-cli's login for http://bad.example in " + path + " is damaged"},
		{"http://half.example", "", "", "is damaged"},
	} {
		name, password, err := savedLogin(c.gateway)
		if name != c.name || password != c.password || (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %q, %q, %v", c.gateway, name, password, err)
		}
	}
	for _, damaged := range []string{"auths: [", "auths: 3", "\x00"} {
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := savedLogin("http://127.0.0.1:8080"); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", damaged, err)
		}
	}
}

func TestLoginsFile(t *testing.T) {
	t.Setenv("HOME", "/home/somebody")
	for _, c := range []struct{ config, ci, want string }{
		{"", "", "/home/somebody/.openfaas/config.yml"},
		{"/etc/faas", "", "/etc/faas/config.yml"},
		{"~/faas", "", "/home/somebody/faas/config.yml"},
		{"", "true", ".openfaas/config.yml"},
		{"", "no", "/home/somebody/.openfaas/config.yml"},
		{"/etc/faas", "1", "/etc/faas/config.yml"},
	} {
		t.Setenv("OPENFAAS_CONFIG", c.config)
		t.Setenv("CI", c.ci)
		if got := loginsFile(); got != c.want {
			t.Errorf("OPENFAAS_CONFIG=%q CI=%q: %s, want %s", c.config, c.ci, got, c.want)
		}
	}
}

func TestNewLogin(t *testing.T) {
	one, command, err := newLogin("")
	if err != nil || one.User != "admin" || len(one.Password) < 20 || !strings.Contains(command, one.Password) {
		t.Errorf("random: %v, %s, %v", one, command, err)
	}
	if two, _, _ := newLogin(""); one == two {
		t.Error("a random password comes twice")
	}
	path := filepath.Join(t.TempDir(), "password")
	for content, want := range map[string]string{"open sesame\n": "open sesame", "x": "x", "": "", " \n": ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		auth, command, err := newLogin(path)
		var usage usageError
		if auth.Password != want || (want == "") != errors.As(err, &usage) || strings.Contains(command, "sesame") {
			t.Errorf("file of %q: %v, %s, %v", content, auth, command, err)
		}
	}
	if _, _, err := newLogin(path + "-not"); err == nil || !strings.Contains(err.Error(), "--password-file") {
		t.Errorf("no file: %v", err)
	}
}
