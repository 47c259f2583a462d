package pager

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Priorities of threads, best effort: a guest thread waits for a fault, nobody
// waits for the drain. Fault threads sleep nearly always and run for microseconds,
// so a real-time priority costs nobody anything and keeps a fault from waiting for
// a time slice of the drain or of another guest.

const (
	ioprioWho   = 1       // IOPRIO_WHO_PROCESS: one thread
	ioprioClass = 2 << 13 // IOPRIO_CLASS_BE
	ioprioBest0 = ioprioClass
	ioprioBest7 = ioprioClass | 7
)

// faultThread locks the goroutine to its thread and raises that.
func faultThread(realtime bool) {
	runtime.LockOSThread()
	if realtime {
		attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
		if unix.SchedSetAttr(0, attr, 0) != nil {
			realtime = false
		}
	}
	if !realtime {
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -10)
	}
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWho, 0, ioprioBest0)
}

// drainThread locks the goroutine to its thread and lowers that.
func drainThread(index int) {
	runtime.LockOSThread()
	if index > 0 {
		// One drainer competes with the guest as an equal, the others only use
		// what is left over.
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	}
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWho, 0, ioprioBest7)
}

// protect asks the kernel to look elsewhere first when memory runs out: this process
// is small and a guest waits for it. Best effort.
func protect() { _ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0) }
