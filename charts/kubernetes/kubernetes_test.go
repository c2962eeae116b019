//go:build kubernetes

package kubernetes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// words makes n bytes of words in lines, always the same for a seed.
func words(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var b strings.Builder
	for b.Len() < n {
		for range 1 + rnd.IntN(12) {
			fmt.Fprintf(&b, "w%d ", int(rnd.ExpFloat64()*200))
		}
		b.WriteByte('\n')
	}
	return b.String()[:n]
}

// sequential counts words as one program would.
func sequential(input string) string {
	counts := map[string]int{}
	for _, w := range strings.Fields(input) { // the input is ASCII
		counts[w]++
	}
	var out strings.Builder
	for _, w := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int { return cmp.Or(counts[b]-counts[a], strings.Compare(a, b)) }) {
		fmt.Fprintf(&out, "%s %d\n", w, counts[w])
	}
	return out.String()
}

// paced reads text in pieces over about the given time, so that a job lasts.
type paced struct {
	text string
	step int
	wait time.Duration
}

func (p *paced) Read(b []byte) (int, error) {
	if p.text == "" {
		return 0, io.EOF
	}
	time.Sleep(p.wait)
	n := copy(b[:min(len(b), p.step)], p.text)
	p.text = p.text[n:]
	return n, nil
}

func over(text string, d time.Duration) io.Reader {
	const pieces = 200
	return &paced{text, len(text)/pieces + 1, d / pieces}
}

// job posts an input to the master; the answer must be that of one program.
func (c *cluster) job(query, input string, body io.Reader) (http.Header, error) {
	if body == nil {
		body = strings.NewReader(input)
	}
	req, err := http.NewRequest(http.MethodPost, c.gateway+"/function/master?"+query, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := caller.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return resp.Header, fmt.Errorf("status %d: %s", resp.StatusCode, text)
	}
	if string(text) != sequential(input) {
		return resp.Header, fmt.Errorf("WRONG ANSWER: %d bytes, want %d", len(text), len(sequential(input)))
	}
	return resp.Header, nil
}

// passed tells how many calls the gateway passed on to workers.
func (c *cluster) passed() int {
	c.t.Helper()
	_, b, err := c.do("GET", "/calls", nil)
	c.must(err)
	var calls map[string]int
	c.must(json.Unmarshal(b, &calls))
	return calls["worker"]
}

// during runs a job that lasts, and f while it runs.
func (c *cluster) during(t *testing.T, what string, d time.Duration, f func()) http.Header {
	t.Helper()
	input := words(rand.Uint64N(1<<20), 4<<20)
	type outcome struct {
		h   http.Header
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		h, err := c.job("block=4KiB", input, over(input, d))
		done <- outcome{h, err}
	}()
	time.Sleep(d / 10)
	begun := time.Now()
	f()
	took := time.Since(begun)
	select {
	case o := <-done:
		t.Fatalf("%s: the job ended before all was done to it (%v); it must last longer than %.1f s", what, o.err, took.Seconds())
	default:
	}
	o := <-done
	if o.err != nil {
		t.Fatalf("%s: %v", what, o.err)
	}
	t.Logf("%s: right; %s blocks on %s replicas in %s (what was done to it took %.1f s)", what, o.h.Get("Sheaf-Blocks"), o.h.Get("Sheaf-Replicas"), o.h.Get("Sheaf-Elapsed"), took.Seconds())
	return o.h
}

func TestKubernetes(t *testing.T) {
	c := connect(t)
	steps := []struct {
		name string
		do   func(*cluster, *testing.T)
	}{
		{"images", func(c *cluster, t *testing.T) { c.images() }},
		{"install", install},
		{"rights", rights},
		{"policies", policies},
		{"upload", upload},
		{"topic", topic},
		{"scale", scaled},
		{"roll", roll},
		{"kill", kill},
		{"restart connector", restartConnector},
		{"restart NATS", restartNATS},
		{"restart API server", restartAPI},
		{"cold starts", coldStarts},
		{"uninstall", uninstall},
	}
	for _, s := range steps {
		if !t.Run(s.name, func(t *testing.T) {
			of := *c
			of.t = t
			s.do(&of, t)
		}) {
			return // the next steps need this one
		}
	}
}

