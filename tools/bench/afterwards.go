package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/ckagent/ckagent/tools/bench/report"
)

// wayUntouched is a guest that nobody does anything to: what its speed does by itself
// between two moments, that of the host does.
const wayUntouched = "untouched"

const (
	fSpeedBefore = "speed_before" // pages written per second
	fSpeedAfter  = "speed_after"

	afterCheckpoints = 3
	afterRest        = 60 * time.Second // from the last checkpoint of a guest to the look at it
	afterWindows     = 20               // of one second, before and after
)

// afterwardsGuest writes as fast as it can, all over its huge pages.
var afterwardsGuest = guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2, fast: true}

// afterwards looks at what is left of a guest's speed and of its huge pages when it has
// been checkpointed and a minute has gone by.
func (b *bench) afterwards(ctx context.Context) error {
	ways := []*way{{name: wayOurs, op: b.ckagent}, {name: wayUffd, op: b.uffd}, {name: waySnapshot, op: b.backgroundSnapshot}, {name: wayUntouched}}
	defer closeGuests(ways)
	if err := launchGuests(ctx, ways, afterwardsGuest); err != nil {
		return err
	}
	rest, windows := afterRest, afterWindows
	if b.Quick {
		rest, windows = time.Second, 2
	}
	if err := b.speeds(ctx, ways, fSpeedBefore, windows); err != nil {
		return err
	}
	for _, w := range ways {
		if w.op == nil {
			continue
		}
		if err := b.checkpointed(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	for _, w := range ways { // all at once: they have a minute to recover, not to be fast
		if err := w.guest.run(ctx); err != nil {
			return err
		}
	}
	if err := wait(ctx, rest); err != nil {
		return err
	}
	for _, w := range ways {
		if err := w.guest.stop(ctx); err != nil {
			return err
		}
	}
	if err := b.speeds(ctx, ways, fSpeedAfter, windows); err != nil {
		return err
	}
	for _, w := range ways {
		left, err := w.guest.hugeBytes()
		if err != nil {
			return err
		}
		w.later.Add(fHuge, float64(left)/float64(w.guest.huge))
		if r := w.guest.Report(); r.Check() != nil {
			return fmt.Errorf("the guest of %s: %w", w.name, r.Check())
		}
	}
	b.afterwardsRows(ways)
	return nil
}

// checkpointed takes the checkpoints of one way, one after the other.
func (b *bench) checkpointed(ctx context.Context, w *way) error {
	if err := w.guest.run(ctx); err != nil {
		return err
	}
	for range afterCheckpoints {
		dir, err := os.MkdirTemp(b.dir, "checkpoint-")
		if err != nil {
			return err
		}
		_, _, err = w.op(ctx, w.guest, dir)
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			return err
		}
	}
	return w.guest.stop(ctx)
}

// speeds measures how fast each guest writes, in windows of a second in alternation.
func (b *bench) speeds(ctx context.Context, ways []*way, figure string, windows int) error {
	b.Log("afterwards: %s", figure)
	for range windows {
		for _, w := range ways {
			if err := w.guest.run(ctx); err != nil {
				return err
			}
			// Reports cover the window with one to spare on either side.
			if err := wait(ctx, 4*reportEvery); err != nil {
				return err
			}
			from := time.Now()
			if err := wait(ctx, window); err != nil {
				return err
			}
			to := time.Now()
			if err := wait(ctx, 4*reportEvery); err != nil {
				return err
			}
			if err := w.guest.stop(ctx); err != nil {
				return err
			}
			if pages, ok := w.guest.work.between(from, to); ok {
				w.later.Add(figure, pages/to.Sub(from).Seconds())
			}
		}
	}
	return nil
}

// afterwardsRows makes the table: each way against the guest that was left alone.
func (b *bench) afterwardsRows(ways []*way) {
	group := fmt.Sprintf("A minute after %d checkpoints: %s, a guest that writes as fast as it can", afterCheckpoints, afterwardsGuest)
	kept := func(w *way) float64 {
		return w.later.Get(fSpeedAfter).Median() / w.later.Get(fSpeedBefore).Median()
	}
	alone := ways[len(ways)-1]
	goal := report.Goal{Text: "≥ 99 %", Ratio: 0.99, AtLeast: true}
	for _, w := range ways[:len(ways)-1] {
		if w.name == waySnapshot {
			goal = report.Goal{}
		}
		b.row(report.Row{ID: "afterwards/speed/" + w.name, Group: group, What: "pages written per second, of those before, " + w.name, Unit: report.Percent,
			Ours: kept(w), Peer: kept(alone), PeerName: wayUntouched, N: len(w.later.Get(fSpeedAfter)), Goal: goal})
		b.row(report.Row{ID: "afterwards/huge/" + w.name, Group: group, What: "huge pages, of those before, " + w.name, Unit: report.Percent,
			Ours: w.later.Get(fHuge).Median(), Peer: math.Max(1, alone.later.Get(fHuge).Median()), PeerName: wayUntouched, N: 1, Goal: goal})
	}
}
