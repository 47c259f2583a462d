package uffd

import "unsafe"

// The kernel's interface, from include/uapi/linux/userfaultfd.h (Linux 6.18).
// It is spelled out here rather than taken from the installed headers because
// the headers of the build host lag behind the kernels this runs on: Debian 12
// ships those of 6.1, which know neither WP_UNPOPULATED nor WP_ASYNC. A test
// compiles the values that the local headers do have and compares.

const apiVersion = 0xAA

// Requests. The direction bits of UNREGISTER and WAKE are "wrong" (_IOR) in the
// kernel and are kept that way.
const (
	ioctlNew          = 0x0000AA00 // _IO(0xAA, 0x00), on /dev/userfaultfd
	ioctlAPI          = 0xC018AA3F
	ioctlRegister     = 0xC020AA00
	ioctlUnregister   = 0x8010AA01
	ioctlWake         = 0x8010AA02
	ioctlCopy         = 0xC028AA03
	ioctlZeroPage     = 0xC020AA04
	ioctlMove         = 0xC028AA05
	ioctlWriteProtect = 0xC018AA06
	ioctlContinue     = 0xC020AA07
	ioctlPoison       = 0xC020AA08
)

// Features is the bit set of UFFDIO_API.
type Features uint64

// Feature bits and the kernel that brought each.
const (
	FeaturePagefaultFlagWP  Features = 1 << 0  // 5.7: write-protect faults of anonymous memory
	FeatureEventFork        Features = 1 << 1  // 4.11; needs CAP_SYS_PTRACE
	FeatureEventRemap       Features = 1 << 2  // 4.11
	FeatureEventRemove      Features = 1 << 3  // 4.11: MADV_DONTNEED, MADV_FREE and MADV_REMOVE announce themselves
	FeatureMissingHugetlbfs Features = 1 << 4  // 4.11
	FeatureMissingShmem     Features = 1 << 5  // 4.11
	FeatureEventUnmap       Features = 1 << 6  // 4.12
	FeatureSigbus           Features = 1 << 7  // 4.14
	FeatureThreadID         Features = 1 << 8  // 4.14: Msg.ThreadID is filled
	FeatureMinorHugetlbfs   Features = 1 << 9  // 5.13
	FeatureMinorShmem       Features = 1 << 10 // 5.14
	FeatureExactAddress     Features = 1 << 11 // 5.18: Msg.Address keeps the offset within the page
	FeatureWPHugetlbfsShmem Features = 1 << 12 // 5.19: write protection of memfd, tmpfs and hugetlbfs
	FeatureWPUnpopulated    Features = 1 << 13 // 6.4: absent anonymous pages can carry the mark too
	FeaturePoison           Features = 1 << 14 // 6.6
	FeatureWPAsync          Features = 1 << 15 // 6.7: the kernel resolves write-protect faults itself and only remembers
	FeatureMove             Features = 1 << 16 // 6.8
	featureInitialized               = 1 << 31 // kernel-internal, seen in fdinfo: the handshake was done
	allKnownFeatures        Features = 1<<17 - 1
)

// Ioctls is a bit set of requests by number, as UFFDIO_API and UFFDIO_REGISTER
// answer it.
type Ioctls uint64

// Bits of Ioctls.
const (
	IoctlRegister     Ioctls = 1 << 0x00
	IoctlUnregister   Ioctls = 1 << 0x01
	IoctlWake         Ioctls = 1 << 0x02
	IoctlCopy         Ioctls = 1 << 0x03
	IoctlZeroPage     Ioctls = 1 << 0x04
	IoctlMove         Ioctls = 1 << 0x05
	IoctlWriteProtect Ioctls = 1 << 0x06
	IoctlContinue     Ioctls = 1 << 0x07
	IoctlPoison       Ioctls = 1 << 0x08
	IoctlAPI          Ioctls = 1 << 0x3F
)

// Mode says which faults a registered range reports.
type Mode uint64

// Register modes; they may be combined.
const (
	ModeMissing Mode = 1 << 0 // no page there: resolve by Copy or ZeroPage
	ModeWP      Mode = 1 << 1 // a write to a page with the mark: resolve by Unprotect
	ModeMinor   Mode = 1 << 2 // page cache has it, page table does not: resolve by Continue
)

// CopyMode holds the flags of Copy, and (DontWake only) of ZeroPage and Continue.
type CopyMode uint64

// Flags of Copy.
const (
	CopyDontWake CopyMode = 1 << 0 // leave the waiters asleep; the caller wakes the range
	CopyWP       CopyMode = 1 << 1 // map the page with the write-protect mark set
)

const (
	wpModeWP       = 1 << 0
	wpModeDontWake = 1 << 1
	// UFFDIO_CONTINUE has its own bit for the mark; DONTWAKE is the same bit 0.
	continueModeWP = 1 << 1
)

// Flags of userfaultfd(2) and USERFAULTFD_IOC_NEW beside O_CLOEXEC and O_NONBLOCK.
const FlagUserModeOnly = 1

// Event numbers of Msg.
const (
	EventPagefault = 0x12
	EventFork      = 0x13
	EventRemap     = 0x14
	EventRemove    = 0x15
	EventUnmap     = 0x16
)

// Flags of a page-fault Msg.
const (
	FaultWrite = 1 << 0 // it was a write
	FaultWP    = 1 << 1 // the write-protect mark was hit
	FaultMinor = 1 << 2 // the page is in the page cache
)

// MsgBytes is the size of one message on the wire.
const MsgBytes = 32

type apiArg struct {
	api      uint64
	features uint64
	ioctls   uint64
}

type rangeArg struct {
	start  uint64
	length uint64
}

type registerArg struct {
	rangeArg
	mode   uint64
	ioctls uint64
}

// copyArg holds the source as a pointer, not a number, so that a source on the
// caller's stack is followed if the stack moves before the call.
type copyArg struct {
	dst    uint64
	src    unsafe.Pointer
	length uint64
	mode   uint64
	copied int64
}

// fillArg is uffdio_zeropage, uffdio_continue and uffdio_poison alike.
type fillArg struct {
	rangeArg
	mode uint64
	done int64
}

type writeProtectArg struct {
	rangeArg
	mode uint64
}

// Msg is struct uffd_msg itself, so that reading decodes nothing. For events
// other than EventPagefault use Fork, Remap and Removed.
type Msg struct {
	Event uint8
	_     uint8
	_     uint16
	_     uint32
	// Flags holds Fault* bits.
	Flags uint64
	// Address is the virtual address of the fault in the target, rounded down
	// to the page unless FeatureExactAddress was negotiated.
	Address uint64
	// ThreadID is the faulting thread if FeatureThreadID was negotiated.
	ThreadID uint32
	high     uint32
}

// Remap decodes an EventRemap: length bytes moved from one address to another.
func (m *Msg) Remap() (from, to, length uint64) {
	return m.Flags, m.Address, uint64(m.high)<<32 | uint64(m.ThreadID)
}

// Removed decodes an EventRemove or EventUnmap: the range [start,end) is going.
func (m *Msg) Removed() (start, end uint64) { return m.Flags, m.Address }

// Fork decodes an EventFork: the descriptor, already open in this process, of
// the child's userfaultfd.
func (m *Msg) Fork() (fd int) { return int(uint32(m.Flags)) }
