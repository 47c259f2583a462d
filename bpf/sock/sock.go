package sock

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/ckagent/ckagent/bpf/load"
)

const object = "sock"

// Monitor holds the loaded programs.
type Monitor struct {
	objs struct {
		OnSend    *ebpf.Program `ebpf:"on_send"`
		OnReceive *ebpf.Program `ebpf:"on_receive"`
		Processes *ebpf.Map     `ebpf:"processes"`
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
	return map[string]*ebpf.Program{"sock_send_length": m.objs.OnSend, "sock_recv_length": m.objs.OnReceive}
}

// Close detaches the programs and drops what they counted.
func (m *Monitor) Close() error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, l.Close())
	}
	m.links = nil
	for _, o := range []io.Closer{m.objs.OnSend, m.objs.OnReceive, m.objs.Processes} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Attach begins to count a process; silence for gap makes an idle slot (0: none).
func (m *Monitor) Attach(pid int, gap time.Duration) error {
	if err := m.objs.Processes.Update(uint32(pid), &objectsProcess{GapNs: uint64(max(0, gap))}, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("bpf sock: attach pid %d: %w", pid, err)
	}
	return nil
}

// Traffic is what a process transferred since Attach; in is towards the VM.
type Traffic struct {
	CallsIn, CallsOut uint64
	BytesIn, BytesOut uint64
	LastIn, LastOut   time.Duration // CLOCK_MONOTONIC; 0: never
	Slots             uint64
	Idle, Longest     time.Duration // in slots that are over
	IdleSince         time.Duration // CLOCK_MONOTONIC of the last transfer before the present slot; 0: none
}

// Read returns what a process transferred.
func (m *Monitor) Read(pid int) (Traffic, error) {
	var p objectsProcess
	if err := m.objs.Processes.Lookup(uint32(pid), &p); err != nil {
		return Traffic{}, fmt.Errorf("bpf sock: pid %d: %w", pid, err)
	}
	t := Traffic{CallsIn: p.CallsIn, CallsOut: p.CallsOut, BytesIn: p.BytesIn, BytesOut: p.BytesOut,
		LastIn: time.Duration(p.LastIn), LastOut: time.Duration(p.LastOut),
		Slots: p.Slots, Idle: time.Duration(p.IdleNs), Longest: time.Duration(p.Longest)}
	if p.Idle != 0 {
		t.IdleSince = time.Duration(p.IdleSince)
	}
	return t, nil
}

// Detach ends the counting of a process.
func (m *Monitor) Detach(pid int) error { return m.objs.Processes.Delete(uint32(pid)) }
