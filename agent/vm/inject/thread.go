package inject

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// thread is what /proc says of one thread before it is touched.
type thread struct {
	tid   int
	comm  string
	state byte
	nr    int64 // system call it sleeps in; -1 not in one, -2 unknown (running)
	args  [6]uint64
	rsp   uint64
	vcpu  bool // the caller said so
}

// kvmRun is KVM_RUN, _IO(0xAE, 0x80).
const kvmRun = 0xae80

// unfit is the rank of a thread that cannot be used at all.
const unfit = 100

// rank orders candidates: lower is better. A vCPU's pause costs the guest, the
// main loop's costs its I/O, a call with a relative timeout is not restarted
// exactly should the tracer die. QEMU names its threads only with
// debug-threads=on; among equals the oldest is best, which in QEMU is the one
// that frees memory in the background.
func (t thread) rank(pid int) int {
	switch t.state {
	case 'S', 'R', 'T':
	default:
		return unfit // D, Z, X, t: does not stop, or is somebody else's
	}
	if strings.HasPrefix(t.comm, "iou-") || strings.HasPrefix(t.comm, "vhost-") {
		return unfit // kernel workers in the process's clothes never reach user mode
	}
	// Ranks 7 and up cost the guest or the thread itself.
	vcpu := t.vcpu || strings.HasPrefix(t.comm, "CPU ") || t.nr == unix.SYS_IOCTL && t.args[1] == kvmRun
	switch {
	case t.nr < 0 && vcpu:
		return 10
	case t.nr < 0:
		return 9
	case vcpu:
		return 7
	case t.nr == unix.SYS_RESTART_SYSCALL:
		return 8
	case t.restartsInexactly():
		return 6
	case t.tid == pid:
		return 5
	case t.nr == unix.SYS_FUTEX:
		return 0
	case t.nr == unix.SYS_PPOLL, t.nr == unix.SYS_SELECT, t.nr == unix.SYS_PSELECT6, t.nr == unix.SYS_POLL,
		t.nr == unix.SYS_READ, t.nr == unix.SYS_RECVMSG, t.nr == unix.SYS_RECVFROM, t.nr == unix.SYS_ACCEPT,
		t.nr == unix.SYS_ACCEPT4, t.nr == unix.SYS_PAUSE, t.nr == unix.SYS_RT_SIGSUSPEND, t.nr == unix.SYS_WAIT4:
		return 1
	}
	return 3
}

// restartsInexactly: see the package comment on what a tracer's death costs.
func (t thread) restartsInexactly() bool {
	switch t.nr {
	case unix.SYS_NANOSLEEP:
		return t.args[0] != t.args[1]
	case unix.SYS_CLOCK_NANOSLEEP:
		return t.args[1]&1 == 0 && t.args[2] != t.args[3] // TIMER_ABSTIME
	case unix.SYS_POLL:
		return int32(t.args[2]) >= 0
	case unix.SYS_FUTEX:
		const cmdMask, waitBitset = 0x7f, 9
		return t.args[3] != 0 && t.args[1]&cmdMask != waitBitset
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		return int32(t.args[3]) >= 0
	case unix.SYS_RT_SIGTIMEDWAIT:
		return t.args[2] != 0
	}
	return false
}

// listThreads reads the state of every thread of a process, best candidate first,
// without those that are unfit. vcpus are threads known to be vCPUs.
func listThreads(pid int, vcpus ...int) ([]thread, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []thread
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		t, err := readThread(pid, tid)
		if err != nil {
			continue // it has ended meanwhile
		}
		t.vcpu = slices.Contains(vcpus, tid)
		if t.rank(pid) < unfit {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b thread) int {
		return cmp.Or(a.rank(pid)-b.rank(pid), a.tid-b.tid)
	})
	return out, nil
}

func readThread(pid, tid int) (thread, error) {
	base := fmt.Sprintf("/proc/%d/task/%d/", pid, tid)
	stat, err := os.ReadFile(base + "stat")
	if err != nil {
		return thread{}, err
	}
	t, err := parseThreadStat(string(stat))
	if err != nil {
		return thread{}, err
	}
	t.tid = tid
	t.nr = -2
	if call, err := os.ReadFile(base + "syscall"); err == nil {
		parseThreadSyscall(string(call), &t)
	}
	return t, nil
}

// parseThreadStat takes name and state out of "tid (comm) S ...".
func parseThreadStat(s string) (thread, error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open || end+2 >= len(s) {
		return thread{}, fmt.Errorf("not a stat line: %.80q", s)
	}
	return thread{comm: s[open+1 : end], state: s[end+2]}, nil
}

// parseThreadSyscall reads "nr a0 a1 a2 a3 a4 a5 sp pc", "-1 sp pc" or "running".
func parseThreadSyscall(s string, t *thread) {
	f := strings.Fields(s)
	if len(f) == 3 && f[0] == "-1" {
		t.nr = -1
		t.rsp, _ = strconv.ParseUint(strings.TrimPrefix(f[1], "0x"), 16, 64)
		return
	}
	if len(f) != 9 {
		return
	}
	nr, err := strconv.ParseInt(f[0], 10, 64)
	if err != nil {
		return
	}
	t.nr = nr
	for i := range t.args {
		t.args[i], _ = strconv.ParseUint(strings.TrimPrefix(f[1+i], "0x"), 16, 64)
	}
	t.rsp, _ = strconv.ParseUint(strings.TrimPrefix(f[7], "0x"), 16, 64)
}
