package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

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
		{"anonymous", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, VCPUs: 2}},
		{"memfd", vmtest.Config{MemoryMiB: 256, WSMiB: 128, Rate: 20000, Backend: vmtest.Memfd}},
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

// TestLoads takes many checkpoints by engine bpf of guests under loads, and of guests
// whose host is busy with their memory (CKAGENT_E2E_LOADS: how many of each; 0, the
// default, leaves it to the short tests of package faultserver).
func TestLoads(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("CKAGENT_E2E_LOADS"))
	if err != nil || n < 0 {
		n = 0
	}
	nothing := func(*testing.T, *vmtest.VM) func() { return func() {} }
	small := vmtest.Config{MemoryMiB: 256, WSMiB: 64, Rate: 20000}
	for _, c := range []struct {
		name    string
		cfg     vmtest.Config
		disturb func(t *testing.T, v *vmtest.VM) (end func())
	}{
		{"20,000 pages a second", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000}, nothing},
		{"20,000 pages a second, memfd, 2 vCPUs", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, VCPUs: 2, Backend: vmtest.Memfd}, nothing},
		{"100,000 pages a second", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 100000}, nothing},
		{"as fast as it can", vmtest.Config{MemoryMiB: 384, WSMiB: 192, Rate: vmtest.Unlimited, VCPUs: 2}, nothing},
		{"compaction", small, every(200*time.Millisecond, func() error { return os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0) })},
		{"same-page merging", small, merging},
		{"swap pressure", small, swapping},
	} {
		if n == 0 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			consecutive(t, x, c.cfg, course{engine: "bpf", n: n, keep: 2, disturb: c.disturb})
		})
	}
}

// every does something again and again.
func every(d time.Duration, do func() error) func(*testing.T, *vmtest.VM) func() {
	return func(t *testing.T, _ *vmtest.VM) func() {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			tick := time.NewTicker(d)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					if err := do(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
		return func() { close(stop); wg.Wait() }
	}
}

// merging switches same-page merging on; QEMU has asked for it for its guest's RAM.
func merging(t *testing.T, _ *vmtest.VM) func() {
	const run = "/sys/kernel/mm/ksm/run"
	before, err := os.ReadFile(run)
	if err == nil {
		err = os.WriteFile(run, []byte("1"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(run, before[:1], 0); err != nil {
			t.Error(err)
		}
	}
}

// swapping puts a sixteenth of the guest's RAM out to swap five times a second.
func swapping(t *testing.T, v *vmtest.VM) func() {
	path := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(path, make([]byte, 256<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/sbin/mkswap", path}, {"/sbin/swapon", path}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	hva, bytes, err := v.MainRAM()
	if err != nil {
		t.Fatal(err)
	}
	piece, at := bytes/16, uint64(0)
	end := every(200*time.Millisecond, func() error {
		at = (at + 5*piece) % bytes
		return vmtest.PageOut(v.PID(), hva+at, piece)
	})(t, v)
	return func() {
		end()
		if out, err := exec.Command("/sbin/swapoff", path).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %v: %s", err, out)
		}
	}
}
