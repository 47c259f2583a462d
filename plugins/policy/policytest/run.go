package policytest

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

const (
	cases = 200
	begin = int64(1_800_000_000_000_000_000)
)

// Build makes a program of a Go package, such as "." for the one that the test is in.
func Build(t *testing.T, pkg string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "policy")
	if out, err := exec.Command("go", "build", "-o", path, pkg).CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return path
}

// Run tests the program at path with the parameters an operator would give.
func Run(t *testing.T, path string, params map[string]string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the suite needs root: ckagent runs nothing that somebody else could have written (sudo -E go test)")
	}
	r := plugins.NewRegistry(filepath.Join(t.TempDir(), "policies"))
	p, err := r.Install(path)
	if err != nil {
		t.Fatal(err)
	}
	h := &plugins.Host{Line: func(_, text string) { t.Logf("it says: %s", text) }}
	g, err := h.Start(t.Context(), p, params)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { ends(t, g) }()
	if d := g.Description; d.GetVersion() == "" || d.GetFormula() == "" {
		t.Errorf("describes itself without version or formula: %v", d)
	}
	for i := range cases {
		s := situation(i)
		d, err := g.Decide(t.Context(), s)
		if err != nil {
			t.Fatalf("case %d: %v\nsignals: %v", i, err, s)
		}
		again, err := g.Decide(t.Context(), s)
		if err != nil || !proto.Equal(d, again) {
			t.Fatalf("case %d: the same signals get another decision: %v, %v, %v", i, d, again, err)
		}
	}
	patient(t, g)
	// Another process decides the same: what it needs to know is in the signals.
	other, err := h.Start(t.Context(), p, params)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { ends(t, other) }()
	for i := cases - 1; i >= 0; i -= 10 {
		s := situation(i)
		a, aerr := g.Decide(t.Context(), s)
		b, berr := other.Decide(t.Context(), s)
		if aerr != nil || berr != nil || !proto.Equal(a, b) {
			t.Fatalf("case %d: two processes decide differently: %v, %v; %v", i, a, b, errors.Join(aerr, berr))
		}
	}
	unknown := map[string]string{"no-such-parameter-of-any-policy": "1"}
	if u, err := h.Start(t.Context(), p, unknown); err == nil {
		u.End()
		t.Error("an unknown parameter is taken: operators would not notice a typing error")
	} else if !errors.Is(err, plugins.ErrParams) {
		t.Errorf("an unknown parameter is not answered with INVALID_ARGUMENT: %v", err)
	}
}

// soon after a failure nothing is to be tried again.
const soon = time.Second

// patient makes sure that after failures the next checkpoint is not wanted at once: the
// host would do it, and the guest would be stopped again and again for nothing.
func patient(t *testing.T, g *plugins.Generation) {
	t.Helper()
	for failures := 1; failures <= 8; failures++ {
		for _, succeeded := range []bool{false, true} {
			s := situation(failures)
			s.History, s.LastSuccessNs = nil, 0
			if succeeded {
				s.LastSuccessNs = s.NowNs - int64(100*24*time.Hour)
				s.History = append(s.History, &policy.Checkpoint{AtNs: s.LastSuccessNs, Ok: true, Mode: "stop", PauseNs: 1e6, TotalNs: 1e9, StoredBytes: 1 << 28})
			}
			for range failures {
				s.History = append(s.History, &policy.Checkpoint{AtNs: s.NowNs - int64(time.Millisecond), Mode: "stop", Error: "the store is full"})
			}
			d, err := g.Decide(t.Context(), s)
			if err != nil {
				t.Fatalf("after %d failures: %v\nsignals: %v", failures, err, s)
			}
			at := d.GetAtNs()
			if slot := d.GetIdleSlot(); slot != nil {
				at = slot.GetNotBeforeNs()
			}
			if d.GetNow() || d.GetWhen() != nil && at < s.NowNs+int64(soon) {
				t.Errorf("after %d failures in a row, the last a millisecond ago, it wants the next at once (policy.Retry says when): %v", failures, d)
			}
		}
	}
}

// ends makes sure that a program ends when it is asked to.
func ends(t *testing.T, g *plugins.Generation) {
	t.Helper()
	pid := g.PID()
	ctx, cancel := context.WithTimeout(context.Background(), policy.Deadline)
	defer cancel()
	if err := g.Healthy(ctx); err != nil {
		t.Errorf("it does not answer for its health: %v", err)
	}
	g.End()
	if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid))); pid != 0 && err == nil {
		t.Errorf("pid %d is still there", pid)
	}
}

// situation is one that a policy may meet: known or not, before the first checkpoint,
// after failures, with and without what a host may offer. The same number is the same
// situation.
func situation(n int) *policy.Signals {
	rng := rand.New(rand.NewPCG(uint64(n), 1))
	s := &policy.Signals{NowNs: begin + int64(n)*int64(time.Second), ProtectedSinceNs: begin - int64(time.Hour),
		Vm: &policypb.VM{Name: "vm", RamBytes: 4 << 30, UsedBytes: uint64(1+rng.IntN(4)) << 30, Vcpus: 2, Accel: "kvm"},
		Capabilities: &policypb.Capabilities{Modes: []string{"stop", "buffer", "cow"}[:1+rng.IntN(3)], Engines: []string{"uffd"},
			Compressions: []string{"none", "s2"}, Incremental: rng.IntN(2) == 0, IdleSlots: rng.IntN(2) == 0, Throttle: rng.IntN(2) == 0,
			MinIntervalNs: rng.Int64N(int64(10 * time.Second)), Keep: int32(rng.IntN(10))}}
	if rng.IntN(4) > 0 {
		rate := rng.Float64() * 50000
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: rate * 10, GTauNs: 1e10, CompressRatio: rng.Float64()}
	}
	if rng.IntN(4) > 0 {
		s.Host = &policypb.Host{StoreBytesPerSecond: rng.Float64() * 1e9, FailuresPerSecond: rng.Float64() / 86400, LoadShare: rng.Float64()}
	}
	if rng.IntN(2) > 0 {
		s.Network = &policypb.Network{OutPacketsPerSecond: rng.Float64() * 1e5, IdleShare: rng.Float64(), Idle: rng.IntN(2) == 0}
		s.Cpu = &policypb.CPU{BusyShare: rng.Float64(), Idle: rng.IntN(2) == 0}
		s.Disk = &policypb.Disk{WrittenBytesPerSecond: rng.Float64() * 1e8}
	}
	for i := range rng.IntN(64) {
		at := s.NowNs - int64(64-i)*int64(time.Minute) - rng.Int64N(int64(time.Second))
		c := &policy.Checkpoint{AtNs: at, Ok: rng.IntN(5) > 0, Mode: "cow", Engine: "uffd", PauseNs: rng.Int64N(1e8), TotalNs: 1e8 + rng.Int64N(1e10),
			StoredBytes: rng.Uint64N(1 << 32), CapturedPages: rng.Uint64N(1 << 20)}
		if s.History = append(s.History, c); c.Ok {
			s.LastSuccessNs = at
		}
	}
	return s
}
