//go:build kubernetes

// Command provider is an OpenFaaS provider with a gateway's front, for the test
// of sheaf on a Kubernetes and for nothing else: OpenFaaS's own may not be
// shipped, and its Community Edition does not start without the internet. It
// makes of a function what OpenFaaS makes of it, a Deployment and a Service,
// and passes calls on to one replica at random.
//
//	GET /calls   how many calls it passed on, by function, as JSON
//
// With an argument it is another thing: it asks a URL, prints the answer, and
// ends; so a pod of this image can see what it reaches.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	bootstrap "github.com/openfaas/faas-provider"
	"github.com/openfaas/faas-provider/proxy"
	"github.com/openfaas/faas-provider/types"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	k8stypes "k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	applisters "k8s.io/client-go/listers/apps/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
)

// label names a function on all that it is made of.
const label = "faas_function"

func main() {
	if len(os.Args) == 2 {
		os.Exit(ask(os.Args[1]))
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

// ask prints what a URL answers. The exit code is 0 if it does at all.
func ask(url string) int {
	client := http.Client{Timeout: 5 * time.Second, Transport: new(http.Transport), // no proxy
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get(url)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	fmt.Printf("%s %s\n", resp.Status, body)
	return 0
}

// provider makes functions in a namespace of Kubernetes.
type provider struct {
	namespace   string
	client      kubernetes.Interface
	deployments applisters.DeploymentNamespaceLister
	slices      discoverylisters.EndpointSliceNamespaceLister

	mu    sync.Mutex // guards calls
	calls map[string]int
}

func run(ctx context.Context) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 100, 200
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	namespace := os.Getenv("function_namespace")
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(namespace))
	p := &provider{
		namespace: namespace, client: client, calls: map[string]int{},
		deployments: factory.Apps().V1().Deployments().Lister().Deployments(namespace),
		slices:      factory.Discovery().V1().EndpointSlices().Lister().EndpointSlices(namespace),
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	settings := types.FaaSConfig{ReadTimeout: 5 * time.Minute, WriteTimeout: 5 * time.Minute, TCPPort: new(8080),
		EnableBasicAuth: true, SecretMountPath: "/var/secrets", MaxIdleConns: 1024, MaxIdleConnsPerHost: 1024}
	pass := proxy.NewHandlerFunc(settings, p, false)
	bootstrap.Router().HandleFunc("/calls", p.told)
	bootstrap.Serve(ctx, &types.FaaSHandlers{
		ListNamespaces: func(w http.ResponseWriter, r *http.Request) { answer(w, http.StatusOK, []string{namespace}) },
		FunctionProxy: func(w http.ResponseWriter, r *http.Request) {
			name, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/function/"), "/")
			p.mu.Lock()
			p.calls[strings.TrimSuffix(name, "."+namespace)]++
			p.mu.Unlock()
			pass(w, r)
		},
		FunctionLister: p.list, FunctionStatus: p.status, DeployFunction: p.deploy, UpdateFunction: p.update,
		DeleteFunction: p.remove, ScaleFunction: p.scale,
		Secrets: missing, Logs: missing,
		Info: func(w http.ResponseWriter, r *http.Request) {
			answer(w, http.StatusOK, types.ProviderInfo{Name: "sheaf-test", Orchestration: "kubernetes", Version: &types.VersionInfo{Release: "test"}})
		},
	}, &settings)
	return nil
}

func missing(w http.ResponseWriter, r *http.Request) {
	http.Error(w, "this provider is for tests and has none", http.StatusNotImplemented)
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// refuse answers with an error of Kubernetes.
func refuse(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	if s := apierrors.APIStatus(nil); errors.As(err, &s) && s.Status().Code != 0 {
		status = int(s.Status().Code)
	}
	http.Error(w, err.Error(), status)
}

func (p *provider) told(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	answer(w, http.StatusOK, p.calls)
}

// Resolve finds a ready replica, at random, as OpenFaaS does.
func (p *provider) Resolve(name string) (url.URL, error) {
	name = strings.TrimSuffix(name, "."+p.namespace)
	slices, err := p.slices.List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: name}))
	if err != nil {
		return url.URL{}, err
	}
	var ready []string
	for _, s := range slices {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready == nil || *e.Conditions.Ready {
				ready = append(ready, e.Addresses[0])
			}
		}
	}
	if len(ready) == 0 {
		return url.URL{}, fmt.Errorf("no replica of %s is ready", name)
	}
	return url.URL{Scheme: "http", Host: ready[rand.IntN(len(ready))] + ":8080"}, nil
}

func (p *provider) statusOf(d *appsv1.Deployment) types.FunctionStatus {
	c := d.Spec.Template.Spec.Containers[0]
	s := types.FunctionStatus{Name: d.Name, Image: c.Image, Namespace: d.Namespace, CreatedAt: d.CreationTimestamp.Time,
		Labels: &d.Spec.Template.Labels, Annotations: &d.Annotations, AvailableReplicas: uint64(d.Status.AvailableReplicas), Replicas: 1}
	if d.Spec.Replicas != nil {
		s.Replicas = uint64(*d.Spec.Replicas)
	}
	return s
}

func (p *provider) list(w http.ResponseWriter, r *http.Request) {
	selector, _ := labels.Parse(label) // a constant
	found, err := p.deployments.List(selector)
	if err != nil {
		refuse(w, err)
		return
	}
	all := []types.FunctionStatus{}
	for _, d := range found {
		all = append(all, p.statusOf(d))
	}
	answer(w, http.StatusOK, all)
}

