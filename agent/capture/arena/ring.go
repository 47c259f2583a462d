package arena

import (
	"fmt"
	"sync/atomic"
	"time"
)

// Record says which pages the producer captured. Data is nil for a run of zero pages,
// and of pages that are what they were in the capture before, if Same is set. Data
// points into the arena and is the consumer's until Done.
type Record struct {
	Block  int    // index of the RAMBlock
	First  uint64 // first page of the run, in pages from the block's start
	Pages  uint64 // length of the run in pages
	Origin Origin
	Same   bool
	Data   []byte
}

// Origin says what caused a capture.
type Origin uint32

const (
	ByScan  Origin = iota // the background scan came by
	ByFault               // the guest wrote to the page
	end                   // the producer is finished; internal
)

// Flags of runs without data.
const (
	flagZero = 1 << 8
	flagSame = 1 << 9
)

// Ring is a single-producer single-consumer queue of records with page data.
type Ring struct {
	h     *ringControl
	slots []slot
	data  []byte
	pages uint64 // data pages in the ring

	// producer only
	headSlot uint64 // records published
	headPage uint64 // data pages allocated since creation, skipped ones included
	lastPage uint64 // data position after the last record published
	slack    uint64 // see SetSlack
	// consumer only
	readSlot uint64 // the next to be read
	tailSlot uint64 // given back up to here
}

// Reserve waits until n contiguous data pages are free, and as many records, and
// returns the pages. What the producer then publishes of them, with zero runs in
// between if it likes, waits for nothing as long as it is at most n records. It
// gives up after wait and reports false: the consumer does not keep up. n must not
// exceed MaxReserve.
func (r *Ring) Reserve(n int, wait time.Duration) ([]byte, bool) {
	need := uint64(n)
	at := r.headPage % r.pages
	skip := uint64(0)
	if at+need > r.pages { // a record's data never wraps
		skip, at = r.pages-at, 0
	}
	if !r.waitSpace(r.headPage+skip+need, need, wait) {
		return nil, false
	}
	r.headPage += skip
	return r.data[at*PageBytes : (at+need)*PageBytes], true
}

// SetSlack is for a producer that is never in a hurry: once it has to wait for room it
// sleeps until so many pages more are free. Without it producer and consumer of a full
// ring take turns at every record, and each turn costs two switches of context.
func (r *Ring) SetSlack(pages int) { r.slack = uint64(min(pages, r.MaxReserve())) }

// MaxReserve is the longest run, in pages, that Reserve can be asked for.
func (r *Ring) MaxReserve() int { return int(r.pages / 2) }

// FreePages is how many data pages are free now; the consumer may free more.
func (r *Ring) FreePages() int {
	return int(r.pages - (r.headPage - atomic.LoadUint64(&r.h.tailPage)))
}

// Pages is the capacity in data pages.
func (r *Ring) Pages() int { return int(r.pages) }

// FreeRecords is how many records can be published now without waiting; the
// consumer may free more.
func (r *Ring) FreeRecords() int {
	return len(r.slots) - int(r.headSlot-atomic.LoadUint64(&r.h.tailSlot))
}

// WaitRecords waits until n records can be published; false if that takes longer
// than wait. n must not exceed Pages.
func (r *Ring) WaitRecords(n int, wait time.Duration) bool {
	return r.waitSpace(r.headPage, uint64(n), wait)
}

// waitSpace waits until the data pages up to position end and so many record slots
// are free.
func (r *Ring) waitSpace(end, records uint64, wait time.Duration) bool {
	// Not beyond what was published, or nobody would ever get there.
	atomic.StoreUint64(&r.h.wantPage, min(max(end, r.pages)-r.pages+r.slack, r.lastPage))
	return await(&r.h.tailSeq, &r.h.producerWaits, wakeNow, wait, func() bool {
		return end-atomic.LoadUint64(&r.h.tailPage) <= r.pages &&
			r.headSlot+records-atomic.LoadUint64(&r.h.tailSlot) <= uint64(len(r.slots))
	})
}

// What one who sleeps wants to be woken for.
const (
	wakeNow   = 1 // anything
	wakeBatch = 2 // as much as is worth it; otherwise it wakes by itself
)

// await waits until ready, looking again whenever the peer has changed seq and
// wakes us; waits tells the peer that somebody sleeps, and what for. The sequence
// is read before ready looks, so a change in between ends the sleep at once.
func await(seq, waits *uint32, what uint32, wait time.Duration, ready func() bool) bool {
	var deadline time.Time
	for {
		seen := atomic.LoadUint32(seq)
		if ready() {
			return true
		}
		now := time.Now()
		if deadline.IsZero() {
			deadline = now.Add(wait)
		}
		left := deadline.Sub(now)
		if left <= 0 {
			return false
		}
		atomic.StoreUint32(waits, what)
		if atomic.LoadUint32(seq) == seen {
			futexWait(seq, seen, left)
		}
		atomic.StoreUint32(waits, 0)
	}
}

