package pager

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pinned is page-aligned memory outside of the Go heap: the source of UFFDIO_COPY,
// which must neither move nor be freed under the kernel's hands.
type pinned struct{ mem []byte }

func newPinned(bytes uint64) (*pinned, error) {
	mem, err := unix.Mmap(-1, 0, int(bytes), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("buffer of %d bytes: %w", bytes, err)
	}
	// Best effort: without the right to lock, the buffer may be swapped.
	_ = unix.Mlock(mem)
	return &pinned{mem: mem}, nil
}

func (p *pinned) free() {
	if p != nil && p.mem != nil {
		_ = unix.Munmap(p.mem)
		p.mem = nil
	}
}

func (p *pinned) ptr() unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(p.mem)) }

// writeRemote puts b at addr of the process.
func writeRemote(pid int, addr uint64, b []byte) (int, error) {
	local := []unix.Iovec{{Base: unsafe.SliceData(b)}}
	local[0].SetLen(len(b))
	return unix.ProcessVMWritev(pid, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
}

// adviseRemote is process_madvise for one range.
func adviseRemote(pidfd int, addr, bytes uint64, advice int) error {
	iov := unix.RemoteIovec{Base: uintptr(addr), Len: int(bytes)}
	_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pidfd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(advice), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
