package pager

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
)

// stuckNS is how long a fault thread may be busy with itself before the worker
// stops claiming to be well.
const stuckNS = int64(time.Second)

// beater shows that the worker lives, notices that the process served has ended or
// that the seat was given away, ends a hold on the drain that nobody else will end,
// and keeps an eye on memory.
type beater struct {
	w      *worker
	stop   *uffd.Stop
	pidfd  int
	held   *hold
	server atomic.Pointer[server]
}

func (b *beater) run() {
	w := b.w
	for n := 0; ; n++ {
		s := b.server.Load()
		if s == nil || !s.stuck(stuckNS) {
			w.ctl.worker.beatNS.Store(nowNS())
		}
		if w.ctl.worker.occupant() != w.self && s != nil {
			s.end(errSuperseded)
		}
		b.held.look()
		if n%20 == 0 {
			b.weigh()
		}
		switch await(beatEvery, b.stop.FD(), b.pidfd, b.held.starter) {
		case stopped:
			return
		case 0:
			if s := b.server.Load(); s != nil {
				s.end(uffd.ErrGone)
			}
			// Everything else fails by itself now; do not spin meanwhile.
			await(beatEvery, b.stop.FD())
		case 1:
			b.held.release() // the starter has ended; idle drainers look every 20 ms
		}
	}
}

// weigh notes the largest resident size.
func (b *beater) weigh() {
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) == nil {
		b.w.ctl.rssBytes.Store(max(b.w.ctl.rssBytes.Load(), uint64(ru.Maxrss)<<10))
	}
}
