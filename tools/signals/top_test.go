package signals

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// look is one line of ckagent top --json (the part the tests look at).
type look struct {
	Schema  string                             `json:"schema"`
	Time    time.Time                          `json:"time"`
	VMs     []vmOf                             `json:"vms"`
	Missing []struct{ Program, Reason string } `json:"missing"`
}

// vmOf is what a look says of one VM.
type vmOf struct {
	PID   int    `json:"pid"`
	VM    string `json:"vm"`
	State string `json:"checkpoint_state"`
	Dirty *struct {
		Rate     float64 `json:"dirty_pages_per_second"`
		Error    float64 `json:"error_pages_per_second"`
		Interval int64   `json:"interval_ns"`
		Windows  uint64  `json:"windows_total"`
	} `json:"dirty"`
	DirtyNote string `json:"dirty_note"`
	VCPU      struct {
		Each []struct {
			Run  int64 `json:"run_total_ns"`
			Wait int64 `json:"wait_total_ns"`
		} `json:"each"`
		Slots uint64 `json:"idle_slots_total"`
		Idle  int64  `json:"idle_total_ns"`
	} `json:"vcpu"`
	Network []struct {
		Device   string `json:"device"`
		In       uint64 `json:"in_bytes_total"`
		Out      uint64 `json:"out_bytes_total"`
		Requests uint64 `json:"requests_total"`
		Answers  uint64 `json:"answers_total"`
		Slots    uint64 `json:"idle_slots_total"`
		False    uint64 `json:"false_idle_slots_total"`
		Idle     int64  `json:"idle_total_ns"`
		Estimate bool   `json:"estimate"`
	} `json:"network"`
	Disk struct {
		Bytes  uint64 `json:"written_bytes_total"`
		Writes uint64 `json:"writes_total"`
	} `json:"disk"`
}

// watch is a ckagent top that runs; lines are its looks.
type watch struct {
	t     testing.TB
	cmd   *exec.Cmd
	lines *bufio.Scanner
	err   bytes.Buffer
}

func startTop(t testing.TB, args ...string) *watch {
	t.Helper()
	w := &watch{t: t, cmd: exec.Command(binary, append([]string{"top", "--json"}, args...)...)}
	w.cmd.Stderr = &w.err
	out, err := w.cmd.StdoutPipe()
	if err == nil {
		err = w.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.lines = bufio.NewScanner(out)
	w.lines.Buffer(nil, 1<<22)
	t.Cleanup(func() {
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait() // ended by us, or by itself
	})
	return w
}

func (w *watch) next() (l look) {
	w.t.Helper()
	if !w.lines.Scan() {
		w.t.Fatalf("top ended: %v %s", w.lines.Err(), w.err.String())
	}
	if err := json.Unmarshal(w.lines.Bytes(), &l); err != nil {
		w.t.Fatal(err)
	}
	if l.Schema != "ckagent.top/1" {
		w.t.Fatalf("schema %q", l.Schema)
	}
	return l
}

// fresh returns a look taken from now on: older ones may wait in the pipe.
func (w *watch) fresh() (l look) {
	w.t.Helper()
	for now := time.Now(); l.Time.Before(now); {
		l = w.next()
	}
	return l
}

// TestVCPUDuty: a guest whose CPUs are busy for a known share of the time. Run and
// wait times are what the scheduler itself accounted to the threads; where the host
// let them run whenever they wanted, they are the guest's duty as well.
func TestVCPUDuty(t *testing.T) {
	duties := []int{20, 80}
	cpus, d := []int{2}, 2*time.Second
	if campaign {
		duties, cpus, d = []int{20, 50, 80}, []int{1, 2}, 10*time.Second
	}
	for _, n := range cpus {
		for _, duty := range duties {
			t.Run(fmt.Sprintf("%d vCPUs, %d %%", n, duty), func(t *testing.T) {
				v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 128, VCPUs: n, Append: fmt.Sprintf("GD_DUTY=%d GD_TICK=1000", duty)})
				w := startTop(t, pidOf(v.PID()), "--dirty-every", "0", "--interval", "100ms")
				w.next()
				a := w.fresh()
				before := accounted(t, v)
				b := a
				for b.Time.Sub(a.Time) < d {
					b = w.fresh()
				}
				after := accounted(t, v)
				wall := float64(b.Time.Sub(a.Time))
				x, y := a.VMs[0].VCPU, b.VMs[0].VCPU
				if len(y.Each) != n || len(after) != n {
					t.Fatalf("%d vCPUs, %d threads", len(y.Each), len(after))
				}
				var run, wait, wantRun, wantWait float64
				for i := range y.Each {
					run += 100 * float64(y.Each[i].Run-x.Each[i].Run) / wall / float64(n)
					wait += 100 * float64(y.Each[i].Wait-x.Each[i].Wait) / wall / float64(n)
					wantRun += 100 * (after[i][0] - before[i][0]) / wall / float64(n)
					wantWait += 100 * (after[i][1] - before[i][1]) / wall / float64(n)
				}
				slots, idle := y.Slots-x.Slots, 100*float64(y.Idle-x.Idle)/wall
				t.Logf("running %.1f %% (scheduler: %.1f), waiting %.1f %% (%.1f); all idle %.1f %% of the time in %d slots", run, wantRun, wait, wantWait, idle, slots)
				// The two were not read at the same moment: a look is up to 0.1 s old.
				slack := 2 + 100*100e6/wall
				if math.Abs(run-wantRun) > slack || math.Abs(wait-wantWait) > slack {
					t.Errorf("running %.1f %%, waiting %.1f %%; the scheduler says %.1f and %.1f", run, wait, wantRun, wantWait)
				}
				if slots == 0 || idle > 101-run {
					t.Errorf("%d slots, all idle %.1f %% of the time", slots, idle)
				}
				// The guest's kernel adds its own: ticks, wakeups and the reports.
				if want := float64(duty); wait < 2 && (run < want-2 || run > want+5) {
					t.Errorf("running %.1f %%, known %d %%", run, duty)
				}
			})
		}
	}
}

