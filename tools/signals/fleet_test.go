package signals

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// fleet is a number of small guests of the same known load, of which some are killed
// and others started in their place.
type fleet struct {
	t    *testing.T
	load known
	vms  []*vmtest.VM
	dead []int // pids of those killed
}

func startFleet(t *testing.T, n int, k known) *fleet {
	f := &fleet{t: t, load: k}
	for range n {
		f.vms = append(f.vms, k.start(t))
	}
	return f
}

// replace kills one at random and starts another, whose pid is returned.
func (f *fleet) replace() int {
	f.t.Helper()
	i := rand.IntN(len(f.vms))
	v := f.vms[i]
	f.dead = append(f.dead, v.PID())
	if err := v.Signal(unix.SIGKILL); err != nil {
		f.t.Fatal(err)
	}
	<-v.Done()
	v.Kill()
	f.vms[i] = f.load.start(f.t)
	return f.vms[i].PID()
}

// sees reports whether a look shows all of the fleet.
func (f *fleet) sees(l look) bool {
	seen := 0
	for _, v := range l.VMs {
		if slices.ContainsFunc(f.vms, func(m *vmtest.VM) bool { return m.PID() == v.PID }) {
			seen++
		}
	}
	return seen == len(f.vms) && len(l.VMs) == seen
}

// judge compares the next windows of every VM with what that VM wrote meanwhile, and
// returns how many are off.
func (f *fleet) judge(w *watch, windows int) (off int) {
	f.t.Helper()
	type sum struct {
		n            int
		last         uint64
		got, squares float64
		wrote        uint64
		begin        time.Time
		interval     float64
	}
	sums := map[int]*sum{}
	for _, v := range f.vms {
		sums[v.PID()] = &sum{wrote: v.WaitProgress(f.t, 1).Writes, begin: time.Now()}
	}
	first := w.fresh()
	for _, v := range first.VMs {
		if s := sums[v.PID]; s != nil && v.Dirty != nil {
			s.last = v.Dirty.Windows
		}
	}
	// Twenty guests that never sleep share the host with what watches them.
	eventuallyIn(f.t, 2*time.Minute, "every VM has windows of its own", func() bool {
		enough := 0
		for _, v := range w.next().VMs {
			s := sums[v.PID]
			if s == nil {
				continue
			}
			if v.Dirty != nil && v.Dirty.Windows > s.last {
				s.last = v.Dirty.Windows
				s.n++
				s.got += v.Dirty.Rate
				s.squares += v.Dirty.Error * v.Dirty.Error
				s.interval += float64(v.Dirty.Interval) / 1e9
			}
			if s.n >= windows {
				enough++
			}
		}
		return enough == len(sums)
	})
	for _, v := range f.vms {
		s := sums[v.PID()]
		end := v.WaitProgress(f.t, 1)
		rate := float64(end.Writes-s.wrote) / time.Since(s.begin).Seconds()
		n := float64(s.n)
		got, bar := s.got/n, math.Sqrt(s.squares)/n
		want := f.load.expected(rate, s.interval/n) * n / s.interval
		// Twice the bar, as for other tests, and what the known rate itself is good
		// for while many guests share the processors.
		if math.Abs(got-want) > 2*bar+0.1*want {
			off++
			f.t.Logf("pid %d: %.0f +- %.0f pages/s in %d windows, known %.0f", v.PID(), got, bar, s.n, want)
		}
	}
	return off
}

// usage is what a process holds.
type usage struct{ kib, fds int }

func usageOf(t testing.TB, pid int) (u usage) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			u.kib, _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.fds = len(list)
	return u
}

// held are the ids of BPF objects that a process holds: programs, maps and links, by
// what its descriptors say of themselves.
func held(t testing.TB, pid int) (ids map[string][]int) {
	t.Helper()
	ids = map[string][]int{}
	list, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // closed just now
		}
		for line := range strings.Lines(string(b)) {
			kind, rest, _ := strings.Cut(line, ":")
			if kind != "prog_id" && kind != "map_id" && kind != "link_id" {
				continue
			}
			if n, err := strconv.Atoi(strings.TrimSpace(rest)); err == nil && !slices.Contains(ids[kind], n) {
				ids[kind] = append(ids[kind], n)
			}
		}
	}
	return ids
}

