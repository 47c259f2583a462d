package cow

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/bpf/load"
	"github.com/ckagent/ckagent/bpf/mapped"
)

const (
	// PageBytes is the page size of the architectures supported (x86-64).
	PageBytes = 4096
	// MaxRanges bounds the ranges, as in cow.bpf.c.
	MaxRanges = 32

	object = "cow"

	minRing = 1 << 20
	maxRing = 256 << 20
)

// Range is a piece of the process's memory. Pages are numbered through all ranges, in
// the order given; each range's numbers begin at a multiple of 64.
type Range struct{ Start, Bytes uint64 }

// GuestRange says where guest-physical memory lies in the process.
type GuestRange struct{ Start, Bytes, Host uint64 }

// Options of Load.
type Options struct {
	Ranges []Range
	// Guest is for VMs under KVM; nil: its faults are not looked at.
	Guest []GuestRange
	// RingBytes is the size of the ring, a power of two from 1 MiB to 256 MiB. A
	// record takes 4,120 bytes, one of a page of zeros that nobody had touched 24.
	RingBytes int
	// Types are the kernel's types; nil: they are read anew. That takes a processor some
	// 20 ms, for which who waits for Load may not want to wait.
	Types *btf.Cache
}

// Mode is what the programs do.
type Mode uint32

// Modes, as in cow.bpf.c.
const (
	Off     Mode = 0
	Track   Mode = 1 // set dirty bits
	Capture Mode = 2 // and copy pages that are not captured yet
)

// Programs are the loaded programs and the memory they share with us.
type Programs struct {
	objs struct {
		OnUserFault   *ebpf.Program `ebpf:"on_user_fault"`
		OnKernelFault *ebpf.Program `ebpf:"on_kernel_fault"`
		Prepare       *ebpf.Program `ebpf:"prepare"`
		States        *ebpf.Map     `ebpf:"states"`
		Dirty         *ebpf.Map     `ebpf:"dirty"`
		Captured      *ebpf.Map     `ebpf:"captured"`
		Blank         *ebpf.Map     `ebpf:"blank"`
		Ring          *ebpf.Map     `ebpf:"ring"`
	}
	// extra are the programs that not every kernel takes, by tracepoint.
	extra   map[string]*ebpf.Program
	lacking map[string]error
	links   []link.Link

	ring     *reader
	raw      []byte // of the state
	state    *objectsState
	dirty    *mapped.Words
	captured *mapped.Words
	blank    *mapped.Words
}

// tracepoints that may be missing, and their programs.
var optional = map[string]string{
	"iomap_dio_rw_begin": "on_direct_io",
	"kvm_page_fault":     "on_guest_fault",
}

// Load loads the programs. Nothing is watched yet.
func Load(o Options) (*Programs, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if err := load.Recent(); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, load.Failed(object, "read", err)
	}
	if err := o.fill(spec); err != nil {
		return nil, load.Failed(object, "prepare", err)
	}
	if o.Types == nil {
		o.Types = btf.NewCache()
	}
	p := &Programs{extra: map[string]*ebpf.Program{}, lacking: map[string]error{}}
	core, options := spec, map[string]*ebpf.ProgramSpec{}
	for point, name := range optional {
		options[point] = spec.Programs[name]
		delete(core.Programs, name)
	}
	if err := core.LoadAndAssign(&p.objs, &ebpf.CollectionOptions{Cache: o.Types}); err != nil {
		return nil, load.Failed(object, "load", err)
	}
	if err := p.share(o); err != nil {
		return nil, errors.Join(load.Failed(object, "map", err), p.Close())
	}
	for point, ps := range options {
		if point == "kvm_page_fault" && len(o.Guest) == 0 {
			continue
		}
		prog, err := p.loadExtra(spec, ps, o.Types)
		if err != nil {
			p.lacking[point] = load.Failed(object, "load "+ps.Name, err)
			continue
		}
		p.extra[point] = prog
	}
	return p, nil
}

