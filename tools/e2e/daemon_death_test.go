package e2e

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// stepsVariable, set to anything, has the daemon and its children killed at more steps.
const stepsVariable = "CKAGENT_E2E_STEPS"

// crowd is a daemon with five VMs, one of them on a bed.
type crowd struct {
	*host
	b    *bed
	list []*vmtest.VM // the bed's is the last
}

// crowdNames are those of the VMs.
var crowdNames = []string{"k0", "k1", "k2", "k3", "k9"}

func newCrowd(t *testing.T) *crowd {
	c := &crowd{host: newHost(t, "[limits]\ncheckpoints = 3\n")}
	c.b = newBedOf(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 32, WSMiB: 4, Rate: 500, Idle: true, Name: "k9"})
	c.list = append(guests(t, "k", 4), c.b.v)
	c.start(t)
	var wg sync.WaitGroup
	for i, v := range c.list {
		args := []string{"attach", itoa(v.PID()), "--interval", "400ms", "--keep-last", "2"}
		if i == len(c.list)-1 {
			args = append(args, "--qmp", c.b.proxy.Path())
		}
		wg.Go(func() {
			if r := c.run(t, args...); r.code != exitOK {
				t.Errorf("%s", r)
			}
		})
	}
	wg.Wait()
	return c
}

// protected: each VM has been checkpointed by this daemon.
func (c *crowd) protected(m map[string]statusView) bool {
	for _, name := range crowdNames {
		if s := m[name]; s.Checkpoints == 0 || !s.Protected {
			return false
		}
	}
	return len(m) == len(crowdNames)
}

// strike does something when the bed's VM next comes to a command.
func (c *crowd) strike(t *testing.T, step string, do func()) {
	t.Helper()
	var once sync.Once
	struck := make(chan struct{})
	remove := c.b.proxy.Add(vmtest.Rule{Command: step, Decide: func(context.Context, vmtest.Message) vmtest.Verdict {
		once.Do(func() { do(); close(struck) })
		return vmtest.Pass
	}})
	defer remove()
	select {
	case <-struck:
	case <-time.After(30 * time.Second):
		t.Errorf("nobody ever came to %s", step)
		c.kill(t, unix.SIGQUIT) // says what it was at
		t.FailNow()
	}
}

// taker is the process that takes a VM's checkpoint now.
func (c *crowd) taker(vm int) (pid int) {
	for _, p := range c.x.processes() {
		if args, err := readArgs(p); err == nil && strings.HasSuffix(args, " __take "+itoa(vm)) {
			return p
		}
	}
	return 0
}

// guardianOf is the guardian that a taker has started.
func (c *crowd) guardianOf(taker int) (pid int) {
	for _, p := range c.x.processes() {
		args, err := readArgs(p)
		if err != nil || !strings.HasSuffix(args, " __guardian") {
			continue
		}
		if st, err := os.ReadFile("/proc/" + itoa(p) + "/status"); err == nil && strings.Contains(string(st), "PPid:\t"+itoa(taker)+"\n") {
			return p
		}
	}
	return 0
}

// readArgs is a process's command line, with spaces between the arguments.
func readArgs(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + itoa(pid) + "/cmdline")
	return strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " "), err
}

