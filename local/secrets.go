package local

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// MountEnv is the environment variable that tells a replica in which folder
// the secrets are that its function names, a file for each.
//
// In OpenFaaS they are at /var/openfaas/secrets. A process cannot be given a
// file system of its own without privileges, so they are not there, and a
// function for both reads the folder from the variable and falls back to that
// path. For the same reason secrets are kept from other users of the machine,
// but not from other functions.
const MountEnv = "secret_mount_path"

var secretName = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

func checkSecret(name string) *wire.Problem {
	if !secretName.MatchString(name) {
		return wire.Refuse(http.StatusBadRequest, "bad_secret_name",
			fmt.Sprintf("secret name %q must be 1 to 253 lower-case letters, digits and inner hyphens and dots", wire.Cut(name))).About("name")
	}
	return nil
}

func unknownSecret(name string) *wire.Problem {
	return wire.Refuse(http.StatusNotFound, "secret_not_found",
		fmt.Sprintf("secret %q does not exist; create it with faas-cli secret create", wire.Cut(name)))
}

var noSecrets = wire.Refuse(http.StatusNotImplemented, "no_secrets", "this provider has no folder for secrets")

// Secrets lists the names of the secrets. What they are is told to functions only.
func (p *Provider) Secrets() ([]string, error) {
	if p.store == nil {
		return nil, nil
	}
	return p.store.names(secretsFolder)
}

// SetSecret creates a secret, or changes it when create is false; functions
// that have it mounted see the new value.
func (p *Provider) SetSecret(name string, value []byte, create bool) error {
	if bad := checkSecret(name); bad != nil {
		return bad
	}
	if p.store == nil {
		return noSecrets
	}
	if len(value) == 0 {
		return wire.Refuse(http.StatusBadRequest, "empty_secret", fmt.Sprintf("secret %q has no value", name)).About("value")
	}
	p.keep.Lock()
	defer p.keep.Unlock()
	switch has := p.hasSecret(name); {
	case create && has:
		return wire.Refuse(http.StatusConflict, "secret_exists", fmt.Sprintf("secret %q exists already; change it with faas-cli secret update", name))
	case !create && !has:
		return unknownSecret(name)
	}
	if err := p.store.write(secretsFolder, name, value); err != nil {
		return notKept("secret "+name, err)
	}
	return nil
}

// DeleteSecret removes a secret. Functions that name it run on without, and
// cannot start again until they are deployed without it, or it is there again.
func (p *Provider) DeleteSecret(name string) error {
	if bad := checkSecret(name); bad != nil {
		return bad
	}
	p.keep.Lock()
	defer p.keep.Unlock()
	if !p.hasSecret(name) {
		return unknownSecret(name)
	}
	if err := p.store.remove(secretsFolder, name); err != nil {
		return notKept("secret "+name, err)
	}
	return nil
}

// hasSecret says whether there is a secret of this name, which may be any.
func (p *Provider) hasSecret(name string) bool {
	if p.store == nil || checkSecret(name) != nil {
		return false
	}
	_, err := os.Lstat(p.store.path(secretsFolder, name))
	return err == nil
}

// notKept says that the provider's folder failed.
func notKept(what string, err error) *wire.Problem {
	return wire.Refuse(http.StatusInternalServerError, "not_kept", fmt.Sprintf("%s: %v", what, err))
}

// mount makes the folder of a replica's secrets, which is removed when the
// replica has ended. The files are links, so that a changed secret is seen at
// once. It is empty for a function without secrets.
func (p *Provider) mount(r *replica) (dir string, err error) {
	if len(r.spec.Secrets) == 0 || p.store == nil {
		return "", nil
	}
	dir = p.store.path(mountsFolder, r.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("mount secrets: %w", err)
	}
	for _, name := range r.spec.Secrets {
		err := error(unknownSecret(name))
		if p.hasSecret(name) {
			err = os.Symlink(p.store.path(secretsFolder, name), filepath.Join(dir, name))
		}
		if err != nil && !errors.Is(err, fs.ErrExist) { // named twice
			p.unmount(dir)
			return "", fmt.Errorf("mount secrets: %w", err)
		}
	}
	return dir, nil
}

func (p *Provider) unmount(dir string) {
	if dir == "" {
		return
	}
	if err := os.RemoveAll(dir); err != nil {
		p.log.Error("folder of a replica's secrets is left", "folder", dir, "err", err)
	}
}

// secrets lists, creates, changes or removes secrets, as faas-cli asks.
func (f *Front) secrets(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		list := []types.Secret{}
		if _, here := name(r); here {
			names, err := f.Provider.Secrets()
			if err != nil {
				notKept("list secrets", err).Write(w)
				return
			}
			for _, name := range names {
				list = append(list, types.Secret{Name: name, Namespace: Namespace})
			}
		}
		reply(w, list)
		return
	}
	var s types.Secret
	if !body(w, r, &s) {
		return
	}
	value := s.RawValue // as it is; the other may have lost white space, or bytes that are no text
	if len(value) == 0 {
		value = []byte(s.Value)
	}
	switch {
	case s.Namespace != "" && s.Namespace != Namespace:
		foreign(s.Namespace).Write(w)
	case r.Method == http.MethodDelete:
		settle(w, f.Provider.DeleteSecret(s.Name))
	default:
		settle(w, f.Provider.SetSecret(s.Name, value, r.Method == http.MethodPost))
	}
}
