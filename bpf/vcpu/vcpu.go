package vcpu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/bpf/load"
)

const object = "vcpu"

// States of a thread, as in vcpu.bpf.c.
const (
	running = 1
	waiting = 2
	asleep  = 3
)

// Monitor holds the loaded programs.
type Monitor struct {
	objs struct {
		OnSwitch *ebpf.Program `ebpf:"on_switch"`
		OnWakeup *ebpf.Program `ebpf:"on_wakeup"`
		VCPUs    *ebpf.Map     `ebpf:"vcpus"`
		Machines *ebpf.Map     `ebpf:"machines"`
		Slots    *ebpf.Map     `ebpf:"slots"`
	}
	links []link.Link
}

// Load loads the programs and attaches them.
func Load() (*Monitor, error) {
	if err := load.Recent(); err != nil {
		return nil, load.Failed(object, "attach", err)
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, load.Failed(object, "read", err)
	}
	m := &Monitor{}
	if err := spec.LoadAndAssign(&m.objs, nil); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	for name, p := range m.Programs() {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return nil, errors.Join(load.Failed(object, "attach "+name, err), m.Close())
		}
		m.links = append(m.links, l)
	}
	return m, nil
}

// Programs are the loaded programs by name.
func (m *Monitor) Programs() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{"sched_switch": m.objs.OnSwitch, "sched_wakeup": m.objs.OnWakeup}
}

// Close detaches the programs and drops what they know.
func (m *Monitor) Close() error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, l.Close())
	}
	m.links = nil
	for _, o := range []io.Closer{m.objs.OnSwitch, m.objs.OnWakeup, m.objs.VCPUs, m.objs.Machines, m.objs.Slots} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Machine is a virtual machine being followed.
type Machine struct {
	m     *Monitor
	pid   uint32
	tids  []uint32
	begin time.Time
	base  []account // what the scheduler had accounted at Attach
	carry []account // up to the moment the programs first saw the thread
}

type account struct{ run, wait time.Duration }

// Times is how a vCPU spent its time since Attach.
type Times struct {
	Run, Wait, Sleep time.Duration
	Switches         uint64 // times it was put on a processor
}

// Idle is what is known of a machine's idle slots.
type Idle struct {
	Slots   uint64
	Total   time.Duration
	Longest time.Duration // of those that are over
	Since   time.Duration // length of the present one; 0: some vCPU is awake
	Lost    uint32        // events nobody took in time
}

// Attach follows the vCPU threads tids of process pid. With notify, slots are told
// of through Slots.
func (m *Monitor) Attach(pid int, tids []int, notify bool) (*Machine, error) {
	v := &Machine{m: m, pid: uint32(pid), begin: time.Now(), carry: make([]account, len(tids))}
	state := objectsMachine{Vcpus: uint32(len(tids))}
	if notify {
		state.Notify = 1
	}
	if len(tids) == 0 {
		return nil, errors.New("bpf vcpu: no thread")
	}
	if err := m.objs.Machines.Update(v.pid, &state, ebpf.UpdateNoExist); err != nil {
		return nil, fmt.Errorf("bpf vcpu: attach pid %d: %w", pid, err)
	}
	for _, tid := range tids {
		a, err := schedstat(pid, tid)
		if err == nil {
			err = m.objs.VCPUs.Update(uint32(tid), &objectsVcpu{Vm: v.pid}, ebpf.UpdateNoExist)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("bpf vcpu: attach thread %d of pid %d: %w", tid, pid, err), v.Detach())
		}
		v.tids = append(v.tids, uint32(tid))
		v.base = append(v.base, a)
	}
	return v, nil
}

// schedstat is the scheduler's own account of a thread.
func schedstat(pid, tid int) (account, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(tid) + "/schedstat")
	if err != nil {
		return account{}, err
	}
	var run, wait int64
	if _, err := fmt.Sscan(string(b), &run, &wait); err != nil {
		return account{}, fmt.Errorf("schedstat of thread %d: %w", tid, err)
	}
	return account{time.Duration(run), time.Duration(wait)}, nil
}

// Read returns the times of each vCPU, in the order of Attach, and the idle slots.
func (v *Machine) Read() ([]Times, Idle, error) {
	out := make([]Times, 0, len(v.tids))
	for i, tid := range v.tids {
		var s objectsVcpu
		if err := v.m.objs.VCPUs.Lookup(tid, &s); err != nil {
			return nil, Idle{}, fmt.Errorf("bpf vcpu: thread %d: %w", tid, err)
		}
		if s.Since == 0 {
			a, err := schedstat(int(v.pid), int(tid))
			if err != nil {
				return nil, Idle{}, err
			}
			v.carry[i] = account{a.run - v.base[i].run, a.wait - v.base[i].wait}
		} else if s.State <= asleep {
			s.Spent[s.State] += now() - min(s.Since, now()) // the present state goes on
		}
		t := Times{Run: v.carry[i].run + time.Duration(s.Spent[running]), Wait: v.carry[i].wait + time.Duration(s.Spent[waiting]), Switches: s.Switches}
		t.Sleep = max(0, time.Since(v.begin)-t.Run-t.Wait)
		out = append(out, t)
	}
	var s objectsMachine
	if err := v.m.objs.Machines.Lookup(v.pid, &s); err != nil {
		return nil, Idle{}, fmt.Errorf("bpf vcpu: pid %d: %w", v.pid, err)
	}
	idle := Idle{Slots: s.Slots, Total: time.Duration(s.IdleNs), Longest: time.Duration(s.Longest), Lost: s.Lost}
	if s.IdleSince != 0 {
		idle.Since = time.Duration(now() - min(s.IdleSince, now()))
		idle.Total += idle.Since
	}
	return out, idle, nil
}

// now is the clock of the programs.
func now() uint64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // cannot fail for this clock
	return uint64(t.Nano())
}

// Detach ends the following.
func (v *Machine) Detach() error {
	var errs []error
	for _, tid := range v.tids {
		errs = append(errs, v.m.objs.VCPUs.Delete(tid))
	}
	return errors.Join(append(errs, v.m.objs.Machines.Delete(v.pid))...)
}

// Slot is an idle slot's beginning or end.
type Slot struct {
	PID    int
	At     time.Duration // CLOCK_MONOTONIC
	Length time.Duration // 0: it begins
}

// Slots reads slots as they happen.
type Slots struct{ r *ringbuf.Reader }

// Slots opens the stream of slots of all machines attached with notify.
func (m *Monitor) Slots() (*Slots, error) {
	r, err := ringbuf.NewReader(m.objs.Slots)
	if err != nil {
		return nil, load.Failed(object, "open slots", err)
	}
	return &Slots{r}, nil
}

// Next waits for the next slot; os.ErrClosed after Close, os.ErrDeadlineExceeded
// after the deadline.
func (s *Slots) Next() (Slot, error) {
	rec, err := s.r.Read()
	if err != nil {
		return Slot{}, err
	}
	b := rec.RawSample
	if len(b) < 24 {
		return Slot{}, fmt.Errorf("bpf vcpu: record of %d bytes", len(b))
	}
	ne := binary.NativeEndian
	return Slot{PID: int(ne.Uint32(b[16:])), At: time.Duration(ne.Uint64(b)), Length: time.Duration(ne.Uint64(b[8:]))}, nil
}

// SetDeadline bounds Next.
func (s *Slots) SetDeadline(t time.Time) { s.r.SetDeadline(t) }

// Close ends a Next that waits.
func (s *Slots) Close() error { return s.r.Close() }
