package disk

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/ckagent/ckagent/bpf/load"
)

const object = "disk"

// Monitor holds the loaded programs.
type Monitor struct {
	objs struct {
		OnExit    *ebpf.Program `ebpf:"on_exit"`
		Files     *ebpf.Map     `ebpf:"files"`
		Processes *ebpf.Map     `ebpf:"processes"`
	}
	uring   *ebpf.Program // nil where it cannot be loaded
	links   []link.Link
	missing error
}

// Load loads the programs and attaches them.
func Load() (m *Monitor, err error) {
	if err := load.Recent(); err != nil {
		return nil, load.Failed(object, "attach", err)
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, load.Failed(object, "read", err)
	}
	m = &Monitor{}
	if err := spec.LoadAndAssign(&m.objs, nil); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	if err := m.attach("sys_exit", m.objs.OnExit); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	// io_uring's tracepoint has changed its arguments more than once: apart.
	var u struct {
		OnUring *ebpf.Program `ebpf:"on_uring"`
	}
	o := ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"files": m.objs.Files, "processes": m.objs.Processes}}
	if err := spec.LoadAndAssign(&u, &o); err != nil {
		m.missing = load.Failed(object, "load on_uring", err)
		return m, nil
	}
	m.uring = u.OnUring
	m.missing = m.attach("io_uring_complete", m.uring)
	return m, nil
}

func (m *Monitor) attach(name string, p *ebpf.Program) error {
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return load.Failed(object, "attach "+name, err)
	}
	m.links = append(m.links, l)
	return nil
}

// Missing is why writes by io_uring are not seen; nil if they are.
func (m *Monitor) Missing() error { return m.missing }

// Programs are the loaded programs by name.
func (m *Monitor) Programs() map[string]*ebpf.Program {
	out := map[string]*ebpf.Program{"sys_exit": m.objs.OnExit}
	if m.uring != nil {
		out["io_uring_complete"] = m.uring
	}
	return out
}

// Close detaches the programs and drops what they counted.
func (m *Monitor) Close() error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, l.Close())
	}
	m.links = nil
	if m.uring != nil {
		errs = append(errs, m.uring.Close())
	}
	for _, o := range []io.Closer{m.objs.OnExit, m.objs.Files, m.objs.Processes} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Attach begins to count a process.
func (m *Monitor) Attach(pid int) error {
	if err := m.objs.Processes.Update(uint32(pid), &objectsProcess{}, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("bpf disk: attach pid %d: %w", pid, err)
	}
	return nil
}

// File names a file as the kernel does: device and inode, or a block device by its
// number alone.
type File struct {
	Device uint32 // in the kernel's form, see FileOf
	Inode  uint64 // 0: a block device
}

// Written is what a process wrote to a file since Attach.
type Written struct {
	Bytes, Writes, Syncs uint64
	SubmittedBytes       uint64 // of Bytes: as asked for, not as done
}

// Read returns what a process wrote, and how many of its writes could not be
// counted.
func (m *Monitor) Read(pid int) (map[File]Written, uint64, error) {
	var p objectsProcess
	if err := m.objs.Processes.Lookup(uint32(pid), &p); err != nil {
		return nil, 0, fmt.Errorf("bpf disk: pid %d: %w", pid, err)
	}
	out := map[File]Written{}
	err := m.each(pid, func(k objectsFileKey, w objectsWritten) error {
		out[File{k.Device, k.Inode}] = Written{Bytes: w.Bytes, Writes: w.Writes, Syncs: w.Syncs, SubmittedBytes: w.Submitted}
		return nil
	})
	return out, p.Missed, err
}

func (m *Monitor) each(pid int, do func(objectsFileKey, objectsWritten) error) error {
	it := m.objs.Files.Iterate()
	var k objectsFileKey
	var w objectsWritten
	for it.Next(&k, &w) {
		if k.Tgid == uint32(pid) {
			if err := do(k, w); err != nil {
				return err
			}
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("bpf disk: read: %w", err)
	}
	return nil
}

// Detach ends the counting of a process.
func (m *Monitor) Detach(pid int) error {
	err := m.objs.Processes.Delete(uint32(pid))
	var keys []objectsFileKey
	if e := m.each(pid, func(k objectsFileKey, _ objectsWritten) error {
		keys = append(keys, k)
		return nil
	}); e != nil {
		err = errors.Join(err, e)
	}
	for _, k := range keys {
		if e := m.objs.Files.Delete(k); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
