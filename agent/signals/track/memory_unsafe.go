package track

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const madvCollapse = 25 // MADV_COLLAPSE, Linux 6.1

// collapse asks the kernel to make one huge page of another process whole.
func collapse(pidfd int, at uint64) error {
	v := unix.RemoteIovec{Base: uintptr(at), Len: hugeBytes}
	_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pidfd), uintptr(unsafe.Pointer(&v)), 1, madvCollapse, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}
