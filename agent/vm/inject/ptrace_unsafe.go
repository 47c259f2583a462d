package inject

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and options of ptrace(2) that x/sys does not name everywhere.
const (
	ptraceSetRegSet        = 0x4205
	ptraceGetRegSet        = 0x4204
	ptraceSeize            = 0x4206
	ptraceInterrupt        = 0x4207
	ptraceGetSigMask       = 0x420a
	ptraceSetSigMask       = 0x420b
	ptraceSeccompGetFilter = 0x420c
	ptraceGetSyscallInfo   = 0x420e
	ptraceGetRseqConfig    = 0x420f
	ptraceGetSUDConfig     = 0x4211

	optionSysGood        = 0x1
	optionSuspendSeccomp = 1 << 21

	eventStop = 128 // PTRACE_EVENT_STOP

	ntX86XState = 0x202

	syscallInfoEntry = 1
	syscallInfoExit  = 2
)

// ptrace is one raw request: these never block for long, and a detour through
// the Go scheduler would only lengthen the target's stop.
func ptrace(request, tid int, addr, data uintptr) (uintptr, error) {
	r, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}

func ptraceBuf(request, tid int, addr uintptr, buf []byte) (uintptr, error) {
	r, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr,
		uintptr(unsafe.Pointer(unsafe.SliceData(buf))), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}

// getRegSet fills buf with a register set and returns its length in bytes.
func getRegSet(tid int, kind uintptr, buf []byte) (int, error) {
	iov := unix.Iovec{Base: unsafe.SliceData(buf)}
	iov.SetLen(len(buf))
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, ptraceGetRegSet, uintptr(tid), kind,
		uintptr(unsafe.Pointer(&iov)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(iov.Len), nil
}

// getRegs and setRegs move the general registers in one atomic request.
func getRegs(tid int, regs *unix.PtraceRegs) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGS, uintptr(tid), 0,
		uintptr(unsafe.Pointer(regs)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func setRegs(tid int, regs *unix.PtraceRegs) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGS, uintptr(tid), 0,
		uintptr(unsafe.Pointer(regs)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func getSigMask(tid int) (uint64, error) {
	var mask uint64
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, ptraceGetSigMask, uintptr(tid), 8,
		uintptr(unsafe.Pointer(&mask)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return mask, nil
}

func setSigMask(tid int, mask uint64) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, ptraceSetSigMask, uintptr(tid), 8,
		uintptr(unsafe.Pointer(&mask)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// syscallStopKind says whether a syscall stop is the entry or the exit of a call.
func syscallStopKind(tid int) (byte, error) {
	var info [88]byte // struct ptrace_syscall_info; the kernel fills what it has
	if _, err := ptraceBuf(ptraceGetSyscallInfo, tid, uintptr(len(info)), info[:]); err != nil {
		return 0, err
	}
	return info[0], nil
}

// waitStatus asks for news of one thread without blocking; ok is false if there
// is none. The status is the raw word of wait4(2).
func waitStatus(tid int) (status uint32, ok bool, err error) {
	var ws int32
	r, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, uintptr(tid), uintptr(unsafe.Pointer(&ws)),
		unix.WALL|unix.WNOHANG, 0, 0, 0)
	if errno != 0 {
		return 0, false, errno
	}
	return uint32(ws), r != 0, nil
}

func schedYield() { unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
