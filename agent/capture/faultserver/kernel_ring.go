package faultserver

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/heartbeat"
	"github.com/ckagent/ckagent/bpf/cow"
)

// ringReader moves what the programs have copied from the kernel's ring to the arena.
type ringReader struct {
	e    *kernelEngine
	ring *arena.Ring

	records uint64 // read, of this capture
	pages   uint64 // delivered
	peak    uint64 // bytes that waited in the kernel's ring, at most

	stoppedNS int64  // when the guest was seen stopped by the programs; 0: it runs
	stoppedAt uint64 // bytes that waited in the ring then
	longest   int64  // such a stop
}

const (
	// readerNap is how long records gather: nobody waits for them, and to be woken for
	// each would cost more than to copy it.
	readerNap = time.Millisecond
	// roomWait is how long to wait for the store before looking around.
	roomWait = 2 * time.Millisecond
)

func (r *ringReader) run() {
	runtime.LockOSThread() // the thread ends with us, and its priority with it
	heartbeat.Realtime()   // or the ring overflows
	heartbeat.Pin()
	defer heartbeat.Unpin()
	for !r.e.ending.Load() && r.e.s.failedWith() == nil {
		if !r.drain() {
			return
		}
		r.release()
		r.e.judge()
		nap(readerNap)
	}
}

// drain reads what there is. It reports whether to go on.
func (r *ringReader) drain() bool {
	r.peak = max(r.peak, r.e.progs.Waiting())
	for {
		rec, ok := r.e.progs.Next()
		if !ok {
			return true
		}
		if rec.Epoch == r.e.epoch {
			r.records++
			if !r.deliver(rec) {
				return false
			}
		}
		r.e.progs.Advance()
	}
}

// deliver hands a page on that nobody else has. It reports whether to go on.
func (r *ringReader) deliver(rec cow.Record) bool {
	block, page := r.e.locate(rec.Page)
	t := r.e.s.tables[block]
	w, bit := int(page/wordPages), uint64(1)<<(page%wordPages)
	if atomic.LoadUint64(&t.claimed[w])&bit != 0 {
		return true
	}
	if rec.Data == nil {
		if !r.room(func(wait time.Duration) bool { return r.ring.WaitRecords(1, wait) }) {
			return false
		}
		if t.claim(w, bit) != 0 {
			r.ring.PublishZero(block, page, 1, arena.ByFault, 0) // there is room
			r.e.settled(block, page, 1)
			r.pages++
		}
		return true
	}
	var data []byte
	if !r.room(func(wait time.Duration) (ok bool) {
		data, ok = r.ring.Reserve(1, wait)
		return ok
	}) {
		return false
	}
	if t.claim(w, bit) != 0 {
		copy(data, rec.Data)
		r.e.deliver(r.ring, block, page, 1, arena.ByFault)
		r.pages++
	}
	return true
}

// room waits until the arena has room for a page, as wait tells. It reports false if the
// capture is over before.
func (r *ringReader) room(wait func(time.Duration) bool) bool {
	for {
		if wait(0) {
			return true
		}
		if r.e.ending.Load() || r.e.s.failedWith() != nil {
			return false
		}
		heartbeat.Unpin()
		ok := wait(roomWait)
		heartbeat.Pin()
		if ok {
			return true
		}
		r.peak = max(r.peak, r.e.progs.Waiting())
		r.release()
		r.e.judge() // the ring may have overflowed
	}
}

// release ends the stop of a guest that was too fast, as soon as there is room again
// or it has stood still for as long as it may.
func (r *ringReader) release() {
	if !r.e.progs.Stopped() {
		return
	}
	now, waiting := heartbeat.NowNS(), r.e.progs.Waiting()
	if r.stoppedNS == 0 {
		r.stoppedNS, r.stoppedAt = now, waiting
	}
	late := now-r.stoppedNS > r.e.s.cfg.MaxStall.Nanoseconds()
	if !late && waiting > uint64(r.e.s.cfg.RingBytes)/8*5 {
		return
	}
	r.longest = max(r.longest, now-r.stoppedNS)
	r.stoppedNS = 0
	if late {
		r.e.progs.StopAbove(0)
		failure, how := Unproven, "too little"
		if waiting >= r.stoppedAt { // then no other engine would get further
			failure, how = Stalled, "nothing"
		}
		r.e.s.fail(failure, "no room for pages the guest wants to write: the store took %s in %v", how, r.e.s.cfg.MaxStall)
	}
	r.e.resume()
}