func (o *Options) validate() error {
	if len(o.Ranges) == 0 || len(o.Ranges) > MaxRanges || len(o.Guest) > MaxRanges {
		return fmt.Errorf("bpf cow: %d ranges, %d of the guest: want 1 to %d", len(o.Ranges), len(o.Guest), MaxRanges)
	}
	for _, r := range o.Ranges {
		if r.Start%PageBytes != 0 || r.Bytes%PageBytes != 0 || r.Bytes == 0 {
			return fmt.Errorf("bpf cow: range [%#x,+%#x) is not of whole pages", r.Start, r.Bytes)
		}
	}
	if o.RingBytes < minRing || o.RingBytes > maxRing || bits.OnesCount(uint(o.RingBytes)) != 1 {
		return fmt.Errorf("bpf cow: ring of %d bytes: want a power of two from %d to %d", o.RingBytes, minRing, maxRing)
	}
	return nil
}

// fill puts the ranges and the sizes of maps into the object.
func (o *Options) fill(spec *ebpf.CollectionSpec) error {
	var ranges [MaxRanges]objectsRange
	words := uint64(0)
	for i, r := range o.Ranges {
		ranges[i] = objectsRange{Start: r.Start, Bytes: r.Bytes, First: words * 64}
		words += r.words()
	}
	var guest [MaxRanges]objectsGuestRange
	for i, g := range o.Guest {
		guest[i] = objectsGuestRange{Start: g.Start, Bytes: g.Bytes, Host: g.Host}
	}
	spec.Maps["ring"].MaxEntries = uint32(o.RingBytes)
	for _, name := range []string{"dirty", "captured", "blank"} {
		spec.Maps[name].MaxEntries = uint32(words)
	}
	return errors.Join(
		spec.Variables["ranges"].Set(ranges), spec.Variables["range_count"].Set(uint32(len(o.Ranges))),
		spec.Variables["guest_ranges"].Set(guest), spec.Variables["guest_range_count"].Set(uint32(len(o.Guest))))
}

// words is how many words of the bitmaps a range takes.
func (r Range) words() uint64 { return (r.Bytes/PageBytes + 63) / 64 }

// loadExtra loads a program that shares the maps of the others.
func (p *Programs) loadExtra(spec *ebpf.CollectionSpec, ps *ebpf.ProgramSpec, types *btf.Cache) (*ebpf.Program, error) {
	one := spec.Copy()
	clear(one.Programs)
	one.Programs[ps.Name] = ps
	coll, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{Cache: types, MapReplacements: map[string]*ebpf.Map{
		"states": p.objs.States, "dirty": p.objs.Dirty, "captured": p.objs.Captured, "blank": p.objs.Blank, "ring": p.objs.Ring}})
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	return coll.DetachProgram(ps.Name), nil
}

// share maps what we and the programs look at.
func (p *Programs) share(o Options) (err error) {
	words := uint64(0)
	for _, r := range o.Ranges {
		words += r.words()
	}
	if p.raw, err = mapped.Bytes(p.objs.States.FD(), stateBytes); err != nil {
		return err
	}
	p.state = stateOf(p.raw)
	for at, m := range map[**mapped.Words]*ebpf.Map{&p.dirty: p.objs.Dirty, &p.captured: p.objs.Captured, &p.blank: p.objs.Blank} {
		if *at, err = mapped.MapWords(m.FD(), words); err != nil {
			return err
		}
	}
	p.ring, err = newReader(p.objs.Ring.FD(), o.RingBytes)
	return err
}

// steps of the program prepare, by its answer.
var steps = []string{"", "find its own state", "find the descriptor's file", "find the address space of the userfaultfd",
	"find our own page tables", "find where the kernel maps physical memory"}

const unmapped = 5 // the last of the steps

