package faultserver

import (
	"runtime"
	"sync/atomic"

	"github.com/ckagent/ckagent/agent/affinity"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// kernelScanner captures what the guest has not written yet. Nobody waits for it, so it
// claims a page only when it has proved its copy.
type kernelScanner struct {
	scanner
	e       *kernelEngine
	same    uint64 // pages delivered as they were in the capture before
	regions [64]pagemap.Region
}

func (c *kernelScanner) run() {
	runtime.LockOSThread() // the thread ends with us, and its priority with it
	background()
	c.thread = affinity.Of(c.s.cfg.VCPUs).Thread()
	c.windows(c.window)
}

// over reports whether there is no use in going on.
func (c *kernelScanner) over() bool {
	return c.e.ending.Load() || c.s.failedWith() != nil
}

// window captures the words [w, end) of a block; with hot, only those that were hot.
// It reports whether to go on.
func (c *kernelScanner) window(block int, t *pageTable, w, end int, hot bool) bool {
	if !hot && !c.unchanged(block, t, w, end) {
		return false
	}
	content, err := c.contentNow(block, t, w, end)
	if err != nil {
		c.s.fail(Broken, "block %d: page map: %v", block, err)
		return false
	}
	skip := func(w int) bool {
		return hot && t.hot[w] == 0 || atomic.LoadUint64(&t.claimed[w])|t.unwritten(w) == t.full(w)
	}
	for from := w; w < end; {
		switch {
		case c.over():
			return false
		case skip(w):
			w++
		case content[w-from] == 0:
			last := w + 1
			for last < end && content[last-from] == 0 && !skip(last) {
				last++
			}
			first := uint64(w) * wordPages
			if !c.zeros(block, t, first, min(uint64(last)*wordPages, t.block.Pages)-first) {
				return false
			}
			w = last
		default:
			n, most := 1, min(batchWords, c.ring.MaxReserve()/wordPages, end-w)
			for n < most && content[w-from+n] != 0 && !skip(w+n) {
				n++
			}
			if !c.words(block, t, w, content[w-from:w-from+n]) {
				return false
			}
			w += n
		}
	}
	return true
}

// words captures what is left of the words from w on; content says which of their pages
// have any.
func (c *kernelScanner) words(block int, t *pageTable, w int, content []uint64) bool {
	data, ok := c.reserve(len(content) * wordPages)
	if !ok {
		return false
	}
	begin := uint64(w) * wordPages
	end := min(begin+uint64(len(content))*wordPages, t.block.Pages)
	for at := begin; at < end; {
		full, n := runFrom(content, at-begin, end-begin)
		if n = t.apart(at, n); n == 0 { // if it was written meanwhile, the ring has it
			at++
			continue
		}
		if !full {
			ok = c.zeros(block, t, at, n)
		} else {
			data, ok = c.copies(block, t, at, n, data)
		}
		if !ok {
			return false
		}
		at += n
	}
	return true
}

// runFrom is the run of equal bits from bit at on, within end.
func runFrom(bits []uint64, at, end uint64) (set bool, n uint64) {
	get := func(i uint64) bool { return bits[i/wordPages]>>(i%wordPages)&1 != 0 }
	set = get(at)
	for n = 1; at+n < end && get(at+n) == set; n++ {
	}
	return set, n
}

// zeros delivers pages without content.
func (c *kernelScanner) zeros(block int, t *pageTable, first, n uint64) bool {
	return c.proved(block, t, first, n, func(first, n uint64) bool {
		for !c.ring.PublishZero(block, first, n, arena.ByScan, reserveWait) {
			if c.over() {
				return false
			}
		}
		c.pages += n
		c.e.settled(block, first, n)
		return true
	})
}

// copies delivers pages with content by way of data, the next pages of the ring. It
// returns what it did not need of them: pages that somebody else delivers are closed up.
func (c *kernelScanner) copies(block int, t *pageTable, first, n uint64, data []byte) (rest []byte, ok bool) {
	if err := c.s.src.Read(block, first, data[:n*pageBytes]); err != nil {
		c.s.fail(Broken, "block %d, page %d: %v", block, first, err)
		return data, false
	}
	rest = data
	ok = c.proved(block, t, first, n, func(f, k uint64) bool {
		if at := data[(f-first)*pageBytes:]; &at[0] != &rest[0] {
			copy(rest, at[:k*pageBytes])
		}
		c.e.deliver(c.ring, block, f, k, arena.ByScan)
		rest = rest[k*pageBytes:]
		c.pages += k
		return true
	})
	return rest, ok
}

// proved looks, after they were copied, which of the pages still bear their marks: they
// were neither written nor discarded since the freeze. It claims them and calls deliver
// for the runs that nobody had claimed. It reports whether to go on.
func (c *kernelScanner) proved(block int, t *pageTable, first, n uint64, deliver func(first, n uint64) bool) bool {
	return c.eachArmed(block, t, first, n, func(first, n uint64) bool { return t.claimRuns(first, n, deliver) })
}

// eachArmed calls do for the runs of pages that bear their marks, until it reports false.
func (c *kernelScanner) eachArmed(block int, t *pageTable, first, n uint64, do func(first, n uint64) bool) bool {
	ok, start := true, t.block.HVA+first*pageBytes
	err := c.s.pm.Armed(start, start+n*pageBytes, c.regions[:], func(r pagemap.Region) bool {
		f, k := (r.Start-t.block.HVA)/pageBytes, r.Pages(pageBytes)
		if t.held != nil && !c.s.stillHeld(block, t, f, k) {
			c.s.fail(Unproven, "block %d: a page of %d+%d was discarded before it was captured", block, f, k)
			ok = false
			return ok
		}
		ok = do(f, k)
		return ok
	})
	if err != nil {
		c.s.fail(Broken, "block %d, page %d: %v", block, first, err)
		return false
	}
	return ok
}
