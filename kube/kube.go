// Package kube is a source of replica addresses on Kubernetes: it follows the
// EndpointSlices of a namespace in which functions run. It is the only room
// that knows Kubernetes.
//
// Replica addresses come from there to a registry.Watcher:
//
//	source, err := kube.InCluster("openfaas-fn", nil)
//	w := &registry.Watcher{Conn: nc, Provider: gatewayClient, Source: source}
//
// Each function of OpenFaaS has a Service of its name, and Kubernetes keeps
// the addresses of the Service's pods in EndpointSlices. Reading these needs
// no more than a Role that may get, list and watch endpointslices of
// discovery.k8s.io in that one namespace.
package kube

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/sheaf-project/sheaf"
)

// Unknown is the Desired of each View that a Source yields: EndpointSlices do
// not tell how many replicas a function shall have, nor which Services are
// functions. The provider's list of functions does.
const Unknown = -2

// A Source tells where the pods of functions are. Make one with New or
// InCluster; its replicas may be read by one at a time, again and again.
type Source struct {
	namespace string
	log       *slog.Logger
	directory *directory
	reflector *cache.Reflector
}

// InCluster returns a Source for a process that runs in a pod: the address of
// the API server, its certificate and the token come from the pod's service
// account. A nil log means slog.Default.
func InCluster(namespace string, log *slog.Logger) (*Source, error) {
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("find the Kubernetes API: %w; is this a pod, with its service account mounted?", err)
	}
	return New(config, namespace, log)
}

// New returns a Source that asks the API server that config names for the
// EndpointSlices of a namespace. A nil log means slog.Default. Nothing is
// asked before the replicas are read.
func New(config *rest.Config, namespace string, log *slog.Logger) (*Source, error) {
	if log == nil {
		log = slog.Default()
	}
	scheme := runtime.NewScheme() // of this one kind: client-go's own knows all of Kubernetes
	if err := discovery.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("make a client of Kubernetes: %w", err)
	}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/apis", &discovery.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	if config.UserAgent == "" {
		config.UserAgent = "sheaf"
	}
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("make a client of Kubernetes: %w", err)
	}
	s := &Source{namespace: namespace, log: log, directory: newDirectory()}
	slices := cache.NewFilteredListWatchFromClient(client, "endpointslices", namespace, func(o *metav1.ListOptions) {
		o.LabelSelector = discovery.LabelServiceName
	})
	logger := s.logger()
	s.reflector = cache.NewReflectorWithOptions(&cache.ListWatch{
		ListWithContextFunc: slices.ListWithContext,
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := slices.WatchWithContext(ctx, o)
			if err != nil {
				// Without its type: the reflector would try again unseen, and who
				// reads the replicas shall know that there are no news.
				return nil, fmt.Errorf("watch: %v", err)
			}
			return w, nil
		},
	}, &discovery.EndpointSlice{}, s.directory, cache.ReflectorOptions{
		Name: "endpointslices", Logger: &logger,
		Backoff: &wait.Backoff{Duration: 50 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 6, Cap: 2 * time.Second},
	})
	return s, nil
}

// logger is the log for client-go: what it calls levels 4 and above is for
// debugging.
func (s *Source) logger() klog.Logger { return logr.FromSlogHandler(s.log.Handler()) }

// Replicas yields, for each Service of the namespace, its pods in all states,
// and again on each change, until the loop is left or the API server fails,
// which is an error; whoever calls again learns all of it again. A View
// without a function says that all were told. Desired is [Unknown]; the ID of
// a replica is the name of its pod, Since is not known, and epochs are 0. A
// Service that is gone is told once, without replicas.
func (s *Source) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		ctx, cancel := context.WithCancel(klog.NewContext(ctx, s.logger()))
		s.directory.again()
		ended := make(chan error, 1)
		go func() { ended <- s.follow(ctx) }()
		over := false
		defer func() {
			cancel()
			if !over {
				<-ended
			}
		}()
		told := false
		for {
			select {
			case err := <-ended:
				over = true
				yield(sheaf.View{}, fmt.Errorf("watch the EndpointSlices of namespace %s: %w", s.namespace, err))
				return
			case <-s.directory.changed:
			}
			views, all := s.directory.take()
			for name, replicas := range views {
				v := sheaf.View{Function: name + "." + s.namespace, Desired: Unknown, Replicas: replicas}
				for i := range v.Replicas {
					v.Replicas[i].Function = name
				}
				if !yield(v, nil) {
					return
				}
			}
			if all && !told {
				told = true
				if !yield(sheaf.View{}, nil) {
					return
				}
			}
		}
	}
}

// follow keeps the directory until the API server fails or ctx ends. A watch
// that has become too old (410 Gone) is no failure: the slices are listed
// again.
func (s *Source) follow(ctx context.Context) error {
	for {
		if err := s.reflector.ListAndWatchWithContext(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.New("told to end")
		case <-time.After(50 * time.Millisecond):
		}
	}
}