func (p *provider) status(w http.ResponseWriter, r *http.Request) {
	d, err := p.deployments.Get(strings.TrimPrefix(r.URL.Path, "/system/function/"))
	if err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, p.statusOf(d))
}

// read decodes a request's body, or answers 400.
func read[T any](w http.ResponseWriter, r *http.Request) (v T, ok bool) {
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return v, false
	}
	return v, true
}

func values(m *map[string]string) map[string]string {
	if m == nil {
		return nil
	}
	return *m
}

// template makes of a function what OpenFaaS makes of it, with its probes. The
// annotations com.openfaas.ready.http.initialDelay and .period, which the
// Community Edition does not read, set when a replica is first asked whether it
// is ready, and how often then, in whole seconds.
func template(f types.FunctionDeployment) corev1.PodTemplateSpec {
	of := map[string]string{label: f.Service}
	for k, v := range values(f.Labels) {
		of[k] = v
	}
	annotations := map[string]string{"prometheus.io.scrape": "false"}
	for k, v := range values(f.Annotations) {
		annotations[k] = v
	}
	var env []corev1.EnvVar
	for k, v := range f.EnvVars {
		env = append(env, corev1.EnvVar{Name: k, Value: v})
	}
	probe := func() *corev1.Probe {
		return &corev1.Probe{
			ProbeHandler:        corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/_/health", Port: intstr.FromInt32(8080)}},
			InitialDelaySeconds: 2, PeriodSeconds: 2, TimeoutSeconds: 1, FailureThreshold: 3, SuccessThreshold: 1,
		}
	}
	ready := probe()
	for name, into := range map[string]*int32{"initialDelay": &ready.InitialDelaySeconds, "period": &ready.PeriodSeconds} {
		if n, err := strconv.Atoi(annotations["com.openfaas.ready.http."+name]); err == nil {
			*into = int32(n)
		}
	}
	c := corev1.Container{
		Name: f.Service, Image: f.Image, ImagePullPolicy: corev1.PullIfNotPresent, Env: env,
		Ports:         []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}},
		LivenessProbe: probe(), ReadinessProbe: ready,
		SecurityContext: &corev1.SecurityContext{ReadOnlyRootFilesystem: &f.ReadOnlyRootFilesystem},
	}
	if f.Limits != nil && f.Limits.Memory != "" {
		if q, err := resource.ParseQuantity(f.Limits.Memory); err == nil {
			c.Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: q}
		}
	}
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: of, Annotations: annotations},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{c}},
	}
}

func (p *provider) deploy(w http.ResponseWriter, r *http.Request) {
	f, ok := read[types.FunctionDeployment](w, r)
	if !ok {
		return
	}
	replicas := int32(1)
	if n, err := strconv.Atoi(values(f.Labels)["com.openfaas.scale.min"]); err == nil {
		replicas = int32(n)
	}
	of := map[string]string{label: f.Service}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: f.Service, Namespace: p.namespace, Labels: of, Annotations: values(f.Annotations)},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: of}, Template: template(f),
			Strategy: appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType, RollingUpdate: &appsv1.RollingUpdateDeployment{
				MaxSurge: new(intstr.FromInt32(1)), MaxUnavailable: new(intstr.FromInt32(0))}},
			RevisionHistoryLimit: new(int32(5)),
		},
	}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: f.Service, Namespace: p.namespace, Annotations: values(f.Annotations)},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, Selector: of,
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 8080, TargetPort: intstr.FromInt32(8080)}}},
	}
	if _, err := p.client.AppsV1().Deployments(p.namespace).Create(r.Context(), d, metav1.CreateOptions{}); err != nil {
		refuse(w, err)
		return
	}
	if _, err := p.client.CoreV1().Services(p.namespace).Create(r.Context(), s, metav1.CreateOptions{}); err != nil {
		refuse(w, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// update rolls the function, whatever changed: its pods get a new label uid.
func (p *provider) update(w http.ResponseWriter, r *http.Request) {
	f, ok := read[types.FunctionDeployment](w, r)
	if !ok {
		return
	}
	api := p.client.AppsV1().Deployments(p.namespace)
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		d, err := api.Get(r.Context(), f.Service, metav1.GetOptions{})
		if err != nil {
			return err
		}
		d.Annotations, d.Spec.Template = values(f.Annotations), template(f)
		d.Spec.Template.Labels["uid"] = strconv.FormatUint(rand.Uint64(), 36)
		_, err = api.Update(r.Context(), d, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		refuse(w, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

func (p *provider) remove(w http.ResponseWriter, r *http.Request) {
	f, ok := read[types.DeleteFunctionRequest](w, r)
	if !ok {
		return
	}
	err := errors.Join(
		p.client.AppsV1().Deployments(p.namespace).Delete(r.Context(), f.FunctionName, metav1.DeleteOptions{}),
		p.client.CoreV1().Services(p.namespace).Delete(r.Context(), f.FunctionName, metav1.DeleteOptions{}))
	if err != nil {
		refuse(w, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

func (p *provider) scale(w http.ResponseWriter, r *http.Request) {
	f, ok := read[types.ScaleServiceRequest](w, r)
	if !ok {
		return
	}
	api := p.client.AppsV1().Deployments(p.namespace)
	// A patch, because controllers write to the Deployment all the time.
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, f.Replicas)
	if _, err := api.Patch(r.Context(), f.ServiceName, k8stypes.MergePatchType, patch, metav1.PatchOptions{}, "scale"); err != nil {
		refuse(w, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}
