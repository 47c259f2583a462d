package vmstate

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// Segment is a segment register with its hidden part.
type Segment struct {
	Selector uint32
	Base     uint64
	Limit    uint32
	Flags    uint32
}

// CPU are the registers of one x86-64 vCPU that a core dump shows.
type CPU struct {
	Instance uint32     // QEMU's CPU index
	Regs     [16]uint64 // rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15
	RIP      uint64
	RFLAGS   uint64
	Segs     [6]Segment // es, cs, ss, ds, fs, gs
	LDT, TR  Segment
	GDT, IDT Segment
	CR       [5]uint64 // CR1 does not exist and is 0
	EFER     uint64
	KernelGS uint64 // base that SWAPGS exchanges
}

// Numbers of the registers in CPU.Regs and CPU.Segs.
const (
	RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = 0, 1, 2, 3, 4, 5, 6, 7
	ES, CS, SS, DS, FS, GS                 = 0, 1, 2, 3, 4, 5
)

// The section "cpu" of x86-64 (target/i386/machine.c), version 12, which QEMU has
// written since 2009: fields in this order, without gaps, big endian. Newer fields
// follow these or are in subsections.
const (
	cpuSection       = "cpu"
	cpuVersion       = 12
	cpuSegmentBytes  = 20
	cpuOffRegs       = 0
	cpuOffRIP        = 128
	cpuOffRFLAGS     = 136
	cpuOffSegs       = 236 // behind hflags and the x87 state
	cpuOffLDT        = cpuOffSegs + 6*cpuSegmentBytes
	cpuOffTR         = cpuOffLDT + cpuSegmentBytes
	cpuOffGDT        = cpuOffTR + cpuSegmentBytes
	cpuOffIDT        = cpuOffGDT + cpuSegmentBytes
	cpuOffCR0        = 456 // behind the SYSENTER registers; CR2, CR3, CR4 follow
	cpuOffEFER       = 816 // behind the debug and XMM registers
	cpuOffKernelGS   = 856
	cpuBytesRequired = cpuOffKernelGS + 8
)

// CPUs returns the vCPUs of a device state of an x86-64 machine, by index.
func CPUs(deviceState []byte) ([]CPU, error) {
	l, err := Parse(deviceState)
	if err != nil {
		return nil, err
	}
	var out []CPU
	for _, s := range l.Sections {
		if s.Name != cpuSection {
			continue
		}
		if s.Version != cpuVersion || s.Bytes < cpuBytesRequired {
			return nil, fmt.Errorf("%w: vCPU %d is in a section of version %d and %d bytes: not that of an x86-64 CPU", ErrFormat, s.Instance, s.Version, s.Bytes)
		}
		out = append(out, parseCPU(s.Instance, deviceState[s.Offset:s.Offset+s.Bytes]))
	}
	slices.SortFunc(out, func(a, b CPU) int { return int(int64(a.Instance) - int64(b.Instance)) })
	return out, nil
}

func parseCPU(instance uint32, b []byte) CPU {
	u64 := func(off int) uint64 { return binary.BigEndian.Uint64(b[off:]) }
	segment := func(off int) Segment {
		return Segment{Selector: binary.BigEndian.Uint32(b[off:]), Base: u64(off + 4),
			Limit: binary.BigEndian.Uint32(b[off+12:]), Flags: binary.BigEndian.Uint32(b[off+16:])}
	}
	c := CPU{Instance: instance, RIP: u64(cpuOffRIP), RFLAGS: u64(cpuOffRFLAGS),
		LDT: segment(cpuOffLDT), TR: segment(cpuOffTR), GDT: segment(cpuOffGDT), IDT: segment(cpuOffIDT),
		EFER: u64(cpuOffEFER), KernelGS: u64(cpuOffKernelGS)}
	for i := range c.Regs {
		c.Regs[i] = u64(cpuOffRegs + 8*i)
	}
	for i := range c.Segs {
		c.Segs[i] = segment(cpuOffSegs + cpuSegmentBytes*i)
	}
	for i, cr := range []int{0, 2, 3, 4} {
		c.CR[cr] = u64(cpuOffCR0 + 8*i)
	}
	return c
}
