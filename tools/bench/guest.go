package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// writesPerSecond is how fast the guests write random pages.
const writesPerSecond = 24_000

// recordsPerSecond is how many records a guest with a disk writes to it, each fsynced.
const recordsPerSecond = 100

// guestSpec says what guest to measure on.
type guestSpec struct {
	memoryMiB, usedMiB int
	devices            int  // virtio devices
	small              bool // RAM in 4 KiB pages instead of transparent huge ones
	idle               bool // writes little
	fast               bool // writes as fast as it can
	disk               bool // a qcow2 disk that it writes and fsyncs records to
}

func (s guestSpec) String() string {
	pages := "huge pages"
	if s.small {
		pages = "4 KiB pages"
	}
	text := fmt.Sprintf("%s RAM, %s used, %s, %d virtio devices", mib(s.memoryMiB), mib(s.usedMiB), pages, s.devices)
	if s.disk {
		text += " and a qcow2 disk"
	}
	return text
}

func mib(n int) string {
	if n%1024 == 0 {
		return strconv.Itoa(n>>10) + " GiB"
	}
	return strconv.Itoa(n) + " MiB"
}

// guest is a running machine and everything that observes it.
type guest struct {
	*vmtest.VM
	spec    guestSpec
	q       *qmp.Client
	events  *qmp.Subscription
	work    *workLog
	vcpus   []int // thread ids
	paused  bool
	huge    uint64 // bytes in huge pages when it was young
	ramHVA  uint64
	ramSize uint64
}

// launch boots a guest and checks that it is what the spec says.
func launch(ctx context.Context, s guestSpec) (_ *guest, err error) {
	if err := enoughMemory(uint64(s.memoryMiB) << 20); err != nil {
		return nil, err
	}
	cfg := vmtest.Config{MemoryMiB: s.memoryMiB, WSMiB: s.usedMiB, Rate: writesPerSecond,
		VirtioDevices: s.devices, Control: true, BeatUS: 250,
		// Few words of a page and a slow sweep: the rate is what counts here, and
		// an emulated processor has to reach it with time to spare.
		Append: fmt.Sprintf("GD_WORDS=64 GD_SWEEP=2000 GD_REPORT=%d", reportEvery.Milliseconds())}
	if s.idle {
		cfg.Rate, cfg.BeatUS = 400, 0
	}
	if s.fast {
		cfg.Rate = vmtest.Unlimited
	}
	if s.disk {
		cfg.Disks = []vmtest.Disk{{FS: "ext4", Format: "qcow2"}}
		cfg.Append += fmt.Sprintf(" GD_LOG=%d", recordsPerSecond)
	}
	g := &guest{spec: s}
	boot, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := withHugePages(!s.small, func() (err error) { g.VM, err = vmtest.Launch(boot, cfg); return err }); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if err := g.observe(ctx); err != nil {
		return nil, err
	}
	huge, err := g.hugeBytes()
	if err != nil {
		return nil, err
	}
	g.huge = huge
	used := uint64(s.usedMiB) << 20
	if s.small && huge > 0 || !s.small && !s.idle && huge < used/2 {
		return nil, problem.New(problem.Failed, "bench", s.String(), "%d MiB of it are huge pages", huge>>20).
			WithHint("transparent huge pages must be at \"madvise\" or \"always\" on this host")
	}
	return g, nil
}

// observe connects the monitor and starts following the console.
func (g *guest) observe(ctx context.Context) error {
	ep, err := qmp.ParseEndpoint("unix:" + g.ControlPath())
	if err != nil {
		return err
	}
	if g.q, err = qmp.Dial(ctx, ep); err != nil {
		return err
	}
	g.events = g.q.Subscribe(1024, "STOP", "RESUME", "MIGRATION")
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := g.q.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return err
	}
	for _, c := range cpus {
		g.vcpus = append(g.vcpus, c.Thread)
	}
	if g.ramHVA, g.ramSize, err = g.MainRAM(); err != nil {
		return err
	}
	g.work = followWork(g.SerialPath())
	return nil
}

func (g *guest) close() {
	if g.work != nil {
		g.work.close()
	}
	if g.q != nil {
		_ = g.q.Close() // QEMU is about to be killed
	}
	g.Kill()
}

// stop and run keep a guest out of the way while another one is measured.
func (g *guest) stop(ctx context.Context) error {
	if g.paused {
		return nil
	}
	g.paused = true
	return g.q.Execute(ctx, "stop", nil, nil)
}

func (g *guest) run(ctx context.Context) error {
	if !g.paused {
		return nil
	}
	g.paused = false
	return g.q.Execute(ctx, "cont", nil, nil)
}

// hugeBytes is how much of the guest's RAM is in transparent huge pages.
func (g *guest) hugeBytes() (uint64, error) {
	maps, err := vmtest.Mappings(g.PID())
	if err != nil {
		return 0, err
	}
	var kib uint64
	for _, m := range maps {
		if m.Start >= g.ramHVA && m.End <= g.ramHVA+g.ramSize {
			kib += m.HugeKiB
		}
	}
	return kib << 10, nil
}

// hostCPU is the processor time QEMU has used outside its vCPU threads, those of
// threads that have ended included.
func (g *guest) hostCPU() (time.Duration, error) {
	const scheduled = 2 // CPUCLOCK_SCHED of a process: (~pid << 3) | 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^g.PID()<<3|scheduled), &ts); err != nil {
		return 0, fmt.Errorf("processor time of pid %d: %w", g.PID(), err)
	}
	all := time.Duration(ts.Nano())
	for _, tid := range g.vcpus {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", g.PID(), tid))
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(strings.Fields(string(b) + " ")[0], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("schedstat of thread %d: %w", tid, err)
		}
		all -= time.Duration(ns)
	}
	return all, nil
}

// withHugePages calls start with transparent huge pages allowed or not for this
// process; a program started meanwhile inherits that for good (it is a property of
// the address space that exec keeps).
func withHugePages(allow bool, start func() error) (err error) {
	if allow {
		return start()
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("switch transparent huge pages off: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)) }()
	return start()
}

// enoughMemory refuses to start what would make the host swap or kill.
func enoughMemory(need uint64) error {
	available, err := procstat.AvailableMemory()
	if err != nil {
		return err
	}
	if available < need+need/8 {
		return problem.New(problem.Refused, "bench", "", "%d MiB of memory are needed, %d are available", need>>20, available>>20).
			WithHint("leave the part out with -only")
	}
	return nil
}
