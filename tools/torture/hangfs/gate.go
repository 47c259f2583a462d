package hangfs

import (
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// gate stands before a file system and decides about each operation.
type gate struct {
	fuse.RawFileSystem

	mu       sync.Mutex
	ops      int
	written  uint64 // bytes
	hangAt   int    // operations; 0: never
	fullAt   uint64 // bytes; 0: never
	slow     time.Duration
	open     chan struct{} // closed by release
	hung     chan struct{} // closed when the first operation hangs
	released bool
	hanging  bool
}

func newGate(f fuse.RawFileSystem) *gate {
	return &gate{RawFileSystem: f, open: make(chan struct{}), hung: make(chan struct{})}
}

// HangAfter makes every operation hang once n more have been answered.
func (g *gate) HangAfter(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hangAt = g.ops + n + 1
}

// FullAfter makes writes fail with ENOSPC once n more bytes were written.
func (g *gate) FullAfter(n uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fullAt = g.written + n + 1
}

// Slow makes every write take d longer.
func (g *gate) Slow(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.slow = d
}

// Ops is how many operations were asked for so far.
func (g *gate) Ops() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ops
}

// Hung is closed when an operation hangs.
func (g *gate) Hung() <-chan struct{} { return g.hung }

// release lets what hangs go on: it gets an I/O error.
func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.released {
		g.released = true
		close(g.open)
	}
}

// pass counts an operation and holds it if it is time to.
func (g *gate) pass() fuse.Status {
	g.mu.Lock()
	g.ops++
	hang := g.hangAt > 0 && g.ops >= g.hangAt
	if hang && !g.hanging {
		g.hanging = true
		close(g.hung)
	}
	g.mu.Unlock()
	if !hang {
		return fuse.OK
	}
	<-g.open
	return fuse.EIO
}

func (g *gate) passWrite(n int) fuse.Status {
	if st := g.pass(); st != fuse.OK {
		return st
	}
	g.mu.Lock()
	full := g.fullAt > 0 && g.written+uint64(n) >= g.fullAt
	if !full {
		g.written += uint64(n)
	}
	slow := g.slow
	g.mu.Unlock()
	if full {
		return fuse.Status(28) // ENOSPC
	}
	if slow > 0 {
		t := time.NewTimer(slow)
		defer t.Stop()
		select {
		case <-t.C:
		case <-g.open:
		}
	}
	return fuse.OK
}

// Init keeps the server from the file system below, which would otherwise have the
// kernel read and write its files without asking us (FUSE passthrough).
func (g *gate) Init(*fuse.Server) {}
