package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

// swapsVariable sets how many swaps TestPolicySwaps makes.
const swapsVariable = "CKAGENT_E2E_SWAPS"

// TestPolicySwaps: the policies of five VMs are replaced again and again, each time while
// a checkpoint of that VM is under way. Every decision is in time and of one generation,
// checkpoints go on, and nothing is left of the policies that were.
// The last ones are back in charge after a daemon that could not start them.
func TestPolicySwaps(t *testing.T) {
	total := 10
	if n, err := strconv.Atoi(os.Getenv(swapsVariable)); err == nil {
		total = n
	}
	h := newHost(t, "[limits]\ncheckpoints = 5\n")
	installTwo(t, h)
	h.start(t, "--verbose") // tells each decision
	list := guests(t, "s", 5)
	var wg sync.WaitGroup
	for _, v := range list {
		wg.Go(func() {
			if r := h.run(t, "attach", itoa(v.PID()), "--policy", "one", "--param", "interval=200ms", "--keep-last", "1", "--disks", "none"); r.code != exitOK {
				t.Errorf("%s", r)
			}
		})
	}
	wg.Wait()
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
	before := openFiles(t, h.d.pid)

	var mu sync.Mutex
	var took []time.Duration
	taken := uint64(0)
	for _, v := range list {
		wg.Go(func() {
			mine, n := swapWhileCapturing(t, c, itoa(v.PID()), total/len(list))
			mu.Lock()
			took, taken = append(took, mine...), taken+n
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
	if len(took) != total {
		t.Fatalf("%d swaps of %d were made", len(took), total)
	}
	// What a checkpoint under way has and what a call needs come and go; what swaps leave
	// would be as much as there were swaps.
	if after := openFiles(t, h.d.pid); after > before+20 {
		t.Errorf("%d descriptors before, %d afterwards", before, after)
	}
	if n := policiesRunning(t, filepath.Join(h.dir, "policies")); n != 5 {
		t.Errorf("%d policies run for 5 VMs", n)
	}
	said := h.kill(t, unix.SIGTERM).err
	if n := policiesRunning(t, filepath.Join(h.dir, "policies")); n != 0 {
		t.Errorf("%d policies are left", n)
	}
	decisions, late := decisionsOf(t, said)
	t.Logf("%d swaps, each with a checkpoint in flight; a swap took %v (p50), %v (p99), %v at most; %d checkpoints meanwhile; %d decisions that differ, %d of them not in time",
		len(took), took[len(took)/2], took[len(took)*99/100], took[len(took)-1], taken, decisions, late)
	if late > 0 || decisions < total {
		t.Errorf("%d decisions were told, and %d were not the program's", decisions, late)
	}
	wantComeBack(t, h)
	wantAlive(t, list)
}

// wantComeBack: a daemon that takes its VMs up while their policies cannot be started
// protects them without, and has them in charge as soon as they can.
func wantComeBack(t *testing.T, h *host) {
	t.Helper()
	programs := filepath.Join(h.dir, "policies")
	if err := os.Rename(programs, programs+".away"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	h.start(t)
	h.wait(t, "the fallback protects all", func(m map[string]statusView) bool {
		for _, s := range m {
			if s.Checkpoints == 0 || s.Policy.Trouble == "" {
				return false
			}
		}
		return len(m) == 5
	})
	if err := os.Rename(programs+".away", programs); err != nil {
		t.Fatal(err)
	}
	alone := time.Since(began)
	h.wait(t, "the policies are back", func(m map[string]statusView) bool {
		for _, s := range m {
			if s.Policy.Trouble != "" || s.Decision.Source != "program" {
				return false
			}
		}
		return len(m) == 5
	})
	t.Logf("without policies all were protected after %v; the policies were back %v later", alone, time.Since(began)-alone)
	h.kill(t, unix.SIGTERM)
}

// installTwo installs the policy fixed under two names: one and other.
func installTwo(t *testing.T, h *host) {
	t.Helper()
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
}

// swapWhileCapturing swaps a VM's policy so many times, each time when a checkpoint has
// begun and before it has ended. It returns what the swaps took and how many
// checkpoints the VM had meanwhile.
func swapWhileCapturing(t *testing.T, c apipb.AgentClient, vm string, swaps int) (took []time.Duration, taken uint64) {
	status := func() *apipb.VMStatus {
		r, err := c.Status(t.Context(), &apipb.StatusRequest{Vm: vm})
		if err != nil || len(r.GetVms()) != 1 {
			t.Errorf("%v", err)
			return &apipb.VMStatus{}
		}
		return r.GetVms()[0]
	}
	s := status()
	first, generation := s.GetCheckpoints(), s.GetPolicy().GetGeneration()
	pace := time.NewTicker(lookEvery / 5)
	defer pace.Stop()
	for i := range swaps {
		ctx, cancel := context.WithCancel(t.Context())
		err := underWay(ctx, c, vm)
		if err != nil {
			t.Errorf("no checkpoint to swap in: %v", err)
		}
		began := time.Now()
		r, err := c.SetPolicy(ctx, &apipb.SetPolicyRequest{Vm: vm, Policy: []string{"other", "one"}[i%2], Params: map[string]string{"interval": "200ms"}})
		took = append(took, time.Since(began))
		cancel()
		generation++
		if err != nil || r.GetPolicy().GetGeneration() != generation || r.GetDecision().GetGeneration() != generation {
			t.Errorf("swap %d: %v, %v; want generation %d", i, err, r, generation)
			break
		}
		// It is in force as soon as the checkpoint under way has ended, before the next swap.
		for end := began.Add(30 * time.Second); ; <-pace.C {
			if s = status(); s.GetDecision().GetGeneration() > s.GetPolicy().GetGeneration() {
				t.Errorf("whose decision is it: %v, policy %v", s.GetDecision(), s.GetPolicy())
			}
			if s.GetDecision().GetGeneration() == generation {
				break
			}
			if time.Now().After(end) {
				t.Errorf("swap %d: decision %v is in force, want one of generation %d", i, s.GetDecision(), generation)
				return took, s.GetCheckpoints() - first
			}
		}
	}
	return took, s.GetCheckpoints() - first
}

// underWay returns when a checkpoint of the VM has begun: the one that is ordered for it,
// which nobody waits for.
func underWay(ctx context.Context, c apipb.AgentClient, vm string) error {
	for {
		stream, err := c.Checkpoint(ctx, &apipb.CheckpointRequest{Vm: vm})
		if err != nil {
			return err
		}
		e, err := stream.Recv()
		switch {
		case err == nil && e.GetTaken() == nil:
			return nil
		case err != nil && !problem.Is(api.FromStatus("checkpoint", err), problem.Busy):
			return err
		}
	}
}

// decisionsOf reads the decisions that a daemon has told: how many there were, and how many
// were not a program's. Those of a VM are of generations that only grow, whose policies take
// turns.
func decisionsOf(t *testing.T, log string) (n, late int) {
	t.Helper()
	last := map[string]int{}
	for line := range strings.Lines(log) {
		word := map[string]string{}
		for f := range strings.FieldsSeq(line) {
			if k, v, ok := strings.Cut(f, "="); ok {
				word[k] = v
			}
		}
		if word["msg"] != "decision" {
			continue
		}
		n++
		vm := word["vm"]
		generation, err := strconv.Atoi(word["generation"])
		switch {
		case word["source"] != "program":
			late++
			t.Logf("not the program's: %s", line)
		case err != nil || generation < last[vm] || word["policy"] != []string{"other", "one"}[generation%2]:
			t.Errorf("whose is it, after generation %d: %s", last[vm], line)
		default:
			last[vm] = generation
		}
	}
	return n, late
}

// openFiles counts the descriptors of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	fds, err := os.ReadDir(filepath.Join("/proc", itoa(pid), "fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
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
