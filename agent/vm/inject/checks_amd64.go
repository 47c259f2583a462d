package inject

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// checkThread refuses threads whose way home this architecture part does not know.
func (t *tracer) checkThread() error {
	if t.orig.Cs != userCS64 {
		return t.errorf(problem.Refused, "it runs 32-bit code (cs %#x)", t.orig.Cs).
			WithHint("only 64-bit QEMU processes can be protected")
	}
	if feature := statusField(t.status, "x86_Thread_features"); bytes.Contains(feature, []byte("shstk")) {
		return t.errorf(problem.Refused, "it runs with a shadow stack").
			WithHint("start QEMU with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off")
	}
	// struct ptrace_sud_config: mode, selector, offset, len. Kernels before 6.4
	// do not tell (EIO), and QEMU does not use it.
	var sud [32]byte
	if _, err := ptraceBuf(ptraceGetSUDConfig, t.tid, uintptr(len(sud)), sud[:]); err == nil {
		if binary.NativeEndian.Uint64(sud[:]) != 0 {
			return t.errorf(problem.Refused, "its system calls are dispatched to user space")
		}
	}
	return nil
}

// checkRseq leaves alone a thread that was preempted inside a restartable
// sequence: the kernel aborts the sequence at the next return to user mode, by
// the instruction pointer it finds, and that would be ours.
func (t *tracer) checkRseq() error {
	if int64(t.orig.Orig_rax) >= 0 {
		return nil // sequences make no system calls
	}
	var conf [24]byte // struct ptrace_rseq_configuration: pointer, size, signature, flags
	if _, err := ptraceBuf(ptraceGetRseqConfig, t.tid, uintptr(len(conf)), conf[:]); err != nil {
		if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) {
			return nil // the kernel has no restartable sequences
		}
		return t.failed("read rseq", err)
	}
	abi := binary.NativeEndian.Uint64(conf[:])
	if abi == 0 {
		return nil
	}
	const rseqCS = 8 // offset of struct rseq's pointer to the sequence
	var b [32]byte   // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
	if _, err := t.mem.ReadAt(b[:8], int64(abi+rseqCS)); err != nil {
		return t.unfit("its rseq area cannot be read: %v", err)
	}
	cs := binary.NativeEndian.Uint64(b[:8])
	if cs == 0 {
		return nil
	}
	if _, err := t.mem.ReadAt(b[:], int64(cs)); err != nil {
		return t.unfit("its restartable sequence cannot be read: %v", err)
	}
	start, length := binary.NativeEndian.Uint64(b[8:]), binary.NativeEndian.Uint64(b[16:])
	if t.orig.Rip-start < length {
		return t.unfit("it is inside a restartable sequence")
	}
	return nil
}

// checkRoom looks at the mappings as they were just before the stop: a thread's
// own stack does not go away. Only for a stack they do not know, they are read
// again, which takes a millisecond in a big process.
func (t *tracer) checkRoom() error {
	if hasRoom(t.maps, t.l) {
		return nil
	}
	maps, err := readMaps(t.pid)
	if err != nil {
		return t.failed("read maps", unix.ESRCH)
	}
	if !hasRoom(maps, t.l) {
		return t.unfit("its stack has no room below %#x", t.orig.Rsp)
	}
	return nil
}

// hasRoom: everything from the first return address to the thread's rsp lies in
// one writable mapping, so that nothing but its own free stack is written.
func hasRoom(maps []mapping, l layout) bool {
	for _, m := range maps {
		if m.start <= l.entry && l.end+redZoneBytes <= m.end {
			return m.writable() && l.entry-m.start >= stackReserve
		}
	}
	return false
}

// stackReserve is left below the frame for a signal frame of the kernel's own.
const stackReserve = 4096

// loadSeccomp fetches the filters that our calls will meet, and makes sure that
// the way home, which nobody watches after our death, is open.
func (t *tracer) loadSeccomp() (err error) {
	switch string(statusField(t.status, "Seccomp")) {
	case "", "0":
		return nil
	case "2":
	default:
		return t.errorf(problem.Refused, "strict seccomp allows it no other system call")
	}
	if t.filters, err = seccompFilters(t.tid); err != nil {
		return t.errorf(problem.Refused, "its seccomp filter cannot be read: %w", err).
			WithHint("run ckagent with CAP_SYS_ADMIN, on a kernel with CONFIG_CHECKPOINT_RESTORE")
	}
	for _, at := range []uint64{t.g.signalReturn, t.g.call} {
		if at == 0 {
			continue
		}
		v, err := seccompVerdict(t.filters, seccompData(unix.SYS_RT_SIGRETURN, at+syscallBytes, [6]uintptr{}))
		if err != nil {
			return t.errorf(problem.Refused, "%w", err)
		}
		if a := v & seccompActionMask; a != seccompAllow && a != seccompLog {
			return t.errorf(problem.Refused, "its seccomp filter does not allow rt_sigreturn")
		}
	}
	return nil
}

// permitted evaluates the target's seccomp filters for a call of ours. Only what
// is harmless should we die before it is executed goes on.
func (t *tracer) permitted(name string, nr uintptr, args [6]uintptr) error {
	if len(t.filters) == 0 {
		return nil
	}
	v, err := seccompVerdict(t.filters, seccompData(nr, t.g.call+syscallBytes, args))
	if err != nil {
		return t.errorf(problem.Refused, "%w", err)
	}
	switch v & seccompActionMask {
	case seccompAllow, seccompLog:
		return nil
	case seccompErrno, seccompTrace:
		if t.suspend {
			return nil
		}
		if _, err := ptrace(unix.PTRACE_SETOPTIONS, t.tid, 0, optionSysGood|optionSuspendSeccomp); err != nil {
			return t.errorf(problem.Refused, "its seccomp filter forbids %s, and it cannot be suspended: %w", name, err).
				WithHint("run ckagent with CAP_SYS_ADMIN outside any seccomp sandbox of its own")
		}
		t.suspend = true
		return nil
	}
	return t.errorf(problem.Refused, "its seccomp filter answers %s with %#x, which would kill or hang it", name, v).
		WithHint("start QEMU with a sandbox that allows the call, such as QEMU's own -sandbox on")
}

// statusField is the value of a field of /proc/PID/status.
func statusField(status []byte, name string) []byte {
	for line := range bytes.Lines(status) {
		if v, ok := bytes.CutPrefix(line, []byte(name+":")); ok {
			return bytes.TrimSpace(v)
		}
	}
	return nil
}