func install(c *cluster, t *testing.T) {
	c.clean()
	c.provider()
	begun := time.Now()
	notes := c.command(append(c.helm, "install", release, "sheaf", "--namespace", system, "--kubeconfig", os.Getenv("KUBECONFIG"), "--wait", "--timeout", "3m",
		"--set", "connector.image.repository=localhost/sheaf/connector,connector.image.tag=test,connector.image.pullPolicy=Never",
		"--set", "nats.image.repository=localhost/sheaf/nats,nats.image.tag=test,nats.image.pullPolicy=Never,nats.persistence.enabled=false",
		"--set", "connector.rebuildInterval=1s")...)
	t.Logf("helm install --wait: %.1f s\n%s", time.Since(begun).Seconds(), notes)
	for _, p := range c.pods(system, "app.kubernetes.io/instance="+release) {
		for _, s := range p.Status.ContainerStatuses {
			if s.RestartCount > 2 {
				t.Errorf("%s was restarted %d times", p.Name, s.RestartCount)
			}
		}
	}
	c.deploy("POST", worker(quick()))
	c.deploy("POST", master())
	c.settled("worker", 1)
	c.settled("master", 1)
}

// rights asks the API server what the connector may do.
func rights(c *cluster, t *testing.T) {
	may := func(verb, group, resource, namespace string) bool {
		r, err := c.api.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: "system:serviceaccount:" + system + ":sheaf-connector", Groups: []string{"system:serviceaccounts", "system:authenticated"},
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Namespace: namespace},
		}}, metav1.CreateOptions{})
		c.must(err)
		return r.Status.Allowed
	}
	asked := 0
	for _, verb := range []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"} {
		for _, r := range []struct{ group, name string }{{"discovery.k8s.io", "endpointslices"}, {"", "pods"}, {"", "secrets"}, {"", "configmaps"}, {"", "services"},
			{"", "pods/exec"}, {"apps", "deployments"}, {"rbac.authorization.k8s.io", "roles"}, {"", "nodes"}, {"", "namespaces"}} {
			for _, namespace := range []string{functions, system, "default", "kube-system", ""} {
				asked++
				want := namespace == functions && r.name == "endpointslices" && slices.Contains([]string{"get", "list", "watch"}, verb)
				if got := may(verb, r.group, r.name, namespace); got != want {
					t.Errorf("%s %s in %q: %v", verb, r.name, namespace, got)
				}
			}
		}
	}
	t.Logf("asked the API server %d times: of these the connector may get, list and watch endpointslices in %s, and nothing else", asked, functions)
}

// policies sees that the network policies are there, and whether this
// cluster's network keeps them.
func policies(c *cluster, t *testing.T) {
	for namespace, want := range map[string][]string{system: {"sheaf-connector", "sheaf-nats"}, functions: {"sheaf-masters", "sheaf-worker-worker"}} {
		l, err := c.api.NetworkingV1().NetworkPolicies(namespace).List(t.Context(), metav1.ListOptions{})
		c.must(err)
		var names []string
		for _, p := range l.Items {
			names = append(names, p.Name)
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("policies in %s are %q, want %q", namespace, names, want)
		}
	}
	there, err := c.endpoints("worker")
	c.must(err)
	_ = c.api.CoreV1().Pods("default").Delete(t.Context(), "sheaf-stranger", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	_, err = c.api.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "sheaf-stranger"}, Spec: corev1.PodSpec{
		RestartPolicy: corev1.RestartPolicyNever,
		Containers:    []corev1.Container{{Name: "ask", Image: "localhost/sheaf/provider:test", ImagePullPolicy: corev1.PullNever, Args: []string{there[0] + "/_/health"}}},
	}}, metav1.CreateOptions{})
	c.must(err)
	defer func() {
		_ = c.api.CoreV1().Pods("default").Delete(context.Background(), "sheaf-stranger", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	}()
	var phase corev1.PodPhase
	until(t, "the stranger has asked", func() (string, bool) {
		p, err := c.api.CoreV1().Pods("default").Get(t.Context(), "sheaf-stranger", metav1.GetOptions{})
		if err != nil {
			return err.Error(), false
		}
		phase = p.Status.Phase
		return string(phase), phase == corev1.PodSucceeded || phase == corev1.PodFailed
	})
	enforced := os.Getenv("NETWORK_POLICY") == "enforced"
	switch {
	case phase == corev1.PodFailed:
		t.Log("4 policies are applied; a pod of another namespace does not reach a worker")
	case enforced:
		t.Error("a pod of another namespace reaches a worker, and NETWORK_POLICY says that policies are enforced")
	default:
		t.Log("4 policies are applied; this cluster's network does not enforce them: a pod of another namespace reaches a worker")
	}
}

