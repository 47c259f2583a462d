package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/ckagent/ckagent/bpf/load"
)

const object = "net"

// Monitor holds the loaded programs.
type Monitor struct {
	objs struct {
		ToVM    *ebpf.Program `ebpf:"to_vm"`
		FromVM  *ebpf.Program `ebpf:"from_vm"`
		Devices *ebpf.Map     `ebpf:"devices"`
		Flows   *ebpf.Map     `ebpf:"flows"`
		Events  *ebpf.Map     `ebpf:"events"`
	}
	mu    sync.Mutex // guards links
	links map[int][]link.Link
}

// Load loads the programs. They are on no interface yet.
func Load() (*Monitor, error) {
	spec, err := loadObjects()
	if err != nil {
		return nil, load.Failed(object, "read", err)
	}
	m := &Monitor{links: map[int][]link.Link{}}
	if err := spec.LoadAndAssign(&m.objs, nil); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	return m, nil
}

// Programs are the loaded programs by name.
func (m *Monitor) Programs() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{"tcx/egress": m.objs.ToVM, "tcx/ingress": m.objs.FromVM}
}

// Close takes the programs off every interface and drops them.
func (m *Monitor) Close() error {
	m.mu.Lock()
	var errs []error
	for _, ls := range m.links {
		for _, l := range ls {
			errs = append(errs, l.Close())
		}
	}
	m.links = nil
	m.mu.Unlock()
	for _, o := range []io.Closer{m.objs.ToVM, m.objs.FromVM, m.objs.Devices, m.objs.Flows, m.objs.Events} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Options of Attach.
type Options struct {
	Gap    time.Duration // silence that makes an idle slot; 0: none are looked for
	Notify bool          // tell of slots through Events
}

// Attach watches an interface of the network namespace of the calling thread.
func (m *Monitor) Attach(ifindex int, o Options) error {
	d := objectsDevice{GapNs: uint64(max(0, o.Gap)), Ifindex: uint32(ifindex), QuickNs: uint32(min(o.Gap/4, time.Second))}
	if o.Notify {
		d.Notify = 1
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.objs.Devices.Update(uint32(ifindex), &d, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("bpf net: attach interface %d: %w", ifindex, err)
	}
	for _, a := range []struct {
		p  *ebpf.Program
		at ebpf.AttachType
	}{{m.objs.ToVM, ebpf.AttachTCXEgress}, {m.objs.FromVM, ebpf.AttachTCXIngress}} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: a.p, Attach: a.at})
		if err != nil {
			return errors.Join(load.Failed(object, fmt.Sprintf("attach to interface %d", ifindex), err), m.detach(ifindex))
		}
		m.links[ifindex] = append(m.links[ifindex], l)
	}
	return nil
}

// Detach ends the watching of an interface, be it still there or not.
func (m *Monitor) Detach(ifindex int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.detach(ifindex)
}

func (m *Monitor) detach(ifindex int) error {
	var errs []error
	for _, l := range m.links[ifindex] {
		errs = append(errs, l.Close())
	}
	delete(m.links, ifindex)
	return errors.Join(append(errs, m.objs.Devices.Delete(uint32(ifindex)))...)
}

// Traffic is what was seen on an interface since Attach.
type Traffic struct {
	PacketsIn, PacketsOut uint64
	BytesIn, BytesOut     uint64
	LastIn, LastOut       time.Duration // CLOCK_MONOTONIC; 0: never

	Requests, Answers uint64
	Gone              uint64        // requests whose connection ended before an answer
	Pending           int64         // requests waiting for an answer
	AnswerTime        time.Duration // of all answers together

	Stalls, Resumed uint64 // windows that closed, that opened again
	Stalled         int64  // windows closed now

	Slots      uint64
	FalseSlots uint64 // of those, ended right after they were told of
	Idle       time.Duration
	Longest    time.Duration
	IdleSince  time.Duration // CLOCK_MONOTONIC of the last packet before the present slot; 0: none
	Lost       uint32        // events nobody took in time
}

// Read returns what was seen on an interface.
func (m *Monitor) Read(ifindex int) (Traffic, error) {
	var d objectsDevice
	if err := m.objs.Devices.Lookup(uint32(ifindex), &d); err != nil {
		return Traffic{}, fmt.Errorf("bpf net: interface %d: %w", ifindex, err)
	}
	t := Traffic{
		PacketsIn: d.PacketsIn, PacketsOut: d.PacketsOut, BytesIn: d.BytesIn, BytesOut: d.BytesOut,
		LastIn: time.Duration(d.LastIn), LastOut: time.Duration(d.LastOut),
		Requests: d.Requests, Answers: d.Answers, Gone: d.Gone, Pending: d.Pending, AnswerTime: time.Duration(d.AnswerNs),
		Stalls: d.Shut, Resumed: d.Opened, Stalled: d.Stalled,
		Slots: d.Slots, FalseSlots: d.FalseSlots, Idle: time.Duration(d.IdleNs), Longest: time.Duration(d.Longest), Lost: d.Lost,
	}
	if d.Idle != 0 {
		t.IdleSince = time.Duration(d.IdleSince)
	}
	return t, nil
}

// Event is the beginning or the end of an idle slot.
type Event struct {
	Interface int
	At        time.Duration // CLOCK_MONOTONIC
	Silence   time.Duration // since the last packet
	Pending   int64         // requests waiting for an answer
	Begins    bool
}

// Events reads slots as they happen.
type Events struct{ r *ringbuf.Reader }

// Events opens the stream of slots of all interfaces attached with Notify.
func (m *Monitor) Events() (*Events, error) {
	r, err := ringbuf.NewReader(m.objs.Events)
	if err != nil {
		return nil, load.Failed(object, "open events", err)
	}
	return &Events{r}, nil
}

// Next waits for the next event; os.ErrClosed after Close, os.ErrDeadlineExceeded
// after the deadline.
func (e *Events) Next() (Event, error) {
	rec, err := e.r.Read()
	if err != nil {
		return Event{}, err
	}
	b := rec.RawSample
	if len(b) < 32 {
		return Event{}, fmt.Errorf("bpf net: record of %d bytes", len(b))
	}
	ne := binary.NativeEndian
	return Event{At: time.Duration(ne.Uint64(b)), Silence: time.Duration(ne.Uint64(b[8:])), Pending: int64(ne.Uint64(b[16:])),
		Interface: int(ne.Uint32(b[24:])), Begins: ne.Uint32(b[28:]) == 1}, nil
}

// SetDeadline bounds Next.
func (e *Events) SetDeadline(t time.Time) { e.r.SetDeadline(t) }

// Close ends a Next that waits.
func (e *Events) Close() error { return e.r.Close() }
