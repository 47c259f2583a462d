package daemon

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/ckagent/ckagent/agent"
)

const (
	minBandwidth = 1 << 20
	// minShare is the least memory a checkpoint can do with: half of it is for pages
	// on their way to the store, of which a fault server needs 16 MiB.
	minShare = 64 << 20
	// burst is how long a store may have been idle to make up for it afterwards.
	burst = 200 * time.Millisecond
)

// limits are those of the host.
type limits struct {
	cfg   Limits
	turns *semaphore.Weighted // first come, first served
	// windows are those in which dirty rates are sampled.
	windows *semaphore.Weighted
	store   bandwidth
	// waiting counts those that want a turn and have none.
	waiting atomic.Int64
}

func newLimits(cfg Limits) *limits {
	return &limits{cfg: cfg, turns: semaphore.NewWeighted(int64(cfg.Checkpoints)), windows: semaphore.NewWeighted(dirtyAtOnce), store: bandwidth{perSecond: float64(cfg.StoreBandwidth)}}
}

// apply puts a VM's protection under the limits.
func (l *limits) apply(p *agent.Protection) {
	p.Enter = func(ctx context.Context) (func(), error) {
		l.waiting.Add(1)
		err := l.turns.Acquire(ctx, 1)
		l.waiting.Add(-1)
		if err != nil {
			return nil, err
		}
		return func() { l.turns.Release(1) }, nil
	}
	o := &p.Capture
	if l.cfg.StoreBandwidth > 0 {
		o.Pace = l.store.wait
		// Disks are copied by QEMU, by a limit of its own.
		o.DiskSpeedBytes = least(o.DiskSpeedBytes, uint64(l.cfg.StoreBandwidth)/uint64(l.cfg.Checkpoints))
	}
	if l.cfg.Memory > 0 {
		share := uint64(l.cfg.Memory) / uint64(l.cfg.Checkpoints)
		// Mode cow and its disks, or mode buffer alone.
		o.ArenaBytes = least(max(o.ArenaBytes, defaultArena), share/2)
		o.DiskMemoryBytes = least(o.DiskMemoryBytes, share/2)
		o.BufferBytes = least(o.BufferBytes, share)
	}
}

// defaultArena is what a checkpoint takes that was told nothing.
const defaultArena = 96 << 20

// least is the lower of two limits, 0 meaning none.
func least(a, b uint64) uint64 {
	if a == 0 {
		return b
	}
	return min(a, b)
}

// bandwidth lets bytes pass at a rate, in the order in which they come.
type bandwidth struct {
	perSecond float64

	mu   sync.Mutex
	free time.Time // when everything that was let pass has passed
}

// wait returns when the bytes may pass. Those that are urgent pass at once, and the
// others after them wait for it.
func (b *bandwidth) wait(ctx context.Context, bytes int, urgent bool) error {
	at := b.reserve(time.Now(), bytes)
	d := time.Until(at)
	if urgent || d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reserve says from when on the bytes may pass.
func (b *bandwidth) reserve(now time.Time, bytes int) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if earliest := now.Add(-burst); b.free.Before(earliest) {
		b.free = earliest
	}
	at := b.free
	b.free = b.free.Add(time.Duration(float64(bytes) / b.perSecond * float64(time.Second)))
	return at
}
