package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
)

// swapsVariable sets how many swaps TestPolicySwaps makes.
const swapsVariable = "CKAGENT_E2E_SWAPS"

// TestPolicySwaps: the policies of five VMs are replaced again and again while
// checkpoints are under way. Every decision is of one generation, checkpoints go on, and
// nothing is left of the policies that were.
func TestPolicySwaps(t *testing.T) {
	total := 10
	if n, err := strconv.Atoi(os.Getenv(swapsVariable)); err == nil {
		total = n
	}
	h := newHost(t, "[limits]\ncheckpoints = 5\n")
	programs := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", programs, "github.com/ckagent/ckagent/cmd/ckagent-policy-fixed").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	one, other := filepath.Join(programs, "ckagent-policy-one"), filepath.Join(programs, "ckagent-policy-other")
	for _, path := range []string{one, other} {
		if err := os.Link(filepath.Join(programs, "ckagent-policy-fixed"), path); err != nil {
			t.Fatal(err)
		}
	}
	h.x.json(t, &struct{}{}, "policy", "install", one, other, "--policy-dir", filepath.Join(h.dir, "policies"))
	h.start(t)
	list := guests(t, "s", 5)
	for _, v := range list {
		h.json(t, &struct{}{}, "attach", itoa(v.PID()), "--policy", "one", "--param", "interval=200ms", "--keep-last", "1", "--disks", "none")
	}
	h.wait(t, "checkpoints of all", func(m map[string]statusView) bool {
		for _, s := range m {
			if s.Checkpoints == 0 {
				return false
			}
		}
		return len(m) == 5
	})
	conn, err := api.Dial(t.Context(), h.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := apipb.NewAgentClient(conn)
	daemon := h.x.processes()
	before := openFiles(t, daemon)

	var mu sync.Mutex
	var took []time.Duration
	inFlight, taken := 0, uint64(0)
	var wg sync.WaitGroup
	for _, v := range list {
		wg.Go(func() {
			name := itoa(v.PID())
			first, last, generation := uint64(0), uint64(0), uint64(0)
			for i := range total / len(list) {
				st, err := c.Status(t.Context(), &apipb.StatusRequest{Vm: name})
				if err != nil || len(st.GetVms()) != 1 {
					t.Errorf("%v", err)
					return
				}
				s := st.GetVms()[0]
				if d := s.GetDecision(); d.GetSource() != "program" || d.GetGeneration() > s.GetPolicy().GetGeneration() {
					t.Errorf("whose decision is it: %v, policy %v", d, s.GetPolicy())
				}
				if i == 0 {
					first, generation = s.GetCheckpoints(), s.GetPolicy().GetGeneration()
				}
				last = s.GetCheckpoints()
				began := time.Now()
				r, err := c.SetPolicy(t.Context(), &apipb.SetPolicyRequest{Vm: name, Policy: []string{"other", "one"}[i%2], Params: map[string]string{"interval": "200ms"}})
				d := time.Since(began)
				generation++
				if err != nil || r.GetPolicy().GetGeneration() != generation || r.GetDecision().GetGeneration() != generation {
					t.Errorf("swap %d: %v, %v; want generation %d", i, err, r, generation)
					return
				}
				mu.Lock()
				took = append(took, d)
				if s.GetState() != "idle" && s.GetState() != "queued" {
					inFlight++
				}
				mu.Unlock()
			}
			mu.Lock()
			taken += last - first
			mu.Unlock()
		})
	}
	wg.Wait()
	m := h.wait(t, "they are still protected", func(m map[string]statusView) bool { return len(m) == 5 && m["s4"].Protected })
	for name, s := range m {
		if s.Policy.Trouble != "" || s.Decision.Source != "program" || !s.Protected {
			t.Errorf("%s: %+v", name, s)
		}
	}
	slices.Sort(took)
	if len(took) == 0 {
		t.Fatal("no swap was made")
	}
	t.Logf("%d swaps, %d with a checkpoint in flight; a swap took %v (p50), %v (p99), %v at most; %d checkpoints meanwhile",
		len(took), inFlight, took[len(took)/2], took[len(took)*99/100], took[len(took)-1], taken)
	if inFlight < len(took)/2 {
		t.Errorf("only %d of %d swaps met a checkpoint in flight: the test tests less than it says", inFlight, len(took))
	}
	// A checkpoint under way has descriptors of its own; those that swaps leave would
	// be as many as there were swaps.
	if after := openFiles(t, daemon); after > before+40 {
		t.Errorf("%d descriptors before, %d afterwards", before, after)
	}
	if n := policiesRunning(t, filepath.Join(h.dir, "policies")); n != 5 {
		t.Errorf("%d policies run for 5 VMs", n)
	}
	h.kill(t, unix.SIGTERM)
	if n := policiesRunning(t, filepath.Join(h.dir, "policies")); n != 0 {
		t.Errorf("%d policies are left", n)
	}
	for _, v := range list {
		v.WaitProgress(t, 20)
	}
}

// openFiles counts the descriptors of the processes that live.
func openFiles(t *testing.T, pids []int) (n int) {
	t.Helper()
	for _, pid := range pids {
		if fds, err := os.ReadDir(filepath.Join("/proc", itoa(pid), "fd")); err == nil {
			n += len(fds)
		}
	}
	return n
}

// policiesRunning counts the processes whose program is in a directory.
func policiesRunning(t *testing.T, dir string) (n int) {
	t.Helper()
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, exe := range exes {
		if path, err := os.Readlink(exe); err == nil && filepath.Dir(path) == dir {
			n++
		}
	}
	return n
}