// prepare has the program prepare look around, led by a page whose content nothing else
// in memory has.
func (p *Programs) prepare(userfaultfd int) error {
	page, err := unix.Mmap(-1, 0, PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return load.Failed(object, "make a page", err)
	}
	defer unix.Munmap(page)
	var answer uint32
	for range 3 { // the kernel may be moving the page at that moment
		args := prepareArgs(userfaultfd, page)
		_, _ = rand.Read(page[:len(args.Known)*8]) // never fails
		for i := range args.Known {
			args.Known[i] = binary.NativeEndian.Uint64(page[i*8:])
		}
		if answer, err = p.ask(args); err != nil || answer != unmapped {
			break
		}
	}
	switch {
	case err != nil:
		return load.Failed(object, "run prepare", err)
	case answer != 0:
		return load.Failed(object, "prepare", fmt.Errorf("cannot %s: %w", steps[min(int(answer), len(steps)-1)], ebpf.ErrNotSupported))
	}
	return nil
}

// ask runs the program prepare.
func (p *Programs) ask(args objectsPrepareArgs) (answer uint32, err error) {
	return p.objs.Prepare.Run(&ebpf.RunOptions{Context: args})
}

// Attach learns whose memory the userfaultfd, a descriptor of this process, protects,
// and attaches the programs. The mode stays Off.
func (p *Programs) Attach(userfaultfd int) error {
	if err := p.prepare(userfaultfd); err != nil {
		return err
	}
	programs := map[string]*ebpf.Program{"page_fault_user": p.objs.OnUserFault, "page_fault_kernel": p.objs.OnKernelFault}
	for point, prog := range p.extra {
		programs[point] = prog
	}
	for point, prog := range programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: prog})
		if err != nil {
			if p.extra[point] == nil {
				return load.Failed(object, "attach to "+point, err)
			}
			p.lacking[point] = load.Failed(object, "attach to "+point, err)
			continue
		}
		p.links = append(p.links, l)
	}
	return nil
}

// Lacking are the tracepoints that are not watched though that was wanted, and why.
func (p *Programs) Lacking() map[string]error { return p.lacking }

// Missed is how many faults of the whole host the kernel has kept from the programs
// since Load, because one of them was at work on that processor already.
func (p *Programs) Missed() (n uint64, err error) {
	for _, prog := range p.All() {
		st, err := prog.Stats()
		if err != nil {
			return 0, load.Failed(object, "ask for misses", err)
		}
		n += st.RecursionMisses
	}
	return n, nil
}

// All are the loaded programs by tracepoint, to ask the kernel what they cost.
func (p *Programs) All() map[string]*ebpf.Program {
	out := map[string]*ebpf.Program{"page_fault_user": p.objs.OnUserFault, "page_fault_kernel": p.objs.OnKernelFault}
	for point, prog := range p.extra {
		out[point] = prog
	}
	return out
}

// Dirty are the pages that were about to be written since their bits were cleared.
func (p *Programs) Dirty() *mapped.Words { return p.dirty }

// Captured are the pages that need not be copied: the programs set the bits of those
// they have copied, the caller those that it has by other means.
func (p *Programs) Captured() *mapped.Words { return p.captured }

// Blank are the pages that held zeros at the arm if they bear their mark and nothing is
// mapped there. The caller says so: of anonymous memory that is every page, of shared
// memory what its file has no page of. Such a page gets a record as soon as it is touched.
func (p *Programs) Blank() *mapped.Words { return p.blank }

// Detach ends the watching, whatever else is still in use.
func (p *Programs) Detach() error {
	var errs []error
	if p.state != nil {
		p.SetMode(Off, 0)
	}
	for _, l := range p.links {
		errs = append(errs, l.Close())
	}
	p.links = nil
	return errors.Join(errs...)
}

// Close detaches the programs and drops them and what the ring holds.
func (p *Programs) Close() error {
	errs := []error{p.Detach()}
	if p.ring != nil {
		errs = append(errs, p.ring.close())
	}
	for _, w := range []*mapped.Words{p.dirty, p.captured, p.blank} {
		if w != nil {
			errs = append(errs, w.Close())
		}
	}
	p.state = nil
	if p.raw != nil {
		errs = append(errs, unix.Munmap(p.raw))
	}
	for _, prog := range p.extra {
		errs = append(errs, prog.Close())
	}
	for _, o := range []io.Closer{p.objs.OnUserFault, p.objs.OnKernelFault, p.objs.Prepare, p.objs.States, p.objs.Dirty, p.objs.Captured, p.objs.Blank, p.objs.Ring} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}
