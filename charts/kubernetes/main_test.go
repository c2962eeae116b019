//go:build kubernetes

// Package kubernetes tests sheaf on a real Kubernetes: its images, its chart
// and its functions, with pods that are killed, rolled and scaled, and with the
// connector, NATS and the API server restarted under jobs.
//
// It needs a cluster that it may use for itself (namespaces openfaas and
// openfaas-fn), and is told of it by the environment:
//
//	KUBECONFIG         the cluster
//	LOAD_IMAGE         a command that brings an image archive to the nodes; the archive's path is added to it
//	RESTART_APISERVER  a command that restarts the API server; "none" leaves that part out, and says so
//	NETWORK_POLICY     "enforced" if the cluster's network enforces policies: then strangers must be shut out
//	GATEWAY_URL        where this machine reaches node port 31112; found by the node's address without it
//	HELM               the helm to use; built from its module without it
//
// What is missing fails, with a sentence that says what; nothing is skipped.
package kubernetes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/openfaas/faas-provider/types"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	client "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/sheaf-project/sheaf/charts/image"
)

const (
	system    = "openfaas"    // where OpenFaaS's own pods are
	functions = "openfaas-fn" // where functions are
	release   = "sheaf"
	mark      = "sheaf-test" // label of namespaces that this test made, and may remove
	password  = "s3cret"
	soon      = 3 * time.Minute
)

// A cluster is the Kubernetes under test, with sheaf on it.
type cluster struct {
	t       *testing.T
	config  *rest.Config
	api     client.Interface
	gateway string
	helm    []string
	arch    string
}

// must fails the test.
func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// until waits for a condition; it fails with what the condition said last.
func until(t *testing.T, what string, f func() (string, bool)) {
	t.Helper()
	last := ""
	for begun := time.Now(); time.Since(begun) < soon; time.Sleep(50 * time.Millisecond) {
		var ok bool
		if last, ok = f(); ok {
			return
		}
	}
	t.Fatalf("%s: not after %s; last: %s", what, soon, last)
}

// connect finds the cluster, or fails with the reason.
func connect(t *testing.T) *cluster {
	t.Helper()
	for name, example := range map[string]string{
		"KUBECONFIG":        "$HOME/.kube/config",
		"LOAD_IMAGE":        "kind load image-archive",
		"RESTART_APISERVER": "docker exec kind-control-plane sh -c 'crictl stop $(crictl ps -q --name kube-apiserver)', or none to leave that part out",
	} {
		if os.Getenv(name) == "" {
			t.Fatalf("environment variable %s is not set; expected such as %s", name, example)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		t.Fatalf("KUBECONFIG: %v", err)
	}
	config.QPS, config.Burst = 200, 400
	api, err := client.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, config: config, api: api}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	version, err := api.Discovery().ServerVersion()
	if err != nil {
		t.Fatalf("the cluster of KUBECONFIG cannot be reached: %v", err)
	}
	nodes, err := api.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil || len(nodes.Items) == 0 {
		t.Fatalf("the cluster of KUBECONFIG has no node (%v)", err)
	}
	node := nodes.Items[0]
	c.arch = node.Status.NodeInfo.Architecture
	t.Logf("Kubernetes %s, %d nodes, %s %s", version.GitVersion, len(nodes.Items), node.Status.NodeInfo.ContainerRuntimeVersion, c.arch)
	c.gateway = os.Getenv("GATEWAY_URL")
	if c.gateway == "" {
		for _, a := range node.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				c.gateway = "http://" + a.Address + ":31112"
			}
		}
	}
	c.helm = []string{"go", "tool", "helm"}
	if h := os.Getenv("HELM"); h != "" {
		c.helm = []string{h}
	}
	return c
}

