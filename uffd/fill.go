package uffd

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Copy gives the target's absent pages at dst the content of src, atomically
// per page, and wakes waiters unless CopyDontWake. dst and len(src) are whole
// pages. Partial copies are continued and EAGAIN is retried (a bounded number of
// times, then ErrAgain). A page that exists already ends the copy with
// ErrExists; since the kernel wakes nobody in that case, Copy then wakes the
// rest of the range (unless CopyDontWake). copied is the number of bytes placed,
// also with an error: the page at dst+copied is the one that failed.
func (h *Handle) Copy(dst uint64, src []byte, mode CopyMode) (copied int64, err error) {
	if len(src) == 0 {
		return 0, opError("copy", dst, 0, unix.EINVAL)
	}
	n, errno := h.place(dst, uint64(len(src)), mode, func(off, length uint64) (int64, unix.Errno) {
		a := copyArg{dst: dst + off, length: length, mode: uint64(mode)}
		errno := h.copyOnce(&a, src[off:])
		return a.copied, errno
	})
	return int64(n), h.fillError("copy", dst, uint64(len(src)), n, errno)
}

// ZeroPage maps zeros into [start, start+length); like Copy otherwise. Of mode
// only CopyDontWake counts.
func (h *Handle) ZeroPage(start, length uint64, mode CopyMode) (filled int64, err error) {
	return h.fillRange("zeropage", ioctlZeroPage, start, length, mode, uint64(mode&CopyDontWake))
}

// Continue maps the pages that the page cache has for [start, start+length),
// resolving minor faults; like Copy otherwise. CopyWP maps them with the mark.
func (h *Handle) Continue(start, length uint64, mode CopyMode) (mapped int64, err error) {
	m := uint64(mode & CopyDontWake)
	if mode&CopyWP != 0 {
		m |= continueModeWP
	}
	return h.fillRange("continue", ioctlContinue, start, length, mode, m)
}

// Poison makes any access to the absent pages of the range raise SIGBUS: what a
// pager does with a page whose content is lost, so that no wrong page is fed.
func (h *Handle) Poison(start, length uint64, mode CopyMode) (poisoned int64, err error) {
	return h.fillRange("poison", ioctlPoison, start, length, mode, uint64(mode&CopyDontWake))
}

func (h *Handle) fillRange(op string, request uintptr, start, length uint64, mode CopyMode, flags uint64) (int64, error) {
	n, errno := h.place(start, length, mode, func(off, length uint64) (int64, unix.Errno) {
		a := fillArg{rangeArg: rangeArg{start + off, length}, mode: flags}
		errno := h.fill(request, &a)
		return a.done, errno
	})
	return int64(n), h.fillError(op, start, length, n, errno)
}

// place drives a filling request over [start, start+length) until all of it is
// done or a page fails.
func (h *Handle) place(start, length uint64, mode CopyMode, once func(off, length uint64) (int64, unix.Errno)) (uint64, unix.Errno) {
	var off uint64
	for idle := 0; ; {
		n, errno := once(off, length-off)
		if n > 0 {
			off += uint64(n)
			idle = 0
		}
		switch {
		case errno == 0:
			return off, 0
		case errno == unix.EAGAIN && off < length && idle < retryLimit:
			if n <= 0 {
				idle++
				yield()
			}
		case errno == unix.EEXIST:
			if mode&CopyDontWake == 0 {
				if e := h.wake(&rangeArg{start + off, length - off}); e != 0 {
					return off, e
				}
			}
			return off, errno
		default:
			return off, errno
		}
	}
}

func (h *Handle) fillError(op string, start, length, done uint64, errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	e := opError(op, start+done, length-done, errno).(*OpError)
	switch errno {
	case unix.ENOENT:
		e.Detail = "not mapped or not registered there any more"
	case unix.EINVAL:
		e.Detail = "not page-aligned, or this kind of memory does not support the request"
	case unix.ENOSPC:
		e.Detail = "the target's shared memory is full or its mapping went away"
	case unix.EFAULT:
		e.Detail = "the source is not readable, or the page cache has no such page"
	}
	if done > 0 {
		return fmt.Errorf("after %d of %d bytes: %w", done, length, e)
	}
	return e
}

// Wake wakes every thread waiting in [start, start+length); each repeats its
// access and, if that faults again, is reported again.
func (h *Handle) Wake(start, length uint64) error {
	a := rangeArg{start, length}
	if errno := h.wake(&a); errno != 0 {
		return opError("wake", start, length, errno)
	}
	return nil
}
