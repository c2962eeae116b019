package schedule_test

// schedule_test.go states the rules one by one, each as a short story told to
// a Machine. The simulation shows that they hold together.

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/schedule"
)

const ms = time.Millisecond

// story drives a Machine by hand and writes down what it commands.
type story struct {
	t   *testing.T
	m   *schedule.Machine
	now time.Duration
}

func tell(t *testing.T, cfg schedule.Config) *story {
	return &story{t: t, m: schedule.New(cfg)}
}

// step sends e at the given time. Each command becomes a word: "read 8",
// "start 1: block 0 on a", "cancel 1", "emit 0", "give up 0", "fail", "done",
// "timer 20ms".
func (s *story) step(at time.Duration, e schedule.Event) []string {
	s.t.Helper()
	if at < s.now {
		s.t.Fatalf("the story goes back from %v to %v", s.now, at)
	}
	s.now = at
	words := []string{}
	for _, c := range s.m.Step(at, e) {
		switch c.Kind {
		case schedule.Read:
			words = append(words, fmt.Sprintf("read %d", c.N))
		case schedule.Start:
			words = append(words, fmt.Sprintf("start %d: block %d on %s", c.Attempt, c.Block, c.Replica))
		case schedule.Cancel:
			words = append(words, fmt.Sprintf("cancel %d", c.Attempt))
		case schedule.SetTimer:
			if c.At == schedule.Never {
				words = append(words, "no timer")
			} else {
				words = append(words, fmt.Sprintf("timer %v", c.At))
			}
		case schedule.Emit:
			words = append(words, fmt.Sprintf("emit %d", c.Block))
		case schedule.GiveUp:
			words = append(words, fmt.Sprintf("give up %d: %s", c.Block, reasons[c.Reason]))
		case schedule.Fail:
			words = append(words, "fail: "+reasons[c.Reason])
		case schedule.Done:
			words = append(words, "done")
		}
	}
	return words
}

var reasons = map[schedule.Reason]string{
	schedule.TooManyFailures: "failures", schedule.BlockRejected: "rejected", schedule.Poison: "poison",
	schedule.TooManyFaults: "faults", schedule.NoReplica: "no replica", schedule.Intolerable: "intolerable",
}

func (s *story) view(at time.Duration, ids string) []string {
	s.t.Helper()
	return s.step(at, schedule.Event{Kind: schedule.ViewChanged, Replicas: strings.Fields(ids)})
}

func (s *story) block(at time.Duration) []string {
	s.t.Helper()
	return s.step(at, schedule.Event{Kind: schedule.BlockRead})
}

func (s *story) inputEnd(at time.Duration) []string {
	s.t.Helper()
	return s.step(at, schedule.Event{Kind: schedule.InputEnd})
}

func (s *story) tick(at time.Duration) []string {
	s.t.Helper()
	return s.step(at, schedule.Event{Kind: schedule.Tick})
}

func (s *story) ended(at time.Duration, attempt int, o schedule.Outcome) []string {
	s.t.Helper()
	return s.step(at, schedule.Event{Kind: schedule.Ended, Attempt: attempt, Outcome: o})
}

// want compares words with the commands that are written one after another,
// with semicolons between them.
func (s *story) want(what string, words []string, want string) {
	s.t.Helper()
	if got := strings.Join(words, "; "); got != want {
		s.t.Errorf("%v, %s:\n got %s\nwant %s", s.now, what, got, want)
	}
}

// starts counts the attempts that words start.
func starts(words []string) (n int) {
	for _, w := range words {
		if strings.HasPrefix(w, "start") {
			n++
		}
	}
	return n
}

