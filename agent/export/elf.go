package export

import (
	"debug/elf"
	"encoding/binary"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

// Sizes of ELF64 structures.
const (
	elfHeadBytes    = 64
	elfSegmentBytes = 56
	elfSectionBytes = 64
	// elfMaxSegments fit into the header's field; more are counted in section 0.
	elfMaxSegments = 0xffff
)

// load is a PT_LOAD: memory by address, and where it is in the file. Virtual ones
// may share their place in the file with others.
type load struct{ virt, phys, bytes, offset uint64 }

// writeELF writes a core in the form of QEMU's dump-guest-memory: a note with the
// registers of each vCPU as gdb reads them, one as crash reads them, and memory.
func writeELF(x *exporter) error {
	state, err := x.deviceState()
	if err != nil {
		return err
	}
	cpus, err := vmstate.CPUs(state)
	if err != nil {
		return problem.New(problem.Refused, "export", x.m.ID, "its vCPUs cannot be read: %w", err).
			WithHint("only x86-64 machines of a type from 2.4 on have an ELF export")
	}
	if len(cpus) == 0 {
		return x.refuse("its device state has no x86-64 vCPU")
	}
	mem, err := x.physical(false)
	if err != nil {
		return err
	}
	var virt []mapping
	if x.o.Paging {
		if virt, err = x.mappings(mem, cpus); err != nil {
			return err
		}
	}
	notes := elfNotes(cpus)
	segments := 1 + len(mem)
	if x.o.Paging {
		segments = 1 + len(virt)
	}
	head := elfHeadBytes + segments*elfSegmentBytes
	if segments >= elfMaxSegments {
		head += elfSectionBytes
	}
	start := (uint64(head+len(notes)) + pageBytes - 1) &^ (pageBytes - 1)
	loads := make([]load, 0, segments)
	at := start
	for _, r := range mem {
		x.total += r.bytes
		x.sum.Map = append(x.sum.Map, Range{GPA: r.gpa, Bytes: r.bytes, Offset: at, Block: x.m.Blocks[r.block].Name})
		if !x.o.Paging {
			// Without page tables an address means itself, so that gdb can read
			// physical memory.
			loads = append(loads, load{virt: r.gpa, phys: r.gpa, bytes: r.bytes, offset: at})
		}
		at += r.bytes
	}
	for _, v := range virt {
		off := x.sum.Map[v.mem].Offset + v.phys - mem[v.mem].gpa
		loads = append(loads, load{virt: v.virt, phys: v.phys, bytes: v.bytes, offset: off})
	}
	x.sum.VCPUs = len(cpus)
	front := append(elfHead(loads, uint64(head), len(notes)), notes...)
	if _, err := x.w.Write(front); err != nil {
		return err
	}
	if err := x.w.zeros(start - x.w.bytes); err != nil {
		return err
	}
	for _, r := range mem {
		if err := x.memory(r); err != nil {
			return err
		}
	}
	return nil
}

// elfHead is the ELF header, the program headers, and, where they are too many to
// be counted in the header, a section header that counts them.
func elfHead(loads []load, notesAt uint64, notesBytes int) []byte {
	le := binary.LittleEndian
	segments := 1 + len(loads)
	b := append([]byte(elf.ELFMAG), byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT))
	b = append(b, make([]byte, elf.EI_NIDENT-len(b))...)
	b = le.AppendUint16(b, uint16(elf.ET_CORE))
	b = le.AppendUint16(b, uint16(elf.EM_X86_64))
	b = le.AppendUint32(b, uint32(elf.EV_CURRENT))
	b = le.AppendUint64(b, 0) // entry
	b = le.AppendUint64(b, elfHeadBytes)
	many := segments >= elfMaxSegments
	if many {
		b = le.AppendUint64(b, uint64(elfHeadBytes+segments*elfSegmentBytes))
	} else {
		b = le.AppendUint64(b, 0)
	}
	b = le.AppendUint32(b, 0) // flags
	b = le.AppendUint16(b, elfHeadBytes)
	b = le.AppendUint16(b, elfSegmentBytes)
	b = le.AppendUint16(b, uint16(min(segments, elfMaxSegments)))
	if many {
		b = le.AppendUint16(b, elfSectionBytes)
		b = le.AppendUint16(b, 1)
	} else {
		b = le.AppendUint32(b, 0)
	}
	b = le.AppendUint16(b, 0)
	b = elfSegment(b, elf.PT_NOTE, load{bytes: uint64(notesBytes), offset: notesAt})
	for _, l := range loads {
		b = elfSegment(b, elf.PT_LOAD, l)
	}
	if many {
		section := make([]byte, elfSectionBytes)
		le.PutUint32(section[44:], uint32(segments)) // sh_info
		b = append(b, section...)
	}
	return b
}

