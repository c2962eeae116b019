package main

// A mutant is a bug that the suite must catch.
type mutant struct {
	bug   string
	file  string      // from the module's root
	edits [][2]string // what stands there once, and what takes its place
	room  string      // whose tests catch it
	tests string      // a pattern for their names
}

// mutants are the bugs. The first twelve are those of the program that sheaf's
// idea comes from; each of them was shipped once.
var mutants = []mutant{
	{"all blocks share one array", "split.go", [][2]string{{
		"	return append(make([]byte, 0, max(n, len(carry))), carry...)\n}",
		"	if cap(shared) < max(n, len(carry)) {\n		shared = make([]byte, 0, max(n, len(carry)))\n	}\n	return append(shared[:0], carry...)\n}\n\nvar shared []byte",
	}}, ".", "^TestSplit"},
	{"blocks over a cap are dropped without a word", "split.go", [][2]string{{
		"		return fmt.Errorf(\"%w: the input makes more than %d at a block size of %d bytes; take larger blocks\",\n			ErrTooManyBlocks, c.maxBlocks, c.size)",
		"		return errLeft",
	}}, ".", "Split|Blocks"},
	{"a line that is too long ends the input without an error", "split.go", [][2]string{{
		"return nil, &RecordError{Offset: c.offset, Limit: c.maxRecord, Err: ErrRecordTooLong}", "return nil, errLeft",
	}}, ".", "Split"},
	{"the block size cannot be set", "master/params.go", [][2]string{{
		"h.block(ps, up, by)", "h.block(nil, up, by)",
	}}, "./master", "Block|Bad|Same"},
	{"results are never merged", "master/master.go", [][2]string{{
		"return answer.Add(r)", "return nil",
	}}, "./master", "Same"},
	{"blocks go out one after the other", "group.go", [][2]string{{
		"	or(&c.Limit, DefaultLimit)\n", "	c.Limit = 1\n",
	}}, ".", "^TestScatter"},
	{"the first attempt that fails ends the job", "scatter.go", [][2]string{{
		"h.event.Kind != schedule.Ended || errors.Is(h.err, ErrNotAddressable)", "true",
	}}, ".", "^TestScatter"},
	{"a replica that is starting counts as ready", "registry/registry.go", [][2]string{{
		"		if rep.State == sheaf.Ready {", "		if rep.State != sheaf.Draining {",
	}}, "./registry", "."},
	{"a worker takes as many blocks as it has places, and no more", "internal/serve/serve.go", [][2]string{{
		"	defer s.inflight.Add(-1)\n	s.Handler", "	s.Handler",
	}}, "./internal/serve", "."},
	{"a handler that panics takes the connection with it", "worker/worker.go", [][2]string{{
		"if v := recover(); v != nil {", "if v := any(nil); v != nil {",
	}}, "./worker", "."},
	{"a function that nobody knows panics the watcher", "registry/watcher.go", [][2]string{{
		"		if k := w.known[Key(v.Function)]; k != nil {\n			k.view, k.status", "		if k := w.known[Key(v.Function)]; true {\n			k.view, k.status",
	}}, "./registry", "."},
	{"uploads share what they count", "master/master.go", [][2]string{
		{"answer = j.h.Job.New(); return nil", "if shared == nil {\n		shared = j.h.Job.New()\n	}\n	answer = shared\n	return nil"},
		{"var errPanicked = errors.New(", "var shared Answer\n\nvar errPanicked = errors.New("},
	}, "./master", "Same|Many"},
	{"no address is recorded", "registry/watcher.go", [][2]string{{
		"rec.Replicas = k.date(k.view.Replicas)", "rec.Replicas = nil",
	}}, "./registry", "."},
	{"a broadcast reaches one replica", "group.go", [][2]string{{
		"return 0, len(v.Replicas), nil", "return 0, min(1, len(v.Replicas)), nil",
	}}, ".", "Broadcast"},
	{"a message to a rank goes to rank 0", "group.go", [][2]string{{
		"return rank, rank + 1, nil", "return 0, 1, nil",
	}}, ".", "Send"},

	{"the last record is lost without a line end", "split.go", [][2]string{{
		"\n			return c.emit(buf, int64(len(buf)))", "\n			return nil",
	}}, ".", "Split"},
	{"results are merged as they come", "gather.go", [][2]string{{
		"			if r.Index != next {", "			if false {",
	}}, ".", "Order|Reduce"},
	{"a result counts as often as it comes", "internal/schedule/schedule.go", [][2]string{{
		"if a.block < m.low || m.block(a.block).settled {", "if a.block < m.low {",
	}}, "./internal/schedule", "."},
	{"a lost connection counts as the block's failure", "internal/schedule/schedule.go", [][2]string{{
		"	case Lost:\n		b.faults++", "	case Lost:\n		b.failures++",
	}}, "./internal/schedule", "."},
	{"the attempt that lost is not cancelled", "internal/schedule/schedule.go", [][2]string{{
		"			m.emit(Command{Kind: Cancel, Attempt: id, Block: i})", "			_ = id",
	}}, "./internal/schedule", "."},
	{"a block may take down every replica", "internal/schedule/schedule.go", [][2]string{{
		"case len(b.lost) >= m.cfg.Losses:", "case false:",
	}}, "./internal/schedule", "."},
	{"hedges are not counted", "internal/schedule/schedule.go", [][2]string{{
		"			m.hedges++\n			a := m", "			a := m",
	}}, "./internal/schedule", "."},
	{"a body need not match its digest", "internal/wire/wire.go", [][2]string{{
		"value != string(sum[len(\"sha-256=\"):])", "false && value != string(sum)",
	}}, "./internal/wire", "Check"},
	{"an empty answer without a digest is a result", "internal/wire/call.go", [][2]string{{
		"		if len(body) == 0 && resp.StatusCode == http.StatusOK {", "		if false {",
	}}, "./direct", "Route"},
	{"redirects are followed", "internal/wire/call.go", [][2]string{{
		"return http.ErrUseLastResponse", "return nil",
	}}, "./gateway", "Route"},
	{"another replica's answer is taken", "internal/wire/call.go", [][2]string{{
		"if from != \"\" && from != req.To.ID {", "if false {",
	}}, "./direct", "Route"},
	{"a replica takes another one's blocks", "internal/serve/serve.go", [][2]string{{
		"if s.Replica != \"\" && e.Replica != s.Replica || s.Function", "if s.Function",
	}}, "./internal/serve", "."},
	{"what a busy replica says is not waited for", "internal/wire/call.go", [][2]string{{
		"		e.RetryAfter = retryAfter(resp.Header, time.Now())\n", "",
	}}, "./internal/wire", "Retry"},
	{"a recorded block runs again", "internal/wire/sign.go", [][2]string{{
		"	if *bit&(1<<(n%64)) != 0 {", "	if false {",
	}}, "./internal/wire", "Control04"},
	{"the signature does not say which block", "internal/wire/sign.go", [][2]string{{
		"uint64(e.Block), ", "",
	}}, "./internal/wire", "Verify"},
	{"an answer is signed for any request", "internal/wire/sign.go", [][2]string{{
		"	b = append(b, p.mac[:]...)\n", "",
	}}, "./internal/wire", "Proof"},
	{"an answer that is not signed is taken", "internal/wire/sign.go", [][2]string{{
		"		return false, errUnsigned\n", "		return false, nil\n",
	}}, "./direct", "Control02"},
	{"whoever lacks a signature may call a worker", "internal/wire/sign.go", [][2]string{{
		"if s == nil || s.Lax && len(header) == 0 {", "if s == nil || len(header) == 0 {",
	}}, "./worker", "Control01"},
	{"an address in another form is public", "internal/egress/egress.go", [][2]string{{
		"addr = addr.Unmap().WithZone(\"\")", "addr = addr.WithZone(\"\")",
	}}, "./internal/egress", "Control08"},
	{"a name that leads elsewhere when it is dialled", "internal/egress/egress.go", [][2]string{{
		"			if no := p.address(to.Addr()); no != nil {", "			if no := p.address(to.Addr()); false {",
	}}, "./local", "Rebound"},
	{"every client of NATS hears everything", "local/permissions.go", [][2]string{{
		"subscribe: []string{\"_INBOX.>\", ", "subscribe: []string{\">\", ",
	}}, "./local", "Control06"},
	{"functions may write the record of replicas", "local/permissions.go", [][2]string{{
		"\"$KV.sheaf-jobs.>\",", "\"$KV.>\",",
	}}, "./local", "Control07"},

	// What the simulation of masters and jobs finds in its first thousand seeds.
	{"results are written whoever has the job", "job/lease.go", [][2]string{{
		"return s.shelf.putUnder(ctx, key, data, state, l.fence) })",
		"\n\t\t\te, err := s.shelf.get(ctx, state)\n\t\t\tif err != nil {\n\t\t\t\treturn err\n\t\t\t}\n\t\t\treturn s.shelf.putUnder(ctx, key, data, state, e.Revision())\n\t\t})",
	}}, "./job", "TestSimulation/first"},
	{"a record is written whoever wrote it meanwhile", "job/store.go", [][2]string{{
		"\t\tr.Revision, err = s.shelf.update(ctx, s.key(r.ID, \"state\"), body, r.Revision)",
		"\t\tif e, bad := s.shelf.get(ctx, s.key(r.ID, \"state\")); bad == nil {\n\t\t\tr.Revision = e.Revision()\n\t\t}\n\t\tr.Revision, err = s.shelf.update(ctx, s.key(r.ID, \"state\"), body, r.Revision)",
	}}, "./job", "TestSimulation/first"},
	{"a run that goes on overlooks results", "job/lease.go", [][2]string{{
		"\t\t\tif i, err := strconv.Atoi(index); err == nil {\n\t\t\t\tdone",
		"\t\t\tif i, err := strconv.Atoi(index); err == nil && i != 1 {\n\t\t\t\tdone",
	}}, "./job", "TestSimulation/first"},
	{"a job ends before its results are stored", "job/lease.go", [][2]string{{
		"func (l *Lease) Wait() { l.s.host.wait(&l.pending) }",
		"func (l *Lease) Wait() {}",
	}}, "./job", "TestSimulation/first"},
	{"a job that has succeeded is run again", "job/store.go", [][2]string{{
		"\t\tif r.State != Failed {\n",
		"\t\tif !r.State.Final() {\n",
	}}, "./job", "TestSimulation/first"},
	{"a job that is over is cancelled", "job/store.go", [][2]string{{
		"\t\tif r.State.Final() {\n\t\t\treturn false, nil",
		"\t\tif r.State == Cancelled {\n\t\t\treturn false, nil",
	}}, "./job", "TestSimulation/first"},
	{"another input is accepted under the same key", "job/input.go", [][2]string{{
		"\tif there.Digest != r.Digest {",
		"\tif false {",
	}}, "./job", "TestSimulation/first"},
	{"claims are not counted", "job/lease.go", [][2]string{{
		"s.cfg.Master, r.Epoch+1",
		"s.cfg.Master, max(1, r.Epoch)",
	}}, "./job", "TestSimulation/first"},
	{"an end that another one wrote counts as one's own", "job/lease.go", [][2]string{{
		"there.Revision != l.fence && there.Epoch == r.Epoch && there.Owner == r.Owner && there.State == r.State && there.Redrives == r.Redrives",
		"there.Revision != l.fence",
	}}, "./job", "TestSimulation/first"},
	{"the input of a job that may be stored is dropped", "job/input.go", [][2]string{{
		"\t\t\tu.keep() // the record",
		"\t\t\t_ = u.keep // the record",
	}}, "./job", "TestSimulation/first"},
	{"an upload that is dropped takes that of its job along", "job/input.go", [][2]string{{
		"id+\".\"+upload+\".>\"",
		"id+\".>\"",
	}}, "./job", "TestSimulation/first"},
	{"jobs of silent masters are left", "job/lease.go", [][2]string{{
		"\treturn now.Sub(heard) > s.cfg.Lease\n",
		"\treturn false && now.Sub(heard) > s.cfg.Lease\n",
	}}, "./job", "TestSimulation/first"},
	{"an older record takes the place of a newer one", "job/store.go", [][2]string{{
		"\tif j.Revision >= r.Revision {\n\t\treturn\n\t}\n\tif r.State",
		"\tif r.State",
	}}, "./job", "TestSimulation/first"},
	{"what a handler saved is given to another block", "job/lease.go", [][2]string{{
		"l.s.key(l.rec.ID, \"saved.\"+strconv.Itoa(block))",
		"l.s.key(l.rec.ID, \"saved.0\")",
	}, {
		"\tif !l.saved[block] {",
		"\tif !l.saved[0] {",
	}}, "./job", "TestSimulation/first"},
	{"a run ends itself by its own claim", "job/store.go", [][2]string{{
		"l != nil && !l.own && revision",
		"l != nil && revision",
	}}, "./job", "TestSimulation/first"},
	{"a claim that is not answered is taken for granted", "job/lease.go", [][2]string{{
		"there.Owner == r.Owner && there.Epoch == r.Epoch && there.State == Running",
		"there.Epoch == r.Epoch && there.State == Running",
	}}, "./job", "TestSimulation/first"},
	{"the results of a job are dropped when it fails", "job/lease.go", [][2]string{{
		"\t\tif r.State != Failed { // one that failed may run again\n",
		"\t\tif r.State != Cancelled {\n",
	}}, "./job", "TestSimulation/first"},
	{"a job that is queued again keeps its end", "job/store.go", [][2]string{{
		"r.State, r.Owner, r.Redrives, r.Deaths = Queued, \"\", r.Redrives+1, 0",
		"r.State, r.Owner, r.Deaths = Queued, \"\", 0",
	}}, "./job", "TestSimulation/first"},
	{"an attempt that another one beat counts, too", "internal/schedule/schedule.go", [][2]string{{
		"\tif a.block < m.low || m.block(a.block).settled {\n\t\treturn // another attempt won",
		"\tif a.block < m.low {\n\t\treturn // another attempt won",
	}}, "./job", "TestSimulation/first"},
}
