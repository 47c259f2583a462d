package source

import (
	"fmt"
	"io"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ReadMemory copies len(dst) bytes at addr of the process into dst. It neither
// allocates nor yields to the scheduler, so it can serve a fault; a copy of a
// megabyte holds its thread for some hundred microseconds.
func ReadMemory(pid int, addr uint64, dst []byte) error {
	for len(dst) > 0 {
		local := unix.Iovec{Base: &dst[0], Len: uint64(len(dst))}
		remote := unix.RemoteIovec{Base: uintptr(addr), Len: len(dst)}
		n, _, errno := syscall.RawSyscall6(unix.SYS_PROCESS_VM_READV, uintptr(pid),
			uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("read %d bytes at %#x of process %d: %w", len(dst), addr, pid, errno)
		}
		if n == 0 {
			return fmt.Errorf("read %d bytes at %#x of process %d: %w", len(dst), addr, pid, unix.EFAULT)
		}
		dst, addr = dst[n:], addr+uint64(n)
	}
	return nil
}

// readFile is pread(2) of all of dst, with ReadMemory's manners.
func readFile(fd int, offset int64, dst []byte) error {
	for len(dst) > 0 {
		n, _, errno := syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd),
			uintptr(unsafe.Pointer(&dst[0])), uintptr(len(dst)), uintptr(offset), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("read %d bytes at offset %d: %w", len(dst), offset, errno)
		}
		if n == 0 {
			return fmt.Errorf("read %d bytes at offset %d: %w", len(dst), offset, io.ErrUnexpectedEOF)
		}
		dst, offset = dst[n:], offset+int64(n)
	}
	return nil
}

// cacheStat is struct cachestat (Linux 6.5), in pages.
type cacheStat struct{ cached, dirty, writeback, evicted, recentlyEvicted uint64 }

const sysCachestat = 451

// cachestat counts the pages of a range of a file that are in the page cache.
func cachestat(fd int, offset, length uint64) (s cacheStat, err error) {
	r := struct{ offset, length uint64 }{offset, length}
	_, _, errno := syscall.RawSyscall6(sysCachestat, uintptr(fd), uintptr(unsafe.Pointer(&r)), uintptr(unsafe.Pointer(&s)), 0, 0, 0)
	if errno != 0 {
		return s, errno
	}
	return s, nil
}
