package faultserver

import (
	"math/bits"
	"runtime"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/heartbeat"
	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

// faultThread serves the guest's write faults. It owns one ring.
type faultThread struct {
	s    *server
	e    *syncEngine
	ring *arena.Ring

	mu sync.Mutex // held while messages are worked on; see freeze

	// of the thread alone
	began, ended time.Time // the last batch of messages
	deadline     time.Time // by when room must be found for this one's

	// guarded by mu
	around    uint64 // pages to capture at the next fault, adapted to how the guest writes
	lastEnd   uint64 // page after the last captured one
	lastBlock int
	tracked   uint64
	faults    uint64
	pages     uint64
	serviceNS histogram
}

// run serves faults until the process ends: nothing wakes a thread that blocks in
// read(2) on a userfaultfd, and blocking there answers some microseconds sooner
// than poll(2) does. Once nothing is registered any more no message comes, so a
// thread that is left there touches nothing.
func (t *faultThread) run() {
	runtime.LockOSThread()
	heartbeat.Realtime()
	heartbeat.Pin() // or the guest waits for more than us
	defer heartbeat.Unpin()
	var msgs [16]uffd.Msg
	for {
		n, errno := t.s.h.ReadRaw(msgs[:])
		switch errno {
		case 0:
			t.serve(msgs[:n])
		case unix.EINTR, unix.EAGAIN:
		default:
			t.s.fail(Broken, "read faults: %v", errno)
			return
		}
	}
}

// queued is how soon after a batch the next one is there if it was waiting.
const queued = 20 * time.Microsecond

const lockNap = 20 * time.Microsecond // who holds the lock may need our processor

func (t *faultThread) serve(msgs []uffd.Msg) {
	begin := time.Now()
	// What was queued when the last batch had been served came in while it was
	// being served: the waiting of those threads counts from its beginning.
	since := begin
	if begin.Sub(t.ended) < queued {
		since = t.began
	}
	t.began, t.deadline = begin, since.Add(t.s.cfg.MaxStall)
	for !t.mu.TryLock() { // during a freeze; pinned
		nap(lockNap)
	}
	defer t.mu.Unlock()
	defer func() { t.ended = time.Now() }()
	for i := range msgs {
		if msgs[i].Event != uffd.EventPagefault {
			continue
		}
		block, page, ok := t.s.locate(msgs[i].Address)
		if !ok {
			continue
		}
		switch phase(t.s.phase.Load()) {
		case tracking:
			t.track(t.s.tables[block], page)
		case capturing:
			t.faults++
			t.capture(block, t.s.tables[block], page)
			now := time.Now()
			t.serviceNS.add(now.Sub(begin))
			begin = now
		default: // released: unregistering wakes everybody
		}
	}
}

// locate finds the block and the page of an address.
func (s *server) locate(addr uint64) (block int, page uint64, ok bool) {
	for i, t := range s.tables {
		if addr-t.block.HVA < t.block.Pages*pageBytes {
			return i, (addr - t.block.HVA) / pageBytes, true
		}
	}
	return 0, 0, false
}

// track lets a write through and remembers it. The protection is lifted before
// the page is marked dirty: a pass that clears the mark in between has armed the
// page after it was marked, never before it was freed.
func (t *faultThread) track(tab *pageTable, page uint64) {
	t.tracked++
	first, n := tab.granule(page)
	for {
		errno := t.s.h.UnprotectRaw(tab.block.HVA+first*pageBytes, n*pageBytes, true)
		if errno == unix.EAGAIN {
			nap(changeNap)
			continue
		}
		if errno != 0 {
			t.s.fail(Broken, "page %d: let a write through: %v", page, errno)
			return
		}
		break
	}
	if tab.populated != nil {
		setRange(tab.populated, first, n)
		setRange(tab.held, first, n)
	}
	setRange(tab.dirty, first, n)
}

// capture keeps the page's old content, with some neighbours that the guest is
// likely to write next, and lets the write go on.
func (t *faultThread) capture(block int, tab *pageTable, page uint64) {
	if tab.whole {
		t.captureWhole(block, tab, page&^(hugePages-1))
		return
	}
	if tab.isHuge(page) && t.captureHuge(block, tab, page) {
		return
	}
	t.adapt(block, page)
	w := int(page / wordPages)
	got := tab.claim(w, tab.around(page, t.around))
	mine := got>>(page%wordPages)&1 != 0
	for got != 0 {
		off, n := lowestRun(got)
		got &^= maskOf(off, n)
		if !t.captureRun(block, tab, uint64(w)*wordPages+off, n) {
			return
		}
	}
	// Whoever else claimed the page wakes the guest when it is done. If it was
	// done before this fault was read, waking again does no harm.
	switch {
	case mine:
	case tab.isDone(page):
		t.s.unprotect(block, tab, page, 1)
	default:
		t.e.hurry()
	}
	t.lastBlock, t.lastEnd = block, page+1
}

// adapt doubles the fault-around while faults come next to each other, and
// halves it when they do not or when the ring fills up.
func (t *faultThread) adapt(block int, page uint64) {
	near := block == t.lastBlock && page-t.lastEnd+2*t.around < 4*t.around
	roomy := t.ring.FreePages() > t.ring.Pages()/4
	switch {
	case near && roomy:
		t.around = min(t.around*2, uint64(t.s.cfg.FaultAround))
	case t.around > 1:
		t.around /= 2
	}
}

// captureHuge takes the huge page at once, so that it stays whole. It does so
// only while the ring has plenty of room. It reports whether page was captured.
func (t *faultThread) captureHuge(block int, tab *pageTable, page uint64) bool {
	if t.ring.FreePages() < t.ring.Pages()/2 || t.ring.MaxReserve() < hugePages {
		return false
	}
	first := page &^ (hugePages - 1)
	n := tab.claimHuge(first)
	return n > 0 && t.captureRun(block, tab, first, n) && page < first+n
}

// captureWhole captures a page of hugetlbfs. Who claims its first word claims it all.
func (t *faultThread) captureWhole(block int, tab *pageTable, first uint64) {
	switch {
	case tab.claimHuge(first) == hugePages:
		t.captureRun(block, tab, first, hugePages)
	case tab.isDone(first + hugePages - 1):
		t.s.unprotect(block, tab, first, hugePages)
	default:
		t.e.hurry()
	}
}

// captureRun captures claimed pages; it waits for room until the stall budget of
// the thread that has waited longest is used up.
func (t *faultThread) captureRun(block int, tab *pageTable, first, n uint64) bool {
	data, ok := t.ring.Reserve(int(n), 0)
	if !ok {
		heartbeat.Unpin()
		data, ok = t.ring.Reserve(int(n), max(0, time.Until(t.deadline)))
		heartbeat.Pin()
	}
	if !ok {
		t.s.fail(Stalled, "no room for a page the guest wants to write: the store took more than %v", t.s.cfg.MaxStall)
		return false
	}
	if !t.s.captureRun(block, tab, first, n, data) {
		return false
	}
	t.ring.Publish(block, first, n, arena.ByFault)
	t.pages += n
	t.s.pagesDone(int64(n))
	return true
}

// addTo adds the thread's figures to those of the capture.
func (t *faultThread) addTo(st *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	st.TrackedFaults += t.tracked
	st.Faults += t.faults
	st.FaultPages += t.pages
	st.FaultP50NS = max(st.FaultP50NS, t.serviceNS.quantile(0.5))
	st.FaultP99NS = max(st.FaultP99NS, t.serviceNS.quantile(0.99))
	st.FaultMaxNS = max(st.FaultMaxNS, t.serviceNS.max)
}

// histogram counts durations in buckets of a quarter of a power of two.
type histogram struct {
	n       uint64
	max     int64
	buckets [256]uint64
}

func (h *histogram) add(d time.Duration) {
	ns := max(d.Nanoseconds(), 1)
	h.n++
	h.max = max(h.max, ns)
	h.buckets[bucketOf(ns)]++
}

func bucketOf(ns int64) int {
	e := bits.Len64(uint64(ns)) - 1
	if e < 2 {
		return e * 4
	}
	return e*4 + int(uint64(ns)>>(e-2)&3)
}

// quantile is the lower bound of the bucket that holds quantile q; 0 if empty.
func (h *histogram) quantile(q float64) int64 {
	seen, want := uint64(0), uint64(float64(h.n)*q)
	for i, c := range h.buckets {
		if seen += c; c > 0 && seen > want {
			e := i / 4
			if e < 2 {
				return 1 << e
			}
			return int64(4+i%4) << (e - 2)
		}
	}
	return h.max
}
