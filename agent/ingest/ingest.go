package ingest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/ramstream"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

// Mode is what the manifest of an imported checkpoint says of how it was taken.
const Mode = "import"

// Options of an import.
type Options struct {
	Name     string // of the VM in the store; the command line's -name if empty
	Command  vm.CommandLine
	Binary   string    // QEMU's path, absolute
	UID, GID int       // whom QEMU ran as
	Groups   []int     //
	Cwd      string    // where it ran
	At       time.Time // when the stream was written
	Compress string    // of the image
}

// Result is a checkpoint that exists.
type Result struct {
	Manifest    *image.Manifest
	UnsentPages uint64 // that were in no record: the guest had given them back, they are zeros
	ResentPages uint64 // that came again, because the guest wrote them meanwhile
	Notes       []string
}

// Import reads a stream to its end and makes it a checkpoint.
func Import(ctx context.Context, r io.Reader, st *store.Store, o Options) (*Result, error) {
	x := &importer{ctx: ctx, o: o, st: st, began: time.Now()}
	if x.o.Name == "" {
		x.o.Name = o.Command.Name
	}
	if x.o.Name == "" {
		return nil, problem.New(problem.Usage, "import", "", "the VM has no name").WithHint("--name NAME")
	}
	res, err := x.run(r)
	return res, x.explain(err)
}

// importer is one call of Import.
type importer struct {
	ctx   context.Context
	o     Options
	st    *store.Store
	began time.Time
	txn   *store.Txn
	spool *spool
	save  *saveImage // nil unless it is a libvirt save image
	notes []string
}

func (x *importer) note(format string, args ...any) {
	x.notes = append(x.notes, fmt.Sprintf(format, args...))
}

func (x *importer) explain(err error) error {
	var p *problem.Error
	switch {
	case err == nil || errors.As(err, &p):
		return err
	case x.ctx.Err() != nil:
		return problem.New(problem.Cancelled, "import", x.o.Name, "%w", context.Cause(x.ctx))
	case errors.Is(err, ramstream.ErrUnsupported):
		return problem.New(problem.Refused, "import", x.o.Name, "%w", err)
	case errors.Is(err, ramstream.ErrFormat), errors.Is(err, vmstate.ErrFormat), errors.Is(err, errSaveImage):
		return problem.New(problem.Integrity, "import", x.o.Name, "%w", err).
			WithHint("import what `migrate exec:cat>FILE`, `migrate file:FILE` or virsh save wrote, whole and uncompressed")
	}
	return problem.New(problem.Failed, "import", x.o.Name, "%w", err)
}

func (x *importer) run(r io.Reader) (res *Result, err error) {
	stream, save, err := openSaveImage(r)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	x.save = save
	if x.txn, err = x.st.Begin(x.ctx, x.o.Name); err != nil {
		return nil, err
	}
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, x.txn.Abort())
		}
	}()
	if x.spool, err = newSpool(x.txn.Dir()); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, x.spool.close()) }()
	tail, err := ramstream.Decode(x.ctx, stream, x.spool)
	if err != nil {
		return nil, err
	}
	if tail.Machine == "" {
		return nil, problem.New(problem.Refused, "import", x.o.Name, "the stream does not say which machine type it is of").
			WithHint("machine types before 2.4 cannot be imported")
	}
	state, sections, err := vmstate.FromTail(tail.Devices)
	if err != nil {
		return nil, err
	}
	m, err := x.manifest(tail, state, sections)
	if err != nil {
		return nil, err
	}
	sum, err := x.write(m.Blocks, state)
	if err != nil {
		return nil, err
	}
	sum.Apply(m)
	m.Stats.TotalNS = time.Since(x.began).Nanoseconds()
	if err := x.txn.Commit(x.ctx, m); err != nil {
		return nil, err
	}
	committed = true
	return &Result{Manifest: m, UnsentPages: x.spool.unsent(), ResentPages: x.spool.resent, Notes: x.notes}, nil
}

