//go:build linux && (amd64 || arm64)

package fsys

import (
	"io"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aligned reports whether a buffer starts at a multiple of n.
func aligned(b []byte, n uintptr) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%n == 0 }

// writeVec is pwritev(2) that goes on after a short write and allocates nothing:
// unix.Pwritev builds its vector on the heap once it has more than eight parts.
// The buffers may be shared memory; the kernel copies out of them, so a page
// that vanishes meanwhile is EFAULT here and no signal. 64-bit only: an offset is
// one argument.
func writeVec(fd int, iov []unix.Iovec, bufs [][]byte, off int64) (int64, error) {
	var total int64
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		v := unix.Iovec{Base: unsafe.SliceData(b)}
		v.SetLen(len(b))
		iov = append(iov, v)
		total += int64(len(b))
	}
	var done int64
	for len(iov) > 0 {
		at := off + done
		var n uintptr
		var errno unix.Errno
		if len(iov) == 1 { // the common case: one long run
			n, _, errno = unix.Syscall6(unix.SYS_PWRITE64, uintptr(fd),
				uintptr(unsafe.Pointer(iov[0].Base)), uintptr(iov[0].Len), uintptr(at), 0, 0)
		} else {
			n, _, errno = unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd),
				uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)), uintptr(at), 0, 0)
		}
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return done, errno
		}
		if n == 0 {
			return done, io.ErrShortWrite
		}
		done += int64(n)
		for rest := uint64(n); rest > 0; {
			if rest < iov[0].Len {
				iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), rest))
				iov[0].SetLen(int(iov[0].Len - rest))
				break
			}
			rest -= iov[0].Len
			iov = iov[1:]
		}
	}
	runtime.KeepAlive(bufs)
	if done != total {
		return done, io.ErrShortWrite
	}
	return done, nil
}
