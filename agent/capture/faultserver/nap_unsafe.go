package faultserver

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nap sleeps without the Go scheduler's knowledge.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	// However soon it returns, callers look again.
	_, _, _ = syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
}
