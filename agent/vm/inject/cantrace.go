package inject

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// facts is what decides whether a process can be traced; all of it is read
// without touching the process.
type facts struct {
	pid          int
	tracer       int    // TracerPid of one of its threads, 0 none
	tracerComm   string // its name
	seccomp      int    // 0 none, 1 strict, 2 filter
	yama         int    // ptrace_scope, -1 without Yama
	capPtrace    bool   // we have CAP_SYS_PTRACE
	capAdmin     bool   // we have CAP_SYS_ADMIN
	sameUser     bool   // same uid and gid
	dumpable     bool
	elf64        bool
	apparmor     string // its profile, "" or "unconfined"
	memErr       error  // what opening its memory answered
	kernelThread bool
}

// CanTrace says whether a system call can be run inside the process, by looking
// only: nil, or a *problem.Error that names what stands in the way and what to
// do about it. It may still fail later, for instance if a debugger attaches.
func CanTrace(pid int) error {
	f, err := readFacts(pid)
	if err != nil {
		return problem.New(problem.NotFound, "trace", pidObject(pid), "no such process: %w", err)
	}
	return f.verdict()
}

func (f facts) refuse(format string, args ...any) *problem.Error {
	return problem.New(problem.Refused, "trace", pidObject(f.pid), format, args...)
}

// verdict is the decision, without any input but the facts.
func (f facts) verdict() error {
	switch {
	case f.kernelThread:
		return f.refuse("it is a kernel thread")
	case f.tracer != 0:
		return f.refuse("it is traced already, by pid %d (%s)", f.tracer, f.tracerComm).
			WithHint("end that debugger or tracer first")
	case !f.elf64:
		return f.refuse("it is not a 64-bit x86 program").
			WithHint("only 64-bit QEMU processes can be protected")
	case f.seccomp == 1:
		return f.refuse("it runs under strict seccomp, which allows no further system call")
	case f.seccomp == 2 && !f.capAdmin:
		return f.refuse("it runs under a seccomp filter, which only CAP_SYS_ADMIN may read").
			WithHint("run ckagent with CAP_SYS_ADMIN, so that it can prove that its system calls are allowed")
	case f.yama == 3:
		return f.refuse("Yama forbids tracing altogether (kernel.yama.ptrace_scope = 3)").
			WithHint("that value can only be left by a reboot; set 2 or less at boot and run ckagent with CAP_SYS_PTRACE")
	}
	if f.memErr == nil {
		return nil
	}
	switch {
	case errors.Is(f.memErr, unix.ENOENT), errors.Is(f.memErr, unix.ESRCH):
		return problem.New(problem.NotFound, "trace", pidObject(f.pid), "it ended: %w", f.memErr)
	case f.yama == 2 && !f.capPtrace:
		return f.refuse("Yama allows only CAP_SYS_PTRACE to trace (kernel.yama.ptrace_scope = 2): %w", f.memErr).
			WithHint("run ckagent as root or with CAP_SYS_PTRACE")
	case f.yama == 1 && !f.capPtrace && f.sameUser && f.dumpable:
		return f.refuse("Yama allows tracing of descendants only (kernel.yama.ptrace_scope = 1): %w", f.memErr).
			WithHint("run ckagent with CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 0")
	case !f.capPtrace && !f.sameUser:
		return f.refuse("it belongs to another user: %w", f.memErr).
			WithHint("run ckagent as that user, as root, or with CAP_SYS_PTRACE")
	case !f.capPtrace && !f.dumpable:
		return f.refuse("it is not dumpable (it changed its user or forbade dumps): %w", f.memErr).
			WithHint("run ckagent with CAP_SYS_PTRACE")
	case f.apparmor != "" && f.apparmor != "unconfined":
		return f.refuse("its AppArmor profile %q does not let us trace it: %w", f.apparmor, f.memErr).
			WithHint("add `ptrace (readby, tracedby) peer=unconfined,` (or ckagent's own profile as peer) to it and reload it")
	case !f.capPtrace:
		return f.refuse("we lack CAP_SYS_PTRACE: %w", f.memErr).WithHint("run ckagent as root or with CAP_SYS_PTRACE")
	}
	return f.refuse("the kernel does not allow access to its memory: %w", f.memErr).
		WithHint("look for a security module (AppArmor, SELinux), kernel lockdown or a user namespace that is not ours")
}

func readFacts(pid int) (facts, error) {
	f := facts{pid: pid, yama: -1}
	dir := fmt.Sprintf("/proc/%d/", pid)
	st, err := os.Stat(dir)
	if err != nil {
		return f, err
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return f, err
	}
	stat, err := procstat.Read(pid)
	if err != nil {
		return f, err
	}
	f.kernelThread = stat.Kernel()
	if !f.kernelThread && (stat.Ended() || statusField(status, "VmSize") == nil) {
		return f, fmt.Errorf("it has ended or is about to (%c)", stat.State)
	}
	f.seccomp, _ = strconv.Atoi(string(statusField(status, "Seccomp")))
	if b, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil {
		f.yama, _ = strconv.Atoi(string(bytes.TrimSpace(b)))
	}
	f.capPtrace, f.capAdmin = ownCapability(unix.CAP_SYS_PTRACE), ownCapability(unix.CAP_SYS_ADMIN)
	uids := bytes.Fields(statusField(status, "Uid"))
	f.sameUser = len(uids) == 4 && allEqual(uids, strconv.Itoa(os.Geteuid()))
	if s, ok := st.Sys().(*syscall.Stat_t); ok && len(uids) == 4 {
		// /proc/PID belongs to root while its process is not dumpable.
		f.dumpable = strconv.Itoa(int(s.Uid)) == string(uids[1])
	}
	f.tracer, f.tracerComm = findTracer(pid)
	f.apparmor = appArmorProfile(pid)
	f.elf64 = isELF64(pid)
	mem, err := os.OpenFile(dir+"mem", os.O_RDWR, 0)
	if f.memErr = err; err == nil {
		mem.Close()
	}
	return f, nil
}

func allEqual(fields [][]byte, want string) bool {
	for _, f := range fields {
		if string(f) != want {
			return false
		}
	}
	return true
}

func ownCapability(c int) bool {
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return false
	}
	v, err := strconv.ParseUint(string(statusField(b, "CapEff")), 16, 64)
	return err == nil && v&(1<<c) != 0
}

// findTracer looks at every thread: a tracer may hold a single one.
func findTracer(pid int) (int, string) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return 0, ""
	}
	for _, e := range entries {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", pid, e.Name()))
		if err != nil {
			continue
		}
		if n, _ := strconv.Atoi(string(statusField(b, "TracerPid"))); n != 0 {
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", n))
			return n, string(bytes.TrimSpace(comm))
		}
	}
	return 0, ""
}

func appArmorProfile(pid int) string {
	for _, name := range []string{"attr/apparmor/current", "attr/current"} {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name)); err == nil {
			return strings.Trim(string(b), "\x00\n ")
		}
	}
	return ""
}

// isELF64 reads the class of the program; what cannot be read is left to the
// check at the stop.
func isELF64(pid int) bool {
	exe, err := os.Open(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return true
	}
	defer exe.Close()
	var ident [20]byte
	if _, err := exe.ReadAt(ident[:], 0); err != nil {
		return true
	}
	const class64, machineX8664 = 2, 62
	return ident[4] == class64 && ident[18] == machineX8664
}
