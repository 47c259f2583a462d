package uffd

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Sentinels; every error of this package also unwraps to its errno.
var (
	// ErrUnsupported: this kernel has no userfaultfd, or not with that feature,
	// or not for that kind of memory.
	ErrUnsupported = errors.New("not supported by this kernel or for this memory")
	// ErrExists: there is a page already. Copy and its kin have woken the range.
	ErrExists = errors.New("page exists already")
	// ErrAgain: nothing to read, or the target is changing its mappings and an
	// unread event must be read first.
	ErrAgain = errors.New("try again")
	// ErrGone: the target's address space is no more.
	ErrGone = errors.New("target address space is gone")
	// ErrStopped: Wait ended because its Stop was signalled.
	ErrStopped = errors.New("stopped")
	// ErrClosed: the handle was closed.
	ErrClosed = errors.New("userfaultfd closed")
)

// OpError is a failed request: on which range, with which errno, and (where it
// is known) what that errno means for this request.
type OpError struct {
	Op     string // "register", "write-protect", "copy", ...
	Start  uint64 // virtual address in the target
	Length uint64 // bytes; 0 where the request has no range
	Errno  unix.Errno
	Detail string // explanation, may be empty
	Kind   error  // one of the sentinels, or nil
}

func (e *OpError) Error() string {
	s := "userfaultfd " + e.Op
	if e.Length != 0 {
		s += fmt.Sprintf(" [%#x,+%#x)", e.Start, e.Length)
	}
	s += ": " + e.Errno.Error()
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// Unwrap gives the errno and, where one applies, the sentinel.
func (e *OpError) Unwrap() []error {
	if e.Kind == nil {
		return []error{e.Errno}
	}
	return []error{e.Errno, e.Kind}
}

func opError(op string, start, length uint64, errno unix.Errno) error {
	e := &OpError{Op: op, Start: start, Length: length, Errno: errno}
	switch errno {
	case unix.EAGAIN:
		e.Kind = ErrAgain
	case unix.EEXIST:
		e.Kind = ErrExists
	case unix.ESRCH:
		e.Kind = ErrGone
	case unix.EBADF:
		e.Kind = ErrClosed
	case unix.ENOTTY, unix.ENOSYS:
		e.Kind = ErrUnsupported
	}
	return e
}

// explainRegister gives the reasons behind UFFDIO_REGISTER's few errnos.
func explainRegister(e *OpError, mode Mode, have Features) {
	switch e.Errno {
	case unix.EINVAL:
		switch {
		case e.Start%4096 != 0 || e.Length%4096 != 0 || e.Length == 0:
			e.Detail = "range is empty or not page-aligned"
		case mode&ModeWP != 0 && !have.Has(FeatureWPAsync):
			e.Kind = ErrUnsupported
			e.Detail = "synchronous write protection takes only private anonymous memory, memfd, tmpfs and hugetlbfs; a file on a disk filesystem (ext4, xfs, ...) is refused whether mapped private or shared"
			if !have.Has(FeatureWPHugetlbfsShmem) {
				e.Detail += "; memfd and tmpfs need the feature WP_HUGETLBFS_SHMEM, which was not negotiated"
			}
		default:
			e.Kind = ErrUnsupported
			e.Detail = "this kind of mapping cannot be registered in mode " + mode.String() +
				" (missing and minor faults: private anonymous memory, memfd, tmpfs and hugetlbfs only), or the range starts in no mapping"
		}
	case unix.EBUSY:
		e.Detail = "registered with another userfaultfd already (a postcopy or background-snapshot under way, or another tool)"
	case unix.EPERM:
		e.Detail = "the mapping is shared and was opened read-only (it may never become writable)"
	case unix.ENOMEM:
		e.Detail = "no mapping there, or out of memory"
	}
}
