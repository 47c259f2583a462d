package inject

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// auditArchX8664 is AUDIT_ARCH_X86_64.
const auditArchX8664 = 0xc000003e

// Verdicts of a seccomp filter (linux/seccomp.h); the lower 16 bits are data.
const (
	seccompActionMask  = 0xffff0000
	seccompKillProcess = 0x80000000
	seccompKillThread  = 0x00000000
	seccompTrap        = 0x00030000
	seccompErrno       = 0x00050000
	seccompUserNotif   = 0x7fc00000
	seccompTrace       = 0x7ff00000
	seccompLog         = 0x7ffc0000
	seccompAllow       = 0x7fff0000
)

const (
	maxSeccompFilters = 64
	maxFilterInsns    = 4096 // BPF_MAXINSNS
	bpfInsnBytes      = 8
)

// seccompFilters fetches the filters of a stopped thread, newest first. It needs
// CAP_SYS_ADMIN (the kernel answers EACCES without) and CONFIG_CHECKPOINT_RESTORE.
func seccompFilters(tid int) ([][]unix.SockFilter, error) {
	var out [][]unix.SockFilter
	for i := range maxSeccompFilters {
		n, err := ptrace(ptraceSeccompGetFilter, tid, uintptr(i), 0)
		if errors.Is(err, unix.ENOENT) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if n > maxFilterInsns {
			return nil, fmt.Errorf("seccomp filter of %d instructions", n)
		}
		raw := make([]byte, int(n)*bpfInsnBytes)
		if _, err := ptraceBuf(ptraceSeccompGetFilter, tid, uintptr(i), raw); err != nil {
			return nil, err
		}
		out = append(out, decodeFilter(raw))
	}
	return nil, fmt.Errorf("more than %d seccomp filters", maxSeccompFilters)
}

func decodeFilter(raw []byte) []unix.SockFilter {
	f := make([]unix.SockFilter, len(raw)/bpfInsnBytes)
	for i := range f {
		b := raw[i*bpfInsnBytes:]
		f[i] = unix.SockFilter{Code: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3],
			K: binary.NativeEndian.Uint32(b[4:])}
	}
	return f
}

// seccompData is struct seccomp_data, what a filter decides on.
func seccompData(nr uintptr, ip uint64, args [6]uintptr) [64]byte {
	var d [64]byte
	ne := binary.NativeEndian
	ne.PutUint32(d[0:], uint32(nr))
	ne.PutUint32(d[4:], auditArchX8664)
	ne.PutUint64(d[8:], ip)
	for i, a := range args {
		ne.PutUint64(d[16+8*i:], uint64(a))
	}
	return d
}

// seccompVerdict runs all filters, as the kernel does: the strictest action wins,
// by signed value.
func seccompVerdict(filters [][]unix.SockFilter, data [64]byte) (uint32, error) {
	verdict := uint32(seccompAllow)
	for _, f := range filters {
		v, err := runFilter(f, data)
		if err != nil {
			return 0, err
		}
		if int32(v&seccompActionMask) < int32(verdict&seccompActionMask) {
			verdict = v
		}
	}
	return verdict, nil
}

var errBadFilter = errors.New("malformed seccomp filter")

// runFilter interprets classic BPF with the subset that seccomp admits
// (kernel/seccomp.c, seccomp_check_filter). Jumps only go forward, so it ends.
func runFilter(prog []unix.SockFilter, data [64]byte) (uint32, error) {
	var a, x uint32
	var m [16]uint32
	for pc := 0; pc < len(prog); pc++ {
		in := prog[pc]
		src := in.K
		if in.Code&unix.BPF_X != 0 {
			src = x
		}
		switch in.Code & 0x07 {
		case unix.BPF_LD, unix.BPF_LDX:
			var v uint32
			switch in.Code & 0xe0 {
			case unix.BPF_ABS:
				if in.K > 60 || in.K%4 != 0 {
					return 0, errBadFilter
				}
				v = binary.NativeEndian.Uint32(data[in.K:])
			case unix.BPF_IMM:
				v = in.K
			case unix.BPF_MEM:
				if in.K > 15 {
					return 0, errBadFilter
				}
				v = m[in.K]
			case unix.BPF_LEN:
				v = uint32(len(data))
			default:
				return 0, errBadFilter
			}
			if in.Code&0x07 == unix.BPF_LD {
				a = v
			} else {
				x = v
			}
		case unix.BPF_ST, unix.BPF_STX:
			if in.K > 15 {
				return 0, errBadFilter
			}
			if in.Code&0x07 == unix.BPF_ST {
				m[in.K] = a
			} else {
				m[in.K] = x
			}
		case unix.BPF_ALU:
			v, ok := alu(in.Code&0xf0, a, src)
			if !ok {
				return 0, nil // division by zero ends a filter with 0: kill
			}
			a = v
		case unix.BPF_JMP:
			if in.Code&0xf0 == unix.BPF_JA {
				pc += int(in.K)
				continue
			}
			taken, ok := jump(in.Code&0xf0, a, src)
			if !ok {
				return 0, errBadFilter
			}
			if taken {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		case unix.BPF_RET:
			if in.Code&0x18 == unix.BPF_A {
				return a, nil
			}
			return in.K, nil
		case unix.BPF_MISC:
			if in.Code&0xf8 == unix.BPF_TXA {
				a = x
			} else {
				x = a
			}
		}
	}
	return 0, errBadFilter
}

func alu(op uint16, a, b uint32) (uint32, bool) {
	switch op {
	case unix.BPF_ADD:
		return a + b, true
	case unix.BPF_SUB:
		return a - b, true
	case unix.BPF_MUL:
		return a * b, true
	case unix.BPF_DIV:
		if b == 0 {
			return 0, false
		}
		return a / b, true
	case unix.BPF_OR:
		return a | b, true
	case unix.BPF_AND:
		return a & b, true
	case unix.BPF_XOR:
		return a ^ b, true
	case unix.BPF_LSH:
		return a << (b & 31), true
	case unix.BPF_RSH:
		return a >> (b & 31), true
	case unix.BPF_NEG:
		return -a, true
	}
	return 0, false
}

func jump(op uint16, a, b uint32) (taken, ok bool) {
	switch op {
	case unix.BPF_JEQ:
		return a == b, true
	case unix.BPF_JGT:
		return a > b, true
	case unix.BPF_JGE:
		return a >= b, true
	case unix.BPF_JSET:
		return a&b != 0, true
	}
	return false, false
}