// TestDaemonKilledAtEachStep: whatever is killed or frozen in the middle of a checkpoint of
// many VMs, the process that takes it or the daemon, every guest runs on and all are
// protected again, without anybody's doing.
func TestDaemonKilledAtEachStep(t *testing.T) {
	c := newCrowd(t)
	more := os.Getenv(stepsVariable) != ""
	c.wait(t, "all are protected", c.protected)
	for i, harm := range []struct {
		step string
		sig  unix.Signal
		said string // of it in the status
		both bool   // its guardian as well
	}{
		{"xen-save-devices-state", unix.SIGKILL, "signal: killed", true}, // the VM is stopped then
		{"xen-save-devices-state", unix.SIGSTOP, "no sign of life", false},
		{"cont", unix.SIGKILL, "signal: killed", false},
		{"add-fd", unix.SIGKILL, "signal: killed", false},
		{"query-migrate", unix.SIGSTOP, "", false}, // where no guardian watches, and where one does
		{"cont", unix.SIGSTOP, "no sign of life", false},
		{"stop", unix.SIGKILL, "signal: killed", false},
	} {
		if i > 1 && !more {
			break
		}
		t.Run("taker/"+harm.step+"/"+unix.SignalName(harm.sig), func(t *testing.T) { c.harmTaker(t, harm.step, harm.sig, harm.said, harm.both) })
	}
	steps := []string{"query-migrate", "add-fd", "stop", "xen-save-devices-state", "cont", "remove-fd"}
	if !more {
		steps = []string{"add-fd", "xen-save-devices-state"}
	}
	for _, step := range steps {
		t.Run("daemon/"+step, func(t *testing.T) {
			d := c.d
			c.strike(t, step, func() { d.signal(unix.SIGKILL) })
			c.kill(t, unix.SIGKILL)
			c.start(t)
			wantAlive(t, c.list)
			c.wait(t, "all are protected again", c.protected)
		})
	}
	for i, v := range c.list {
		c.json(t, &struct{}{}, "detach", crowdNames[i])
		if left, err := traces(v.PID()); err != nil || len(left) > 0 {
			t.Errorf("%s: %v, %v", crowdNames[i], left, err)
		}
	}
}

// harmTaker harms the process that takes a checkpoint of the bed's VM. That VM goes on, the
// checkpoint counts as failed and says why, and the next one succeeds; the other VMs'
// checkpoints and the daemon notice nothing.
func (c *crowd) harmTaker(t *testing.T, step string, sig unix.Signal, said string, both bool) {
	conn, err := api.Dial(t.Context(), c.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := apipb.NewAgentClient(conn)
	status := func() map[string]*apipb.VMStatus {
		r, err := client.Status(t.Context(), &apipb.StatusRequest{})
		if err != nil {
			t.Fatalf("the daemon does not answer: %v", err)
		}
		m := map[string]*apipb.VMStatus{}
		for _, s := range r.GetVms() {
			m[s.GetVm()] = s
		}
		return m
	}
	before := status()
	victim, guard := 0, 0
	c.strike(t, step, func() {
		if victim = c.taker(c.b.v.PID()); victim == 0 {
			return
		}
		if guard = c.guardianOf(victim); both && guard != 0 {
			_ = unix.Kill(guard, sig)
		}
		_ = unix.Kill(victim, sig)
	})
	if victim == 0 || both && guard == 0 {
		t.Fatalf("process %d takes the checkpoint, and %d is its guardian", victim, guard)
	}
	seen, failed := "", before["k9"].GetCheckpoints()
	pace := time.NewTicker(lookEvery / 5) // a failure is forgotten with the next success
	defer pace.Stop()
	for end := time.Now().Add(30 * time.Second); seen == "" && time.Now().Before(end); <-pace.C {
		s := status()["k9"]
		if s.GetFailures() > 0 {
			seen, failed = s.GetLastError(), s.GetCheckpoints()
		}
	}
	if seen == "" || !strings.Contains(seen, said) {
		t.Errorf("the status says %q of it, want %q", seen, said)
	}
	wantAlive(t, c.list)
	c.wait(t, "another checkpoint of it, and two of each other", func(m map[string]statusView) bool {
		for _, name := range crowdNames[:4] {
			if m[name].Checkpoints < before[name].GetCheckpoints()+2 {
				return false
			}
		}
		return m["k9"].Checkpoints > failed && c.protected(m)
	})
	// Checkpoints are counted by the daemon that took them: it is the same.
	for name, s := range status() {
		if s.GetSinceNs() != before[name].GetSinceNs() {
			t.Errorf("%s is protected anew", name)
		}
	}
}
