package login_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/sheaf-project/sheaf/internal/login"
)

func TestOptions(t *testing.T) {
	pair, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	public, err := pair.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	got, err := login.Options([]byte("\n" + string(seed) + "\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	var o nats.Options
	for _, set := range got {
		if err := set(&o); err != nil {
			t.Fatal(err)
		}
	}
	if o.Nkey != public || o.SignatureCB == nil || o.InboxPrefix != login.Inbox(public) {
		t.Errorf("a seed: nkey %q, inbox %q", o.Nkey, o.InboxPrefix)
	}
	creds := "-----BEGIN NATS USER JWT-----\neyJ0.e30.x\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n" + string(seed) + "\n------END USER NKEY SEED------\n"
	if got, err = login.Options([]byte(creds)); err != nil || len(got) != 1 {
		t.Errorf("credentials: %d options, %v", len(got), err)
	}
}

func TestOptionsRefuse(t *testing.T) {
	account, err := nkeys.CreateAccount()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := account.Seed()
	if err != nil {
		t.Fatal(err)
	}
	for name, secret := range map[string]string{
		"nothing": "", "a password": "hunter2", "an account's seed": string(seed), "a cut seed": "SUAHUNTER2",
		"credentials without a seed": "-----BEGIN NATS USER JWT-----\nhunter2\n------END NATS USER JWT------\n",
	} {
		_, err := login.Options([]byte(secret))
		if err == nil || strings.Contains(strings.ToLower(err.Error()), "hunter2") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever a secret file holds, nothing of it is told.
func FuzzOptions(f *testing.F) {
	f.Add([]byte("SUABCDEFGH"))
	f.Add([]byte("-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n"))
	f.Fuzz(func(t *testing.T, secret []byte) {
		_, err := login.Options(secret)
		if err != nil && len(secret) > 12 && strings.Contains(err.Error(), string(secret)) {
			t.Errorf("%q is told: %v", secret, err)
		}
	})
}
