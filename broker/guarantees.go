package broker

import (
	"fmt"
	"strings"
)

// Guarantees is what a bus promises. The suite of package internal/bustest
// shows for each bus that it keeps what it promises.
type Guarantees struct {
	Type Type
	// Acks: a message without an outcome is delivered again, also after the
	// connector, the network or NATS has failed.
	Acks bool
	// Stored: what is published while no connector runs is delivered later.
	Stored bool
	// Extends: work that takes longer than AckWait is not delivered a second
	// time.
	Extends bool
	// Counts: Message.Delivery counts the deliveries.
	Counts bool
	// Wildcards: a topic may hold * and >.
	Wildcards bool
	// Headers: messages have headers. Without, a message may begin with them.
	Headers bool
	// Replies: an answer goes to the reply subject of a request. Without, only
	// to the one that the header Sheaf-Reply names.
	Replies bool
	// Buries: a buried message is stored until it is sent again.
	Buries bool
}

// What each bus promises.
var (
	coreGuarantees = Guarantees{Type: Core, Extends: true, Wildcards: true, Headers: true, Replies: true}
	// JetStream itself answers the reply subject of what it stores.
	streamGuarantees    = Guarantees{Type: JetStream, Acks: true, Stored: true, Extends: true, Counts: true, Wildcards: true, Headers: true, Buries: true}
	streamingGuarantees = Guarantees{Type: Streaming, Acks: true, Stored: true, Counts: true, Buries: true}
)

// Table is the table of all buses' guarantees, in Markdown.
func Table() string {
	all := []Guarantees{coreGuarantees, streamGuarantees, streamingGuarantees}
	var b strings.Builder
	fmt.Fprint(&b, "| promise |")
	for _, g := range all {
		fmt.Fprintf(&b, " `%s` |", g.Type)
	}
	fmt.Fprint(&b, "\n|---|---|---|---|\n")
	row := func(what string, has func(Guarantees) bool, without [3]string) {
		fmt.Fprintf(&b, "| %s |", what)
		for i, g := range all {
			if has(g) {
				fmt.Fprint(&b, " yes |")
			} else {
				fmt.Fprintf(&b, " no: %s |", without[i])
			}
		}
		fmt.Fprintln(&b)
	}
	row("a message without an outcome comes again", func(g Guarantees) bool { return g.Acks },
		[3]string{"lost with the connector that had it"})
	row("messages wait while no connector runs", func(g Guarantees) bool { return g.Stored },
		[3]string{"nobody gets them; a request is told `no responders`"})
	row("long work is not delivered twice", func(g Guarantees) bool { return g.Extends },
		[3]string{"", "", "work longer than `ack_wait` may run again on another connector"})
	row("deliveries are counted", func(g Guarantees) bool { return g.Counts },
		[3]string{"there is only one"})
	row("topics with `*` and `>`", func(g Guarantees) bool { return g.Wildcards },
		[3]string{"", "", "such a topic is refused, and logged"})
	row("headers", func(g Guarantees) bool { return g.Headers },
		[3]string{"", "", "a message may begin with `NATS/1.0` and a block of headers"})
	row("answers on the reply subject", func(g Guarantees) bool { return g.Replies },
		[3]string{"", "JetStream answers there itself; name one in `Sheaf-Reply`", "a message has none; name one in `Sheaf-Reply`"})
	row("dead letters are stored", func(g Guarantees) bool { return g.Buries },
		[3]string{"only if the server has JetStream; else they are published, once"})
	return b.String()
}
