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

// armedQuery matches pages that carry the mark for certain: something is there
// (a page, a swap entry or a marker) and it is not without the mark. Absence
// alone is not "not written": where a whole page table is missing, the kernel
// reports neither.
const (
	armedInverted = IsWritten
	armedMask     = IsWritten
	armedAnyOf    = IsPresent | IsSwapped
	armedReturn   = IsWritten // 0 for all of them, so that neighbours merge
)

// AllArmedRaw reports whether every page of [start, end) carries the
// write-protect mark, in one bare system call without allocation: for a locked
// thread. end > start, page-aligned.
func (p *Pagemap) AllArmedRaw(start, end uint64) (bool, unix.Errno) {
	var r Region
	a := scanArg{
		size: scanArgBytes, start: start, end: end,
		vec: unsafe.Pointer(&r), vecLen: 1,
		categoryInverted: armedInverted, categoryMask: armedMask,
		categoryAnyOf: armedAnyOf, returnMask: armedReturn,
	}
	n, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, uintptr(p.fd.Load()), ioctlScan, uintptr(unsafe.Pointer(&a)))
	if errno != 0 {
		return false, errno
	}
	return n == 1 && r.Start == start && r.End == end, 0
}

// AnyWrittenRaw reports whether any page of [start, end) is without the
// write-protect mark; the negation of AllArmedRaw.
func (p *Pagemap) AnyWrittenRaw(start, end uint64) (bool, unix.Errno) {
	armed, errno := p.AllArmedRaw(start, end)
	return !armed, errno
}

func entryBytes(e []Entry) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(e))), len(e)*8)
}