// command runs a command in the charts folder and returns what it printed.
func (c *cluster) command(args ...string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// images builds what runs on the cluster and brings it to the nodes.
func (c *cluster) images() {
	c.t.Helper()
	to := []v1.Platform{{OS: "linux", Architecture: c.arch}}
	dir := c.t.TempDir()
	for _, i := range []image.Command{
		{Dir: "../..", Package: "./functions/master", Name: "master", Env: map[string]string{"sheaf_role": "master"}},
		{Dir: "../..", Package: "./functions/worker", Name: "worker"},
		{Dir: "../..", Package: "./cmd/connector", Name: "connector"},
		{Dir: "..", Package: "github.com/nats-io/nats-server/v2", Name: "nats"},
		{Dir: "..", Package: "./kubernetes/provider", Name: "provider", Tags: "kubernetes"},
	} {
		index, err := image.Build(c.t.Context(), i, to)
		c.must(err)
		where := filepath.Join(dir, i.Name)
		c.must(image.Save(index, where, "localhost/sheaf/"+i.Name+":test"))
		c.command("sh", "-c", os.Getenv("LOAD_IMAGE")+` "$0"`, where+".tar")
	}
}

// clean makes the two namespaces anew. It removes none that it did not make.
func (c *cluster) clean() {
	c.t.Helper()
	ctx := c.t.Context()
	for _, name := range []string{system, functions} {
		ns, err := c.api.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			if ns.Labels[mark] != "true" {
				c.t.Fatalf("namespace %s is there and not of this test; give a cluster without an OpenFaaS", name)
			}
			c.must(c.api.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{}))
		} else if !apierrors.IsNotFound(err) {
			c.t.Fatal(err)
		}
	}
	for _, name := range []string{system, functions} {
		until(c.t, "namespace "+name+" is gone", func() (string, bool) {
			_, err := c.api.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
			return fmt.Sprint(err), apierrors.IsNotFound(err)
		})
		_, err := c.api.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{mark: "true"}}}, metav1.CreateOptions{})
		c.must(err)
	}
}

// provider installs what stands for OpenFaaS.
func (c *cluster) provider() {
	c.t.Helper()
	ctx := c.t.Context()
	meta := func(namespace, name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: namespace, Name: name}
	}
	_, err := c.api.CoreV1().Secrets(system).Create(ctx, &corev1.Secret{ObjectMeta: meta(system, "basic-auth"),
		StringData: map[string]string{"basic-auth-user": "admin", "basic-auth-password": password}}, metav1.CreateOptions{})
	c.must(err)
	_, err = c.api.CoreV1().ServiceAccounts(system).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta(system, "provider")}, metav1.CreateOptions{})
	c.must(err)
	_, err = c.api.RbacV1().Roles(functions).Create(ctx, &rbacv1.Role{ObjectMeta: meta(functions, "provider"), Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{"apps"}, Resources: []string{"deployments", "deployments/scale"}, Verbs: []string{"*"}},
		{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"*"}},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"get", "list", "watch"}},
	}}, metav1.CreateOptions{})
	c.must(err)
	_, err = c.api.RbacV1().RoleBindings(functions).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: meta(functions, "provider"),
		RoleRef:  rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "Role", Name: "provider"},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: "provider", Namespace: system}}}, metav1.CreateOptions{})
	c.must(err)
	of := map[string]string{"app": "gateway"}
	_, err = c.api.AppsV1().Deployments(system).Create(ctx, &appsv1.Deployment{ObjectMeta: meta(system, "gateway"), Spec: appsv1.DeploymentSpec{
		Selector: &metav1.LabelSelector{MatchLabels: of},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: of}, Spec: corev1.PodSpec{
			ServiceAccountName: "provider",
			Containers: []corev1.Container{{
				Name: "gateway", Image: "localhost/sheaf/provider:test", ImagePullPolicy: corev1.PullNever,
				Env:            []corev1.EnvVar{{Name: "function_namespace", Value: functions}},
				Ports:          []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
				VolumeMounts:   []corev1.VolumeMount{{Name: "auth", MountPath: "/var/secrets", ReadOnly: true}},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/calls", Port: intstr.FromInt32(8080)}}},
			}},
			Volumes: []corev1.Volume{{Name: "auth", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "basic-auth"}}}},
		}},
	}}, metav1.CreateOptions{})
	c.must(err)
	port := corev1.ServicePort{Name: "http", Port: 8080, TargetPort: intstr.FromInt32(8080)}
	_, err = c.api.CoreV1().Services(system).Create(ctx, &corev1.Service{ObjectMeta: meta(system, "gateway"), Spec: corev1.ServiceSpec{Selector: of, Ports: []corev1.ServicePort{port}}}, metav1.CreateOptions{})
	c.must(err)
	port.NodePort = 31112
	_, err = c.api.CoreV1().Services(system).Create(ctx, &corev1.Service{ObjectMeta: meta(system, "gateway-external"),
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Selector: of, Ports: []corev1.ServicePort{port}}}, metav1.CreateOptions{})
	c.must(err)
	until(c.t, "the provider answers at "+c.gateway, func() (string, bool) {
		status, _, err := c.do("GET", "/system/functions", nil)
		return fmt.Sprint(status, " ", err), status == 200
	})
}

var caller = &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}

