package e2e

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestEngineIsTakenOnlyWhereProved: RAM of a kind that no test on this host has seen is
// no matter for engine bpf; under KVM, where it is experimental, it is taken if asked for.
func TestEngineIsTakenOnlyWhereProved(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Backend: vmtest.FileTmpfs, MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	f := x.fails(t, exitRefused, []string{"engine bpf", "private file", "uffd"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", "cow", "--engine", "bpf")
	if f.Hint == "" {
		t.Errorf("no hint: %+v", f)
	}
	x.wantOnly(t)
	wantUntouched(t, v.PID())
	if c := x.checkpoint(t, v.PID(), "--mode", "cow"); c.Engine != "uffd" || len(c.Retaken) > 0 {
		t.Errorf("engine %s, retaken %q", c.Engine, c.Retaken)
	}
	x.fails(t, exitUsage, []string{"uffd or bpf"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--engine", "magic")
	v.Kill()

	v = vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	// What KVM writes by itself nobody sees the first time; then it is copied in the pause.
	for engine, want := range map[string]string{"auto": "uffd", "bpf": "bpf"} {
		if c := x.checkpoint(t, v.PID(), "--mode", "cow", "--engine", engine); c.Engine != want || len(c.Retaken) > 1 {
			t.Errorf("kvm, engine %s: %s, retaken %q", engine, c.Engine, c.Retaken)
		}
	}
}

// newBuild makes the tool another build, of which nothing is known on this host.
func (x *tool) newBuild(t *testing.T) {
	t.Helper()
	f, err := elf.Open(x.bin)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id := f.Section(".note.go.buildid")
	b, err := os.ReadFile(x.bin)
	if id == nil || err != nil {
		t.Fatalf("no build id, or %v", err)
	}
	copy(b[id.Offset+id.Size-20:], fmt.Appendf(nil, "%016x", time.Now().UnixNano()))
	if err := errors.Join(os.Remove(x.bin), os.WriteFile(x.bin, b, 0o755)); err != nil {
		t.Fatal(err)
	}
}

// TestEngineIsTriedMeanwhile: no checkpoint waits until engine bpf was tried on this host. An
// attach has that done after its first, a daemon when it starts; a single checkpoint does
// not, and says who does. Nothing is left of a trial when they end.
func TestEngineIsTriedMeanwhile(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	explain := func(x *tool) (e struct{ Engine, Reason string }) {
		x.json(t, &e, "explain", itoa(v.PID()))
		return e
	}
	once := newTool(t)
	once.newBuild(t)
	for range 2 {
		if c := once.checkpoint(t, v.PID(), "--mode", "cow"); c.Engine != "uffd" || len(c.Retaken) > 0 {
			t.Errorf("untried: engine %s, retaken %q", c.Engine, c.Retaken)
		}
	}
	if e := explain(once); e.Engine != "uffd" || !strings.Contains(e.Reason, "ckagent doctor") {
		t.Errorf("untried: %+v", e)
	}

	x := newTool(t)
	x.newBuild(t)
	s := x.start(t, "attach", itoa(v.PID()), "--store", x.store, "--foreground", "--interval", "1h", "--mode", "cow", "--json")
	within(t, time.Minute, "the first checkpoint", func() bool { return len(x.ls(t)) > 0 })
	within(t, 2*time.Minute, "tried beside an attach", func() bool { return explain(x).Engine == "bpf" })
	var second checkpoint
	x.json(t, &second, "checkpoint", itoa(v.PID()))
	s.signal(unix.SIGINT)
	first, _, _ := strings.Cut(s.wait(t, 20*time.Second).out, "\n")
	if !strings.Contains(first, `"engine":"uffd"`) || second.Engine != "bpf" {
		t.Errorf("first %s\nsecond %+v", first, second)
	}

	h := newHost(t, "")
	h.x.newBuild(t)
	h.start(t)
	h.kill(t, unix.SIGKILL) // with a trial under way, as a rule
	h.x.wantNoProcess(t)
	h.start(t)
	within(t, 2*time.Minute, "tried by a daemon", func() bool { return explain(h.x).Engine == "bpf" })
	wantUntouched(t, v.PID())
}

// TestConsecutiveInTheKernel does the same with the engine that copies pages in the
// kernel, and restores the last.
func TestConsecutiveInTheKernel(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes many checkpoints")
	}
	for _, c := range []struct {
		name string
		cfg  vmtest.Config
	}{
		{"anonymous", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, SweepMS: 2000, VCPUs: 2}},
		{"memfd", vmtest.Config{MemoryMiB: 256, WSMiB: 128, Rate: 20000, SweepMS: 1000, Backend: vmtest.Memfd}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			v, ids := consecutive(t, x, c.cfg, course{engine: "bpf", n: max(3, rounds(t)/2), keep: 0})
			if err := v.Crash(); err != nil {
				t.Fatal(err)
			}
			r, m := x.restore(t, ids[len(ids)-1], v.SerialPath())
			x.wantDrained(t, r, m, true)
			m.Kill()
			removeLater(r)
		})
	}
}
