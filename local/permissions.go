package local

// permissions.go says who may do what on the NATS of a stack. A subject that a
// room comes to use is added here, to the role that uses it; what no role is
// given, nobody may do. docs/SECURITY.md tells what it keeps out.

import (
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/sheaf-project/sheaf/internal/login"
	"github.com/sheaf-project/sheaf/registry"
)

// A role is a user of the stack's NATS.
type role struct {
	name               string
	publish, subscribe []string
	noPublish          []string // although publish has it
	noSubscribe        []string
	answers            bool // to whoever asked, once for each question
	password           bool // logs in with one, for tools; the others have nkeys
}

// Names of roles.
const (
	roleWatcher   = "watcher"   // keeps the record of replicas
	roleFunctions = "functions" // masters: follow the record, keep jobs
	roleQueue     = "queue"     // keeps asynchronous calls
	roleConnector = "connector" // has functions called for messages
	roleClient    = "client"    // publishes messages, and asks
)

// Streams, as their rooms name them.
const (
	viewsStream     = "KV_" + registry.Bucket
	leaseStream     = "KV_" + registry.LeaseBucket
	jobsStream      = "KV_sheaf-jobs"
	jobInputsStream = "sheaf-job-inputs"
	objectsStream   = "OBJ_sheaf-inputs" // that jobs may name their inputs in
)

// Subjects of route topic.
const (
	topicCalls   = "sheaf.call.>"
	topicCancels = "sheaf.cancel"
)

// changesSubject is where the watcher tells what changes in its record.
const changesSubject = registry.ChangesSubject + ".>"

var roles = []role{
	{
		name: roleWatcher,
		publish: slices.Concat(owns(viewsStream), owns(leaseStream),
			[]string{"$KV." + registry.Bucket + ".>", "$KV." + registry.LeaseBucket + ".>", changesSubject}),
		subscribe: []string{registry.ScaleSubject},
		answers:   true,
	},
	{
		// It makes its own streams, and cannot delete even those.
		name: roleFunctions,
		publish: slices.Concat(reads(viewsStream), []string{registry.ScaleSubject}, reads(jobsStream), reads(jobInputsStream), reads(objectsStream), []string{
			"$JS.API.STREAM.CREATE." + jobsStream, "$JS.API.STREAM.CREATE." + jobInputsStream,
			"$JS.API.STREAM.PURGE." + jobsStream, "$JS.API.STREAM.PURGE." + jobInputsStream,
			"$JS.API.STREAM.CREATE." + objectsStream, "$JS.API.STREAM.PURGE." + objectsStream, "$O.sheaf-inputs.>",
			"$KV.sheaf-jobs.>", "sheaf.job.>", topicCalls, topicCancels,
		}),
		subscribe: []string{"sheaf.job.>", changesSubject},
		answers:   true, // the connector asks for the parts of a block
	},
	{
		name: roleQueue,
		publish: slices.Concat(owns(callStream), owns(callbackStream), owns(recordStream), owns(resultStream), owns(deadStream),
			[]string{"sheaf.async.>"}),
	},
	{
		// Topics are any subjects that are not sheaf's own, and any stream may
		// hold them. Of sheaf's own it has dead letters and their redriving.
		name:    roleConnector,
		publish: []string{">"},
		noPublish: slices.Concat([]string{"$SYS.>", "$KV.>", "$O.>", "sheaf.async.>", "sheaf.job.>", registry.ScaleSubject, changesSubject,
			"$JS.API.STREAM.DELETE.>", "$JS.API.STREAM.PURGE.>", "$JS.API.STREAM.RESTORE.>", "$JS.API.ACCOUNT.>"},
			changes(viewsStream), none(leaseStream, jobsStream, jobInputsStream, objectsStream, callStream, callbackStream, recordStream, resultStream, deadStream)),
		subscribe:   []string{"> sheaf-connector", topicCancels}, // every connector hears of what is cancelled
		noSubscribe: []string{"$SYS.>", "$KV.>", "$O.>", "$JS.>", "_INBOX.>", "sheaf.async.>", "sheaf.job.>", "sheaf.dead.>", registry.ScaleSubject},
	},
	{
		// It hears answers, and what changes in the record of replicas.
		name:    roleClient,
		publish: []string{">"},
		noPublish: []string{"$SYS.>", "$KV.>", "$JS.>", "$O.>", "_INBOX.>", "sheaf.async.>", "sheaf.job.>", "sheaf.inbox.>", "sheaf.dead.>",
			topicCalls, topicCancels, registry.ScaleSubject, changesSubject},
		subscribe: []string{"_INBOX.>", changesSubject},
		password:  true,
	},
}