func TestWorkBeginsAtOnce(t *testing.T) {
	s := tell(t, schedule.Config{Limit: 4})
	s.want("no replica yet", s.tick(0), "read 4")
	s.want("block without a replica", s.block(1*ms), "timer 30.001s")
	s.want("the first replica", s.view(2*ms, "a"), "start 1: block 0 on a; no timer")
	s.want("the next block", s.block(3*ms), "start 2: block 1 on a")
	s.want("its slots are taken", s.block(4*ms), "")
	s.want("a replica joins", s.view(5*ms, "a b"), "start 3: block 2 on b")
	s.want("the limit is read", s.block(6*ms), "start 4: block 3 on b")
	s.want("a result", s.ended(7*ms, 2, schedule.OK), "emit 1; read 1")
	s.want("the input ends", s.inputEnd(8*ms), "")
	s.want("half of the results", s.ended(9*ms, 1, schedule.OK), "emit 0; timer 205ms")
	s.want("a result", s.ended(10*ms, 4, schedule.OK), "emit 3")
	s.want("the last result", s.ended(11*ms, 3, schedule.OK), "emit 2; done")
	s.want("the end is the end", s.tick(time.Hour), "")
}

func TestLeastLoadedFirst(t *testing.T) {
	s := tell(t, schedule.Config{PerReplica: 2})
	s.view(0, "a b c")
	for i, id := range strings.Fields("a b c a b c") {
		s.want("block", s.block(0), fmt.Sprintf("start %d: block %d on %s", i+1, i, id))
	}
	s.ended(1*ms, 5, schedule.OK) // b
	s.ended(1*ms, 2, schedule.OK) // b
	s.ended(1*ms, 4, schedule.OK) // a
	s.want("the one with least to do", s.block(1*ms), "start 7: block 6 on b; no timer")
	s.want("then the one not used for longest", s.block(1*ms), "start 8: block 7 on a")
}

func TestOneOutcome(t *testing.T) {
	// Block 0 is tried on replica a, and meets an outcome; b is idle.
	for _, test := range []struct {
		name    string
		outcome schedule.Outcome
		want    string
	}{
		{"ok", schedule.OK, "emit 0; read 1"},
		{"task failure comes back after a pause", schedule.Failed, "timer"},
		{"rejected is final", schedule.Rejected, "give up 0: rejected; fail: intolerable"},
		{"lost goes elsewhere at once", schedule.Lost, "start 2: block 0 on b"},
		{"refused goes elsewhere at once", schedule.Refused, "start 2: block 0 on b"},
		{"throttled goes elsewhere at once", schedule.Throttled, "start 2: block 0 on b"},
		{"timed out goes elsewhere at once", schedule.TimedOut, "start 2: block 0 on b"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := tell(t, schedule.Config{Limit: 1})
			s.view(0, "a b")
			s.want("block", s.block(0), "start 1: block 0 on a")
			words := s.ended(1*ms, 1, test.outcome)
			if test.want == "timer" {
				if len(words) != 1 || !strings.HasPrefix(words[0], "timer") {
					t.Errorf("got %v", words)
				}
				return
			}
			s.want(test.name, words, test.want)
			if test.outcome != schedule.Rejected {
				s.want("the same answer again", s.ended(2*ms, 1, schedule.OK), "")
			}
		})
	}
}