// do calls the gateway with its login.
func (c *cluster) do(method, path string, body any) (int, []byte, error) {
	var b io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		b = bytes.NewReader(text)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.gateway+path, b)
	if err != nil {
		return 0, nil, err
	}
	req.SetBasicAuth("admin", password)
	resp, err := caller.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, text, err
}

// deploy makes or rolls a function.
func (c *cluster) deploy(method string, f types.FunctionDeployment) {
	c.t.Helper()
	status, text, err := c.do(method, "/system/functions", f)
	if err != nil || status != http.StatusAccepted {
		c.t.Fatalf("%s %s: %d %s %v", method, f.Service, status, text, err)
	}
}

// quick are annotations by which replicas are asked at once whether they are
// ready; without them, after 2 seconds, and every 2 seconds then.
func quick() *map[string]string {
	return &map[string]string{"com.openfaas.ready.http.initialDelay": "0", "com.openfaas.ready.http.period": "1", "topic": "words"}
}

func worker(annotations *map[string]string) types.FunctionDeployment {
	return types.FunctionDeployment{Service: "worker", Image: "localhost/sheaf/worker:test", Annotations: annotations, ReadOnlyRootFilesystem: true,
		Labels:  &map[string]string{"com.openfaas.scale.min": "1", "com.openfaas.scale.max": "40"},
		EnvVars: map[string]string{"sheaf_function": "worker"}}
}

func master() types.FunctionDeployment {
	return types.FunctionDeployment{Service: "master", Image: "localhost/sheaf/master:test", ReadOnlyRootFilesystem: true,
		Annotations: &map[string]string{"com.openfaas.ready.http.initialDelay": "0", "com.openfaas.ready.http.period": "1"},
		EnvVars:     map[string]string{"sheaf_function": "master", "nats_url": "nats://sheaf-nats.openfaas:4222", "replica_wait": "2m"}}
}

// scale sets how many replicas a function has.
func (c *cluster) scale(function string, n int) {
	c.t.Helper()
	status, text, err := c.do("POST", "/system/scale-function/"+function, types.ScaleServiceRequest{ServiceName: function, Replicas: uint64(n)})
	if err != nil || status != http.StatusAccepted {
		c.t.Fatalf("scale %s to %d: %d %s %v", function, n, status, text, err)
	}
}

// A replica as the record has it.
type replica struct{ ID, URL, State string }

// record asks the connector for the ready replicas of a function.
func (c *cluster) record(function string) ([]replica, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b, err := c.api.CoreV1().RESTClient().Get().Namespace(system).Resource("services").Name("sheaf-connector:8080").SubResource("proxy").Suffix("replicas").DoRaw(ctx)
	if err != nil {
		return nil, err
	}
	var list []struct {
		Function string
		Replicas []replica
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%w: %s", err, b)
	}
	for _, f := range list {
		if f.Function == function+"."+functions {
			return slices.DeleteFunc(f.Replicas, func(r replica) bool { return r.State != "ready" }), nil
		}
	}
	return nil, nil
}

// endpoints returns the addresses of the ready pods of a function, by Kubernetes.
func (c *cluster) endpoints(function string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	l, err := c.api.DiscoveryV1().EndpointSlices(functions).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + function})
	if err != nil {
		return nil, err
	}
	var all []string
	for _, s := range l.Items {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready {
				all = append(all, "http://"+e.Addresses[0]+":8080")
			}
		}
	}
	slices.Sort(all)
	return all, nil
}

// settled waits until the record has exactly the ready pods of a function, n of
// them, as Kubernetes does.
func (c *cluster) settled(function string, n int) {
	c.t.Helper()
	until(c.t, fmt.Sprintf("%d replicas of %s in the record", n, function), func() (string, bool) {
		record, err1 := c.record(function)
		there, err2 := c.endpoints(function)
		var urls []string
		for _, r := range record {
			urls = append(urls, r.URL)
		}
		slices.Sort(urls)
		return fmt.Sprintf("record %v, Kubernetes %v, %v", urls, there, errors.Join(err1, err2)),
			err1 == nil && err2 == nil && len(urls) == n && slices.Equal(urls, there)
	})
}

// pods lists the pods of a function, or of all that a selector names.
func (c *cluster) pods(namespace, selector string) []corev1.Pod {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	l, err := c.api.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	c.must(err)
	return l.Items
}

// ready returns the addresses of the ready endpoints of a slice.
func ready(o any) []string {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return nil
	}
	var all []string
	for _, e := range s.Endpoints {
		if e.Conditions.Ready != nil && *e.Conditions.Ready {
			all = append(all, "http://"+e.Addresses[0]+":8080")
		}
	}
	return all
}