// accounted is what the scheduler says of the vCPU threads: run and wait in ns.
func accounted(t testing.TB, v *vmtest.VM) (out [][2]float64) {
	t.Helper()
	for _, tid := range vcpuThreads(t, v) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", v.PID(), tid))
		if err != nil {
			t.Fatal(err)
		}
		var x [2]float64
		if _, err := fmt.Sscan(string(b), &x[0], &x[1]); err != nil {
			t.Fatal(err)
		}
		out = append(out, x)
	}
	return out
}

// TestTapAndDisk: requests over a tap and writes to a disk, each counted to the last.
func TestTapAndDisk(t *testing.T) {
	x := newTap(t)
	image := filepath.Join(t.TempDir(), "disk.raw")
	for _, c := range [][]string{{"qemu-img", "create", "-q", "-f", "raw", image, "64M"}, {"mkfs.ext4", "-q", "-F", image}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 128, Append: x.guest + " GD_DISK=vda GD_FILES=disk",
		Args: append(x.args, "-drive", "if=virtio,format=raw,cache=none,aio=native,file="+image)})
	w := startTop(t, pidOf(v.PID()), "--dirty-every", "0", "--interval", "100ms", "--gap", "2ms")
	first := w.next()
	if len(first.Missing) > 0 {
		t.Errorf("missing: %+v", first.Missing)
	}
	begin := w.fresh().VMs[0]
	want := x.requests(t, 40)
	time.Sleep(1500 * time.Millisecond)
	answers := want()
	var end look
	eventually(t, "every answer is counted", func() bool {
		end = w.next()
		n := end.VMs[0].Network
		return len(n) == 1 && n[0].Answers-begin.Network[0].Answers >= uint64(answers)
	})
	a, b := begin.Network[0], end.VMs[0].Network[0]
	t.Logf("%d answers; %+v", answers, b)
	if b.Device != x.name || b.Estimate || b.Answers-a.Answers != uint64(answers) || b.Requests-a.Requests > uint64(answers)+1 {
		t.Errorf("%d answers were received: %+v", answers, b)
	}
	if slots := b.Slots - a.Slots; slots < uint64(answers)/2 {
		t.Errorf("%d idle slots between %d requests 25 ms apart", slots, answers)
	}
	// The disk, by QEMU's own count.
	m, err := vmtest.DialMonitor(t.Context(), v.QMPPath())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	stats := func() (bytes, ops uint64) {
		var out []struct {
			Stats struct {
				Bytes uint64 `json:"wr_bytes"`
				Ops   uint64 `json:"wr_operations"`
			} `json:"stats"`
		}
		if err := m.Execute(t.Context(), "query-blockstats", nil, &out); err != nil {
			t.Fatal(err)
		}
		for _, s := range out {
			bytes, ops = bytes+s.Stats.Bytes, ops+s.Stats.Ops
		}
		return bytes, ops
	}
	// Both counts go on: ours lies between two of QEMU's.
	b0, _ := stats()
	d0 := w.fresh().VMs[0].Disk.Bytes
	b1, _ := stats()
	time.Sleep(time.Second)
	b2, _ := stats()
	d1 := w.fresh().VMs[0].Disk.Bytes
	b3, _ := stats()
	t.Logf("disk: %d bytes written, QEMU says %d to %d", d1-d0, b2-b1, b3-b0)
	if d1-d0 == 0 || d1-d0 < b2-b1 || d1-d0 > b3-b0 {
		t.Errorf("%d bytes written, QEMU says %d to %d", d1-d0, b2-b1, b3-b0)
	}
	v.Invariants()
}

// TestTopUsage: what makes no sense is refused.
func TestTopUsage(t *testing.T) {
	for _, args := range [][]string{{"--interval", "1ms"}, {"--gap", "0"}, {"--metrics", "0.0.0.0:9464"}, {"--max-share", "2"}, {"--qmp", "unix:/x"}, {"x"}, {"--match", "[", "--count", "1"}, {"--match", "x", "1"}} {
		if code := run(t, nil, append([]string{"top", "--count", "1"}, args...)...); code != 2 {
			t.Errorf("%v: exit code %d", args, code)
		}
	}
	if code := run(t, nil, "top", pidOf(os.Getpid())); code != 3 {
		t.Errorf("a process that is no QEMU: exit code %d", code)
	}
	if code := run(t, nil, "top", "1000000000"); code != 6 {
		t.Errorf("no process: exit code %d", code)
	}
}