func upload(c *cluster, t *testing.T) {
	c.scale("worker", 3)
	c.settled("worker", 3)
	input := words(1, 1<<20)
	before := c.passed()
	h, err := c.job("block=16KiB&verify=require", input, nil)
	c.must(err)
	if n := c.passed() - before; n != 0 || h.Get("Sheaf-Replicas") != "3" {
		t.Errorf("%d blocks went through the gateway; %s replicas took part, want none and 3", n, h.Get("Sheaf-Replicas"))
	}
	t.Logf("upload of 1 MiB: right; %s blocks on %s replicas by the addresses of their pods in %s; the gateway passed none on", h.Get("Sheaf-Blocks"), h.Get("Sheaf-Replicas"), h.Get("Sheaf-Elapsed"))
	before = c.passed()
	h, err = c.job("block=16KiB&route=gateway", input, nil)
	c.must(err)
	if n := c.passed() - before; fmt.Sprint(n) != h.Get("Sheaf-Blocks") {
		t.Errorf("route=gateway: the gateway passed %d blocks on, of %s", n, h.Get("Sheaf-Blocks"))
	}
	h, err = c.job("block=16KiB&route=topic", input, nil)
	c.must(err)
	t.Logf("the same with route=topic: right; %s blocks in %s", h.Get("Sheaf-Blocks"), h.Get("Sheaf-Elapsed"))
}

// topic reads the connector's numbers: the worker's topic is bound.
func topic(c *cluster, t *testing.T) {
	metric := regexp.MustCompile(`(?m)^sheaf_topics ([0-9.e+]+)$`)
	until(t, "the connector binds the worker's topic", func() (string, bool) {
		b, err := c.api.CoreV1().RESTClient().Get().Namespace(system).Resource("services").Name("sheaf-connector:8080").SubResource("proxy").Suffix("metrics").DoRaw(t.Context())
		m := metric.FindSubmatch(b)
		return fmt.Sprintf("%v %q", err, m), m != nil && string(m[1]) == "1"
	})
}

func scaled(c *cluster, t *testing.T) {
	c.scale("worker", 1)
	c.settled("worker", 1)
	h := c.during(t, "scaled from 1 to 35 during a job", 40*time.Second, func() {
		c.scale("worker", 35)
		c.settled("worker", 35)
	})
	if h.Get("Sheaf-Replicas") == "1" {
		t.Error("no replica that came during the job took part")
	}
	c.during(t, "scaled from 35 to 4 during a job", 20*time.Second, func() {
		c.scale("worker", 4)
		c.settled("worker", 4)
	})
}

func roll(c *cluster, t *testing.T) {
	former, err := c.endpoints("worker")
	c.must(err)
	c.during(t, "the worker was rolled during a job", 40*time.Second, func() {
		c.deploy("PUT", worker(quick()))
		until(t, "all replicas are new ones", func() (string, bool) {
			now, err := c.endpoints("worker")
			return fmt.Sprint(now, err), len(now) == len(former) && !slices.ContainsFunc(now, func(u string) bool { return slices.Contains(former, u) })
		})
		c.settled("worker", len(former))
	})
}

// kill deletes pods at random under 50 jobs, half of them without a warning.
func kill(c *cluster, t *testing.T) {
	c.scale("worker", 8)
	c.settled("worker", 8)
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	killed, hard := 0, 0
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(500+rnd.IntN(1000)) * time.Millisecond):
			}
			pods := c.pods(functions, "faas_function=worker")
			pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
			if len(pods) == 0 {
				continue
			}
			var o metav1.DeleteOptions
			if rnd.IntN(2) == 0 {
				o.GracePeriodSeconds = new(int64(0))
				hard++
			}
			if err := c.api.CoreV1().Pods(functions).Delete(context.Background(), pods[rnd.IntN(len(pods))].Name, o); err == nil {
				killed++
			}
		}
	})
	right := 0
	begun := time.Now()
	for i := range 50 {
		input := words(uint64(i), 256<<10)
		if _, err := c.job("block=4KiB", input, over(input, time.Second)); err != nil {
			t.Errorf("job %d: %v (seed %d)", i, err, seed)
			continue
		}
		right++
	}
	close(stop)
	wg.Wait()
	t.Logf("50 jobs in %.0f s with %d pods deleted at random (%d without a warning), seed %d: %d right", time.Since(begun).Seconds(), killed, hard, seed, right)
	if killed < 10 {
		t.Errorf("only %d pods were deleted", killed)
	}
	c.settled("worker", 8)
}