func TestGiveUp(t *testing.T) {
	// A block meets the same outcome again and again, on so many replicas.
	for _, test := range []struct {
		name     string
		outcome  schedule.Outcome
		replicas string
		attempts int // 0: it is never given up
		reason   string
	}{
		{"task failures", schedule.Failed, "a b c d", 3, "failures"},
		{"timeouts", schedule.TimedOut, "a b c d", 3, "failures"},
		{"distinct replicas lost", schedule.Lost, "a b c d", 3, "poison"},
		{"the same two replicas lost", schedule.Lost, "a b", 16, "faults"},
		{"throttled", schedule.Throttled, "a b c d", 0, ""},
		{"refused", schedule.Refused, "a b c d", 0, "no replica"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := tell(t, schedule.Config{Limit: 1, Tolerate: 1, NoHedge: true})
			words := append(s.view(0, test.replicas), s.block(0)...)
			attempts := 0
			for range 400 {
				at := s.now
				for _, w := range words {
					if _, err := fmt.Sscanf(w, "start %d:", &attempts); err == nil {
						break
					}
					if d, ok := strings.CutPrefix(w, "timer "); ok {
						at, _ = time.ParseDuration(d)
					}
				}
				all := strings.Join(words, "; ")
				if strings.Contains(all, "give up") {
					if attempts != test.attempts || !strings.Contains(all, "give up 0: "+test.reason) {
						t.Errorf("after %d attempts: %s", attempts, all)
					}
					return
				}
				if strings.Contains(all, "fail") {
					if test.attempts != 0 || !strings.Contains(all, "fail: "+test.reason) || s.now < 30*time.Second {
						t.Errorf("after %d attempts and %v: %s", attempts, s.now, all)
					}
					return
				}
				if starts(words) > 0 {
					words = s.ended(s.now+ms, attempts, test.outcome)
				} else {
					words = s.tick(at)
				}
			}
			if test.attempts != 0 || test.reason != "" {
				t.Errorf("not given up after %d attempts", attempts)
			}
		})
	}
}

func TestTriesReplicasInTurn(t *testing.T) {
	// Blocks 1 and 2 have used b and c since a got block 0, so by rank and by
	// use it would be a's turn each time.
	begin := func(t *testing.T) *story {
		s := tell(t, schedule.Config{PerReplica: 1})
		s.view(0, "a b c")
		s.block(0)
		s.block(0)
		s.block(0)
		s.ended(0, 2, schedule.OK)
		s.ended(0, 3, schedule.OK)
		return s
	}
	t.Run("not the last one", func(t *testing.T) {
		s := begin(t)
		s.want("timed out on a", s.ended(time.Second, 1, schedule.TimedOut), "start 4: block 0 on b; timer 1.2s")
		s.want("it is a's turn now", s.block(time.Second), "start 5: block 3 on a")
	})
	t.Run("none that was lost", func(t *testing.T) {
		s := begin(t)
		s.want("lost on a", s.ended(0, 1, schedule.Lost), "start 4: block 0 on b; timer 20ms")
		s.want("timed out on b", s.ended(time.Second, 4, schedule.TimedOut), "start 5: block 0 on c; timer 1.2s")
	})
}

