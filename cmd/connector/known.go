package main

import (
	"context"
	"sync"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/registry"
)

// listed is a Provider that remembers which functions it listed last: who asks
// often whether there is one does not ask the gateway.
type listed struct {
	registry.Provider

	mu        sync.Mutex // guards functions
	functions map[string]bool
}

// Functions lists the functions.
func (l *listed) Functions(ctx context.Context) ([]types.FunctionStatus, error) {
	list, err := l.Provider.Functions(ctx)
	if err != nil {
		return nil, err
	}
	here := make(map[string]bool, len(list))
	for _, f := range list {
		if f.Namespace != "" {
			f.Name += "." + f.Namespace
		}
		here[registry.Key(f.Name)] = true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.functions = here
	return list, nil
}

// has says whether there is a function, by its key.
func (l *listed) has(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.functions[key]
}
