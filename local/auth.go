package local

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net/http"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// Auth is the one user of the provider's API, /system/..., as faas-cli login
// knows it. The zero value asks nobody who they are. Calls of functions and
// /healthz are open to all, as they are in OpenFaaS.
type Auth struct {
	User, Password string
}

var errHalfAuth = errors.New("auth needs a user and a password")

func (a Auth) validate() error {
	if (a.User == "") != (a.Password == "") {
		return errHalfAuth
	}
	return nil
}

// allows says whether a request comes from the user. Both comparisons are made,
// and of digests, so that the time they take tells nothing.
func (a Auth) allows(r *http.Request) bool {
	if a == (Auth{}) {
		return true
	}
	user, password, _ := r.BasicAuth()
	same := func(x, y string) int {
		sx, sy := sha256.Sum256([]byte(x)), sha256.Sum256([]byte(y))
		return subtle.ConstantTimeCompare(sx[:], sy[:])
	}
	return same(user, a.User)&same(password, a.Password) == 1
}

// unauthorized asks for basic authentication.
func unauthorized(w http.ResponseWriter) {
	w.Header().Set("WWW-Authenticate", `Basic realm="Restricted"`)
	wire.Refuse(http.StatusUnauthorized, "unauthorized",
		"invalid credentials: log in with faas-cli login --gateway URL, or send user and password by basic authentication").Write(w)
}