// elfSegment appends a program header. Alignment 0 is what crash knows dumps with
// physical addresses by.
func elfSegment(b []byte, kind elf.ProgType, l load) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(kind))
	b = le.AppendUint32(b, 0) // flags
	for _, v := range []uint64{l.offset, l.virt, l.phys, l.bytes, l.bytes, 0} {
		b = le.AppendUint64(b, v)
	}
	return b
}

const (
	noteStatus      = 1 // NT_PRSTATUS
	statusBytes     = 336
	statusPID       = 32
	statusRegisters = 112
	qemuStateBytes  = 440
	qemuStateForm   = 1
)

// elfNotes are the registers: for gdb (the kernel's struct elf_prstatus), then for
// crash (QEMU's own note).
func elfNotes(cpus []vmstate.CPU) []byte {
	var b []byte
	for _, c := range cpus {
		b = appendNote(b, "CORE", noteStatus, prstatus(c))
	}
	for _, c := range cpus {
		b = appendNote(b, "QEMU", 0, qemuState(c))
	}
	return b
}

func appendNote(b []byte, name string, kind uint32, desc []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(len(name)+1))
	b = le.AppendUint32(b, uint32(len(desc)))
	b = le.AppendUint32(b, kind)
	b = append(append(b, name...), 0)
	b = append(b, make([]byte, -len(b)&3)...)
	b = append(b, desc...)
	return append(b, make([]byte, -len(b)&3)...)
}

// prstatus is a thread's registers; vCPUs are numbered from 1, for 0 is no thread.
func prstatus(c vmstate.CPU) []byte {
	le := binary.LittleEndian
	b := make([]byte, statusBytes)
	le.PutUint32(b[statusPID:], c.Instance+1)
	r := &c.Regs
	at := statusRegisters
	for _, v := range []uint64{
		r[15], r[14], r[13], r[12], r[vmstate.RBP], r[vmstate.RBX], r[11], r[10], r[9], r[8],
		r[vmstate.RAX], r[vmstate.RCX], r[vmstate.RDX], r[vmstate.RSI], r[vmstate.RDI],
		0, // of a system call under way: unknown
		c.RIP, uint64(c.Segs[vmstate.CS].Selector), c.RFLAGS, r[vmstate.RSP], uint64(c.Segs[vmstate.SS].Selector),
		c.Segs[vmstate.FS].Base, c.Segs[vmstate.GS].Base, uint64(c.Segs[vmstate.DS].Selector),
		uint64(c.Segs[vmstate.ES].Selector), uint64(c.Segs[vmstate.FS].Selector), uint64(c.Segs[vmstate.GS].Selector),
	} {
		le.PutUint64(b[at:], v)
		at += 8
	}
	return b
}

// qemuState is the whole of a vCPU as far as crash wants it.
func qemuState(c vmstate.CPU) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(make([]byte, 0, qemuStateBytes), qemuStateForm)
	b = le.AppendUint32(b, qemuStateBytes)
	r := &c.Regs
	for _, i := range []int{vmstate.RAX, vmstate.RBX, vmstate.RCX, vmstate.RDX, vmstate.RSI, vmstate.RDI, vmstate.RSP, vmstate.RBP,
		8, 9, 10, 11, 12, 13, 14, 15} {
		b = le.AppendUint64(b, r[i])
	}
	b = le.AppendUint64(b, c.RIP)
	b = le.AppendUint64(b, c.RFLAGS)
	s := &c.Segs
	for _, g := range []vmstate.Segment{s[vmstate.CS], s[vmstate.DS], s[vmstate.ES], s[vmstate.FS], s[vmstate.GS], s[vmstate.SS],
		c.LDT, c.TR, c.GDT, c.IDT} {
		b = le.AppendUint32(b, g.Selector)
		b = le.AppendUint32(b, g.Limit)
		b = le.AppendUint32(b, g.Flags)
		b = le.AppendUint32(b, 0)
		b = le.AppendUint64(b, g.Base)
	}
	for _, v := range c.CR {
		b = le.AppendUint64(b, v)
	}
	return le.AppendUint64(b, c.KernelGS)
}