// gone deletes the pods that a selector names, and waits for as many others.
func (c *cluster) gone(t *testing.T, selector string) {
	t.Helper()
	former := map[types.UID]bool{}
	for _, p := range c.pods(system, selector) {
		former[p.UID] = true
		c.must(c.api.CoreV1().Pods(system).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}))
	}
	until(t, selector+" is back", func() (string, bool) {
		ready := 0
		for _, p := range c.pods(system, selector) {
			for _, k := range p.Status.Conditions {
				if k.Type == corev1.PodReady && k.Status == corev1.ConditionTrue && !former[p.UID] {
					ready++
				}
			}
		}
		return fmt.Sprintf("%d ready of %d", ready, len(former)), ready == len(former)
	})
}

func restartConnector(c *cluster, t *testing.T) {
	c.scale("worker", 4)
	c.settled("worker", 4)
	c.during(t, "the connector was killed during a job", 30*time.Second, func() { c.gone(t, "app.kubernetes.io/component=connector") })
	c.scale("worker", 5)
	c.settled("worker", 5)
}

func restartNATS(c *cluster, t *testing.T) {
	c.during(t, "NATS was killed during a job, and its streams were lost", 30*time.Second, func() { c.gone(t, "app.kubernetes.io/component=nats") })
	c.settled("worker", 5)
	c.scale("worker", 6)
	c.settled("worker", 6)
	input := words(3, 1<<20)
	_, err := c.job("", input, nil)
	c.must(err)
}

func restartAPI(c *cluster, t *testing.T) {
	if os.Getenv("RESTART_APISERVER") == "none" {
		t.Log("NOT RUN: RESTART_APISERVER is none")
		return
	}
	c.during(t, "the API server was restarted during a job", 45*time.Second, func() {
		c.command("sh", "-c", os.Getenv("RESTART_APISERVER"))
		until(t, "the API server is back", func() (string, bool) {
			_, err := c.endpoints("worker")
			return fmt.Sprint(err), err == nil
		})
	})
	until(t, "the provider scales again", func() (string, bool) {
		status, b, err := c.do("POST", "/system/scale-function/worker", map[string]any{"serviceName": "worker", "replicas": 7})
		return fmt.Sprint(status, string(b), err), status == http.StatusAccepted
	})
	c.settled("worker", 7)
}

// known measures, for each replica that comes, how long after its EndpointSlice
// it is in the record, both as this machine sees them.
func (c *cluster) known(ctx context.Context, into chan<- map[string]time.Time) {
	seen := map[string]time.Time{}
	stream, err := c.api.CoreV1().RESTClient().Get().Namespace(system).Resource("services").Name("sheaf-connector:8080").SubResource("proxy").Suffix("replicas").Param("watch", "true").Stream(ctx)
	if err == nil {
		dec := json.NewDecoder(stream)
		for {
			var list []struct {
				Function string
				Replicas []replica
			}
			if dec.Decode(&list) != nil {
				break
			}
			for _, f := range list {
				for _, r := range f.Replicas {
					if f.Function == "worker."+functions && r.State == "ready" && seen[r.URL].IsZero() {
						seen[r.URL] = time.Now()
					}
				}
			}
		}
		_ = stream.Close()
	}
	into <- seen
}

