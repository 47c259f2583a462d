package inject

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Offsets in the x86-64 struct rt_sigframe (arch/x86/include/asm/sigframe.h):
// the return address, struct ucontext, struct siginfo.
const (
	framePretcode = 0
	frameUcFlags  = 8
	frameUcLink   = 16
	frameSsSp     = 24
	frameSsFlags  = 32
	frameSsSize   = 40
	frameGregs    = 48  // 18 registers of 8 bytes
	frameSegments = 192 // cs, gs, fs, ss: 2 bytes each
	frameErr      = 200 // err, trapno, oldmask, cr2
	frameFpstate  = 232
	frameReserved = 240 // 8 words
	frameSigmask  = 304
	frameSiginfo  = 312
	frameBytes    = frameSiginfo + 128

	ucFpXstate        = 1
	ucSigcontextSS    = 2
	ucStrictRestoreSS = 4

	// ssFlagsInvalid makes the sigaltstack part of sigreturn fail with EINVAL,
	// which the kernel ignores there: the thread's alternate signal stack,
	// which we cannot read from outside, stays as it is.
	ssFlagsInvalid = 0x7f

	redZoneBytes = 128
	fxSwReserved = 464 // software-reserved bytes of the FXSAVE image
	xsaveHeader  = 512 // XSTATE_BV
	fpMagic1     = 0x46505853
	fpMagic2     = 0x46505845
	xfeaturePKRU = 1 << 9

	userCS64 = 0x33

	syscallBytes = 2 // length of the syscall instruction
)

// Errors with which the kernel marks an interrupted call for restart; they are
// seen in rax at a ptrace stop only.
const (
	eRestartSys     = -512
	eRestartNoIntr  = -513
	eRestartNoHand  = -514
	eRestartBlock   = -516
	lowestKernelErr = -4095
)

type registers = unix.PtraceRegs

// gadget addresses in the target's own code. signalReturn is `mov $15,%rax;
// syscall` (the C library's restorer); where a program has none, popRax (`pop
// %rax; ret`) and call make one.
type gadgets struct {
	call         uint64 // syscall; ret
	signalReturn uint64
	popRax       uint64
}

func (g gadgets) complete() bool { return g.call != 0 && (g.signalReturn != 0 || g.popRax != 0) }

// codePatterns are the byte sequences looked for, with the field each one fills.
var codePatterns = []struct {
	bytes []byte
	field func(*gadgets) *uint64
}{
	{[]byte{0x0f, 0x05, 0xc3}, func(g *gadgets) *uint64 { return &g.call }},
	{[]byte{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05}, func(g *gadgets) *uint64 { return &g.signalReturn }},
	{[]byte{0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05}, func(g *gadgets) *uint64 { return &g.signalReturn }},
	{[]byte{0x58, 0xc3}, func(g *gadgets) *uint64 { return &g.popRax }},
}

// layout is where things go below a thread's red zone.
type layout struct {
	entry   uint64 // rsp of the parked thread: the first return address
	frame   uint64
	scratch uint64
	fpstate uint64
	end     uint64 // rsp - red zone
}

func layoutBelow(rsp uint64, xstateMax int, g gadgets) layout {
	var l layout
	l.end = rsp - redZoneBytes
	l.fpstate = (l.end - uint64(xstateMax) - 4) &^ 63
	l.scratch = (l.fpstate - scratchBytes) &^ 63
	l.frame = (l.scratch - frameBytes) &^ 15
	l.entry = l.frame
	if g.signalReturn == 0 {
		l.entry = l.frame - 16
	}
	return l
}

// wound is how a thread that was interrupted is brought back through sigreturn:
// the kernel's own restart (rax and rip turned back to the instruction) has to
// be done by hand, because sigreturn does not come from a system call.
// again says that the call ended with EINTR for our stop alone and is repeated
// also when we let the thread go ourselves.
func wound(r *registers) (rax, rip uint64, again bool) {
	rax, rip = r.Rax, r.Rip
	if int64(r.Orig_rax) < 0 {
		return rax, rip, false
	}
	switch int64(r.Rax) {
	case eRestartSys, eRestartNoIntr, eRestartNoHand, eRestartBlock:
		return r.Orig_rax, r.Rip - syscallBytes, false
	case -int64(unix.EINTR):
		if endlessWait(r) {
			return r.Orig_rax, r.Rip - syscallBytes, true
		}
	}
	return rax, rip, false
}

