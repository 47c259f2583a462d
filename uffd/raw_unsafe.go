package uffd

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The Raw methods are bare system calls: they allocate nothing and do not tell
// the Go scheduler that the thread may block. They save the ~100 ns and the
// possible hand-off of the P that syscall.Syscall costs, and are meant for a
// goroutine that owns a locked thread and does nothing else. While one of them
// blocks, it holds its P and delays a garbage collection: keep ranges small, or
// have nothing else in the process that must run.

func (h *Handle) ioctlRaw(request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, uintptr(h.fd.Load()), request, uintptr(arg))
	return errno
}

func (h *Handle) ioctl(request uintptr, arg unsafe.Pointer) unix.Errno {
	for {
		_, _, errno := syscall.Syscall(unix.SYS_IOCTL, uintptr(h.fd.Load()), request, uintptr(arg))
		if errno != unix.EINTR {
			return errno
		}
	}
}

// WriteProtectRaw sets the mark on [start, start+length).
func (h *Handle) WriteProtectRaw(start, length uint64) unix.Errno {
	a := writeProtectArg{rangeArg{start, length}, wpModeWP}
	return h.ioctlRaw(ioctlWriteProtect, unsafe.Pointer(&a))
}

// UnprotectRaw removes the mark from [start, start+length) and, if wake, wakes
// whoever waits there.
func (h *Handle) UnprotectRaw(start, length uint64, wake bool) unix.Errno {
	a := writeProtectArg{rangeArg{start, length}, wpModeDontWake}
	if wake {
		a.mode = 0
	}
	return h.ioctlRaw(ioctlWriteProtect, unsafe.Pointer(&a))
}

// CopyRaw is one UFFDIO_COPY of length bytes from src in this process to dst in
// the target: no retry, no wake on EEXIST. copied is valid with EAGAIN too (the
// copy was partial, or nothing was copied because mappings are changing).
func (h *Handle) CopyRaw(dst uint64, src unsafe.Pointer, length uint64, mode CopyMode) (copied uint64, errno unix.Errno) {
	a := copyArg{dst: dst, src: src, length: length, mode: uint64(mode)}
	errno = h.ioctlRaw(ioctlCopy, unsafe.Pointer(&a))
	if a.copied > 0 {
		copied = uint64(a.copied)
	}
	return copied, errno
}

// ZeroPageRaw is one UFFDIO_ZEROPAGE; results as those of CopyRaw.
func (h *Handle) ZeroPageRaw(start, length uint64, mode CopyMode) (filled uint64, errno unix.Errno) {
	a := fillArg{rangeArg: rangeArg{start, length}, mode: uint64(mode & CopyDontWake)}
	errno = h.ioctlRaw(ioctlZeroPage, unsafe.Pointer(&a))
	if a.done > 0 {
		filled = uint64(a.done)
	}
	return filled, errno
}

// WakeRaw wakes every thread waiting for a fault in [start, start+length).
func (h *Handle) WakeRaw(start, length uint64) unix.Errno {
	a := rangeArg{start, length}
	return h.ioctlRaw(ioctlWake, unsafe.Pointer(&a))
}

// ReadRaw reads up to len(msgs) messages. On a blocking descriptor it blocks
// the thread (not only the goroutine) until a fault or a signal.
func (h *Handle) ReadRaw(msgs []Msg) (int, unix.Errno) {
	if len(msgs) == 0 {
		return 0, unix.EINVAL
	}
	n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(h.fd.Load()),
		uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs))*MsgBytes)
	if errno != 0 {
		return 0, errno
	}
	return int(n / MsgBytes), 0
}

func (h *Handle) read(msgs []Msg) (int, unix.Errno) {
	for {
		n, _, errno := syscall.Syscall(unix.SYS_READ, uintptr(h.fd.Load()),
			uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs))*MsgBytes)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n / MsgBytes), 0
	}
}

func (h *Handle) api(a *apiArg) unix.Errno { return h.ioctl(ioctlAPI, unsafe.Pointer(a)) }

func (h *Handle) register(a *registerArg) unix.Errno {
	return h.ioctl(ioctlRegister, unsafe.Pointer(a))
}

func (h *Handle) unregister(a *rangeArg) unix.Errno {
	return h.ioctl(ioctlUnregister, unsafe.Pointer(a))
}

func (h *Handle) writeProtect(a *writeProtectArg) unix.Errno {
	return h.ioctl(ioctlWriteProtect, unsafe.Pointer(a))
}

func (h *Handle) fill(request uintptr, a *fillArg) unix.Errno {
	return h.ioctl(request, unsafe.Pointer(a))
}

func (h *Handle) wake(a *rangeArg) unix.Errno { return h.ioctl(ioctlWake, unsafe.Pointer(a)) }

func (h *Handle) copyOnce(a *copyArg, src []byte) unix.Errno {
	a.src = unsafe.Pointer(unsafe.SliceData(src))
	return h.ioctl(ioctlCopy, unsafe.Pointer(a))
}
