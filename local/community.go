package local

// community.go keeps the front within what OpenFaaS's Community Edition allows,
// so that what works here works there.

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// What the Community Edition allows, as it was measured; docs/OPENFAAS.md.
const (
	communityReplicas  = 5
	communityFunctions = 15
	communityBody      = 256_000 // bytes of an asynchronous call
)

// community is c as the Community Edition's queue is: one call of a function at
// a time, and no second attempt.
func (c AsyncConfig) community() AsyncConfig {
	orElse(&c.BodyLimit, communityBody)
	orElse(&c.Parallel, 1)
	orElse(&c.Retry.Attempts, 1)
	orElse(&c.CallbackTries, 1)
	return c
}

// beyond says what of a deployment the Community Edition refuses; nil when it
// takes it.
func (p *Provider) beyond(spec types.FunctionDeployment) *wire.Problem {
	refuse := func(about, format string, a ...any) *wire.Problem {
		return wire.Refuse(http.StatusBadRequest, "community_limit",
			fmt.Sprintf(format, a...)+", which OpenFaaS's Community Edition refuses; sheaf up without --community takes it").About(about)
	}
	if spec.Labels != nil {
		for _, label := range []string{LabelMin, LabelMax} {
			if n, err := strconv.Atoi((*spec.Labels)[label]); err == nil && n > communityReplicas {
				return refuse("labels", "label %s is %d, over %d", label, n, communityReplicas).Within(communityReplicas)
			}
		}
		for _, label := range []string{"com.openfaas.scale.zero", "com.openfaas.scale.type", "com.openfaas.scale.target"} {
			if _, has := (*spec.Labels)[label]; has {
				return refuse("labels", "label %s is set", label)
			}
		}
	}
	if spec.Annotations != nil && strings.Contains((*spec.Annotations)["topic"], ",") {
		return refuse("annotations", "annotation topic names more than one topic")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.functions[spec.Service] == nil && len(p.functions) >= communityFunctions {
		return refuse("service", "there are %d functions, and %s would be another", len(p.functions), spec.Service).Within(communityFunctions)
	}
	return nil
}
