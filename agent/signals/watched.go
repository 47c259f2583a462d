package signals

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	stdnet "net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/bpf/disk"
	"github.com/ckagent/ckagent/bpf/net"
	"github.com/ckagent/ckagent/bpf/vcpu"
)

// watched is one VM and everything attached to it.
type watched struct {
	process *vm.Process
	name    string
	tids    []int
	notes   []string
	cpus    *vcpu.Machine // nil without the program
	taps    map[string]int
	sockets bool
	disks   bool

	prev   Sample
	prevAt time.Time
	begin  time.Time
	base   []schedTimes // of the threads, without the program
	io     uint64       // write_bytes at the beginning, without the program

	busy  sync.Mutex // held while memory is sampled; guards gone; taken before Watcher.mu
	gone  bool       // let go of: nothing may be begun any more
	dirty dirtyState
}

// attach takes hold of a VM. Its monitor is borrowed once, for its name and its
// vCPUs; if it is in use the threads' names have to do.
func attach(ctx context.Context, pid int, o WatchOptions, k *Kernel) (v *watched, err error) {
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	v = &watched{process: p, begin: time.Now(), taps: map[string]int{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close(k))
			v = nil
		}
	}()
	v.identify(ctx, o)
	if k.VCPU != nil && len(v.tids) > 0 {
		if v.cpus, err = k.VCPU.Attach(pid, v.tids, false); err != nil {
			return v, err
		}
	}
	for _, tid := range v.tids {
		v.base = append(v.base, readSched(pid, tid))
	}
	if k.Disk != nil {
		if err = k.Disk.Attach(pid); err != nil {
			return v, err
		}
		v.disks = true
	}
	v.io = writeBytes(pid)
	v.attachTaps(o, k)
	if len(v.taps) == 0 && k.Sock != nil {
		if err = k.Sock.Attach(pid, o.Gap); err != nil {
			return v, err
		}
		v.sockets = true
	}
	return v, nil
}

// identifyTimeout bounds the borrowing of a monitor.
const identifyTimeout = 3 * time.Second

func (v *watched) identify(ctx context.Context, o WatchOptions) {
	ctx, cancel := context.WithTimeout(ctx, identifyTimeout)
	defer cancel()
	t, err := vm.Open(ctx, v.process.PID, vm.Options{QMP: o.QMP})
	if err == nil {
		v.name = t.Name
		for _, c := range t.VCPUs {
			v.tids = append(v.tids, c.TID)
		}
		_ = t.Close() // nothing was changed
		return
	}
	v.notes = append(v.notes, fmt.Sprintf("the monitor did not answer, vCPUs are known by their threads' names: %v", err))
	v.name = nameOf(v.process.Argv)
	tids, err := v.process.Threads()
	if err != nil {
		return
	}
	for _, tid := range tids {
		b, err := os.ReadFile(v.process.Path("task/" + strconv.Itoa(tid) + "/comm"))
		if err == nil && strings.HasPrefix(string(b), "CPU ") {
			v.tids = append(v.tids, tid)
		}
	}
}

// attachTaps finds the VM's taps by its descriptors: each names its interface.
func (v *watched) attachTaps(o WatchOptions, k *Kernel) {
	if k.Net == nil {
		return
	}
	fds, err := v.process.FDs()
	if err != nil {
		return // it has ended, or hides them: no taps then
	}
	for _, fd := range fds {
		if fd.Target != "/dev/net/tun" {
			continue
		}
		name := tapName(fd.Info)
		if _, known := v.taps[name]; name == "" || known {
			continue
		}
		i, err := stdnet.InterfaceByName(name)
		if err != nil {
			v.notes = append(v.notes, fmt.Sprintf("tap %s is in another network namespace and not watched", name))
			continue
		}
		if err := k.Net.Attach(i.Index, net.Options{Gap: o.Gap}); err != nil {
			v.notes = append(v.notes, fmt.Sprintf("tap %s: %v", name, err))
			continue
		}
		v.taps[name] = i.Index
	}
}

