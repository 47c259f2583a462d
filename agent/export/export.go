package export

import (
	"context"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// Format names what a checkpoint is turned into.
type Format string

const (
	QEMU    Format = "qemu"    // migration stream for -incoming
	Libvirt Format = "libvirt" // save image for virsh restore
	ELF     Format = "elf"     // core dump for gdb and crash
	Raw     Format = "raw"     // guest-physical memory
)

// Options of an export.
type Options struct {
	Format Format
	// XML is the domain for Libvirt, instead of the recorded one.
	XML string
	// Paging has ELF list memory by the virtual addresses of the vCPUs' page tables
	// instead of physical ones.
	Paging bool
	// Progress is told how much of RAM has been read; it must not block.
	Progress func(doneBytes, totalBytes uint64)
}

// Summary says what was written.
type Summary struct {
	ID     string  `json:"id"`
	VM     string  `json:"vm"`
	Format Format  `json:"format"`
	Bytes  uint64  `json:"output_bytes"`
	VCPUs  int     `json:"vcpus,omitempty"`  // with registers in an ELF core
	Map    []Range `json:"map,omitempty"`    // where guest-physical memory is in the output
	Paused bool    `json:"paused,omitempty"` // the guest was paused when the checkpoint was taken
	Disks  []Disk  `json:"disks,omitempty"`  // what a loaded state must find, in formats that are loaded
}

// Range is a piece of guest-physical memory in the output.
type Range struct {
	GPA    uint64 `json:"gpa"`
	Bytes  uint64 `json:"bytes"`
	Offset uint64 `json:"output_offset"`
	Block  string `json:"block"`
}

// writers are the formats.
var writers = map[Format]func(x *exporter) error{
	QEMU: writeQEMU, Libvirt: writeLibvirt, ELF: writeELF, Raw: writeRaw,
}

// Formats are the names of all formats, sorted.
func Formats() []string {
	var out []string
	for _, f := range slices.Sorted(maps.Keys(writers)) {
		out = append(out, string(f))
	}
	return out
}

// exporter is one call of Write.
type exporter struct {
	ctx   context.Context
	r     *image.Reader
	m     *image.Manifest
	w     *counter
	o     Options
	sum   *Summary
	buf   []byte
	done  uint64
	total uint64
}

// Write encodes a checkpoint.
func Write(ctx context.Context, r *image.Reader, w io.Writer, o Options) (*Summary, error) {
	write, ok := writers[o.Format]
	if !ok {
		return nil, problem.New(problem.Usage, "export", string(o.Format), "no such format").
			WithHint("one of %s", strings.Join(Formats(), ", "))
	}
	m := r.Manifest()
	x := &exporter{ctx: ctx, r: r, m: m, w: &counter{w: w}, o: o, sum: &Summary{ID: m.ID, VM: m.VM, Format: o.Format,
		Paused: m.Machine.Facts[image.FactGuestRuns] == "false"}}
	if err := write(x); err != nil {
		return nil, x.explain(err)
	}
	x.sum.Bytes = x.w.bytes
	if o.Format == QEMU || o.Format == Libvirt {
		x.sum.Disks = disks(m, r.Dir())
	}
	return x.sum, nil
}

// explain gives an error its place.
func (x *exporter) explain(err error) error {
	if err := x.ctx.Err(); err != nil {
		return problem.New(problem.Cancelled, "export", x.m.ID, "%w", context.Cause(x.ctx))
	}
	if x.w.err != nil {
		return problem.New(problem.Failed, "write export", x.m.ID, "%w", x.w.err)
	}
	if code := problem.CodeOf(err); code != problem.Failed {
		return err
	}
	return problem.New(problem.Failed, "export", x.m.ID, "%w", err)
}

func (x *exporter) refuse(format string, args ...any) *problem.Error {
	return problem.New(problem.Refused, "export", x.m.ID, format, args...)
}

// deviceState reads the device state, which every format but Raw needs.
func (x *exporter) deviceState() ([]byte, error) { return x.r.DeviceState(x.ctx) }

// stepBytes is what is read at once.
const stepBytes = 1 << 20

// each reads part of a block in order, both ends multiples of 4096, and hands on
// its pieces: data of whole pages, or, where data is nil, n bytes of zeros.
func (x *exporter) each(block int, offset, bytes uint64, f func(offset uint64, data []byte, n uint64) error) error {
	b := &x.m.Blocks[block]
	if x.buf == nil {
		x.buf = make([]byte, max(stepBytes, image.MaxPageBytes))
	}
	for end := offset + bytes; offset < end; {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		page := offset / b.PageBytes
		within := offset % b.PageBytes // more than 0 only in pages larger than 4096
		want := (end - page*b.PageBytes + b.PageBytes - 1) / b.PageBytes
		pages, zero, err := x.r.Extent(block, page, want)
		if err != nil {
			return err
		}
		var n uint64
		if zero {
			n = min(pages*b.PageBytes-within, end-offset)
			err = f(offset, nil, n)
		} else {
			pages = min(pages, uint64(len(x.buf))/b.PageBytes)
			data := x.buf[:pages*b.PageBytes]
			if _, err := x.r.ReadRun(block, page, data); err != nil {
				return err
			}
			n = min(uint64(len(data))-within, end-offset)
			err = f(offset, data[within:within+n], n)
		}
		if err != nil {
			return err
		}
		offset += n
		if x.done += n; x.o.Progress != nil {
			x.o.Progress(min(x.done, x.total), x.total)
		}
	}
	return nil
}

// counter counts what went out, and keeps the writer's error apart from others.
type counter struct {
	w     io.Writer
	bytes uint64
	err   error
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.bytes += uint64(n)
	if err != nil {
		c.err = err
	}
	return n, err
}

// Skipper is a writer in which zeros need not be written.
type Skipper interface {
	// Skip stands for writing n bytes of zeros.
	Skip(n uint64) error
}

var zeros [stepBytes]byte

// zeros writes n zeros, or a hole where there can be one.
func (c *counter) zeros(n uint64) error {
	if s, ok := c.w.(Skipper); ok {
		if err := s.Skip(n); err != nil {
			c.err = err
			return err
		}
		c.bytes += n
		return nil
	}
	for n > 0 {
		k, err := c.Write(zeros[:min(n, uint64(len(zeros)))])
		if err != nil {
			return err
		}
		n -= uint64(k)
	}
	return nil
}