// endlessWait reports whether the call is one that the kernel never restarts and
// that can be repeated without changing its meaning: a wait without a timeout.
func endlessWait(r *registers) bool {
	switch r.Orig_rax {
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		return int32(r.R10) < 0
	case unix.SYS_EPOLL_PWAIT2:
		return r.R10 == 0
	case unix.SYS_RT_SIGTIMEDWAIT:
		return r.Rdx == 0
	case unix.SYS_SEMOP, unix.SYS_MSGRCV, unix.SYS_MSGSND:
		return true
	case unix.SYS_SEMTIMEDOP:
		return r.R10 == 0
	case unix.SYS_IO_GETEVENTS:
		return r.R8 == 0
	}
	return false
}

// buildFrame makes the bytes for [l.entry, l.fpstate+xstate+4): return addresses,
// rt_sigframe, zeroed scratch, XSAVE image.
func buildFrame(l layout, g gadgets, r *registers, mask uint64, xstate []byte, xcr0 uint64) []byte {
	size, features := usedXstate(xstate, xcr0)
	buf := make([]byte, l.fpstate-l.entry+uint64(size)+4)
	le := binary.LittleEndian
	f := buf[l.frame-l.entry:]
	if g.signalReturn != 0 {
		le.PutUint64(f[framePretcode:], g.signalReturn)
	} else {
		le.PutUint64(buf[0:], g.popRax)
		le.PutUint64(buf[8:], unix.SYS_RT_SIGRETURN)
		le.PutUint64(f[framePretcode:], g.call)
	}
	le.PutUint64(f[frameUcFlags:], ucFpXstate|ucSigcontextSS|ucStrictRestoreSS)
	le.PutUint32(f[frameSsFlags:], ssFlagsInvalid)
	rax, rip, _ := wound(r)
	for i, v := range [...]uint64{r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15,
		r.Rdi, r.Rsi, r.Rbp, r.Rbx, r.Rdx, rax, r.Rcx, r.Rsp, rip, r.Eflags} {
		le.PutUint64(f[frameGregs+8*i:], v)
	}
	le.PutUint16(f[frameSegments:], uint16(r.Cs))
	le.PutUint16(f[frameSegments+6:], uint16(r.Ss))
	le.PutUint64(f[frameFpstate:], l.fpstate)
	le.PutUint64(f[frameSigmask:], mask)

	x := buf[l.fpstate-l.entry:]
	copy(x, xstate[:size])
	if size > xsaveHeader {
		clear(x[fxSwReserved:512])
		le.PutUint32(x[fxSwReserved:], fpMagic1)
		le.PutUint32(x[fxSwReserved+4:], uint32(size)+4)
		le.PutUint64(x[fxSwReserved+8:], features)
		le.PutUint32(x[fxSwReserved+16:], uint32(size))
		le.PutUint64(x[xsaveHeader:], features&(le.Uint64(xstate[xsaveHeader:])|xfeaturePKRU))
		clear(x[xsaveHeader+8 : xsaveHeader+64]) // XCOMP_BV must be 0: standard form
		le.PutUint32(x[size:], fpMagic2)
	}
	return buf
}

// parked is the state from which the thread returns by itself.
func parked(base registers, l layout, g gadgets) registers {
	base.Rip = g.call + syscallBytes
	base.Rsp = l.entry
	base.Rax = 0
	base.Orig_rax = ^uint64(0)
	return base
}

// calling is the parked thread about to execute system call nr.
func calling(park registers, g gadgets, nr uintptr, args [6]uintptr) registers {
	park.Rip = g.call
	park.Rax = uint64(nr)
	park.Rdi, park.Rsi, park.Rdx = uint64(args[0]), uint64(args[1]), uint64(args[2])
	park.R10, park.R8, park.R9 = uint64(args[3]), uint64(args[4]), uint64(args[5])
	return park
}

// returning is what the thread gets when it is let go at a PTRACE_EVENT_STOP: its
// own registers, so that the kernel itself restarts what it interrupted.
func returning(r registers) registers {
	if rax, rip, again := wound(&r); again {
		r.Rax, r.Rip, r.Orig_rax = rax, rip, ^uint64(0)
	}
	return r
}

func result(r *registers) int64 { return int64(r.Rax) }