// coldStarts measures, from no replica, how long the thesis's jobs take, with
// the probes that OpenFaaS's Community Edition has and with quick ones.
func coldStarts(c *cluster, t *testing.T) {
	thesis := map[int]string{6: "4.58", 11: "5.87", 17: "10.10", 35: "18.77"}
	input := words(1654, 1654)
	var table bytes.Buffer
	fmt.Fprintf(&table, "\nFrom no replica, 1,654 bytes, seconds: median (least-most) of 3\n%-22s %8s %8s %20s %20s %16s\n", "probes", "new pods", "thesis", "job's answer", "all are ready", "known after, ms")
	for _, probes := range []struct {
		name        string
		annotations *map[string]string
	}{{"1 s, no delay", quick()}, {"CE: 2 s, delay 2 s", nil}} {
		c.scale("worker", 0)
		c.settled("worker", 0)
		c.deploy("PUT", worker(probes.annotations))
		for _, n := range []int{1, 6, 12, 17, 35} {
			var answers, all, lags []float64
			for range 3 {
				c.scale("worker", 0)
				c.settled("worker", 0)
				until(t, "all pods are gone", func() (string, bool) {
					l := len(c.pods(functions, "faas_function=worker"))
					return fmt.Sprint(l), l == 0
				})
				time.Sleep(time.Second)
				ctx, cancel := context.WithCancel(t.Context())
				into := make(chan map[string]time.Time, 1)
				go c.known(ctx, into)
				slice := map[string]time.Time{}
				w, err := c.api.DiscoveryV1().EndpointSlices(functions).Watch(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=worker"})
				c.must(err)
				time.Sleep(200 * time.Millisecond)
				begun := time.Now()
				done := make(chan error, 1)
				go func() {
					_, err := c.job(fmt.Sprintf("block=%d&workers=%d", max(48, len(input)/n), n), input, nil)
					answers = append(answers, time.Since(begun).Seconds())
					done <- err
				}()
				for len(slice) < n {
					select {
					case e := <-w.ResultChan():
						now := time.Now()
						for _, u := range ready(e.Object) {
							if slice[u].IsZero() {
								slice[u] = now
							}
						}
					case <-time.After(soon):
						t.Fatalf("%d of %d replicas after %s", len(slice), n, soon)
					}
				}
				all = append(all, time.Since(begun).Seconds())
				c.must(<-done)
				c.settled("worker", n)
				cancel()
				w.Stop()
				for u, at := range <-into {
					if !slice[u].IsZero() {
						lags = append(lags, max(0, at.Sub(slice[u]).Seconds()*1000))
					}
				}
			}
			if len(lags) == 0 {
				t.Error("nothing was seen in the record")
				lags = []float64{-1}
			}
			fmt.Fprintf(&table, "%-22s %8d %8s %20s %20s %16s\n", probes.name, n, cmp.Or(thesis[n], thesis[n-1]), spread(answers, "%.2f"), spread(all, "%.2f"), spread(lags, "%.0f"))
			if worst := slices.Max(lags); worst > 1000 {
				t.Errorf("%d new pods: a replica was in the record %.0f ms after its slice, aim 1,000", n, worst)
			}
		}
	}
	t.Log(table.String() + "(The thesis's 5.87 s are of 11 pods.)")
}

func spread(of []float64, format string) string {
	slices.Sort(of)
	return fmt.Sprintf(format+" ("+format+"-"+format+")", of[len(of)/2], of[0], of[len(of)-1])
}

// uninstall removes the release; nothing of it stays.
func uninstall(c *cluster, t *testing.T) {
	t.Log(c.command(append(c.helm, "uninstall", release, "--namespace", system, "--kubeconfig", os.Getenv("KUBECONFIG"), "--wait")...))
	o := metav1.ListOptions{LabelSelector: "app.kubernetes.io/instance=" + release}
	until(t, "its pods are gone", func() (string, bool) { l := len(c.pods(system, o.LabelSelector)); return fmt.Sprint(l), l == 0 })
	ctx := t.Context()
	left := 0
	for _, namespace := range []string{system, functions} {
		a, err1 := c.api.RbacV1().Roles(namespace).List(ctx, o)
		b, err2 := c.api.NetworkingV1().NetworkPolicies(namespace).List(ctx, o)
		s, err3 := c.api.CoreV1().Services(namespace).List(ctx, o)
		c.must(errors.Join(err1, err2, err3))
		left += len(a.Items) + len(b.Items) + len(s.Items)
	}
	if left > 0 {
		t.Errorf("%d objects of the release stay", left)
	}
	for _, namespace := range []string{system, functions} {
		c.must(c.api.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}))
	}
}
