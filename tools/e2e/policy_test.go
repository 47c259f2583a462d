package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// statusView is what `status` reports.
type statusView struct {
	VM      string `json:"vm"`
	QEMUPID int    `json:"qemu_pid"`
	State   string `json:"state"`
	Policy  struct {
		Name       string            `json:"name"`
		Path       string            `json:"path"`
		Generation uint64            `json:"generation"`
		Params     map[string]string `json:"params"`
		Wanted     string            `json:"wanted"`
		Trouble    string            `json:"trouble"`
		PID        int               `json:"pid"`
	} `json:"policy"`
	Decision struct {
		Reason     string `json:"reason"`
		Generation uint64 `json:"generation"`
		Policy     string `json:"policy"`
		Source     string `json:"source"`
	} `json:"decision"`
	Checkpoints uint64 `json:"checkpoints"`
	NextAt      string `json:"next_at"`
	Protected   bool   `json:"protected"`
	Degraded    []string
	Ended       *struct{ How, Detail string }
}

func (x *tool) status(t testing.TB, pid int) (s statusView) {
	t.Helper()
	x.json(t, &s, "status", itoa(pid))
	return s
}

// waitStatus waits until a VM's status is as wanted.
func (x *tool) waitStatus(t testing.TB, pid int, what string, ok func(statusView) bool) statusView {
	t.Helper()
	return hasBecome(t, time.Minute, what, func() (s statusView, seen bool) {
		r := x.run(t, "status", itoa(pid), "--json")
		if r.code != exitOK {
			return s, false
		}
		if err := oneObject(r.out, &s); err != nil {
			t.Fatalf("%v: %s", err, r)
		}
		return s, true
	}, ok)
}

// install builds a policy of ours and installs it.
func (x *tool) install(t testing.TB, dir, policy string) {
	t.Helper()
	program := filepath.Join(filepath.Dir(x.bin), "ckagent-policy-"+policy)
	if out, err := exec.Command("go", "build", "-o", program, "github.com/ckagent/ckagent/cmd/ckagent-policy-"+policy).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	x.json(t, &struct{}{}, "policy", "install", program, "--policy-dir", dir)
}

