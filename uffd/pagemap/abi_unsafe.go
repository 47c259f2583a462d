package pagemap

import "unsafe"

// The kernel's interface, from include/uapi/linux/fs.h (Linux 6.18);
// PAGEMAP_SCAN is there since 6.7.

const (
	ioctlScan    = 0xC0606610 // _IOWR('f', 16, struct pm_scan_arg)
	scanArgBytes = 96
)

// Categories of a page, as PAGEMAP_SCAN sees it.
const (
	IsWPAllowed uint64 = 1 << 0 // its mapping tracks asynchronously (WP_ASYNC)
	IsWritten   uint64 = 1 << 1 // there is something there without the write-protect mark
	IsFile      uint64 = 1 << 2 // it belongs to a file or to shared memory
	IsPresent   uint64 = 1 << 3 // mapped now
	IsSwapped   uint64 = 1 << 4 // swapped out, migrating, or a mark on nothing (marker)
	IsPFNZero   uint64 = 1 << 5 // the zero page
	IsHuge      uint64 = 1 << 6 // mapped by a huge entry
	IsSoftDirty uint64 = 1 << 7
	IsGuard     uint64 = 1 << 8 // guard region (6.15)
)

// Flags of a Query.
const (
	// WPMatching sets the mark on every page reported, atomically with the
	// report. Only memory registered with WP_ASYNC is touched.
	WPMatching uint64 = 1 << 0
	// CheckWPAsync fails the scan with EPERM if any memory of the range is not
	// registered with WP_ASYNC, instead of skipping it.
	CheckWPAsync uint64 = 1 << 1
)

// scanArg is struct pm_scan_arg. vec is a pointer, not a number, so that a
// buffer on the stack is followed if the stack moves before the call.
type scanArg struct {
	size             uint64
	flags            uint64
	start            uint64
	end              uint64
	walkEnd          uint64
	vec              unsafe.Pointer
	vecLen           uint64
	maxPages         uint64
	categoryInverted uint64
	categoryMask     uint64
	categoryAnyOf    uint64
	returnMask       uint64
}

// Region is struct page_region: pages [Start, End) (virtual addresses of the
// target) that share Categories.
type Region struct {
	Start      uint64
	End        uint64
	Categories uint64
}

// Pages is the number of pages of pageBytes in r.
func (r Region) Pages(pageBytes uint64) uint64 { return (r.End - r.Start) / pageBytes }

// Entry is one 64-bit word of /proc/PID/pagemap.
type Entry uint64

const (
	entryUffdWP  = 1 << 57
	entryFile    = 1 << 61
	entrySwapped = 1 << 62
	entryPresent = 1 << 63
	entryPFN     = 1<<55 - 1
)

// UffdWP reports the write-protect mark, on a page or as a marker.
func (e Entry) UffdWP() bool { return e&entryUffdWP != 0 }

// Present reports that the page is mapped.
func (e Entry) Present() bool { return e&entryPresent != 0 }

// Swapped reports a swap or migration entry (or, on some kernels, a marker).
func (e Entry) Swapped() bool { return e&entrySwapped != 0 }

// File reports a page of a file or of shared memory.
func (e Entry) File() bool { return e&entryFile != 0 }

// PFN is the page frame number: 0 without CAP_SYS_ADMIN or if not present.
func (e Entry) PFN() uint64 {
	if !e.Present() {
		return 0
	}
	return uint64(e & entryPFN)
}
