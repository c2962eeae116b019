package charts

// networkpolicy_test.go judges who may talk to whom by the rules of Kubernetes:
// a pod that a policy selects takes only what some policy's rule allows it, and
// both ends must allow a connection.

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// An end of a connection is a pod, or an address outside the cluster.
type end struct {
	namespace string
	labels    map[string]string
	address   string // if it is no pod
}

func function(name string) end {
	return end{"openfaas-fn", map[string]string{"faas_function": name}, ""}
}

// ends are those that may meet in a cluster.
var ends = map[string]end{
	"master":     function("master"),
	"worker":     function("worker"),
	"other":      function("other"), // another function of the same namespace
	"gateway":    {"openfaas", map[string]string{"app": "gateway"}, ""},
	"prometheus": {"openfaas", map[string]string{"app": "prometheus"}, ""},
	"queue":      {"openfaas", map[string]string{"app": "queue-worker"}, ""},
	"connector": {"openfaas", map[string]string{"app.kubernetes.io/name": "sheaf", "app.kubernetes.io/instance": "sheaf",
		"app.kubernetes.io/component": "connector"}, ""},
	"nats": {"openfaas", map[string]string{"app.kubernetes.io/name": "sheaf", "app.kubernetes.io/instance": "sheaf",
		"app.kubernetes.io/component": "nats"}, ""},
	"stranger":  {"default", map[string]string{"app": "stranger"}, ""},
	"forger":    {"default", map[string]string{"faas_function": "master", "app": "gateway"}, ""}, // the right labels, elsewhere
	"apiserver": {address: "192.0.2.1"},
}

func matches(t *testing.T, s *metav1.LabelSelector, of map[string]string) bool {
	t.Helper()
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return sel.Matches(labels.Set(of))
}

// peer says whether a rule's peer is e. A policy's own namespace is meant where
// none is given.
func peer(t *testing.T, p netv1.NetworkPolicyPeer, namespace string, e end) bool {
	t.Helper()
	if p.IPBlock != nil {
		return e.address != "" && netip.MustParsePrefix(p.IPBlock.CIDR).Contains(netip.MustParseAddr(e.address))
	}
	if e.address != "" {
		return false
	}
	if p.NamespaceSelector == nil {
		if e.namespace != namespace {
			return false
		}
	} else if !matches(t, p.NamespaceSelector, map[string]string{"kubernetes.io/metadata.name": e.namespace}) {
		return false
	}
	return p.PodSelector == nil || matches(t, p.PodSelector, e.labels)
}

func allows(t *testing.T, peers []netv1.NetworkPolicyPeer, ports []netv1.NetworkPolicyPort, namespace string, e end, protocol corev1.Protocol, port int) bool {
	t.Helper()
	if len(peers) > 0 && !slices.ContainsFunc(peers, func(p netv1.NetworkPolicyPeer) bool { return peer(t, p, namespace, e) }) {
		return false
	}
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p netv1.NetworkPolicyPort) bool {
		return *p.Protocol == protocol && (p.Port == nil || p.Port.IntValue() == port)
	})
}

// may says whether from may connect to a port of to.
func may(t *testing.T, policies []*netv1.NetworkPolicy, from, to end, protocol corev1.Protocol, port int) bool {
	t.Helper()
	out, in := true, true // what no policy selects is free
	for _, p := range policies {
		if from.namespace == p.Namespace && from.address == "" && slices.Contains(p.Spec.PolicyTypes, netv1.PolicyTypeEgress) && matches(t, &p.Spec.PodSelector, from.labels) {
			out = false
		}
		if to.namespace == p.Namespace && to.address == "" && slices.Contains(p.Spec.PolicyTypes, netv1.PolicyTypeIngress) && matches(t, &p.Spec.PodSelector, to.labels) {
			in = false
		}
	}
	for _, p := range policies {
		if from.namespace == p.Namespace && from.address == "" && matches(t, &p.Spec.PodSelector, from.labels) {
			for _, r := range p.Spec.Egress {
				out = out || allows(t, r.To, r.Ports, p.Namespace, to, protocol, port)
			}
		}
		if to.namespace == p.Namespace && to.address == "" && matches(t, &p.Spec.PodSelector, to.labels) {
			for _, r := range p.Spec.Ingress {
				in = in || allows(t, r.From, r.Ports, p.Namespace, from, protocol, port)
			}
		}
	}
	return out && in
}

