package faultserver

import (
	"errors"
	"math/bits"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/affinity"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/heartbeat"
)

const (
	windowWords = 128 // bitmap words per window: 32 MiB, one look at the page map
	batchWords  = 4   // words captured in one step: a guest that wants one of their pages waits a quarter of a millisecond
	reserveWait = 20 * time.Millisecond
	finishWait  = 10 * time.Second
)

// scanner captures what the guest does not write, so that the capture ends. The
// scanners share the work by taking windows in turn. Each owns one ring.
type scanner struct {
	s     *server
	id    int
	ring  *arena.Ring
	pages uint64
	runs  []source.Run

	thread *affinity.Thread // of its own
	tid    atomic.Int32     // of its thread, while it runs
	urgent atomic.Bool      // a fault thread has put it before all others
}

// run first captures what was hot before the freeze, because the guest will
// write it again, and then everything in ascending order.
func (c *scanner) run() {
	runtime.LockOSThread() // the thread ends with us, and its priority with it
	background()
	c.thread = affinity.Of(c.s.cfg.VCPUs).Thread()
	c.tid.Store(int32(unix.Gettid()))
	defer c.tid.Store(0)
	defer func() { atomic.AddUint64(&c.s.stats.ScanPages, c.pages) }()
	c.windows(c.window)
}

// windows calls do for this scanner's share of the windows, hot ones first, until it
// reports that there is no use in going on.
func (c *scanner) windows(do func(block int, t *pageTable, w, end int, hot bool) bool) {
	n := 0
	for _, hot := range []bool{true, false} {
		for b, t := range c.s.tables {
			for w := 0; w < t.words(); w += windowWords {
				if n++; n%c.s.cfg.ScanThreads != c.id {
					continue
				}
				if !do(b, t, w, min(w+windowWords, t.words()), hot) {
					return
				}
			}
		}
	}
}

// window captures the words [w, end) of a block; with hot, only those that were
// hot. It reports whether to go on.
func (c *scanner) window(block int, t *pageTable, w, end int, hot bool) bool {
	content, err := c.content(block, t, w, end)
	if err != nil {
		c.s.fail(Broken, "block %d: page map: %v", block, err)
		return false
	}
	from := w
	for w < end {
		switch {
		case phase(c.s.phase.Load()) != capturing || c.s.failedWith() != nil:
			return false
		case t.whole:
			if !(hot && t.hot[w] == 0) && atomic.LoadUint64(&t.claimed[w]) == 0 && !c.huge(block, t, uint64(w)*wordPages) {
				return false
			}
			w += hugeWords
		case hot && t.hot[w] == 0 || atomic.LoadUint64(&t.claimed[w]) == t.full(w):
			w++
		case content[w-from] == 0:
			last := w + 1
			for last < end && content[last-from] == 0 && (!hot || t.hot[last] != 0) {
				last++
			}
			if !c.zeroWords(block, t, w, last) {
				return false
			}
			w = last
		case c.isWholeHuge(t, w, end):
			if !c.huge(block, t, uint64(w)*wordPages) {
				return false
			}
			if atomic.LoadUint64(&t.claimed[w]) == t.full(w) {
				w++
			}
		default:
			n := c.batch(t, w, end, content[w-from:], hot)
			if !c.words(block, t, w, content[w-from:w-from+n]) {
				return false
			}
			w += n
		}
	}
	return true
}

// content tells which pages of the words had content at the freeze. What is
// absent now is proved to have been absent then by its mark, when it is captured.
func (c *scanner) content(block int, t *pageTable, w, end int) (masks [windowWords]uint64, err error) {
	if t.populated != nil {
		for i := w; i < end; i++ {
			masks[i-w] = atomic.LoadUint64(&t.populated[i])
		}
		return masks, nil
	}
	return c.contentNow(block, t, w, end)
}

// contentNow tells which pages of the words have content now.
func (c *scanner) contentNow(block int, t *pageTable, w, end int) (masks [windowWords]uint64, err error) {
	first := uint64(w) * wordPages
	n := min(uint64(end)*wordPages, t.block.Pages) - first
	if c.runs, err = c.s.src.Runs(block, first, n, c.runs[:0]); err != nil {
		return masks, err
	}
	for _, r := range c.runs {
		if !r.Zero {
			setRange(masks[:], r.First-first, r.Pages)
		}
	}
	return masks, nil
}

// reserve waits for room in the ring. Nothing is claimed meanwhile, so the guest
// never waits for the store through a scanner.
func (c *scanner) reserve(pages int) ([]byte, bool) {
	c.thread.Keep()
	for phase(c.s.phase.Load()) == capturing && c.s.failedWith() == nil {
		if data, ok := c.ring.Reserve(pages, reserveWait); ok {
			return data, true
		}
	}
	return nil, false
}

// records waits for room for n records, as reserve does for pages.
func (c *scanner) records(n int) bool {
	for phase(c.s.phase.Load()) == capturing && c.s.failedWith() == nil {
		if c.ring.WaitRecords(n, reserveWait) {
			return true
		}
	}
	return false
}

// unpinned calls something that may block.
func (c *scanner) unpinned(do func() bool) bool {
	heartbeat.Unpin()
	defer heartbeat.Pin()
	return do()
}

