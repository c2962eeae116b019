package broker

import (
	"fmt"
	"slices"
	"strings"
)

// reserved are first tokens of subjects that belong to NATS or to sheaf itself:
// a function that listened to all of them would be called for its own answers.
var reserved = []string{"sheaf", "_INBOX", "_STAN"}

// CheckTopic says why a topic cannot be listened to, or nil: it must be a
// subject of NATS, in which * stands for one token and a last > for one or
// more; its first token must be a word.
func CheckTopic(topic string) error {
	tokens := strings.Split(topic, ".")
	for i, t := range tokens {
		switch {
		case t == "":
			return fmt.Errorf("topic %q has an empty token; separate words by single dots", topic)
		case strings.ContainsAny(t, " \t\r\n\f\x00"):
			return fmt.Errorf("topic %q holds a blank", topic)
		case t == ">" && i < len(tokens)-1:
			return fmt.Errorf("topic %q has > before its end; use * for one token", topic)
		}
	}
	if t := tokens[0]; t == "*" || t == ">" || strings.HasPrefix(t, "$") || slices.Contains(reserved, t) {
		return fmt.Errorf("topic %q begins with %q; it must begin with a word, and not with %s or $", topic, t, strings.Join(reserved, ", "))
	}
	return nil
}

// HasWildcard says whether a topic stands for many.
func HasWildcard(topic string) bool {
	for t := range strings.SplitSeq(topic, ".") {
		if t == "*" || t == ">" {
			return true
		}
	}
	return false
}

// Covers says whether every subject that narrow stands for, wide stands for,
// too. For a narrow without wildcards it says whether the subject matches.
func Covers(wide, narrow string) bool {
	w, n := strings.Split(wide, "."), strings.Split(narrow, ".")
	for i, t := range w {
		switch {
		case t == ">":
			return len(n) > i
		case i >= len(n), n[i] == ">", n[i] == "*" && t != "*", t != "*" && t != n[i]:
			return false
		}
	}
	return len(w) == len(n)
}

// Cover returns the topics that no other covers, sorted.
func Cover(topics []string) []string {
	var cover []string
	for _, t := range topics {
		if !slices.ContainsFunc(topics, func(o string) bool { return o != t && Covers(o, t) }) {
			cover = append(cover, t)
		}
	}
	slices.Sort(cover)
	return slices.Compact(cover)
}

// Overlap says whether some subject is both topics'.
func Overlap(a, b string) bool {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(x), len(y)) {
		switch {
		case x[i] == ">", y[i] == ">":
			return true
		case x[i] != y[i] && x[i] != "*" && y[i] != "*":
			return false
		}
	}
	return len(x) == len(y)
}

// disjoint returns topics that cover all those given, and of which no two
// overlap, as a stream needs them: of two that do it makes one that is wider.
func disjoint(topics []string) []string {
	for {
		topics = Cover(topics)
		i, j := overlapping(topics)
		if i < 0 {
			return topics
		}
		topics = append(slices.Delete(slices.Clone(topics), j, j+1), widen(topics[i], topics[j]))
	}
}

func overlapping(topics []string) (int, int) {
	for i := range topics {
		for j := i + 1; j < len(topics); j++ {
			if Overlap(topics[i], topics[j]) {
				return i, j
			}
		}
	}
	return -1, -1
}

// widen returns the narrowest topic that covers two which overlap.
func widen(a, b string) string {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	var w []string
	for i := range min(len(x), len(y)) {
		switch {
		case x[i] == ">" || y[i] == ">":
			return strings.Join(append(w, ">"), ".")
		case x[i] == y[i]:
			w = append(w, x[i])
		default:
			w = append(w, "*")
		}
	}
	return strings.Join(w, ".")
}
