package pager

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/uffd"
)

// badPage is a page whose content could not be had, and why.
type badPage struct {
	block int
	page  uint64
	err   error
}

const (
	firstRetry = 20 * time.Millisecond
	lastRetry  = 2 * time.Second
	maxTracked = 4096 // bad pages retried one by one; more than that is a lost image
)

// report hands a bad page to the retrier. It is held from now on: not offered to
// the drain and not tried again by fault threads.
func (s *server) report(block int, page uint64, err error) {
	// It may not be known as needed yet; if it came in by another way in this very
	// moment, the next trial finds it there.
	s.need.Add(Run{Block: block, First: page, Pages: 1})
	if !s.need.Hold(block, page) {
		return // reported already
	}
	if err == nil {
		err = errors.New("the source has fewer pages than it says")
	}
	select {
	case s.bad <- badPage{block, page, err}:
	default:
		// Beyond the queue only the fact counts: held, and found by HeldRuns.
	}
}

// retrier tries bad pages again, a bounded number of times with growing pauses.
// A page that stays bad is published and left as it is: who touches it waits (or,
// if the operator chose so, gets a memory error). It is never filled with anything
// that was not verified.
func (s *server) retrier(ctx context.Context) {
	type trial struct {
		block int
		page  uint64
		tries int
	}
	var (
		trials []trial
		first  error
		delay  = firstRetry
	)
	buf, err := newPinned(PageBytes)
	if err != nil {
		s.end(err)
		return
	}
	defer buf.free()
	tick := time.NewTimer(delay)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-s.bad:
			if first == nil || problem.Is(b.err, problem.Integrity) && !problem.Is(first, problem.Integrity) {
				first = b.err
			}
			if len(trials) == 0 {
				delay = firstRetry
			}
			if len(trials) < maxTracked {
				trials = append(trials, trial{b.block, b.page, 0})
			}
			continue
		case <-tick.C:
		}
		if s.ctl.flags.And(^uint32(flagRetry))&flagRetry != 0 {
			trials, first, delay = nil, nil, firstRetry
			s.need.Release()
			s.planMu.Lock()
			s.plan.Again()
			s.planMu.Unlock()
			// Threads whose faults were swallowed ask again.
			if err := s.wakeAll(); err != nil {
				s.end(err)
				return
			}
			if err := s.publish(nil); err != nil {
				s.end(err)
				return
			}
			s.ctl.undamage()
			s.nudge()
		}
		rest := trials[:0]
		for _, t := range trials {
			if ctx.Err() != nil {
				return
			}
			b := &s.lazy[t.block]
			n, err := s.src.ReadRun(ctx, Demand, b.ImageBlock, t.page, buf.mem[:PageBytes])
			if n == 1 {
				if err := s.settle(t.block, t.page, s.place(b.HVA+t.page*PageBytes, buf, PageBytes)); err != nil {
					s.end(err)
					return
				}
				s.nudge()
				continue
			}
			if err != nil {
				first = err
			}
			if t.tries++; t.tries < s.cfg.Retries {
				rest = append(rest, t)
			}
		}
		trials = rest
		if len(trials) == 0 {
			if err := s.condemn(first); err != nil {
				s.end(err)
				return
			}
		}
		delay = min(delay*2, lastRetry)
		if len(trials) == 0 {
			delay = firstRetry * 5
		}
		tick.Reset(delay)
	}
}

// condemn gives up on the held pages for now: published, and poisoned if chosen.
func (s *server) condemn(first error) error {
	held := s.need.Held()
	if held != s.ctl.badPages.Load()-s.poisoned {
		if err := s.publish(first); err != nil {
			return err
		}
		if s.cfg.BadPage == BadPagePoison && held > 0 {
			if err := s.poison(); err != nil {
				return err
			}
		}
	}
	switch left := s.need.Left(); {
	case held > 0 && s.known.Load() && left == s.need.Held() && s.ctl.phaseNow() == PhaseServing:
		s.ctl.advance(PhaseDamaged)
	case s.need.Held() == 0:
		s.ctl.undamage()
	}
	return nil
}

// publish makes the present damage known.
func (s *server) publish(first error) error {
	held := s.need.Held()
	d := damage{Pages: uint64(held + s.poisoned)}
	if d.Pages > 0 {
		if first == nil {
			first = errors.New("unreadable")
		}
		d.First = *problem.ToWire(opPageIn, first)
		for _, r := range s.need.HeldRuns(64) {
			d.Runs = append(d.Runs, Run{Block: s.lazy[r.Block].ImageBlock, First: r.First, Pages: r.Pages})
		}
	}
	s.ctl.badPages.Store(int64(d.Pages))
	return s.onDamage(&d)
}

// poison settles every held page as a memory error.
func (s *server) poison() error {
	for {
		runs := s.need.HeldRuns(256)
		if len(runs) == 0 {
			s.nudge()
			return nil
		}
		for _, r := range runs {
			b := &s.lazy[r.Block]
			if _, err := s.h.Poison(b.HVA+r.First*PageBytes, r.Pages*PageBytes, 0); err != nil && !errors.Is(err, uffd.ErrExists) {
				return problem.New(problem.Failed, "poison page", b.Name, "%w", err).
					WithHint("this kernel may lack UFFDIO_POISON (6.6); choose to let the guest wait instead")
			}
			s.poisoned += int64(s.need.Settle(r))
		}
	}
}