// deadKeys counts the entries of a process's BPF maps that are about processes which
// have ended: of those maps whose keys are process ids.
func deadKeys(t testing.TB, maps []int, dead []int) (found int) {
	t.Helper()
	for _, id := range maps {
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if m.Type() == ebpf.Hash && m.KeySize() == 4 {
			for _, pid := range dead {
				if v, err := m.LookupBytes(uint32(pid)); err == nil && v != nil {
					info, _ := m.Info()
					t.Logf("map %v still knows pid %d", info, pid)
					found++
				}
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	return found
}

// TestManyVMs: small guests are started and killed at random while one ckagent
// watches them all. Nothing leaks, and the figures of those that live are right.
func TestManyVMs(t *testing.T) {
	const windows = 2
	n, d := 4, 3*time.Second
	if campaign {
		n, d = 20, 5*time.Minute
		if asked, err := time.ParseDuration(os.Getenv("CKAGENT_SIGNALS_CAMPAIGN")); err == nil {
			d = asked
		}
	}
	f := startFleet(t, n, known{4, 400, "random"})
	// Only ours: others may run tests on this host.
	w := startTop(t, "--match", fmt.Sprintf("vmtest-%d-*", os.Getpid()), "--dirty-every", "1s", "--interval", "200ms", "--max-share", "0.9")
	top := w.cmd.Process.Pid
	eventuallyIn(t, time.Minute, "all are seen", func() bool { return f.sees(w.next()) })
	objects := held(t, top)
	var begin usage
	for started := time.Now(); time.Since(started) < d || len(f.dead) < 4; {
		pid := f.replace()
		eventuallyIn(t, time.Minute, "the new one is seen and the old one is not", func() bool {
			l := w.next()
			return f.sees(l) && slices.ContainsFunc(l.VMs, func(v vmOf) bool { return v.PID == pid })
		})
		if len(f.dead) == min(n, 10) {
			begin = usageOf(t, top)
		}
	}
	if off := f.judge(w, windows); off > n/10 {
		t.Errorf("the rates of %d of %d VMs are off", off, n)
	}
	for _, v := range f.vms {
		v.Invariants()
	}
	end, now := usageOf(t, top), held(t, top)
	t.Logf("%d killed and started; %d -> %d descriptors, %d -> %d KiB; BPF: %d programs, %d maps, %d links, then %d, %d, %d",
		len(f.dead), begin.fds, end.fds, begin.kib, end.kib, len(objects["prog_id"]), len(objects["map_id"]), len(objects["link_id"]),
		len(now["prog_id"]), len(now["map_id"]), len(now["link_id"]))
	for _, kind := range []string{"prog_id", "map_id", "link_id"} {
		if len(objects[kind]) == 0 || len(now[kind]) != len(objects[kind]) {
			t.Errorf("%s: %d at the beginning, %d at the end", kind, len(objects[kind]), len(now[kind]))
		}
	}
	if left := deadKeys(t, now["map_id"], f.dead); left > 0 {
		t.Errorf("%d entries of VMs that have ended", left)
	}
	// Of each VM its process is held, and its end waited for once it was sampled;
	// sampling opens some more for a moment.
	if end.fds > begin.fds+n+4*min(n, 8) {
		t.Errorf("descriptors grew from %d to %d", begin.fds, end.fds)
	}
	if end.kib > begin.kib+16<<10 {
		t.Errorf("memory grew from %d to %d KiB", begin.kib, end.kib)
	}
	if err := w.cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	for w.lines.Scan() {
	}
	if err := w.cmd.Wait(); err != nil {
		t.Errorf("interrupted: %v %s", err, w.err.String())
	}
	for _, v := range f.vms {
		noTrace(t, v)
	}
}

// TestTopKilled: nothing of a ckagent that is killed stays in the kernel, at the tap
// or in QEMU.
func TestTopKilled(t *testing.T) {
	x := newTap(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 128, WSMiB: 16, Rate: 2000, Append: x.guest, Args: x.args})
	w := startTop(t, pidOf(v.PID()), "--dirty-every", "1s", "--interval", "100ms")
	eventually(t, "a window is running", func() bool { return w.next().VMs[0].State == "measuring" })
	objects := held(t, w.cmd.Process.Pid)
	if len(objects["prog_id"]) < 5 || len(objects["link_id"]) < 5 {
		t.Errorf("only %v are held", objects)
	}
	if err := w.cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = w.cmd.Wait() // killed
	eventually(t, "the kernel has dropped its programs", func() bool {
		for _, id := range objects["prog_id"] {
			p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
			if err == nil {
				p.Close()
				return false
			}
		}
		return true
	})
	eventually(t, "and its links", func() bool {
		for _, id := range objects["link_id"] {
			l, err := link.NewFromID(link.ID(id))
			if err == nil {
				l.Close()
				return false
			}
		}
		return true
	})
	eventually(t, "and its maps", func() bool {
		for _, id := range objects["map_id"] {
			m, err := ebpf.NewMapFromID(ebpf.MapID(id))
			if err == nil {
				m.Close()
				return false
			}
		}
		return true
	})
	eventually(t, "QEMU's memory is free", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", v.PID()))
		return err == nil && !strings.Contains(string(b), " uw ")
	})
	noTrace(t, v)
	v.WaitProgress(t, 500)
	v.Invariants()
}
