package ramstream

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/ckagent/ckagent/agent/image"
)

// Sink takes what a stream holds. An error of its ends the decoding and is returned
// as it is.
type Sink interface {
	// Blocks is called once, before any page. The machine is empty in streams of
	// machine types up to 2.3.
	Blocks(machine string, blocks []Block) error
	// Page is the content of a page; data is valid until it returns. A page may
	// come several times: the last counts.
	Page(block int, offset uint64, data []byte) error
	// Zero is a page of zeros.
	Zero(block int, offset uint64) error
}

// Tail is what follows RAM.
type Tail struct {
	Machine string
	// Devices are the bytes from the first device section to the end of the
	// stream: sections, end mark, description.
	Devices []byte
}

// maxTailBytes bounds what follows RAM. The description is text and several times
// as long as what it describes, except that a large state is large by its buffers.
const maxTailBytes = image.MaxDeviceStateBytes + 64<<20

const decoderBytes = 256 << 10

// decoder is the state of one Decode.
type decoder struct {
	r       *bufio.Reader
	sink    Sink
	machine string
	id      uint32
	begun   bool // the list of blocks was read
	ended   bool // the last RAM section was read
	footers bool
	blocks  []Block
	byName  map[string]int
	last    int // block of the last page; -1: none yet
	page    [PageBytes]byte
}

// Decode reads a stream to its end. ctx is asked about now and then.
func Decode(ctx context.Context, r io.Reader, sink Sink) (*Tail, error) {
	d := &decoder{r: bufio.NewReaderSize(r, decoderBytes), sink: sink, last: -1}
	if err := d.header(); err != nil {
		return nil, err
	}
	for {
		kind, err := d.r.ReadByte()
		if err != nil {
			return nil, ended(err)
		}
		switch kind {
		case typeConfig:
			err = d.config()
		case typeCommand:
			err = d.command()
		case typeStart:
			err = d.start(ctx)
		case typePart, typeEnd:
			err = d.more(ctx, kind)
		case typeFull:
			if d.ended {
				return d.tail(kind)
			}
			err = d.early()
		default:
			err = fmt.Errorf("%w: section of type %#x", ErrFormat, kind)
		}
		if err != nil {
			return nil, err
		}
	}
}

// ended turns the end of the input into what it is in the middle of a stream.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return err
}

