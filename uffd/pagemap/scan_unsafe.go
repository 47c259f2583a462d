package pagemap

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

func fillArg(start, end uint64, q *Query, out []Region) scanArg {
	a := scanArg{
		size: scanArgBytes, flags: q.Flags, start: start, end: end,
		maxPages: q.MaxPages, categoryInverted: q.CategoryInverted,
		categoryMask: q.Mask, categoryAnyOf: q.AnyOf, returnMask: q.Return,
	}
	if len(out) > 0 {
		a.vec = unsafe.Pointer(unsafe.SliceData(out))
		a.vecLen = uint64(len(out))
	}
	return a
}

func (p *Pagemap) scan(start, end uint64, q *Query, out []Region) (int, uint64, unix.Errno) {
	a := fillArg(start, end, q, out)
	for {
		n, _, errno := syscall.Syscall(unix.SYS_IOCTL, uintptr(p.fd.Load()), ioctlScan, uintptr(unsafe.Pointer(&a)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, start, errno
		}
		return int(n), a.walkEnd, 0
	}
}

// allOne reports whether the pages of [start, end) all match q, whose Return
// must be the same for all that match, in one bare system call.
func (p *Pagemap) allOneRaw(start, end uint64, q *Query) (bool, unix.Errno) {
	var r [1]Region
	a := fillArg(start, end, q, r[:])
	n, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, uintptr(p.fd.Load()), ioctlScan, uintptr(unsafe.Pointer(&a)))
	if errno != 0 {
		return false, errno
	}
	return n == 1 && r[0].Start == start && r[0].End == end, 0
}

// AllArmedRaw is AllArmed as one bare system call without allocation, for a
// locked thread. start < end, both page-aligned.
func (p *Pagemap) AllArmedRaw(start, end uint64) (bool, unix.Errno) {
	return p.allOneRaw(start, end, &armedQuery)
}

// AnyWrittenRaw is the negation of AllArmedRaw.
func (p *Pagemap) AnyWrittenRaw(start, end uint64) (bool, unix.Errno) {
	armed, errno := p.allOneRaw(start, end, &armedQuery)
	return !armed, errno
}

// AllIntactRaw is AllIntact as one bare system call without allocation.
func (p *Pagemap) AllIntactRaw(start, end uint64, shared bool) (bool, unix.Errno) {
	return p.allOneRaw(start, end, intactQuery(shared))
}

func entryBytes(e []Entry) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(e))), len(e)*8)
}