// zeroWords captures words without content in one step. It waits for the ring only
// while it has claimed nothing, as reserve does: a word is at most half as many runs
// as pages, and the run that is still open one more.
func (c *scanner) zeroWords(block int, t *pageTable, w, end int) bool {
	heartbeat.Pin()
	defer heartbeat.Unpin()
	var first, n uint64
	flush := func() bool {
		ok := n == 0 || c.zeroRun(block, t, first, n)
		n = 0
		return ok
	}
	for ; w < end; w++ {
		if c.ring.FreeRecords() < wordPages && (!flush() || !c.unpinned(func() bool { return c.records(wordPages) })) {
			return false
		}
		for got := t.claim(w, t.full(w)); got != 0; {
			off, k := lowestRun(got)
			got &^= maskOf(off, k)
			at := uint64(w)*wordPages + off
			if n > 0 && at == first+n {
				n += k
				continue
			}
			if !flush() {
				return false
			}
			first, n = at, k
		}
	}
	return flush()
}

// zeroRun captures a claimed run of pages without content. The caller has seen to
// room for its record.
func (c *scanner) zeroRun(block int, t *pageTable, first, n uint64) bool {
	start := t.block.HVA + first*pageBytes
	if !c.s.prove(block, t, first, n, start, start+n*pageBytes) || !c.s.unprotect(block, t, first, n) {
		return false
	}
	if !c.ring.PublishZero(block, first, n, arena.ByScan, reserveWait) {
		c.s.fail(Broken, "block %d, page %d: no record was kept for a run", block, first)
		return false
	}
	c.done(n)
	return true
}

// isWholeHuge reports whether a huge page that nobody has begun on starts at
// word w and lies within the window.
func (c *scanner) isWholeHuge(t *pageTable, w, end int) bool {
	if w%hugeWords != 0 || w+hugeWords > end || !t.isHuge(uint64(w)*wordPages) || c.ring.MaxReserve() < hugePages {
		return false
	}
	for i := range hugeWords {
		if atomic.LoadUint64(&t.claimed[w+i]) != 0 {
			return false
		}
	}
	return true
}

// huge captures a huge page in one piece, so that its protection is lifted
// without splitting it.
func (c *scanner) huge(block int, t *pageTable, first uint64) bool {
	data, ok := c.reserve(hugePages)
	if !ok {
		return false
	}
	heartbeat.Pin() // what is claimed the guest may be waiting for
	defer heartbeat.Unpin()
	// Where the guest was faster, the rest is captured word by word.
	n := t.claimHuge(first)
	return n == 0 || c.captured(block, t, first, n, data[:n*pageBytes])
}

// batch is how many words from w on, but before end, to capture in one step: those
// that have content and are not for huge.
func (c *scanner) batch(t *pageTable, w, end int, content []uint64, hot bool) int {
	n, most := 1, min(batchWords, c.ring.MaxReserve()/wordPages, end-w)
	for n < most && content[n] != 0 && (!hot || t.hot[w+n] != 0) && !c.isWholeHuge(t, w+n, end) {
		n++
	}
	return n
}

// words captures what is left of the words from w on; content says which of their
// pages had any. Pages in a row are copied, proved and let go together, also across
// words: each time costs the guest's processors a flush of their TLBs.
func (c *scanner) words(block int, t *pageTable, w int, content []uint64) bool {
	data, ok := c.reserve(len(content) * wordPages)
	if !ok {
		return false
	}
	heartbeat.Pin() // what is claimed the guest may be waiting for
	defer heartbeat.Unpin()
	var first, n uint64
	var zero bool
	flush := func() (ok bool) {
		switch {
		case n == 0:
			return true
		case zero:
			ok = c.zeroRun(block, t, first, n)
		default:
			ok = c.captured(block, t, first, n, data[:n*pageBytes])
			data = data[n*pageBytes:]
		}
		n = 0
		return ok
	}
	for i, had := range content {
		for got := t.claim(w+i, t.full(w+i)); got != 0; {
			z := had>>bits.TrailingZeros64(got)&1 == 0
			alike := got & had
			if z {
				alike = got &^ had
			}
			off, k := lowestRun(alike)
			got &^= maskOf(off, k)
			at := uint64(w+i)*wordPages + off
			if n > 0 && z == zero && at == first+n {
				n += k
				continue
			}
			if !flush() {
				return false
			}
			first, n, zero = at, k, z
		}
	}
	return flush()
}

// captured captures a claimed run into data, the next pages of the ring.
func (c *scanner) captured(block int, t *pageTable, first, n uint64, data []byte) bool {
	if !c.s.captureRun(block, t, first, n, data) {
		return false
	}
	c.ring.Publish(block, first, n, arena.ByScan)
	c.done(n)
	return true
}

func (c *scanner) done(n uint64) {
	c.pages += n
	c.s.pagesDone(int64(n))
	c.calm()
}

// finishRings tells the agent that every ring has ended. All threads have.
func (s *server) finishRings() error {
	for i := range s.arena.Rings() {
		// Nothing is armed any more: nobody waits but the store's own pace.
		if !s.arena.Ring(i).Finish(finishWait) {
			return errors.New("no room for the end of a ring")
		}
	}
	return nil
}