func TestPauses(t *testing.T) {
	t.Run("what breaks together pauses once", func(t *testing.T) {
		s := tell(t, schedule.Config{})
		s.view(0, "a")
		s.block(0)
		s.block(0)
		s.ended(0, 1, schedule.Lost)
		s.ended(0, 2, schedule.Lost)
		if n := starts(s.tick(20 * ms)); n != 2 {
			t.Errorf("%d attempts are started after the first pause, want 2", n)
		}
	})
	t.Run("throttled waits as told", func(t *testing.T) {
		s := tell(t, schedule.Config{Limit: 1})
		s.view(0, "a")
		s.block(0)
		throttled := schedule.Event{Kind: schedule.Ended, Attempt: 1, Outcome: schedule.Throttled, RetryAfter: 5 * time.Second}
		s.want("throttled", s.step(10*ms, throttled), "timer 5.01s")
		s.want("too early", s.tick(5009*ms), "")
		s.want("in time", s.tick(5010*ms), "start 2: block 0 on a; no timer")
	})
	t.Run("throttled for a day waits a minute", func(t *testing.T) {
		s := tell(t, schedule.Config{Limit: 1})
		s.view(0, "a")
		s.block(0)
		throttled := schedule.Event{Kind: schedule.Ended, Attempt: 1, Outcome: schedule.Throttled, RetryAfter: 24 * time.Hour}
		s.want("throttled", s.step(0, throttled), "timer 1m0s")
	})
	t.Run("throttled takes fewer at once, and more again as it answers", func(t *testing.T) {
		s := tell(t, schedule.Config{Limit: 8, PerReplica: 4})
		s.view(0, "a")
		for range 8 {
			s.block(0)
		}
		s.ended(1*ms, 4, schedule.Throttled)
		s.ended(1*ms, 3, schedule.Throttled)
		s.ended(1*ms, 2, schedule.Throttled)
		if n := starts(s.tick(time.Second)); n != 0 {
			t.Errorf("%d attempts are started on a replica that is full with one", n)
		}
		if n := starts(s.ended(time.Second, 1, schedule.OK)); n != 2 {
			t.Errorf("%d attempts are started after an answer, want 2", n)
		}
	})
	t.Run("refused is asked less and less", func(t *testing.T) {
		s := tell(t, schedule.Config{Limit: 1, ReplicaWait: time.Hour})
		s.view(0, "a")
		s.block(0)
		at := time.Duration(0)
		for attempt, pause := range []time.Duration{1, 2, 4, 8, 10, 10} {
			s.ended(at, attempt+1, schedule.Refused)
			at += pause * time.Second
			s.want("too early", s.tick(at-1), "")
			if starts(s.tick(at)) != 1 {
				t.Fatalf("no attempt %d after a pause of %d s", attempt+2, pause)
			}
		}
		s.ended(at, 7, schedule.OK)
		s.block(at)
		s.ended(at, 8, schedule.Refused)
		if starts(s.tick(at+time.Second)) != 1 {
			t.Error("an answer did not forgive the refusals before it")
		}
	})
	t.Run("a replica is idle once, however late the tick is", func(t *testing.T) {
		// Attempt 2 answers after the pause is over and before the tick that
		// would say so.
		s := tell(t, schedule.Config{Limit: 8, PerReplica: 2})
		s.view(0, "a")
		s.block(0)
		s.block(0)
		s.ended(1*ms, 1, schedule.Lost)
		running := starts(s.ended(100*ms, 2, schedule.OK))
		for range 4 {
			running += starts(s.block(100 * ms))
		}
		if running != 2 {
			t.Errorf("%d attempts run on a replica that may have 2", running)
		}
	})
}

func TestNoReplica(t *testing.T) {
	t.Run("counts while blocks wait", func(t *testing.T) {
		s := tell(t, schedule.Config{ReplicaWait: 10 * time.Second})
		s.view(0, "")
		s.want("no block, no hurry", s.tick(time.Hour), "")
		s.want("a block", s.block(time.Hour), "timer 1h0m10s")
		s.want("the same view", s.view(time.Hour+5*time.Second, ""), "")
		s.want("too long", s.tick(time.Hour+10*time.Second), "fail: no replica")
	})
	t.Run("not while an attempt runs", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1, ReplicaWait: 10 * time.Second, NoHedge: true})
		s.view(0, "a")
		s.block(0)
		s.block(0)
		s.view(0, "")
		s.want("much later", s.tick(time.Minute), "")
		s.want("it was the last", s.ended(time.Minute, 1, schedule.OK), "emit 0; read 1; fail: no replica")
	})
	t.Run("not for one that is busy", func(t *testing.T) {
		s := tell(t, schedule.Config{ReplicaWait: 10 * time.Second})
		s.view(0, "a")
		s.block(0)
		s.ended(0, 1, schedule.Refused)
		s.want("it is back", s.tick(time.Second), "start 2: block 0 on a; no timer")
		throttled := schedule.Event{Kind: schedule.Ended, Attempt: 2, Outcome: schedule.Throttled, RetryAfter: 40 * time.Second}
		s.want("and busy", s.step(2*time.Second, throttled), "timer 42s")
		s.want("for long", s.tick(42*time.Second), "start 3: block 0 on a; no timer")
	})
	t.Run("one that returns counts again", func(t *testing.T) {
		s := tell(t, schedule.Config{NoHedge: true})
		s.view(0, "a")
		s.block(0)
		s.view(0, "")
		s.view(0, "a")
		s.want("a block", s.block(0), "start 2: block 1 on a")
	})
	t.Run("begins anew when all leave", func(t *testing.T) {
		s := tell(t, schedule.Config{ReplicaWait: 10 * time.Second, NoHedge: true})
		s.view(0, "a")
		s.block(0)
		s.want("it leaves", s.view(time.Second, ""), "")
		s.want("and breaks", s.ended(5*time.Second, 1, schedule.Lost), "timer 11s")
		s.want("another comes", s.view(6*time.Second, "b"), "start 2: block 0 on b; no timer")
		s.want("and refuses", s.ended(7*time.Second, 2, schedule.Refused), "timer 8s")
		s.want("again", s.tick(8*time.Second), "start 3: block 0 on b; no timer")
		s.want("and again", s.ended(8*time.Second, 3, schedule.Refused), "timer 10s")
		s.want("and again", s.tick(10*time.Second), "start 4: block 0 on b; no timer")
		s.want("and again", s.ended(10*time.Second, 4, schedule.Refused), "timer 14s")
		s.want("and again", s.tick(14*time.Second), "start 5: block 0 on b; no timer")
		s.want("and again", s.ended(14*time.Second, 5, schedule.Refused), "timer 17s")
		s.want("too long", s.tick(17*time.Second), "fail: no replica")
	})
}

