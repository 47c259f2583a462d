package daemon

import (
	"runtime/debug"
	"sync"
)

// heapLimit is when garbage is collected whatever is under way.
const heapLimit = 1 << 30

// garbage keeps the collector away from checkpoints. A collection stops the world, and
// does so only when every thread that runs Go has come by; on a host without processors
// to spare one that writes to a store, which is nice, is waited for longer than the
// guardians wait for a heartbeat. They cannot tell that from a frozen daemon.
type garbage struct {
	mu      sync.Mutex
	holders int
	percent int // as it was
}

func (g *garbage) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.holders++; g.holders == 1 {
		debug.SetMemoryLimit(heapLimit)
		g.percent = debug.SetGCPercent(-1)
	}
}

func (g *garbage) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.holders--; g.holders == 0 {
		debug.SetGCPercent(g.percent)
	}
}