// write puts the pages of the spool and the device state into an image.
func (x *importer) write(blocks []image.Block, state []byte) (image.Summary, error) {
	if err := x.st.CheckSpace(x.spool.dataPages*image.MinPageBytes+x.spool.pages*16+uint64(len(state)), 0); err != nil {
		return image.Summary{}, err
	}
	w, err := image.NewWriter(x.txn.Dir(), blocks, image.WriterOptions{FS: x.txn.FS(), Compress: x.o.Compress})
	if err != nil {
		return image.Summary{}, err
	}
	defer w.Abort()
	if err := x.spool.copyTo(x.ctx, w); err != nil {
		return image.Summary{}, err
	}
	if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
		return image.Summary{}, err
	}
	return w.Finish(x.ctx)
}

// manifest says what is known of the machine: from the stream its type, memory and
// run state, from the command line the rest.
func (x *importer) manifest(tail *ramstream.Tail, state []byte, l *vmstate.Listing) (*image.Manifest, error) {
	c := x.o.Command
	m := &image.Manifest{
		VM: x.o.Name, CreatedAt: x.o.At, Mode: Mode, Engine: "none",
		QEMU: image.QEMU{BinaryPath: x.o.Binary},
		Machine: image.Machine{
			Type: tail.Machine, Accel: c.Accel, CPUModel: c.CPU, UUID: c.UUID, RTC: c.RTC, Argv: append([]string(nil), c.Argv...),
			UID: x.o.UID, GID: x.o.GID, Groups: x.o.Groups, Cwd: x.o.Cwd, Facts: map[string]string{},
		},
	}
	for _, s := range c.Secrets {
		m.Machine.Redacted = append(m.Machine.Redacted, s.Prompt)
		for i := range m.Machine.Argv {
			m.Machine.Argv[i] = strings.ReplaceAll(m.Machine.Argv[i], s.Placeholder, image.RedactedMark)
		}
	}
	for _, s := range l.Sections {
		if s.Name == "cpu" {
			m.Machine.VCPUs++
		}
	}
	runs := vmstate.RunState(state, l) == "running"
	if x.save != nil {
		runs, m.Machine.LibvirtXML = x.save.running, x.save.xml
		m.Machine.Facts[image.FactManager] = "libvirt"
	} else if c.Manager != "" {
		m.Machine.Facts[image.FactManager] = c.Manager
	}
	if m.Machine.Facts[image.FactGuestRuns] = "true"; !runs {
		m.Machine.Facts[image.FactGuestRuns] = "false"
		x.note("the guest was paused when the stream was written: it will be after a restore")
	}
	for _, d := range c.Disks {
		x.note("disks are not in the stream: the image of %s must hold what it held when the stream was written", d)
	}
	main := 0
	for _, b := range x.spool.blocks {
		ib := image.Block{Name: b.name, UsedBytes: b.bytes, TotalBytes: b.bytes, PageBytes: image.MinPageBytes, GPA: -1, Main: isRAM(b.name, c.RAM)}
		if ib.Main {
			main++
		}
		m.Blocks = append(m.Blocks, ib)
	}
	if main == 0 {
		return nil, problem.New(problem.Refused, "import", x.o.Name, "none of the stream's memories is the RAM of the machine that the command line makes (its backends: %q)", c.RAM).
			WithHint("give the command line of the VM that the stream was written of")
	}
	return m, nil
}

// isRAM says whether a block is guest RAM proper: of a backend on the command line,
// or the one that the machine makes for -m.
func isRAM(name string, backends []string) bool {
	switch name {
	case "pc.ram", "microvm.ram":
		return true
	}
	for _, id := range backends {
		if id != "" && (name == id || name == "/objects/"+id || strings.HasSuffix(name, "/"+id)) {
			return true
		}
	}
	return false
}

// mayHold refuses RAM whose page table in memory would be out of proportion: a
// stream can claim any size in a few bytes.
func mayHold(pages uint64) error {
	const bytesPerPage = 17
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return fmt.Errorf("sysinfo: %w", err)
	}
	if limit := uint64(si.Totalram) * uint64(si.Unit) / 4; pages*bytesPerPage > limit {
		return problem.New(problem.Refused, "import", "", "the stream has %d pages of RAM, for which this host has too little memory", pages)
	}
	return nil
}

// spoolPath is the name a spool has for a moment.
func spoolPath(dir string) string { return filepath.Join(dir, "spool") }