// tapName is the interface in a tun descriptor's fdinfo ("iff:\ttap0").
func tapName(info []byte) string {
	for line := range bytes.Lines(info) {
		if rest, ok := bytes.CutPrefix(line, []byte("iff:")); ok {
			return string(bytes.TrimSpace(rest))
		}
	}
	return ""
}

func (v *watched) close(k *Kernel) error {
	var errs []error
	if v.cpus != nil {
		errs = append(errs, v.cpus.Detach())
	}
	if v.disks {
		errs = append(errs, k.Disk.Detach(v.process.PID))
	}
	if v.sockets {
		errs = append(errs, k.Sock.Detach(v.process.PID))
	}
	for _, i := range v.taps {
		errs = append(errs, k.Net.Detach(i))
	}
	return errors.Join(append(errs, v.process.Close())...)
}

// read makes a sample.
func (v *watched) read(k *Kernel, now time.Time) (Sample, error) {
	s := Sample{PID: v.process.PID, VM: v.name, Notes: v.notes}
	s.State, s.Holder = checkpointState(v.process)
	s.Protected = s.State == StateAttached || s.State == StateCheckpointing
	if v.prevAt.IsZero() {
		v.prevAt = v.begin
	}
	dt := now.Sub(v.prevAt)
	if err := v.readVCPUs(&s, dt); err != nil {
		return s, err
	}
	if err := v.readNetwork(&s, k, dt); err != nil {
		return s, err
	}
	if err := v.readDisk(&s, k, dt); err != nil {
		return s, err
	}
	v.prev, v.prevAt = s, now
	return s, nil
}

// rate is the growth of a counter per second.
func rate(now, before uint64, dt time.Duration) float64 {
	if dt <= 0 || now < before {
		return 0
	}
	return float64(now-before) / dt.Seconds()
}

func (v *watched) readVCPUs(s *Sample, dt time.Duration) error {
	if len(v.tids) == 0 {
		return nil
	}
	c := &VCPU{HasSlots: v.cpus != nil}
	var prev VCPU
	if v.prev.VCPU != nil {
		prev = *v.prev.VCPU
	}
	times := make([]vcpu.Times, len(v.tids))
	if v.cpus != nil {
		t, idle, err := v.cpus.Read()
		if err != nil {
			return err
		}
		times = t
		c.IdleNS, c.Slots, c.LongestNS, c.IdleSinceNS = idle.Total.Nanoseconds(), idle.Slots, idle.Longest.Nanoseconds(), idle.Since.Nanoseconds()
		c.IdleShare = rate(uint64(c.IdleNS), uint64(prev.IdleNS), dt) / 1e9
		c.SlotsRate = rate(c.Slots, prev.Slots, dt)
	} else {
		for i, tid := range v.tids {
			t := readSched(v.process.PID, tid)
			times[i] = vcpu.Times{Run: t.run - v.base[i].run, Wait: t.wait - v.base[i].wait}
		}
	}
	for i, t := range times {
		x := VCPUTimes{Index: i, RunNS: t.Run.Nanoseconds(), WaitNS: t.Wait.Nanoseconds()}
		var before VCPUTimes
		if i < len(prev.Each) {
			before = prev.Each[i]
		}
		x.RunShare = rate(uint64(x.RunNS), uint64(before.RunNS), dt) / 1e9
		x.WaitShare = rate(uint64(x.WaitNS), uint64(before.WaitNS), dt) / 1e9
		c.RunShare += x.RunShare / float64(len(times))
		c.WaitShare += x.WaitShare / float64(len(times))
		c.Each = append(c.Each, x)
	}
	s.VCPU = c
	return nil
}