// nearEnd is a scatter of 10 blocks over a and b of which 9 have a result, each
// after 10 ms. It is 1 s, and the last one begins.
func nearEnd(t *testing.T, cfg schedule.Config) *story {
	cfg.PerReplica = 1
	s := tell(t, cfg)
	s.view(0, "a b")
	for i := range 9 {
		s.block(time.Duration(i) * 100 * ms)
		s.ended(s.now+10*ms, i+1, schedule.OK)
	}
	if starts(s.block(time.Second)) != 1 {
		t.Fatal("the last block is not started")
	}
	return s
}

func TestHedge(t *testing.T) {
	t.Run("of a straggler", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.inputEnd(time.Second)
		s.want("too early", s.tick(1199*ms), "")
		s.want("in time", s.tick(1200*ms), "start 11: block 9 on a; no timer")
		s.want("one hedge only", s.tick(time.Minute), "")
		s.want("the hedge wins", s.ended(time.Minute, 11, schedule.OK), "emit 9; cancel 10; done")
	})
	t.Run("the first attempt may still win", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.inputEnd(time.Second)
		s.tick(1200 * ms)
		s.want("it wins", s.ended(1201*ms, 10, schedule.OK), "emit 9; cancel 11; done")
	})
	t.Run("when one breaks the other goes on", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.inputEnd(time.Second)
		s.tick(1200 * ms)
		s.want("one breaks", s.ended(1201*ms, 10, schedule.Lost), "")
		if n := starts(s.ended(1202*ms, 11, schedule.TimedOut)); n != 1 {
			t.Errorf("%d attempts are started when both broke, want 1", n)
		}
	})
	t.Run("before the input ends, too", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.want("in time", s.tick(1200*ms), "start 11: block 9 on a; no timer")
	})
	t.Run("of a block that holds up all others", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1, Limit: 2, Window: 4})
		s.view(0, "a b")
		s.block(0) // hangs on a
		for i := range 3 {
			s.block(time.Duration(i) * ms)
			s.ended(time.Duration(i+1)*ms, i+2, schedule.OK)
		}
		s.want("the window is full", s.tick(200*ms), "start 5: block 0 on b; no timer")
		s.want("the hedge wins", s.ended(201*ms, 5, schedule.OK), "emit 0; cancel 1; read 2")
		s.want("a has hung", s.ended(201*ms, 1, schedule.Canceled), "")
		s.want("b is given work", s.block(202*ms), "start 6: block 4 on b; timer 401ms")
		s.want("a is not", s.block(202*ms), "")
		s.want("until later", s.tick(401*ms), "start 7: block 5 on a; timer 402ms")
	})
	t.Run("where the route picks the replica", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 4})
		s.step(0, schedule.Event{Kind: schedule.ViewChanged, Replicas: []string{""}})
		s.block(0)
		s.block(0)
		s.ended(ms, 1, schedule.OK)
		if n := starts(s.tick(200 * ms)); n != 1 {
			t.Errorf("%d hedges, want 1", n)
		}
	})
	t.Run("not while blocks wait", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.block(time.Second)
		s.block(time.Second)
		s.inputEnd(time.Second)
		s.want("much later", s.tick(time.Minute), "")
	})
	t.Run("not when forbidden", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{NoHedge: true})
		s.want("the input ends", s.inputEnd(time.Second), "")
		s.want("much later", s.tick(time.Minute), "")
	})
	t.Run("not on the same replica, idle as it is", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 2})
		s.view(0, "a")
		s.block(0)
		s.block(0)
		s.inputEnd(0)
		s.ended(10*ms, 1, schedule.OK)
		s.want("much later", s.tick(time.Minute), "no timer")
	})
	t.Run("not without another replica", func(t *testing.T) {
		s := nearEnd(t, schedule.Config{})
		s.view(time.Second, "b")
		s.inputEnd(time.Second)
		s.want("much later", s.tick(time.Minute), "no timer")
		s.want("another joins", s.view(time.Minute, "b c"), "start 11: block 9 on c")
	})
	t.Run("before the half is done nobody is late", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1})
		s.view(0, "a b c d")
		s.block(0)
		s.block(0)
		s.block(0)
		s.want("the input ends", s.inputEnd(0), "")
		s.want("one result of three", s.ended(10*ms, 1, schedule.OK), "emit 0")
		s.want("two results of three", s.ended(10*ms, 2, schedule.OK), "emit 1; timer 200ms")
	})
	t.Run("one and a half medians", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1})
		s.view(0, "a b c")
		s.block(0)
		s.block(0)
		s.inputEnd(0)
		words := s.ended(time.Second, 1, schedule.OK)
		var at time.Duration
		for _, w := range words {
			if d, ok := strings.CutPrefix(w, "timer "); ok {
				at, _ = time.ParseDuration(d)
			}
		}
		if at < 1500*ms || at > 1700*ms { // the median is right to an eighth
			t.Errorf("hedge at %v: %v", at, words)
		}
	})
	// hanging is a scatter of 40 blocks of which the last 6 hang, and ticks it
	// ten times; each time the hedges that began end as outcome says.
	hanging := func(t *testing.T, hedges schedule.Outcome) (n int) {
		s := tell(t, schedule.Config{PerReplica: 1, Limit: 100})
		s.view(0, "a b c d e f g h i j k l m n o p")
		for range 40 {
			s.block(0)
		}
		s.inputEnd(0)
		for i := range 34 {
			s.ended(10*ms, i+1, schedule.OK)
		}
		for range 10 {
			words := s.tick(s.now + time.Second)
			n += starts(words)
			for _, w := range words {
				var id int
				if _, err := fmt.Sscanf(w, "start %d:", &id); err == nil && hedges != 0 {
					n += starts(s.ended(s.now, id, hedges))
				}
			}
		}
		return n
	}
	t.Run("a tenth of the blocks at most", func(t *testing.T) {
		if n := hanging(t, 0); n != 4 {
			t.Errorf("%d hedges for 40 blocks, want 4", n)
		}
	})
	t.Run("but those that were needed do not count", func(t *testing.T) {
		if n := hanging(t, schedule.OK); n < 6 {
			t.Errorf("%d hedges for 6 blocks that hang, want all of them", n)
		}
	})
	t.Run("of a replica that left", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1})
		s.view(0, "a b")
		s.block(0)
		s.want("it leaves", s.view(time.Second, "b"), "timer 1.2s")
		s.want("no answer by now", s.tick(1200*ms), "start 2: block 0 on b; no timer")
	})
	t.Run("of a replica that left and answers", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1})
		s.view(0, "a b")
		s.block(0)
		s.view(time.Second, "b")
		s.ended(1100*ms, 1, schedule.OK)
		if n := starts(s.tick(1200 * ms)); n != 0 {
			t.Errorf("%d attempts at a block that has its result", n)
		}
	})
	t.Run("forbidden of a replica that left", func(t *testing.T) {
		s := tell(t, schedule.Config{PerReplica: 1, NoHedge: true})
		s.view(0, "a b")
		s.block(0)
		s.want("it leaves", s.view(time.Second, "b"), "")
	})
}

