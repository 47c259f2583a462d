package dirty

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/ckagent/ckagent/bpf/load"
	"github.com/ckagent/ckagent/bpf/mapped"
)

const (
	// PageBytes is the page size of the architectures supported (x86-64).
	PageBytes = 4096
	// HeatPages is the size of a heat region: 2 MiB.
	HeatPages = 512
	// MaxRanges bounds the ranges of one target, as in dirty.bpf.c.
	MaxRanges = 24

	object = "dirty"
)

// ErrTracked: the process is tracked already.
var ErrTracked = errors.New("the process is tracked already")

// Range is a piece of a process's memory. Pages are numbered through all ranges
// of a target, in the order given.
type Range struct {
	Start, Bytes uint64
}

// Counter holds the loaded programs.
type Counter struct {
	objs struct {
		OnUserFault   *ebpf.Program `ebpf:"on_user_fault"`
		OnKernelFault *ebpf.Program `ebpf:"on_kernel_fault"`
		Targets       *ebpf.Map     `ebpf:"targets"`
		Spaces        *ebpf.Map     `ebpf:"spaces"`
		Bitmaps       *ebpf.Map     `ebpf:"bitmaps"`
		Heats         *ebpf.Map     `ebpf:"heats"`
	}
	links []link.Link
	spec  struct{ bitmap, heat *ebpf.MapSpec }
	mu    sync.Mutex // guards the maps' contents against Track and Untrack at once
}

// Load loads the programs and attaches them.
func Load() (*Counter, error) {
	if err := load.Recent(); err != nil {
		return nil, load.Failed(object, "attach", err)
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, load.Failed(object, "read", err)
	}
	c := &Counter{}
	c.spec.bitmap, c.spec.heat = spec.Maps["bitmaps"].InnerMap, spec.Maps["heats"].InnerMap
	if err := spec.LoadAndAssign(&c.objs, nil); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	for name, p := range map[string]*ebpf.Program{"on_user_fault": c.objs.OnUserFault, "on_kernel_fault": c.objs.OnKernelFault} {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return nil, errors.Join(load.Failed(object, "attach "+name, err), c.Close())
		}
		c.links = append(c.links, l)
	}
	return c, nil
}

// Programs are the loaded programs by name, to ask the kernel what they cost.
func (c *Counter) Programs() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{"page_fault_user": c.objs.OnUserFault, "page_fault_kernel": c.objs.OnKernelFault}
}

// Close detaches the programs and drops them and what they counted.
func (c *Counter) Close() error {
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.Close())
	}
	c.links = nil
	for _, o := range []io.Closer{c.objs.OnUserFault, c.objs.OnKernelFault, c.objs.Targets, c.objs.Spaces, c.objs.Bitmaps, c.objs.Heats} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Counts are what a target has seen since Track.
type Counts struct {
	Faults       uint64 // write faults in the ranges
	KernelFaults uint64 // of them, in kernel mode
	Pages        uint64 // bits of the bitmap that were set: pages written anew since their bit was cleared
}

// Target is a process being counted.
type Target struct {
	c            *Counter
	pid          uint32
	bitmap, heat *ebpf.Map
	bits, warm   *mapped.Words
}