// TestWhoMayTalkToWhom: control 16.
func TestWhoMayTalkToWhom(t *testing.T) {
	type row struct {
		from, to string
		port     int
		want     bool
	}
	rows := []row{
		{"master", "worker", 8080, true},
		{"gateway", "worker", 8080, true},
		{"connector", "worker", 8080, true},
		{"worker", "worker", 8080, true},
		{"other", "worker", 8080, false},
		{"stranger", "worker", 8080, false},
		{"forger", "worker", 8080, false},
		{"prometheus", "worker", 8080, false},
		{"nats", "worker", 8080, false},
		{"master", "worker", 22, false},

		{"gateway", "master", 8080, true},
		{"connector", "master", 8080, true},
		{"worker", "master", 8080, false},
		{"other", "master", 8080, false},
		{"stranger", "master", 8080, false},

		{"connector", "nats", 4222, true},
		{"master", "nats", 4222, true},
		{"worker", "nats", 4222, false},
		{"gateway", "nats", 4222, false},
		{"stranger", "nats", 4222, false},
		{"forger", "nats", 4222, false},
		{"connector", "nats", 8222, false},
		{"nats", "apiserver", 443, false},

		{"prometheus", "connector", 8080, true},
		{"gateway", "connector", 8080, false},
		{"stranger", "connector", 8080, false},
		{"worker", "connector", 8080, true}, // the record of replicas
		{"master", "connector", 8080, true},
		{"other", "connector", 8080, false},
		{"worker", "connector", 9090, false},
		{"connector", "gateway", 8080, true},
		{"connector", "apiserver", 6443, true},
		{"connector", "apiserver", 443, true},
		{"connector", "apiserver", 25, false},
		{"connector", "stranger", 8080, false},

		{"worker", "apiserver", 443, true}, // workerEgress is on
		{"stranger", "gateway", 8081, true},
		{"stranger", "other", 8080, true}, // not ours to guard
	}
	check := func(t *testing.T, policies []*netv1.NetworkPolicy, rows []row) {
		t.Helper()
		for _, r := range rows {
			if got := may(t, policies, ends[r.from], ends[r.to], corev1.ProtocolTCP, r.port); got != r.want {
				t.Errorf("%s to %s at %d: %v, want %v", r.from, r.to, r.port, got, r.want)
			}
		}
	}
	policies := func(t *testing.T, values map[string]any) []*netv1.NetworkPolicy {
		t.Helper()
		return only[*netv1.NetworkPolicy](objects(t, values))
	}
	t.Run("default", func(t *testing.T) { check(t, policies(t, nil), rows) })
	t.Run("strict", func(t *testing.T) {
		changed := slices.Clone(rows)
		for i, r := range changed {
			switch fmt.Sprint(r.from, r.to, r.port) {
			case "workerapiserver443", "workerworker8080", "strangergateway8081":
				changed[i].want = false
			}
		}
		changed = append(changed, row{"stranger", "gateway", 8080, true}, row{"prometheus", "gateway", 8082, true}, row{"stranger", "gateway", 8082, false})
		check(t, policies(t, map[string]any{"networkPolicy": map[string]any{"closeProviderPort": true,
			"functions": map[string]any{"workerEgress": false, "peers": false}}}), changed)
	})
	t.Run("a NATS of the user's own", func(t *testing.T) {
		p := policies(t, map[string]any{"nats": map[string]any{"enabled": false, "external": map[string]any{"url": "tls://nats.example.com:4443,nats://nats2.example.com"}}})
		check(t, p, []row{{"connector", "apiserver", 4443, true}, {"connector", "apiserver", 4222, true}, {"connector", "apiserver", 4444, false}})
	})
	t.Run("off", func(t *testing.T) {
		if n := len(policies(t, map[string]any{"networkPolicy": map[string]any{"enabled": false}})); n > 0 {
			t.Errorf("there are %d policies", n)
		}
	})
	t.Run("names are found by DNS", func(t *testing.T) {
		dns := end{"kube-system", map[string]string{"k8s-app": "kube-dns"}, ""}
		p := policies(t, map[string]any{"networkPolicy": map[string]any{"functions": map[string]any{"workerEgress": false}}})
		for _, from := range []string{"connector", "master", "worker"} {
			if !may(t, p, ends[from], dns, corev1.ProtocolUDP, 53) {
				t.Errorf("%s reaches no DNS", from)
			}
		}
	})
}
