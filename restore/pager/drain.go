package pager

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/ckagent/ckagent/restore/pager/order"
)

const (
	// While faults come in, the drain works in pieces small enough that the one
	// under way costs a fault next to nothing.
	politeNS    = int64(2 * time.Millisecond)
	politePages = 16
)

// pace is a token bucket for the background.
type pace struct {
	bytesPerSecond uint64
	nextNS         atomic.Int64 // when the next byte may go
}

// take books bytes and returns when they may go.
func (p *pace) take(bytes uint64) (atNS int64) {
	if p.bytesPerSecond == 0 {
		return 0
	}
	cost := int64(float64(bytes) / float64(p.bytesPerSecond) * 1e9)
	for {
		old := p.nextNS.Load()
		at := max(old, nowNS())
		if p.nextNS.CompareAndSwap(old, at+cost) {
			return at
		}
	}
}

// drainer brings in what nobody asked for yet, until everything is in or ctx ends.
func (s *server) drainer(ctx context.Context, index int, p *pace) {
	drainThread(index)
	buf, err := newPinned(s.cfg.ChunkBytes)
	if err != nil {
		s.end(err)
		return
	}
	defer buf.free()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		r, why, ok := s.next()
		if !ok {
			if s.need.Left() == 0 {
				s.end(nil)
				return
			}
			// All the rest is in other hands, held, or not to be drained.
			timer.Reset(20 * time.Millisecond)
			select {
			case <-ctx.Done():
			case <-s.kick:
			case <-timer.C:
			}
			continue
		}
		if at := p.take(r.Pages * PageBytes); at > nowNS() {
			timer.Reset(time.Duration(at - nowNS()))
			select {
			case <-ctx.Done():
			case <-timer.C:
			}
		}
		err := s.fetch(ctx, buf, r, why)
		s.planMu.Lock()
		s.plan.Done(r)
		s.planMu.Unlock()
		s.ctl.leftPages.Store(s.need.Left())
		if err != nil {
			if ctx.Err() == nil {
				s.end(err)
			}
			return
		}
	}
}

// next asks the planner, after telling it what was asked for meanwhile.
func (s *server) next() (Run, order.Why, bool) {
	s.planMu.Lock()
	defer s.planMu.Unlock()
	for {
		select {
		case h := <-s.hints:
			s.plan.Fault(h.block, h.page)
			continue
		default:
		}
		break
	}
	s.plan.UrgentOnly(s.cfg.NoDrain && !s.ctl.has(flagRelease))
	return s.plan.Next()
}

// fetch reads, verifies and places one run, in pieces while faults come in.
func (s *server) fetch(ctx context.Context, buf *pinned, r Run, why order.Why) error {
	for done := uint64(0); done < r.Pages && ctx.Err() == nil; {
		piece, ok := s.need.Next(Run{Block: r.Block, First: r.First + done, Pages: r.Pages - done})
		if !ok {
			return nil // faults were faster
		}
		if nowNS()-s.faultNS.Load() < politeNS {
			piece.Pages = min(piece.Pages, politePages)
		}
		done = piece.End() - r.First
		n, err := s.src.ReadRun(ctx, Bulk, s.lazy[r.Block].ImageBlock, piece.First, buf.mem[:piece.Pages*PageBytes])
		if n > 0 {
			placed, perr := s.placeRun(buf, 0, Run{Block: r.Block, First: piece.First, Pages: uint64(n)})
			s.ctl.drainBytes.Add(placed * PageBytes)
			switch why {
			case order.Hot:
				s.ctl.hotPages.Add(placed)
			case order.Near:
				s.ctl.nearPages.Add(placed)
			}
			if perr != nil {
				return perr
			}
		}
		if uint64(n) < piece.Pages {
			if ctx.Err() != nil || errors.Is(err, context.Canceled) {
				return nil
			}
			// What follows the bad page is taken up from there.
			s.ctl.readErrors.Add(1)
			s.report(r.Block, piece.First+uint64(n), err)
			done = piece.First + uint64(n) + 1 - r.First
		}
	}
	return nil
}

// nudge lets an idle drainer look again.
func (s *server) nudge() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}
