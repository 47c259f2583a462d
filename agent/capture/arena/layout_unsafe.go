package arena

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ringControl is the shared control page of a ring. Indexes written by
// different processes are kept on different cache lines.
type ringControl struct {
	headSlot      uint64 // producer: records published
	headSeq       uint32 // producer: futex word, counts publications
	consumerWaits uint32 // consumer: what it sleeps on headSeq for, 0: awake
	wantPage      uint64 // producer: the data position to be woken at while it sleeps on tailSeq
	_             [104]byte
	tailPage      uint64 // consumer: data position given back
	tailSlot      uint64 // consumer: records given back
	tailSeq       uint32 // consumer: futex word, counts returns
	producerWaits uint32 // producer: wakeNow while it sleeps on tailSeq
}

// slot is one record as it stands in shared memory.
type slot struct {
	block   uint32
	flags   uint32 // Origin, and what is said of a run without data
	first   uint64
	pages   uint32
	start   uint32 // first data page in the ring
	endPage uint64 // data position after this record: what Done gives back
}

type header struct {
	magic uint64
	rings uint32
	pages [maxRings]uint32
}

func writeHeader(mem []byte, ringPages []int) {
	h := (*header)(unsafe.Pointer(&mem[0]))
	h.magic, h.rings = magic, uint32(len(ringPages))
	for i, n := range ringPages {
		h.pages[i] = uint32(n)
	}
}

func readHeader(mem []byte) ([]int, error) {
	h := (*header)(unsafe.Pointer(&mem[0]))
	if h.magic != magic || h.rings == 0 || h.rings > maxRings {
		return nil, fmt.Errorf("%w: header magic %#x, %d rings", ErrCorrupt, h.magic, h.rings)
	}
	ringPages := make([]int, h.rings)
	size := headerBytes
	for i := range ringPages {
		n := int(h.pages[i])
		if n <= 0 || n > maxRingPages {
			return nil, fmt.Errorf("%w: ring %d of %d pages", ErrCorrupt, i, n)
		}
		ringPages[i] = n
		size += ringBytes(n)
	}
	if size != len(mem) {
		return nil, fmt.Errorf("%w: %d bytes mapped, header says %d", ErrCorrupt, len(mem), size)
	}
	return ringPages, nil
}

func newRing(mem []byte, pages int) *Ring {
	n := recordSlots(pages)
	return &Ring{
		h:     (*ringControl)(unsafe.Pointer(&mem[0])),
		slots: unsafe.Slice((*slot)(unsafe.Pointer(&mem[ringHeader])), n),
		data:  mem[ringHeader+pageAlign(n*recordBytes):],
		pages: uint64(pages),
	}
}

const (
	futexWaitOp = 0 // FUTEX_WAIT, shared: the peer is another process
	futexWakeOp = 1 // FUTEX_WAKE
)

// futexWait sleeps while *word == seq, for at most d. Spurious returns are fine:
// callers look again.
func futexWait(word *uint32, seq uint32, d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexWaitOp, uintptr(seq),
		uintptr(unsafe.Pointer(&ts)), 0, 0)
}

func futexWake(word *uint32) {
	unix.RawSyscall(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexWakeOp, 1)
}