func TestRanksFollowTheView(t *testing.T) {
	s := tell(t, schedule.Config{PerReplica: 1})
	s.view(0, "a b")
	s.view(0, "b c a")
	for range 3 {
		for _, c := range s.m.Step(0, schedule.Event{Kind: schedule.BlockRead}) {
			if ranks := []string{"b", "c", "a"}; c.Kind == schedule.Start && ranks[c.Rank] != c.Replica {
				t.Errorf("replica %s is started as rank %d of %v", c.Replica, c.Rank, ranks)
			}
		}
	}
}

func TestReadsWithinLimits(t *testing.T) {
	for _, test := range []struct {
		name     string
		cfg      schedule.Config
		replicas string
		want     int // blocks asked for
	}{
		{"two for each slot", schedule.Config{Limit: 64, PerReplica: 2}, "a b c", 12},
		{"at least eight", schedule.Config{Limit: 64, PerReplica: 1}, "a", 8},
		{"no more than the limit", schedule.Config{Limit: 5, PerReplica: 4}, "a b c", 5},
		{"before there is a replica", schedule.Config{Limit: 64}, "", 8},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := tell(t, test.cfg)
			s.want("view", s.view(0, test.replicas), fmt.Sprint("read ", test.want))
		})
	}
	t.Run("no further than the window past a block that is stuck", func(t *testing.T) {
		s := tell(t, schedule.Config{Limit: 2, Window: 6})
		words := s.view(0, "a b")
		read := 0
		for attempt := 1; len(words) > 0 && read < 100; attempt++ {
			for _, w := range words {
				var n int
				if _, err := fmt.Sscanf(w, "read %d", &n); err == nil {
					for range n {
						read++
						s.block(0)
					}
				}
			}
			words = s.ended(0, attempt+1, schedule.OK) // attempt 1 hangs
		}
		if read != 6 {
			t.Errorf("%d blocks were read, want 6", read)
		}
	})
}

