package qmp

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inNetNS runs f in the network namespace of a process (0: the caller's own).
// Abstract and TCP addresses, and what sock_diag knows, belong to one; paths do
// not. f must do its system calls in its own goroutine.
func inNetNS(pid int, f func() error) error {
	if pid <= 0 || sameNetNS(pid) {
		return f()
	}
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that no other
		// one ever runs in the foreign namespace.
		runtime.LockOSThread()
		result <- func() error {
			ns, err := os.Open(procPath(pid, "ns", "net"))
			if err != nil {
				return fmt.Errorf("network namespace of pid %d: %w", pid, err)
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the network namespace of pid %d: %w", pid, err)
			}
			return f()
		}()
	}()
	return <-result
}

func sameNetNS(pid int) bool {
	var own, other unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &own) != nil || unix.Stat(procPath(pid, "ns", "net"), &other) != nil {
		return true // cannot tell: the ordinary case
	}
	return own.Dev == other.Dev && own.Ino == other.Ino
}
