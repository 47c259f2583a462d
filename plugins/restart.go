package plugins

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// stableAfter is how long a program serves until its earlier losses are forgotten.
const stableAfter = time.Minute

// Insist is Set for a policy that was in charge before, of which nobody is there to hear
// that it does not come up, or to set it again: it is wanted all the same, the fallback
// decides meanwhile, and it is started again like one that lost its place. Status says why
// it is not in charge yet.
func (s *Slot) Insist(ctx context.Context, ref string, params map[string]string, signals *policy.Signals) {
	s.change.Lock()
	defer s.change.Unlock()
	w := newWanted(ref, params)
	_, err := s.switchTo(ctx, w, signals)
	if err == nil {
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	if s.want != nil {
		close(s.want.replaced)
	}
	s.retire(s.current, false)
	w.losses = 1
	s.want, s.current, s.trouble, s.signals = w, nil, setError(ref, err), signals
	st := s.status()
	s.wg.Go(func() { s.restart(w) })
	s.mu.Unlock()
	s.changed(st)
}

// own looks after a generation until nothing is left of it, and starts the program
// again if it lost its place.
func (s *Slot) own(l *lease) {
	s.watch(l)
	<-l.idle
	l.End()
	close(l.ended)
	s.mu.Lock()
	lost := l.lost && s.want == l.want && !s.closed
	if lost {
		if time.Since(l.Started) > stableAfter {
			l.want.losses = 0
		}
		l.want.losses++
	}
	s.mu.Unlock()
	if lost {
		s.restart(l.want)
	}
}

// watch returns when a generation is retired, which it sees to if the program ends or
// does not answer for its health.
func (s *Slot) watch(l *lease) {
	tick := time.NewTicker(s.cfg.HealthEvery)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-l.leave:
			return
		case <-l.Ended():
			err = l.quote(fmt.Errorf("%w: %w", ErrEnded, endedHow(l.proc.exitStatus())))
		case <-tick.C:
			ctx, cancel := context.WithTimeout(s.ctx, policy.Deadline)
			err = l.Healthy(ctx)
			cancel()
		}
		s.mu.Lock()
		var lost *Status
		if err != nil && s.ctx.Err() == nil {
			lost = s.failed(l, err)
		}
		s.mu.Unlock()
		if lost != nil {
			s.changed(*lost)
		}
	}
}

func endedHow(status error) error {
	if status == nil {
		return errors.New("exit status 0")
	}
	return status
}

// restart tries to bring a program back, later every time, until something else is
// wanted.
func (s *Slot) restart(w *wanted) {
	s.mu.Lock()
	losses := w.losses
	s.mu.Unlock()
	wait := s.cfg.FirstRestart
	for range losses - 1 {
		wait = min(2*wait, s.cfg.LastRestart)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-w.replaced:
			return
		case <-timer.C:
		}
		done := s.tryRestart(w)
		if done {
			return
		}
		wait = min(2*wait, s.cfg.LastRestart)
		timer.Reset(wait)
	}
}

func (s *Slot) tryRestart(w *wanted) (done bool) {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.Lock()
	superseded, signals := s.want != w || s.closed, s.signals
	s.mu.Unlock()
	if superseded {
		return true
	}
	_, err := s.switchTo(s.ctx, w, signals)
	if err == nil {
		return true
	}
	s.mu.Lock()
	s.trouble = fmt.Errorf("start it again: %w", err)
	w.losses++
	s.mu.Unlock()
	return false
}
