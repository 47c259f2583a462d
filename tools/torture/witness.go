package torture

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// witness measures what the host does to everybody: a thread that wants to run
// every 2 ms and notes how late it was at worst. A guest that is silent for as long
// as this thread was kept waiting was not held up by ckagent.
type witness struct {
	worst atomic.Int64
	quit  atomic.Bool
	done  chan struct{}
}

func watchHost() *witness {
	w := &witness{done: make(chan struct{})}
	go func() {
		defer close(w.done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		const every = 2 * time.Millisecond
		step := unix.NsecToTimespec(int64(every))
		last := time.Now()
		for !w.quit.Load() {
			_ = unix.Nanosleep(&step, nil) // cut short by a signal: the next one is as good
			now := time.Now()
			w.worst.Store(max(w.worst.Load(), int64(now.Sub(last)-every)))
			last = now
		}
	}()
	return w
}

// end stops it and tells the worst delay.
func (w *witness) end() time.Duration {
	w.quit.Store(true)
	<-w.done
	return time.Duration(w.worst.Load())
}
