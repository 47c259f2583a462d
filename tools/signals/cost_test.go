package signals

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/bpf/dirty"
	"github.com/ckagent/ckagent/tools/vmtest"
)

func take(ctx context.Context, pid int, vcpus []int) (*os.File, error) {
	f, _, err := inject.Userfaultfd(ctx, pid, inject.Options{VCPUs: vcpus})
	return f, err
}

// TestProgramCost asks the kernel how long each program runs, under a VM that gives
// all of them work.
func TestProgramCost(t *testing.T) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	x := newTap(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 128, WSMiB: 16, Rate: 4000, Append: x.guest + " GD_WORDS=32", Args: x.args})
	w := signals.NewWatcher(t.Context(), signals.WatchOptions{PIDs: []int{v.PID()}})
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := w.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	counter, err := dirty.Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer counter.Close()
	m, err := signals.OpenMemory(t.Context(), v.PID(), signals.MemoryOptions{Take: take, Counter: counter})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	stop := x.requests(t, 100)
	if _, err := m.MeasureExact(t.Context(), 2*time.Second, 250*time.Millisecond, nil); err != nil {
		t.Fatal(err)
	}
	stop()
	programs := w.Kernel().Programs()
	for name, p := range counter.Programs() {
		programs["dirty/"+name] = p
	}
	var names []string
	for name := range programs {
		names = append(names, name)
	}
	slices.Sort(names)
	// Of what this VM does; the others have nothing to do in it.
	busy := []string{"dirty/page_fault_user", "net/tcx/egress", "net/tcx/ingress", "vcpu/sched_switch", "vcpu/sched_wakeup", "disk/sys_exit"}
	for _, name := range names {
		s, err := programs[name].Stats()
		if err != nil {
			t.Fatal(err)
		}
		if s.RunCount == 0 {
			t.Logf("%-26s never ran", name)
			if slices.Contains(busy, name) {
				t.Errorf("%s never ran", name)
			}
			continue
		}
		ns := s.Runtime.Nanoseconds() / int64(s.RunCount)
		t.Logf("%-26s %7d runs, %5d ns each", name, s.RunCount, ns)
		// An order of magnitude above what is usual: interrupts are counted along.
		if s.RunCount > 1000 && ns > 5000 {
			t.Errorf("%s takes %d ns", name, ns)
		}
	}
}

// BenchmarkGuestWork compares what a guest gets done per second of processor time
// with and without ckagent watching it, in turns, and says how much of a processor
// ckagent itself took: go test -run - -bench GuestWork -benchtime 15x.
func BenchmarkGuestWork(b *testing.B) {
	for _, c := range []struct {
		name string
		args []string
	}{
		{"vcpu-disk-net", []string{"top", "--dirty-every", "0", "--interval", "1s"}},
		{"top-with-sampling", []string{"top", "--dirty-every", "10s", "--interval", "1s"}},
		{"sampled-continuously", []string{"dirty-rate", "--method", "sampled", "--for", "1h", "--interval", "1s"}},
		{"exact", []string{"dirty-rate", "--for", "1h", "--interval", "1s"}},
	} {
		b.Run(c.name, func(b *testing.B) {
			v := vmtest.Start(b, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 128, WSMiB: 32, Rate: 20000, Append: "sweep=1 words=16"})
			var lost []float64
			var own, wall time.Duration
			for b.Loop() {
				without := workPerCPU(b, v)
				w := exec.Command(binary, append([]string{c.args[0], pidOf(v.PID())}, c.args[1:]...)...)
				if err := w.Start(); err != nil {
					b.Fatal(err)
				}
				begin := time.Now()
				with := workPerCPU(b, v)
				_ = w.Process.Signal(unix.SIGINT)
				_ = w.Wait() // its end was asked for
				wall += time.Since(begin)
				own += w.ProcessState.UserTime() + w.ProcessState.SystemTime()
				lost = append(lost, 100*(1-with/without))
			}
			slices.Sort(lost)
			b.ReportMetric(lost[len(lost)/2], "%lost")
			b.ReportMetric(100*own.Seconds()/wall.Seconds(), "%CPU")
			b.ReportMetric(0, "ns/op")
		})
	}
}

var lapsLine = regexp.MustCompile(`^GAP .* laps=(\d+) `)

// workPerCPU is how many turns of its loop, which never sleeps, the mini guest does
// per second of processor time over five of its reports. A host that gives it less
// time does not show.
func workPerCPU(t testing.TB, v *vmtest.VM) float64 {
	t.Helper()
	look := func() (laps uint64, cpu float64) {
		line, err := v.AwaitSerialFrom(t.Context(), v.SerialSize(), "^GAP ")
		if err != nil {
			t.Fatal(err)
		}
		m := lapsLine.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no turns in %q", line)
		}
		if laps, err = strconv.ParseUint(m[1], 10, 64); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile("/proc/" + pidOf(v.PID()) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, s := range f[11:13] { // utime, stime
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			cpu += float64(n) / 100
		}
		return laps, cpu
	}
	l0, c0 := look()
	var l1 uint64
	var c1 float64
	for range 5 {
		l1, c1 = look()
	}
	return float64(l1-l0) / (c1 - c0)
}