// TestPolicies: the policy of a running VM is replaced, killed and stopped, and
// checkpoints go on; whatever cannot take its place does not.
func TestPolicies(t *testing.T) {
	x := newTool(t)
	programs := t.TempDir()
	build := exec.Command("go", "build", "-o", programs, "github.com/ckagent/ckagent/cmd/ckagent-policy-fixed",
		"github.com/ckagent/ckagent/cmd/ckagent-policy-auto")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := filepath.Join(filepath.Dir(x.bin), "policies")
	fixed, auto := filepath.Join(programs, "ckagent-policy-fixed"), filepath.Join(programs, "ckagent-policy-auto")
	x.json(t, &struct{}{}, "policy", "install", fixed, auto, "--policy-dir", dir)
	var list struct {
		Policies []struct{ Name, SHA256 string }
	}
	x.json(t, &list, "policy", "list", "--policy-dir", dir)
	if len(list.Policies) != 2 || list.Policies[0].Name != "auto" || len(list.Policies[1].SHA256) != 64 {
		t.Errorf("listed: %+v", list)
	}
	var d struct {
		Formula string
		Params  []struct{ Name, Value string }
	}
	x.json(t, &d, "policy", "describe", "fixed", "--param", "interval=90s", "--policy-dir", dir)
	if d.Formula == "" || len(d.Params) != 1 || d.Params[0].Value != "90s" {
		t.Errorf("described: %+v", d)
	}
	x.fails(t, exitUsage, []string{"interval"}, "policy", "describe", "fixed", "--param", "interval=soon", "--policy-dir", dir)
	x.fails(t, exitUsage, []string{"--foreground"}, "attach", "1", "--record", filepath.Join(programs, "none"))
	x.fails(t, exitNoDaemon, nil, "status", "nobody", "--socket", filepath.Join(programs, "none"))

	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, Rate: 2000, Idle: true})
	v.WaitProgress(t, 200)
	pid := v.PID()
	trace := filepath.Join(programs, "trace.gz")
	s := x.start(t, "attach", itoa(pid), "--foreground", "--record", trace, "--store", x.store, "--policy", "fixed", "--param", "interval=300ms", "--policy-dir", dir, "--json")
	defer func() { s.signal(unix.SIGKILL) }()
	first := x.waitStatus(t, pid, "two checkpoints", func(s statusView) bool { return s.Checkpoints >= 2 })
	if p := first.Policy; p.Name != "fixed" || p.Path != filepath.Join(dir, "fixed") || p.Generation != 1 || p.Params["interval"] != "300ms" || first.QEMUPID != pid {
		t.Errorf("%+v", first)
	}
	if !strings.Contains(first.Decision.Reason, "every") || first.Decision.Source != "program" {
		t.Errorf("%+v", first.Decision)
	}

	for _, bad := range []struct {
		code int
		args []string
	}{
		{exitNotFound, []string{itoa(pid), "none"}}, {exitRefused, []string{itoa(pid), fixed}},
		{exitUsage, []string{itoa(pid), "auto", "--param", "overhead=3"}}, {exitNotFound, []string{"nobody", "auto"}},
	} {
		x.fails(t, bad.code, nil, append([]string{"policy", "set"}, bad.args...)...)
	}
	before := x.waitStatus(t, pid, "it stays", func(s statusView) bool { return s.Checkpoints > first.Checkpoints })
	if before.Policy.Generation != 1 || before.Policy.PID != first.Policy.PID {
		t.Errorf("what failed changed something: %+v", before.Policy)
	}

	var set struct {
		Policy struct {
			Generation uint64 `json:"generation"`
		} `json:"policy"`
	}
	x.json(t, &set, "policy", "set", itoa(pid), filepath.Join(dir, "auto"), "--param", "shortest=200ms", "--param", "longest=400ms", "--param", "overhead=1")
	if set.Policy.Generation != 2 {
		t.Errorf("%+v", set)
	}
	after := x.waitStatus(t, pid, "checkpoints of auto", func(s statusView) bool {
		return s.Decision.Generation == 2 && s.Checkpoints > before.Checkpoints+1
	})
	if after.Policy.Name != "auto" || after.Decision.Policy != "auto" {
		t.Errorf("%+v", after)
	}
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		was := x.status(t, pid)
		if err := unix.Kill(was.Policy.PID, sig); err != nil {
			t.Fatal(err)
		}
		now := x.waitStatus(t, pid, "it is brought back after "+sig.String(), func(s statusView) bool {
			return s.Policy.Generation > was.Policy.Generation && s.Checkpoints > was.Checkpoints
		})
		if now.Policy.Wanted != "auto" {
			t.Errorf("after %v: %+v", sig, now.Policy)
		}
	}
	s.signal(unix.SIGINT)
	r := s.wait(t, time.Minute)
	if r.code != exitCancelled || !strings.Contains(r.err, "policy does not serve") || !strings.Contains(r.err, "decision") {
		t.Errorf("%s", r)
	}
	var replayed struct {
		Policies []struct{ Checkpoints int }
	}
	x.json(t, &replayed, "policy", "replay", trace, "--policy", "fixed", "--param", "interval=300ms", "--policy-dir", dir)
	if len(replayed.Policies) != 1 || replayed.Policies[0].Checkpoints < 3 {
		t.Errorf("of what was recorded: %+v", replayed)
	}
	wantTold(t, recorded(t, trace))
	if left, _ := filepath.Glob("/tmp/ckagent-policy-*"); len(left) > 0 {
		t.Logf("directories of sockets, perhaps of others: %v", left)
	}
	if r := x.run(t, "status", itoa(pid)); r.code != exitNotFound && r.code != exitNoDaemon {
		t.Errorf("it is not protected any more: %s", r)
	}
	v.WaitProgress(t, 200)
}

// wantTold: a policy is told that checkpoints store what was written since the one before,
// and that is what they do.
func wantTold(t *testing.T, trace []*policy.Signals) {
	t.Helper()
	for i, s := range trace {
		if !s.GetCapabilities().GetIncremental() {
			t.Errorf("line %d says that checkpoints store all that is in use, after %v", i, s.GetHistory())
		}
	}
	list, full := taken(trace), 0
	for _, c := range list {
		if c.GetParent() == "" {
			full++
		}
	}
	if len(list) < 3 || full > 1+len(list)/capture.DefaultFullEvery {
		t.Errorf("%d of %d checkpoints store all that is in use", full, len(list))
	}
}
