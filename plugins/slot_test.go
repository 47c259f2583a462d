package plugins

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
)

func newSlot(t testing.TB, r *Registry, change func(*SlotConfig)) *Slot {
	t.Helper()
	cfg := SlotConfig{Registry: r, Host: &Host{StartTimeout: 5 * time.Second, TempDir: shortDir(t)}, Interval: 7 * time.Minute}
	if change != nil {
		change(&cfg)
	}
	s, err := NewSlot(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if left := leftovers(t, r, cfg.Host.TempDir); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
	return s
}

// until waits for a condition that something else brings about.
func until(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func TestFallbackAlone(t *testing.T) {
	s := newSlot(t, registry(t), nil)
	v := s.Decide(t.Context(), now())
	if v.Source != FromFallback || v.Generation != 0 || v.Policy != "fixed" || !v.Decision.GetNow() || v.Trouble != nil {
		t.Errorf("%+v", v)
	}
	if st := s.Status(); st.Policy != "fixed" || st.Wanted != "fixed" || st.Params["interval"] != "7m0s" || st.Decisions != 1 {
		t.Errorf("%+v", st)
	}
	s.Close()
	if v := s.Decide(t.Context(), &policy.Signals{}); v.Decision == nil {
		t.Error("nothing is decided after the end")
	}
}

// TestSetOrStay: what does not come up leaves the one before it in charge.
func TestSetOrStay(t *testing.T) {
	r := registry(t, "rogue", "mute", "quits")
	s := newSlot(t, r, func(c *SlotConfig) { c.Host.StartTimeout = 2 * time.Second })
	if _, err := s.Set(t.Context(), "none", nil, now()); !problem.Is(err, problem.NotFound) {
		t.Errorf("%v", err)
	}
	v, err := s.Set(t.Context(), "rogue", map[string]string{"tag": "a"}, now())
	if err != nil || v.Generation != 1 || v.Source != FromProgram || v.SHA256 == "" {
		t.Fatalf("%+v, %v", v, err)
	}
	pid := s.Status().PID
	for _, c := range []struct {
		ref    string
		params map[string]string
		code   problem.Code
		says   string
	}{
		{"none", nil, problem.NotFound, "not installed"},
		{"/bin/true", nil, problem.Refused, "run from"},
		{"mute", nil, problem.Failed, "no answer in time"},
		{"quits", nil, problem.Failed, "no such library"},
		{"rogue", map[string]string{"interval": "1m"}, problem.Usage, "interval"},
		{"rogue", map[string]string{"how": "demanding"}, problem.Refused, "replicate"},
		{"rogue", map[string]string{"how": "tlc", "after": "0"}, problem.Refused, "tlc"},
		{"rogue", map[string]string{"how": "nonsense", "after": "0"}, problem.Failed, "reason"},
		{"rogue", map[string]string{"how": "hang", "after": "0"}, problem.Failed, "no answer in time"},
		{"rogue", map[string]string{"how": "exit", "after": "0"}, problem.Failed, "ended"},
	} {
		_, err := s.Set(t.Context(), c.ref, c.params, now())
		if !problem.Is(err, c.code) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s %v: %v, want %s and %q", c.ref, c.params, err, c.code, c.says)
		}
		if st := s.Status(); st.Generation != 1 || st.PID != pid || st.Params["tag"] != "a" {
			t.Errorf("%s %v: %+v is in charge", c.ref, c.params, st)
		}
		if v := s.Decide(t.Context(), now()); v.Generation != 1 || v.Source != FromProgram {
			t.Errorf("%s %v: %+v decides", c.ref, c.params, v)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Set(ctx, "rogue", nil, now()); !problem.Is(err, problem.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestInsist: a policy that was in charge and does not come up is wanted all the same, and
// is in charge as soon as it can be; what an operator sets meanwhile wins.
func TestInsist(t *testing.T) {
	r := registry(t, "rogue")
	fast := func(c *SlotConfig) { c.FirstRestart = 10 * time.Millisecond }
	s := newSlot(t, r, fast)
	s.Insist(t.Context(), "steady", nil, now())
	if st := s.Status(); st.Policy != "fixed" || st.Wanted != "steady" || st.Generation != 0 || !problem.Is(st.Trouble, problem.NotFound) {
		t.Errorf("%+v", st)
	}
	if v := s.Decide(t.Context(), now()); v.Source != FromFallback || v.Trouble == nil || v.Decision == nil {
		t.Errorf("%+v", v)
	}
	installed(t, r, "steady")
	until(t, 10*time.Second, "it is in charge", func() bool { return s.Status().Policy == "steady" })
	if st := s.Status(); st.Generation != 1 || st.Trouble != nil {
		t.Errorf("%+v", st)
	}
	s.Insist(t.Context(), "none", nil, now())
	if st := s.Status(); st.Policy != "fixed" || st.Wanted != "none" || st.PID != 0 {
		t.Errorf("%+v", st)
	}
	if v, err := s.Set(t.Context(), "rogue", nil, now()); err != nil || v.Generation != 2 {
		t.Errorf("%+v, %v", v, err)
	}
	s.Insist(t.Context(), "steady", nil, now())
	if st := s.Status(); st.Policy != "steady" || st.Generation != 3 {
		t.Errorf("%+v", st)
	}
	s.Close()
	again := newSlot(t, r, fast) // ends while it insists
	again.Insist(t.Context(), "absent", nil, now())
}

// TestLosesItsPlace: whatever a program does, a decision is there in time, the
// fallback takes over, and a program that is well again is brought back.
func TestLosesItsPlace(t *testing.T) {
	r := registry(t, "rogue")
	for _, how := range []string{"hang", "nonsense", "huge", "panic", "stop", "error", "chatter"} {
		t.Run(how, func(t *testing.T) {
			s := newSlot(t, r, func(c *SlotConfig) { c.FirstRestart = 10 * time.Millisecond })
			if _, err := s.Set(t.Context(), "rogue", map[string]string{"how": how, "after": "2"}, now()); err != nil {
				t.Fatal(err)
			}
			// The second decision is its own, then it fails until it has lost its place.
			seen := map[Source]bool{}
			for range 50 {
				within(t, policy.Deadline+500*time.Millisecond, "decide", func() {
					v := s.Decide(t.Context(), now())
					if v.Decision == nil || (v.Source == FromFallback) != (v.Generation == 0) {
						t.Errorf("%+v", v)
					}
					if v.Source != FromProgram && v.Trouble == nil {
						t.Errorf("%+v does not say why", v)
					}
					seen[v.Source] = true
				})
				if seen[FromFallback] {
					break
				}
			}
			if !seen[FromProgram] || !seen[FromFallback] {
				t.Errorf("decisions came from %v", seen)
			}
			until(t, 10*time.Second, "it is brought back", func() bool { return s.Status().Generation > 1 })
		})
	}
}

// TestSignalsFromOutside: a program that is killed or stopped between two decisions is
// noticed without one.
func TestSignalsFromOutside(t *testing.T) {
	r := registry(t, "rogue")
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		changes := make(chan Status, 16)
		s := newSlot(t, r, func(c *SlotConfig) {
			c.HealthEvery, c.FirstRestart = 50*time.Millisecond, 10*time.Millisecond
			c.Changed = func(st Status) { changes <- st }
		})
		if _, err := s.Set(t.Context(), "rogue", nil, now()); err != nil {
			t.Fatal(err)
		}
		<-changes
		if err := unix.Kill(s.Status().PID, sig); err != nil {
			t.Fatal(err)
		}
		within(t, 10*time.Second, sig.String(), func() {
			if st := <-changes; st.Generation != 0 || st.Trouble == nil || st.Wanted != "rogue" {
				t.Errorf("%v: %+v", sig, st)
			}
			if st := <-changes; st.Generation != 2 || st.Trouble != nil {
				t.Errorf("%v: %+v", sig, st)
			}
		})
		s.Close()
	}
}

// TestLateAtFirst: a program whose first decision is late comes up all the same.
func TestLateAtFirst(t *testing.T) {
	s := newSlot(t, registry(t, "rogue"), nil)
	if v, err := s.Set(t.Context(), "rogue", map[string]string{"how": "late", "after": "0"}, now()); err != nil || v.Generation != 1 || v.Source != FromProgram {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestMissedOnce: what is decided without a program that missed one answer, or did not say
// whether it serves, does not stay in force until it is asked the next time.
func TestMissedOnce(t *testing.T) {
	s := newSlot(t, registry(t, "rogue"), func(c *SlotConfig) { c.HealthEvery = 50 * time.Millisecond })
	if _, err := s.Set(t.Context(), "rogue", map[string]string{"how": "late", "after": "1"}, now()); err != nil {
		t.Fatal(err)
	}
	<-s.Changes()
	taken := now()
	taken.History = []*policy.Checkpoint{{AtNs: taken.NowNs, Ok: true}}
	if v := s.Decide(t.Context(), taken); v.Source != FromFallback {
		t.Errorf("%+v", v)
	}
	serves := func() {
		t.Helper()
		within(t, 10*time.Second, "it is asked again", func() { <-s.Changes() })
		if v := s.Decide(t.Context(), taken); v.Source != FromProgram || s.Status().Trouble != nil {
			t.Errorf("%+v, %+v", v, s.Status())
		}
	}
	serves()
	pid := s.Status().PID
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "it does not say whether it serves", func() bool { return s.Status().Trouble != nil })
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	serves()
	if s.Status().Generation != 1 {
		t.Errorf("%+v", s.Status())
	}
}

// TestLastDecision: one missed answer leaves the program its place and its last
// decision in force, until a checkpoint was taken on it.
func TestLastDecision(t *testing.T) {
	s := newSlot(t, registry(t, "rogue"), nil)
	sig := now()
	first, err := s.Set(t.Context(), "rogue", map[string]string{"how": "error", "after": "1"}, sig)
	if err != nil {
		t.Fatal(err)
	}
	v := s.Decide(t.Context(), sig)
	if v.Source != FromLast || v.Generation != 1 || v.Decision.GetAtNs() != first.Decision.GetAtNs() || v.Trouble == nil {
		t.Errorf("%+v", v)
	}
	later := now()
	later.History = []*policy.Checkpoint{{AtNs: later.NowNs, Ok: true}}
	later.LastSuccessNs = later.NowNs
	if v := s.Decide(t.Context(), later); v.Source != FromFallback || v.Decision.GetAtNs() != later.NowNs+int64(7*time.Minute) {
		t.Errorf("%+v", v)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestSwapUnderLoad: generations are replaced while decisions are asked for, in five
// slots at once. Every decision is that of one generation, they only rise, and
// nothing is left.
func TestSwapUnderLoad(t *testing.T) {
	swaps, slots := 50, 5
	if testing.Short() { // the race detector makes each program's start five times as long
		swaps = 20
	}
	if n, err := strconv.Atoi(os.Getenv("CKAGENT_SWAPS")); err == nil {
		swaps = n
	}
	r := registry(t, "rogue", "steady")
	before := descriptors(t)
	temp := shortDir(t)
	var decisions, other, longest atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for slot := range slots {
		s, err := NewSlot(SlotConfig{Registry: r, Host: &Host{TempDir: temp, StartTimeout: time.Minute}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Set(t.Context(), "rogue", nil, now()); err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var load sync.WaitGroup
		load.Go(func() {
			newest := uint64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				v := s.Decide(context.Background(), now())
				decisions.Add(1)
				longest.Store(max(longest.Load(), int64(v.Took)))
				if v.Source != FromProgram {
					other.Add(1) // a machine so busy that the deadline passed
					continue
				}
				// Odd generations are rogue, even ones steady.
				want := map[uint64]string{0: "steady", 1: "rogue"}[v.Generation%2]
				if v.Policy != want || v.Generation < newest || v.SHA256 == "" {
					t.Errorf("slot %d: generation %d after %d is %s", slot, v.Generation, newest, v.Policy)
				}
				newest = v.Generation
			}
		})
		wg.Go(func() {
			defer s.Close()
			defer load.Wait()
			defer close(stop)
			for i := range swaps / slots {
				name := []string{"steady", "rogue"}[i%2]
				if v, err := s.Set(context.Background(), name, nil, now()); err != nil || v.Generation != uint64(i+2) {
					t.Errorf("slot %d, swap %d: generation %d, %v", slot, i, v.Generation, err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d swaps in %v, %d decisions, the longest took %v, %d not by the program", swaps, time.Since(began).Round(time.Millisecond),
		decisions.Load(), time.Duration(longest.Load()), other.Load())
	if decisions.Load() < int64(swaps) {
		t.Errorf("%d decisions are no load", decisions.Load())
	}
	if time.Duration(longest.Load()) > policy.Deadline+500*time.Millisecond {
		t.Errorf("a decision took %v", time.Duration(longest.Load()))
	}
	if left := leftovers(t, r, temp); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	until(t, 5*time.Second, fmt.Sprintf("no more than %d descriptors", before), func() bool { return descriptors(t) <= before })
	if zombies := children(t); len(zombies) > 0 {
		t.Errorf("children: %q", zombies)
	}
}

func children(t testing.TB) (list []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && len(b) > 0 {
			list = append(list, strings.TrimSpace(string(b)))
		}
	}
	return list
}