func (d *decoder) header() error {
	var b [8]byte
	if _, err := io.ReadFull(d.r, b[:]); err != nil {
		return ended(err)
	}
	if string(b[:4]) != magic {
		return fmt.Errorf("%w: it begins with %q, want %q", ErrFormat, b[:4], magic)
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != version {
		return fmt.Errorf("%w: version %d, this program reads %d", ErrFormat, v, version)
	}
	return nil
}

func (d *decoder) u32() (uint32, error) {
	var b [4]byte
	_, err := io.ReadFull(d.r, b[:])
	return binary.BigEndian.Uint32(b[:]), ended(err)
}

func (d *decoder) u64() (uint64, error) {
	var b [8]byte
	_, err := io.ReadFull(d.r, b[:])
	return binary.BigEndian.Uint64(b[:]), ended(err)
}

// name reads a string behind its one-byte length.
func (d *decoder) name() (string, error) {
	n, err := d.r.ReadByte()
	if err != nil {
		return "", ended(err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(d.r, b); err != nil {
		return "", ended(err)
	}
	return string(b), nil
}

// config reads the configuration section and its subsections.
func (d *decoder) config() error {
	if d.begun || d.machine != "" {
		return fmt.Errorf("%w: a configuration in the middle", ErrFormat)
	}
	n, err := d.u32()
	if err != nil {
		return err
	}
	if n == 0 || n > maxMachineBytes {
		return fmt.Errorf("%w: machine type of %d bytes", ErrFormat, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(d.r, b); err != nil {
		return ended(err)
	}
	for _, c := range b {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("%w: machine type %.40q", ErrFormat, b)
		}
	}
	d.machine = string(b)
	for {
		if next, err := d.r.Peek(1); err != nil {
			return ended(err)
		} else if next[0] != typeSubsection {
			return nil
		}
		if err := d.subsection(); err != nil {
			return err
		}
	}
}

func (d *decoder) subsection() error {
	d.r.Discard(1) // was peeked at
	name, err := d.name()
	if err != nil {
		return err
	}
	if _, err := d.u32(); err != nil { // version
		return err
	}
	switch name {
	case "configuration/target-page-bits":
		bits, err := d.u32()
		if err == nil && 1<<bits != PageBytes {
			return fmt.Errorf("%w: its pages have 2^%d bytes, not %d", ErrUnsupported, bits, PageBytes)
		}
		return err
	case "configuration/uuid":
		_, err := d.r.Discard(16)
		return ended(err)
	case "configuration/capabilities":
		n, err := d.u32()
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		// Listed are those that change what is in the stream.
		c, err := d.name()
		if err != nil {
			return err
		}
		return unsupported(fmt.Sprintf("capability %.40q", c), "migrate again with it off")
	}
	return fmt.Errorf("%w: configuration %.60q", ErrUnsupported, name)
}

func unsupported(what, advice string) error {
	return fmt.Errorf("%w: it was written with %s; %s", ErrUnsupported, what, advice)
}

// command reads a command of the migration protocol. Those of post-copy mean that
// RAM is not in the stream.
func (d *decoder) command() error {
	var b [4]byte
	if _, err := io.ReadFull(d.r, b[:]); err != nil {
		return ended(err)
	}
	cmd, n := binary.BigEndian.Uint16(b[:]), binary.BigEndian.Uint16(b[2:])
	if n > maxCommandBytes {
		return fmt.Errorf("%w: command %d of %d bytes", ErrFormat, cmd, n)
	}
	switch cmd {
	case commandOpenReturnPath, commandPing, commandSwitchoverStart:
	default:
		return unsupported(fmt.Sprintf("command %d (post-copy or COLO)", cmd), "migrate again without the capability postcopy-ram or x-colo")
	}
	_, err := d.r.Discard(int(n))
	return ended(err)
}

// sectionHead reads id, name, instance and version.
func (d *decoder) sectionHead() (id uint32, name string, ver uint32, err error) {
	if id, err = d.u32(); err != nil {
		return
	}
	if name, err = d.name(); err != nil {
		return
	}
	if _, err = d.u32(); err != nil {
		return
	}
	ver, err = d.u32()
	return
}

// early refuses devices that are saved before RAM.
func (d *decoder) early() error {
	_, name, _, err := d.sectionHead()
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: device %.80q saves its state before RAM (virtio-mem does)", ErrUnsupported, name)
}

// start reads the section that names the blocks.
func (d *decoder) start(ctx context.Context) error {
	id, name, ver, err := d.sectionHead()
	if err != nil {
		return err
	}
	if name != sectionName {
		return fmt.Errorf("%w: %.80q saves its state in pieces, beside RAM (disks migrated with it, dirty bitmaps, VFIO); migrate again without", ErrUnsupported, name)
	}
	if d.begun {
		return fmt.Errorf("%w: RAM begins twice", ErrFormat)
	}
	if ver != sectionVersion {
		return fmt.Errorf("%w: RAM of version %d, this program reads %d", ErrUnsupported, ver, sectionVersion)
	}
	d.id = id
	return d.ram(ctx, true)
}

// more reads one of the sections that follow.
func (d *decoder) more(ctx context.Context, kind byte) error {
	id, err := d.u32()
	if err != nil {
		return err
	}
	if !d.begun || d.ended || id != d.id {
		return fmt.Errorf("%w: a part of section %d, which is not open", ErrFormat, id)
	}
	d.ended = kind == typeEnd
	return d.ram(ctx, false)
}

// ram reads the records of one RAM section, and its footer.
func (d *decoder) ram(ctx context.Context, first bool) error {
	for n := 0; ; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		v, err := d.u64()
		if err != nil {
			return err
		}
		addr, flags := v&^uint64(flagMask), v&flagMask
		switch kind := flags &^ flagContinue; kind {
		case flagMemSize:
			if d.begun || flags != kind {
				return fmt.Errorf("%w: the blocks are listed twice", ErrFormat)
			}
			if err := d.list(addr); err != nil {
				return err
			}
		case flagZero, flagPage:
			if err := d.record(addr, kind, flags != kind); err != nil {
				return err
			}
		case flagEOS:
			if flags != kind || addr != 0 || first && !d.begun {
				return fmt.Errorf("%w: RAM ends with %#x", ErrFormat, v)
			}
			return d.footer(first)
		case flagXBZRLE:
			return unsupported("xbzrle", "it refers to content that an earlier transfer sent; migrate again with the capability off")
		case flagCompressed:
			return unsupported("compressed pages", "migrate again with the capability compress off, and compress the file instead")
		case flagMultifd, flagMultifd | flagEOS:
			return unsupported("multifd", "its pages went through other channels; migrate again with the capability off")
		case flagHook:
			return unsupported("RDMA", "migrate to a file or a socket")
		default:
			return fmt.Errorf("%w: RAM record of kind %#x", ErrFormat, flags)
		}
	}
}

// list reads the blocks' names and sizes, which sum up to total.
func (d *decoder) list(total uint64) error {
	if total > image.MaxRAMBytes {
		return fmt.Errorf("%w: %d bytes of RAM", ErrFormat, total)
	}
	d.byName = map[string]int{}
	for left := total; left > 0; {
		name, err := d.name()
		if err != nil {
			return err
		}
		n, err := d.u64()
		if err != nil {
			return err
		}
		if n > left || n%PageBytes != 0 {
			return fmt.Errorf("%w: RAMBlock %.80q of %d bytes, %d are left of all", ErrFormat, name, n, left)
		}
		if _, twice := d.byName[name]; twice || name == "" || len(d.blocks) == image.MaxBlocks {
			return fmt.Errorf("%w: RAMBlock %.80q after %d others: it is there already, has no name or is one too many", ErrFormat, name, len(d.blocks))
		}
		d.byName[name] = len(d.blocks)
		d.blocks = append(d.blocks, Block{name, n})
		left -= n
	}
	d.begun = true
	return d.sink.Blocks(d.machine, slices.Clone(d.blocks))
}

// record reads a page.
func (d *decoder) record(offset, kind uint64, sameBlock bool) error {
	if !d.begun {
		return fmt.Errorf("%w: a page before the list of blocks", ErrFormat)
	}
	if !sameBlock {
		name, err := d.name()
		if err != nil {
			return err
		}
		i, ok := d.byName[name]
		if !ok {
			return fmt.Errorf("%w: a page of RAMBlock %.80q, which is not in the list", ErrFormat, name)
		}
		d.last = i
	}
	if d.last < 0 {
		return fmt.Errorf("%w: the first page names no block", ErrFormat)
	}
	if offset >= d.blocks[d.last].UsedBytes {
		return fmt.Errorf("%w: a page at %#x of RAMBlock %.80q, which has %#x bytes", ErrFormat, offset, d.blocks[d.last].Name, d.blocks[d.last].UsedBytes)
	}
	if kind == flagZero {
		fill, err := d.r.ReadByte()
		if err != nil {
			return ended(err)
		}
		if fill == 0 {
			return d.sink.Zero(d.last, offset)
		}
		// QEMU before 1.7 wrote any page of one byte so.
		for i := range d.page {
			d.page[i] = fill
		}
		return d.sink.Page(d.last, offset, d.page[:])
	}
	if _, err := io.ReadFull(d.r, d.page[:]); err != nil {
		return ended(err)
	}
	return d.sink.Page(d.last, offset, d.page[:])
}

// footer reads the section's footer. Whether there are any shows after the first
// section: no section type has the footer's number.
func (d *decoder) footer(first bool) error {
	if first {
		next, err := d.r.Peek(1)
		if err != nil {
			return ended(err)
		}
		d.footers = next[0] == typeFooter
	}
	if !d.footers {
		return nil
	}
	var b [5]byte
	if _, err := io.ReadFull(d.r, b[:]); err != nil {
		return ended(err)
	}
	if b[0] != typeFooter || binary.BigEndian.Uint32(b[1:]) != d.id {
		return fmt.Errorf("%w: a RAM section without its footer", ErrFormat)
	}
	return nil
}

// tail reads what follows RAM; the first byte has been read.
func (d *decoder) tail(kind byte) (*Tail, error) {
	if !d.footers {
		return nil, unsupported("a machine type before 2.4, whose sections have no footers", "start the VM with a newer machine type")
	}
	b := bytes.NewBuffer([]byte{kind})
	n, err := io.Copy(b, io.LimitReader(d.r, maxTailBytes+1))
	if err != nil {
		return nil, ended(err)
	}
	if n > maxTailBytes {
		return nil, fmt.Errorf("%w: more than %d bytes follow RAM", ErrFormat, maxTailBytes)
	}
	return &Tail{Machine: d.machine, Devices: b.Bytes()}, nil
}