func (v *watched) readNetwork(s *Sample, k *Kernel, dt time.Duration) error {
	before := map[string]Network{}
	for _, n := range v.prev.Network {
		before[n.Device] = n
	}
	add := func(n Network) {
		b := before[n.Device]
		n.InRate, n.OutRate = rate(n.InBytes, b.InBytes, dt), rate(n.OutBytes, b.OutBytes, dt)
		n.OutPktRate = rate(n.OutPackets, b.OutPackets, dt)
		n.RequestRate, n.SlotsRate = rate(n.Requests, b.Requests, dt), rate(n.Slots, b.Slots, dt)
		n.IdleShare = rate(uint64(n.IdleNS), uint64(b.IdleNS), dt) / 1e9
		s.Network = append(s.Network, n)
	}
	for name, i := range v.taps {
		t, err := k.Net.Read(i)
		if err != nil {
			return err
		}
		add(Network{Device: name, InBytes: t.BytesIn, OutBytes: t.BytesOut, InPackets: t.PacketsIn, OutPackets: t.PacketsOut,
			Requests: t.Requests, Answers: t.Answers, AnswerNS: t.AnswerTime.Nanoseconds(), Pending: t.Pending,
			Stalls: t.Stalls, Stalled: t.Stalled, Slots: t.Slots, FalseSlots: t.FalseSlots,
			IdleNS: (t.Idle + present(t.IdleSince)).Nanoseconds(), Idle: silent(t.IdleSince, t.PacketsIn+t.PacketsOut)})
	}
	if v.sockets {
		t, err := k.Sock.Read(v.process.PID)
		if err != nil {
			return err
		}
		add(Network{Device: "sockets", Estimate: true, InBytes: t.BytesIn, OutBytes: t.BytesOut, InPackets: t.CallsIn, OutPackets: t.CallsOut,
			Slots: t.Slots, IdleNS: (t.Idle + present(t.IdleSince)).Nanoseconds(), Idle: silent(t.IdleSince, t.CallsIn+t.CallsOut)})
	}
	return nil
}

// silent reports whether nothing passes a device now: since an instant, or nothing ever did
// while it was watched, and no slot has begun.
func silent(since time.Duration, packets uint64) bool { return since != 0 || packets == 0 }

// present is how long a slot that began at since (CLOCK_MONOTONIC) lasts by now.
func present(since time.Duration) time.Duration {
	if since == 0 {
		return 0
	}
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // cannot fail for this clock
	return max(0, time.Duration(t.Nano())-since)
}

func (v *watched) readDisk(s *Sample, k *Kernel, dt time.Duration) error {
	d := &Disk{}
	if v.disks {
		all, missed, err := k.Disk.Read(v.process.PID)
		if err != nil {
			return err
		}
		images := v.images()
		for f, w := range all {
			if !images[f] {
				continue
			}
			d.Bytes, d.Writes, d.Syncs = d.Bytes+w.Bytes, d.Writes+w.Writes, d.Syncs+w.Syncs
			d.Estimate = d.Estimate || w.SubmittedBytes > 0
		}
		d.Missed = missed
	} else {
		d.Bytes, d.Estimate = writeBytes(v.process.PID)-v.io, true
	}
	if b := v.prev.Disk; b != nil {
		d.Rate, d.Ops = rate(d.Bytes, b.Bytes, dt), rate(d.Writes, b.Writes, dt)
	} else {
		d.Rate, d.Ops = rate(d.Bytes, 0, dt), rate(d.Writes, 0, dt)
	}
	s.Disk = d
	return nil
}

// images are the files and devices that QEMU holds open for reading and writing:
// logs are opened for writing alone. A file that was closed meanwhile no longer
// counts.
func (v *watched) images() map[disk.File]bool {
	out := map[disk.File]bool{}
	fds, err := v.process.FDs()
	if err != nil {
		return out
	}
	for _, fd := range fds {
		if !strings.HasPrefix(fd.Target, "/") || !readWrite(fd.Info) {
			continue
		}
		if f, ok, err := disk.FileOf(v.process.Path("fd/" + strconv.Itoa(fd.Number))); err == nil && ok {
			out[f] = true
		}
	}
	return out
}

// readWrite reports a descriptor opened O_RDWR and not for appending.
func readWrite(info []byte) bool {
	for line := range bytes.Lines(info) {
		if rest, ok := bytes.CutPrefix(line, []byte("flags:")); ok {
			flags, err := strconv.ParseUint(string(bytes.TrimSpace(rest)), 8, 64)
			return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR && flags&unix.O_APPEND == 0
		}
	}
	return false
}