// Track begins to count a process. Ranges are whole pages.
func (c *Counter) Track(pid int, ranges []Range) (*Target, error) {
	if len(ranges) == 0 || len(ranges) > MaxRanges {
		return nil, fmt.Errorf("bpf dirty: %d ranges: want 1 to %d", len(ranges), MaxRanges)
	}
	v := objectsTarget{Ranges: uint32(len(ranges))}
	var pages uint64
	for i, r := range ranges {
		if r.Start%PageBytes != 0 || r.Bytes%PageBytes != 0 || r.Bytes == 0 {
			return nil, fmt.Errorf("bpf dirty: range [%#x,+%#x) is not of whole pages", r.Start, r.Bytes)
		}
		v.Range[i].Start, v.Range[i].Bytes, v.Range[i].First = r.Start, r.Bytes, pages
		pages += r.Bytes / PageBytes
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &Target{c: c, pid: uint32(pid)}
	if err := t.makeMaps(pages); err != nil {
		return nil, errors.Join(load.Failed(object, "make maps", err), t.drop())
	}
	// Last, as from here on the programs count.
	if err := c.objs.Targets.Update(t.pid, &v, ebpf.UpdateNoExist); err != nil {
		if errors.Is(err, ebpf.ErrKeyExist) {
			err = ErrTracked
		}
		return nil, errors.Join(fmt.Errorf("bpf dirty: pid %d: %w", pid, err), t.drop())
	}
	return t, nil
}

func (t *Target) makeMaps(pages uint64) (err error) {
	if has(t.c.objs.Targets, t.pid) {
		return ErrTracked
	}
	make := func(template *ebpf.MapSpec, outer *ebpf.Map, entries uint64) (*ebpf.Map, *mapped.Words, error) {
		s := template.Copy()
		s.MaxEntries = uint32(entries)
		m, err := ebpf.NewMap(s)
		if err != nil {
			return nil, nil, err
		}
		w, err := mapped.MapWords(m.FD(), entries)
		if err != nil {
			return nil, nil, errors.Join(err, m.Close())
		}
		if err := outer.Update(t.pid, uint32(m.FD()), ebpf.UpdateAny); err != nil {
			return nil, nil, errors.Join(err, w.Close(), m.Close())
		}
		return m, w, nil
	}
	if t.bitmap, t.bits, err = make(t.c.spec.bitmap, t.c.objs.Bitmaps, (pages+63)/64); err != nil {
		return err
	}
	t.heat, t.warm, err = make(t.c.spec.heat, t.c.objs.Heats, (pages+HeatPages-1)/HeatPages)
	return err
}

func has(m *ebpf.Map, key uint32) bool {
	var v objectsTarget
	return m.Lookup(key, &v) == nil
}

// Counts reads the counters.
func (t *Target) Counts() (Counts, error) {
	var v objectsTarget
	if err := t.c.objs.Targets.Lookup(t.pid, &v); err != nil {
		return Counts{}, fmt.Errorf("bpf dirty: counts of pid %d: %w", t.pid, err)
	}
	return Counts{Faults: v.Faults, KernelFaults: v.KernelFaults, Pages: v.Pages}, nil
}

// Words is the number of words of the bitmap.
func (t *Target) Words() int { return t.bits.Len() }

// TakeWord reads 64 pages' bits, page 64*i in the lowest, and clears them.
func (t *Target) TakeWord(i int) uint64 { return t.bits.Exchange(i, 0) }

// Word reads 64 pages' bits.
func (t *Target) Word(i int) uint64 { return t.bits.Load(i) }

// Clear takes all bits out, so that every page can count anew.
func (t *Target) Clear() { t.bits.Clear() }

// Heat appends the first writes in each 2 MiB since Track to out.
func (t *Target) Heat(out []uint64) []uint64 {
	for i := range t.warm.Len() {
		out = append(out, t.warm.Load(i))
	}
	return out
}

// Untrack ends the counting.
func (t *Target) Untrack() error {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	var v objectsTarget
	if err := t.c.objs.Targets.Lookup(t.pid, &v); err == nil && v.Mm != 0 {
		_ = t.c.objs.Spaces.Delete(v.Mm) // not there: no fault was seen since it was learned
	}
	err := t.c.objs.Targets.Delete(t.pid)
	return errors.Join(err, t.drop())
}

// drop takes the maps out of the outer ones and frees them.
func (t *Target) drop() error {
	var errs []error
	for _, m := range []struct {
		outer, inner *ebpf.Map
		w            *mapped.Words
	}{{t.c.objs.Bitmaps, t.bitmap, t.bits}, {t.c.objs.Heats, t.heat, t.warm}} {
		if m.inner == nil {
			continue
		}
		errs = append(errs, m.outer.Delete(t.pid), m.w.Close(), m.inner.Close())
	}
	t.bitmap, t.heat = nil, nil
	return errors.Join(errs...)
}

// Self is a check that the programs see the faults of this process: it maps
// memory, writes to it and reports how many of the pages were counted.
func (c *Counter) Self(pages int) (seen uint64, err error) {
	b, start, err := scratch(pages)
	if err != nil {
		return 0, err
	}
	defer unmapScratch(b)
	t, err := c.Track(os.Getpid(), []Range{{Start: start, Bytes: uint64(len(b))}})
	if err != nil {
		return 0, err
	}
	for i := 0; i < len(b); i += PageBytes {
		b[i] = 1
	}
	n, err := t.Counts()
	return n.Pages, errors.Join(err, t.Untrack())
}
