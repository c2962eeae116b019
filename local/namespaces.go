package local

import (
	"fmt"
	"net/http"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// foreign refuses a namespace that is not ours.
func foreign(namespace string) *wire.Problem {
	return wire.Refuse(http.StatusForbidden, "namespace_not_allowed",
		fmt.Sprintf("namespace %q is not allowed; a local provider has only %s", wire.Cut(namespace), Namespace)).About("namespace")
}

// namespace tells of the one namespace, and refuses to make others or to
// change this one.
func (f *Front) namespace(w http.ResponseWriter, r *http.Request) {
	switch name := r.PathValue("name"); {
	case r.Method != http.MethodGet:
		wire.Refuse(http.StatusNotImplemented, "one_namespace",
			fmt.Sprintf("a local provider has the one namespace %s, which cannot be changed; others cannot be made", Namespace)).Write(w)
	case name != Namespace:
		wire.Refuse(http.StatusNotFound, "namespace_not_found",
			fmt.Sprintf("namespace %q does not exist; a local provider has only %s", wire.Cut(name), Namespace)).Write(w)
	default:
		reply(w, types.FunctionNamespace{Name: Namespace})
	}
}
