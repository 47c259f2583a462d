package faultserver

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// processMadvise gives advice on memory of another process.
func processMadvise(pidfd int, addr, length uint64, advice int) error {
	iov := unix.RemoteIovec{Base: uintptr(addr), Len: int(length)}
	_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pidfd),
		uintptr(unsafe.Pointer(&iov)), 1, uintptr(advice), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
