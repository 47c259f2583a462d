package vmtest

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageOut has the kernel put a piece of a process's memory out to swap, as far as it
// finds room there.
func PageOut(pid int, hva, bytes uint64) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	piece := unix.RemoteIovec{Base: uintptr(hva), Len: int(bytes)}
	if _, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pidfd), uintptr(unsafe.Pointer(&piece)), 1, unix.MADV_PAGEOUT, 0, 0); errno != 0 {
		return fmt.Errorf("page out %d bytes at %#x of pid %d: %w", bytes, hva, pid, errno)
	}
	return nil
}