// Publish hands the last reserved pages to the consumer as a run of block.
func (r *Ring) Publish(block int, first, pages uint64, origin Origin) {
	start := r.headPage % r.pages
	r.headPage += pages
	r.put(slot{block: uint32(block), flags: uint32(origin), first: first, pages: uint32(pages),
		start: uint32(start), endPage: r.headPage})
}

// PublishZero hands over a run of zero pages, which needs no data. It reports
// false when no record slot became free within wait.
func (r *Ring) PublishZero(block int, first, pages uint64, origin Origin, wait time.Duration) bool {
	return r.publishRun(block, first, pages, uint32(origin)|flagZero, wait)
}

// PublishSame does so with pages that are what they were in the capture before.
func (r *Ring) PublishSame(block int, first, pages uint64, wait time.Duration) bool {
	return r.publishRun(block, first, pages, uint32(ByScan)|flagSame, wait)
}

func (r *Ring) publishRun(block int, first, pages uint64, flags uint32, wait time.Duration) bool {
	for pages > 0 {
		n := min(pages, 1<<31)
		if !r.waitSpace(r.headPage, 1, wait) {
			return false
		}
		r.put(slot{block: uint32(block), flags: flags, first: first, pages: uint32(n), endPage: r.headPage})
		first, pages = first+n, pages-n
	}
	return true
}

// Finish tells the consumer that nothing more will come.
func (r *Ring) Finish(wait time.Duration) bool {
	if !r.waitSpace(r.headPage, 1, wait) {
		return false
	}
	r.put(slot{flags: uint32(end), endPage: r.headPage})
	return true
}

func (r *Ring) put(s slot) {
	r.slots[r.headSlot%uint64(len(r.slots))] = s
	r.lastPage = s.endPage
	r.headSlot++
	atomic.StoreUint64(&r.h.headSlot, r.headSlot)
	atomic.AddUint32(&r.h.headSeq, 1)
	switch atomic.LoadUint32(&r.h.consumerWaits) {
	case wakeNow:
		futexWake(&r.h.headSeq)
	case wakeBatch:
		if Origin(s.flags) == end || r.isBatch() {
			futexWake(&r.h.headSeq)
		}
	}
}

// isBatch reports whether so much waits for the consumer that it should come now.
func (r *Ring) isBatch() bool {
	return r.headSlot-atomic.LoadUint64(&r.h.tailSlot) >= uint64(len(r.slots))/16 ||
		r.headPage-atomic.LoadUint64(&r.h.tailPage) >= r.pages/16
}

// Next returns the next record, which is the consumer's until Done. ok is false when
// none came within wait; done is true once the producer finished.
func (r *Ring) Next(wait time.Duration) (rec Record, ok, done bool, err error) {
	if !r.waitRecord(wait) {
		return Record{}, false, false, nil
	}
	s := r.slots[r.readSlot%uint64(len(r.slots))]
	origin := Origin(s.flags &^ (flagZero | flagSame))
	switch {
	case origin == end:
		return Record{}, false, true, nil
	case origin > end:
		return Record{}, false, false, fmt.Errorf("%w: record flags %#x", ErrCorrupt, s.flags)
	}
	rec = Record{Block: int(s.block), First: s.first, Pages: uint64(s.pages), Origin: origin, Same: s.flags&flagSame != 0}
	if s.flags&(flagZero|flagSame) == 0 {
		if uint64(s.start)+uint64(s.pages) > r.pages || s.pages == 0 {
			return Record{}, false, false, fmt.Errorf("%w: record of %d pages at %d of %d", ErrCorrupt, s.pages, s.start, r.pages)
		}
		rec.Data = r.data[uint64(s.start)*PageBytes : (uint64(s.start)+uint64(s.pages))*PageBytes]
	}
	r.readSlot++
	return rec, true, false, nil
}

// lull is how long the consumer lets records gather before it looks again. To wake
// somebody costs about as much as to capture a page, on both sides and, where
// processors are few, the guest its own; so no more than one record in a lull does.
const lull = time.Millisecond

func (r *Ring) waitRecord(wait time.Duration) bool {
	ready := func() bool { return atomic.LoadUint64(&r.h.headSlot) != r.readSlot }
	nap := min(wait, lull)
	return await(&r.h.headSeq, &r.h.consumerWaits, wakeBatch, nap, ready) ||
		await(&r.h.headSeq, &r.h.consumerWaits, wakeNow, wait-nap, ready)
}

// Done gives the data of all records that Next returned back to the producer.
func (r *Ring) Done() {
	if r.readSlot == r.tailSlot {
		return
	}
	s := r.slots[(r.readSlot-1)%uint64(len(r.slots))]
	r.tailSlot = r.readSlot
	atomic.StoreUint64(&r.h.tailPage, s.endPage)
	atomic.StoreUint64(&r.h.tailSlot, r.tailSlot)
	atomic.AddUint32(&r.h.tailSeq, 1)
	if atomic.LoadUint32(&r.h.producerWaits) != 0 && s.endPage >= atomic.LoadUint64(&r.h.wantPage) {
		futexWake(&r.h.tailSeq)
	}
}