// reads is what a user of a stream publishes: requests that change nothing but
// consumers, and acknowledgements.
func reads(stream string) []string {
	return []string{
		"$JS.API.STREAM.INFO." + stream, "$JS.API.STREAM.MSG.GET." + stream,
		"$JS.API.DIRECT.GET." + stream, "$JS.API.DIRECT.GET." + stream + ".>",
		"$JS.API.CONSUMER.*." + stream, "$JS.API.CONSUMER.*." + stream + ".>",
		"$JS.API.CONSUMER.*.*." + stream, "$JS.API.CONSUMER.*.*." + stream + ".>", // DURABLE.CREATE, MSG.NEXT
		"$JS.ACK." + stream + ".>", "$JS.ACK.*.*." + stream + ".>", "$JS.FC." + stream + ".>", "$JS.API.INFO",
	}
}

// owns is what the one who makes a stream publishes.
func owns(stream string) []string {
	return append(reads(stream), "$JS.API.STREAM.*."+stream, "$JS.API.STREAM.*.*."+stream)
}

// changes is what would change a stream, or what is in it.
func changes(stream string) []string {
	deny := []string{"$JS.API.STREAM.MSG.DELETE." + stream}
	for _, what := range []string{"CREATE", "UPDATE", "DELETE", "PURGE", "RESTORE", "PEER.REMOVE", "LEADER.STEPDOWN"} {
		deny = append(deny, "$JS.API.STREAM."+what+"."+stream)
	}
	return deny
}

// none is all that can be asked about streams.
func none(streams ...string) []string {
	var deny []string
	for _, s := range streams {
		deny = append(deny, "$JS.API.STREAM.*."+s, "$JS.API.STREAM.*.*."+s, "$JS.API.DIRECT.GET."+s, "$JS.API.DIRECT.GET."+s+".>",
			"$JS.API.CONSUMER.*."+s, "$JS.API.CONSUMER.*."+s+".>", "$JS.API.CONSUMER.*.*."+s+".>")
	}
	return deny
}

// logins are the users of one server, with what they log in with.
type logins struct {
	seeds    map[string][]byte // by role, of nkeys
	password string            // of the client
	users    []*server.User
	nkeys    []*server.NkeyUser
	names    []string // of the roles of nkeys
}

// newLogins makes new secrets for all roles.
func newLogins() (*logins, error) {
	l := &logins{seeds: make(map[string][]byte), password: rand.Text()}
	inboxes := make(map[string]string) // by role
	for _, r := range roles {
		p := &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: r.publish, Deny: r.noPublish},
			Subscribe: &server.SubjectPermission{Allow: slices.Clone(r.subscribe), Deny: slices.Clone(r.noSubscribe)},
		}
		if r.answers {
			p.Response = &server.ResponsePermission{MaxMsgs: 1, Expires: 5 * time.Minute}
		}
		if r.password {
			l.users = append(l.users, &server.User{Username: r.name, Password: l.password, Permissions: p})
			continue
		}
		pair, err := nkeys.CreateUser()
		if err != nil {
			return nil, fmt.Errorf("nkey of %s: %w", r.name, err)
		}
		public, err := pair.PublicKey()
		if err != nil {
			return nil, fmt.Errorf("nkey of %s: %w", r.name, err)
		}
		if l.seeds[r.name], err = pair.Seed(); err != nil {
			return nil, fmt.Errorf("nkey of %s: %w", r.name, err)
		}
		inboxes[r.name] = login.Inbox(public) + ".>"
		p.Subscribe.Allow = append(p.Subscribe.Allow, inboxes[r.name])
		l.nkeys = append(l.nkeys, &server.NkeyUser{Nkey: public, Permissions: p})
		l.names = append(l.names, r.name)
	}
	for i, u := range l.nkeys {
		for name, inbox := range inboxes {
			if name != l.names[i] {
				u.Permissions.Subscribe.Deny = append(u.Permissions.Subscribe.Deny, inbox)
			}
		}
	}
	return l, nil
}

// options are those of a connection that is a role.
func (l *logins) options(role string) ([]nats.Option, error) {
	o, err := login.Options(l.seeds[role])
	if err != nil {
		return nil, fmt.Errorf("log in as %s: %w", role, err)
	}
	return o, nil
}
