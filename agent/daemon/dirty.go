package daemon

import (
	"context"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/signals/estimate"
)

const (
	// dirtyFor is how long a VM's memory is looked at, and dirtyWindow how long each of the
	// windows in it is.
	dirtyFor    = 2 * time.Second
	dirtyWindow = 500 * time.Millisecond
	// dirtyLimit is what all of it may take. A child that was frozen holds a part of the
	// memory marked until then, which costs the guest next to nothing.
	dirtyLimit = 15 * time.Second
	dirtyGrace = time.Second
	// dirtyRetry is the wait where a checkpoint was in the way.
	dirtyRetry = 5 * time.Second
	// dirtyAtOnce bounds the VMs that are looked at together.
	dirtyAtOnce = 2
)

// sampleOnSchedule has the VM's dirty rate sampled between its checkpoints, until stop is
// called. A child does it, as with everything that holds a VM.
func (w *ward) sampleOnSchedule(ctx context.Context, log *slog.Logger, p *agent.Protector) (stop func()) {
	every := time.Duration(w.d.cfg.Signals.DirtyEvery)
	if every == 0 || w.record().Spec.GetTrack() { // the memory has a tracker already
		return func() {}
	}
	return onSchedule(ctx, min(every, dirtyRetry), w.d.limits.windows, func(ctx context.Context) time.Duration {
		err := p.Between(ctx, 2*dirtyFor, func(ctx context.Context, lock *os.File) error { return w.sample(ctx, log, lock) })
		switch {
		case err == nil:
			return every
		case problem.Is(err, problem.Busy), problem.Is(err, problem.Cancelled):
			return min(every, dirtyRetry)
		}
		log.Debug("no dirty rate", "error", err)
		return every
	})
}

// sample measures the dirty rate once. It ends early where a checkpoint wants the VM.
func (w *ward) sample(ctx context.Context, log *slog.Logger, lock *os.File) error {
	limited, cancel := context.WithTimeout(ctx, dirtyLimit)
	defer cancel()
	var r struct {
		Intervals  int     `json:"intervals"`
		IntervalNS int64   `json:"interval_ns"`
		TimeNS     int64   `json:"time_ns"`
		Rate       float64 `json:"dirty_pages_per_second"`
		Error      float64 `json:"error_pages_per_second"`
		WSSBytes   uint64  `json:"wss_bytes"`
		Armed      float64 `json:"armed_share"`
		Curve      *struct {
			Pages float64 `json:"w_pages"`
			TauNS int64   `json:"tau_ns"`
		} `json:"curve"`
		Shares *struct {
			Pages      int     `json:"pages_looked_at"`
			Zero       float64 `json:"zero"`
			FalseDirty float64 `json:"false_dirty"`
			Duplicate  float64 `json:"duplicate"`
			Half       float64 `json:"compressible"`
			Ratio      float64 `json:"compressed_ratio"`
		} `json:"shares"`
	}
	rec := w.record()
	args := []string{"dirty-rate", strconv.Itoa(rec.PID), "--method", "sampled", "--for", dirtyFor.String(), "--interval", dirtyWindow.String(), "--locked"}
	if q := rec.Spec.GetQmp(); q != "" {
		args = append(args, "--qmp", q)
	}
	err := w.d.run(limited, log, &r, errand{args: args, files: []*os.File{lock}, grace: dirtyGrace})
	switch {
	case ctx.Err() != nil:
		return problem.New(problem.Cancelled, "sample", "VM "+w.name, "%w", ctx.Err())
	case err != nil:
		return err
	}
	s := &sampled{at: time.Now(), dirty: signals.Dirty{IntervalNS: r.IntervalNS, Rate: r.Rate, Error: r.Error, WSSBytes: r.WSSBytes, WSSOverNS: r.TimeNS,
		ArmedShare: r.Armed, Windows: uint64(r.Intervals)}}
	if c := r.Curve; c != nil {
		s.dirty.CurvePages, s.dirty.CurveTauNS = c.Pages, c.TauNS
	}
	if x := r.Shares; x != nil {
		s.dirty.Shares = &estimate.Shares{Pages: x.Pages, Zero: x.Zero, FalseDirty: x.FalseDirty, Duplicate: x.Duplicate, Compressible: x.Half, Ratio: x.Ratio}
	}
	w.dirty.Store(s)
	return nil
}

// sampled is a VM's dirty rate as it was.
type sampled struct {
	at    time.Time
	dirty signals.Dirty
}

// now is it with its age; nil: it was never sampled.
func (s *sampled) now() *signals.Dirty {
	if s == nil {
		return nil
	}
	d := s.dirty
	d.AgeNS = time.Since(s.at).Nanoseconds()
	return &d
}
