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
	go onSpareThread(func() {
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
	})
	return <-result
}

// onSpareThread runs f on a thread that ends with it, so that no other
// goroutine ever runs in the namespace f has entered. The first thread of the
// process never ends, and /proc/self/net is what that one sees: f is kept off it.
func onSpareThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		done := make(chan struct{})
		go func() { // elsewhere, since this thread is taken
			defer close(done)
			onSpareThread(f)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	f() // and no unlock: that is what ends the thread
}

func sameNetNS(pid int) bool {
	var own, other unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &own) != nil || unix.Stat(procPath(pid, "ns", "net"), &other) != nil {
		return true // cannot tell: the ordinary case
	}
	return own.Dev == other.Dev && own.Ino == other.Ino
}
