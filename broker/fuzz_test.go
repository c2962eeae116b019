package broker

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// What is sealed comes back; what anybody sends is headers and data, or data.
func FuzzUnseal(f *testing.F) {
	f.Add([]byte("a"), "Sheaf-Reason", "why")
	f.Add([]byte("NATS/1.0\r\nA: b\r\n\r\nc"), "A", "b\r\nC: d")
	f.Add([]byte("NATS/1.0\r\n\r\n"), "", "")
	f.Add([]byte("NATS/1.0\r\nA b: c\r\n\r\n"), "A", "\x00")
	f.Fuzz(func(t *testing.T, data []byte, key, value string) {
		h, rest := unseal(data)
		if len(rest) > len(data) || !bytes.HasSuffix(data, rest) {
			t.Fatalf("%q became %q", data, rest)
		}
		for k := range h {
			if k == "" || strings.ContainsAny(k, " \t:") {
				t.Errorf("%q has the header %q", data, k)
			}
		}
		if key == "" || strings.ContainsAny(key, " \t:\r\n") || strings.HasPrefix(key, "\r") {
			return
		}
		want := strings.TrimSpace(oneLine(value))
		back, got := unseal(seal(Header{key: {value}}, data))
		if !bytes.Equal(got, data) || !reflect.DeepEqual(back, Header{key: {want}}) {
			t.Errorf("%q with %q: %q came back as %v and %q", data, key, value, back, got)
		}
	})
}

// A topic that is taken is one that NATS takes.
func FuzzCheckTopic(f *testing.F) {
	for _, v := range []string{"orders.new", "a.*.>", ">", "a..b", "sheaf.x", "$JS.x", "a b", "*", "a.>.b", ""} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, topic string) {
		if CheckTopic(topic) != nil {
			return
		}
		if topic == "" || strings.ContainsAny(topic, " \t\r\n") || strings.Contains(topic, "..") || strings.HasPrefix(topic, "sheaf.") || !Covers(topic, topic) && !HasWildcard(topic) {
			t.Errorf("topic %q is taken", topic)
		}
	})
}
