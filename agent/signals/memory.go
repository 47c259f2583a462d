package signals

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/bpf/dirty"
)

// MemoryOptions say how to get at a VM's memory.
type MemoryOptions struct {
	QMP  string // address of the monitor; empty: found from the process
	Take track.Take
	// Counter is the live counter; nil: none.
	Counter *dirty.Counter
	// Lock is a share in the VM's lock that was inherited; nil: it is taken.
	Lock *os.File
}

// Memory is a VM whose memory may be tracked: we hold its lock.
type Memory struct {
	*track.Tracker
	PID  int
	Name string // QEMU's -name

	process *vm.Process
	lock    *vm.FileLock
}

// collapseBudget is the time that making huge pages whole may take at the end.
const collapseBudget = 2 * time.Second

// OpenMemory takes the VM's lock, asks its monitor where memory lies, gives the
// monitor back, and registers the memory for tracking.
func OpenMemory(ctx context.Context, pid int, o MemoryOptions) (m *Memory, err error) {
	t, err := vm.Open(ctx, pid, vm.Options{QMP: o.QMP})
	if err != nil {
		return nil, err
	}
	m = &Memory{PID: pid, Name: t.Name, process: t.Process}
	defer func() {
		if err != nil {
			err = errors.Join(m.process.Explain(err), m.Close())
			m = nil
		}
	}()
	blocks, err := t.Layout(ctx)
	if err = errors.Join(err, t.QMP.Close()); err != nil {
		return m, err
	}
	if o.Lock != nil {
		m.lock = vm.Inherited(o.Lock)
	} else if m.lock, err = vm.Lock(ctx, t.Process); err != nil {
		return m, err
	}
	var vcpus []int
	for _, c := range t.VCPUs {
		vcpus = append(vcpus, c.TID)
	}
	m.Tracker, err = track.Open(ctx, track.Config{PID: pid, VCPUs: vcpus, Blocks: blocks, Take: o.Take,
		Counter: o.Counter, CollapseBudget: collapseBudget})
	return m, err
}

// Ended is closed when the VM has ended.
func (m *Memory) Ended() <-chan struct{} { return m.process.Done() }

// Explain puts the end of the VM, if it is that, in place of an error it caused.
func (m *Memory) Explain(err error) error { return m.process.Explain(err) }

// Close lets go of the memory, then of the VM.
func (m *Memory) Close() error {
	var errs []error
	if m.Tracker != nil {
		errs = append(errs, m.Tracker.Close())
	}
	if m.lock != nil {
		errs = append(errs, m.lock.Close())
	}
	return errors.Join(append(errs, m.process.Close())...)
}
