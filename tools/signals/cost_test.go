package signals

import (
	"context"
	"errors"
	"io"
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
	"github.com/ckagent/ckagent/bpf/disk"
	"github.com/ckagent/ckagent/bpf/vcpu"
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

// watching is a way to watch a VM; start begins it and returns what ends it, and the
// process that does it, 0 if it is a program in the kernel alone.
type watching struct {
	name  string
	start func(b *testing.B, v *vmtest.VM) (pid int, stop func())
}

// verb is ckagent as a user runs it.
func verb(name string, args ...string) watching {
	return watching{name, func(b *testing.B, v *vmtest.VM) (int, func()) {
		w := exec.Command(binary, append([]string{args[0], pidOf(v.PID())}, args[1:]...)...)
		if err := w.Start(); err != nil {
			b.Fatal(err)
		}
		return w.Process.Pid, func() {
			_ = w.Process.Signal(unix.SIGINT)
			_ = w.Wait() // its end was asked for
		}
	}}
}

// program is one object alone, attached as top would.
func program(name string, attach func(v *vmtest.VM) (io.Closer, error)) watching {
	return watching{name, func(b *testing.B, v *vmtest.VM) (int, func()) {
		c, err := attach(v)
		if err != nil {
			b.Fatalf("%+v", err)
		}
		return 0, func() {
			if err := c.Close(); err != nil {
				b.Error(err)
			}
		}
	}}
}

// BenchmarkGuestWork compares what a guest gets done per second of processor time
// with and without it being watched, in turns, and says how much of a processor
// ckagent itself takes: go test -run - -bench GuestWork -benchtime 15x. quartiles are
// those of the losses of the single turns: how far the median may be trusted. On a host
// whose processors are threads of one core they are several per cent; %kernel is what
// no such noise reaches, the time that all programs in the kernel ran for, by its own
// count, of a processor's.
func BenchmarkGuestWork(b *testing.B) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	mini := vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 128, WSMiB: 32, Rate: 20000, Append: "sweep=1 words=16"}
	for _, c := range []watching{
		program("vcpu", func(v *vmtest.VM) (io.Closer, error) {
			m, err := vcpu.Load()
			if err != nil {
				return nil, err
			}
			_, err = m.Attach(v.PID(), vcpuThreads(b, v), false)
			return m, err
		}),
		program("disk", func(v *vmtest.VM) (io.Closer, error) {
			m, err := disk.Load()
			if err != nil {
				return nil, err
			}
			return m, m.Attach(v.PID())
		}),
		program("dirty", func(*vmtest.VM) (io.Closer, error) { return dirty.Load() }),
		verb("vcpu-disk-net", "top", "--dirty-every", "0", "--interval", "1s"),
		verb("top-with-sampling", "top", "--dirty-every", "10s", "--interval", "1s"),
		verb("sampled-continuously", "dirty-rate", "--method", "sampled", "--for", "1h", "--interval", "1s"),
		verb("exact", "dirty-rate", "--for", "1h", "--interval", "1s"),
	} {
		b.Run(c.name, func(b *testing.B) { c.compare(b, vmtest.Start(b, mini)) })
	}
	// The mini guest has neither network nor disk: one that answers 200 requests a
	// second over a tap.
	b.Run("top-with-sampling-of-a-server", func(b *testing.B) {
		x := newTap(b)
		v := vmtest.Start(b, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 128, WSMiB: 16, Rate: 4000, Append: x.guest + " GD_WORDS=32 GD_SPIN=0", Args: x.args})
		stop := x.requests(b, 200)
		verb("", "top", "--dirty-every", "10s", "--interval", "1s").compare(b, v)
		if stop() == 0 {
			b.Error("no answers")
		}
	})
}

func (c watching) compare(b *testing.B, v *vmtest.VM) {
	var lost []float64
	var own, kernel, wall float64
	for b.Loop() {
		without := workPerCPU(b, v)
		pid, stop := c.start(b, v)
		// Its start, which takes a second of loading, is not what it costs to watch.
		awaitReport(b, v)
		awaitReport(b, v)
		begin, used, ran := time.Now(), processorTime(b, pid), programTime(b)
		with := workPerCPU(b, v)
		own, wall = own+processorTime(b, pid)-used, wall+time.Since(begin).Seconds()
		kernel += (programTime(b) - ran).Seconds()
		stop()
		lost = append(lost, 100*(1-with/without))
	}
	slices.Sort(lost)
	n := len(lost)
	b.ReportMetric(lost[n/2], "%lost")
	b.ReportMetric((lost[n*3/4]-lost[n/4])/2, "quartiles")
	b.ReportMetric(100*own/wall, "%CPU")
	b.ReportMetric(100*kernel/wall, "%kernel")
	b.ReportMetric(0, "ns/op")
}

// programTime is how long all programs that are loaded have run so far.
func programTime(b *testing.B) (sum time.Duration) {
	b.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return sum
		}
		if err != nil {
			b.Fatal(err)
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // gone since
		}
		if err != nil {
			b.Fatal(err)
		}
		s, err := p.Stats()
		if err := errors.Join(err, p.Close()); err != nil {
			b.Fatal(err)
		}
		sum += s.Runtime
	}
}

// vcpuThreads are the threads QEMU names as vCPUs.
func vcpuThreads(t testing.TB, v *vmtest.VM) (tids []int) {
	t.Helper()
	m, err := vmtest.DialMonitor(t.Context(), v.QMPPath())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var cpus []struct {
		TID int `json:"thread-id"`
	}
	if err := m.Execute(t.Context(), "query-cpus-fast", nil, &cpus); err != nil {
		t.Fatal(err)
	}
	for _, c := range cpus {
		tids = append(tids, c.TID)
	}
	return tids
}

// awaitReport is the guest's next report of its loop.
func awaitReport(t testing.TB, v *vmtest.VM) string {
	t.Helper()
	line, err := v.AwaitSerialFrom(t.Context(), v.SerialSize(), "^GAP ")
	if err != nil {
		t.Fatal(err)
	}
	return line
}

var lapsLine = regexp.MustCompile(`^GAP .* laps=(\d+) `)

// workPerCPU is how many turns of its loop, which never sleeps, the guest does per
// second of processor time over five of its reports. A host that gives it less
// time does not show.
func workPerCPU(t testing.TB, v *vmtest.VM) float64 {
	t.Helper()
	look := func() (laps uint64, cpu float64) {
		line := awaitReport(t, v)
		m := lapsLine.FindStringSubmatch(line)
		var err error
		if m == nil {
			t.Fatalf("no turns in %q", line)
		}
		if laps, err = strconv.ParseUint(m[1], 10, 64); err != nil {
			t.Fatal(err)
		}
		cpu = processorTime(t, v.PID())
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

// processorTime is what a process has used so far, in seconds; of none it is 0.
func processorTime(t testing.TB, pid int) (seconds float64) {
	t.Helper()
	if pid == 0 {
		return 0
	}
	b, err := os.ReadFile("/proc/" + pidOf(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	for _, s := range f[11:13] { // utime, stime
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seconds += float64(n) / 100
	}
	return seconds
}
