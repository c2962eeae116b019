// Package login is who a process is to NATS: a secret becomes the options of a
// connection.
package login

import (
	"bytes"
	"errors"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Options returns the options of a connection that logs in with a secret: the
// seed of an nkey, or the text of a credentials file. With a seed answers come
// to [Inbox], which nobody else may listen to. Nothing of the secret is in the
// error.
func Options(secret []byte) ([]nats.Option, error) {
	secret = bytes.TrimSpace(secret)
	if bytes.HasPrefix(secret, []byte("-----BEGIN NATS USER JWT-----")) {
		if _, err := nkeys.ParseDecoratedUserNKey(secret); err != nil {
			return nil, errForm
		}
		return []nats.Option{nats.UserCredentialBytes(secret)}, nil
	}
	pair, err := nkeys.FromSeed(secret)
	if err != nil {
		return nil, errForm
	}
	public, err := pair.PublicKey()
	if err != nil || !nkeys.IsValidPublicUserKey(public) {
		return nil, errForm
	}
	return []nats.Option{nats.Nkey(public, pair.Sign), nats.CustomInboxPrefix(Inbox(public))}, nil
}

var errForm = errors.New("it is neither the seed of a user's nkey (SU...) nor a NATS credentials file")

// Inbox returns the subject under which the user with this public nkey gets its
// answers.
func Inbox(public string) string { return "sheaf.inbox." + public }