func TestStepAllocates(t *testing.T) {
	// Not parallel: AllocsPerRun forbids it. Room is made in the first rounds.
	next := steady()
	for range 10_000 {
		next()
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if n := testing.AllocsPerRun(100_000, next); n != 0 {
		t.Errorf("%.2f allocations for each block", n)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 64<<10 {
		t.Errorf("%d bytes were allocated: something grows with the blocks", n)
	}
}

func BenchmarkStep(b *testing.B) {
	next := steady()
	b.ReportAllocs()
	for b.Loop() {
		next()
	}
}

// steady returns a function that takes a scatter over 16 replicas one block
// further: a result comes, and a block is read.
func steady() func() {
	m := schedule.New(schedule.Config{})
	var ids []string
	for i := range 16 {
		ids = append(ids, fmt.Sprint("r", i))
	}
	m.Step(0, schedule.Event{Kind: schedule.ViewChanged, Replicas: ids})
	for range 64 {
		m.Step(0, schedule.Event{Kind: schedule.BlockRead})
	}
	now, attempt := time.Duration(0), 0
	return func() {
		now += 10 * time.Microsecond
		attempt++
		m.Step(now, schedule.Event{Kind: schedule.Ended, Attempt: attempt, Outcome: schedule.OK})
		m.Step(now, schedule.Event{Kind: schedule.BlockRead})
	}
}
