package signals

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/vm"
)

// dirtyState is what sampling knows of one VM; Watcher.mu guards result and note,
// the sampling goroutine owns the rest.
type dirtyState struct {
	result *Dirty
	at     time.Time
	note   string

	blocks  []vm.RAMBlock
	vcpus   []int
	sampled *track.Sampled
	round   int
	due     time.Time
}

func (d *dirtyState) sample(now time.Time) (*Dirty, string) {
	if d.result == nil {
		return nil, d.note
	}
	r := *d.result
	r.AgeNS = now.Sub(d.at).Nanoseconds()
	return &r, d.note
}

// windows are the lengths that take turns: the curve wants points at several.
var windows = []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, time.Second}

// contentPages are read per window to see what they are made of.
const contentPages = 128

// sampleDirty runs a window of each VM in turn. Between two windows of a VM its
// memory is free for others: a checkpoint that comes meanwhile finds it so.
func (w *Watcher) sampleDirty(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, pid := range w.pids() {
			v := w.get(pid)
			if v == nil || time.Now().Before(v.dirty.due) {
				continue
			}
			v.busy.Lock()
			if v.gone {
				v.busy.Unlock()
				continue
			}
			r, err := v.window(ctx, w.o)
			v.dirty.due = time.Now().Add(w.o.DirtyEvery)
			v.busy.Unlock()
			if ctx.Err() != nil {
				return
			}
			w.mu.Lock()
			if err != nil {
				v.dirty.note = err.Error()
			} else {
				v.dirty.result, v.dirty.at, v.dirty.note = r, time.Now(), ""
			}
			w.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// window takes the VM, samples once and lets go.
func (v *watched) window(ctx context.Context, o WatchOptions) (out *Dirty, err error) {
	lock, err := vm.Lock(ctx, v.process)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	d := &v.dirty
	if d.blocks == nil {
		if err := v.layout(ctx, o); err != nil {
			return nil, err
		}
	}
	t, err := track.Open(ctx, track.Config{PID: v.process.PID, VCPUs: d.vcpus, Blocks: d.blocks, Take: o.Take, CollapseBudget: 100 * time.Millisecond})
	if err != nil {
		if !problem.Is(err, problem.Busy) {
			d.blocks = nil // memory may have been plugged: look again
		}
		return nil, v.process.Explain(err)
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	if d.sampled == nil || !d.sampled.Rebind(t) {
		d.sampled = t.Sample(track.SampleConfig{MaxShare: o.MaxShare, Content: contentPages})
	}
	x, err := d.sampled.Window(ctx, windows[d.round%len(windows)])
	if err != nil {
		return nil, v.process.Explain(err)
	}
	d.round++
	out = &Dirty{IntervalNS: x.Time.Nanoseconds(), Rate: x.Rate, Error: x.Error, ArmedShare: x.Armed, Windows: uint64(d.round)}
	if f, ok := d.sampled.Curve().Fit(); ok {
		out.CurvePages, out.CurveTauNS = f.Pages, f.Tau.Nanoseconds()
		out.WSSBytes, out.WSSOverNS = uint64(f.At(f.Longest)*4096), f.Longest.Nanoseconds()
	}
	if s, ok := d.sampled.Shares(); ok {
		out.Shares = &s
	}
	return out, nil
}

// layout asks the monitor where memory lies, and gives it back.
func (v *watched) layout(ctx context.Context, o WatchOptions) (err error) {
	t, err := vm.Open(ctx, v.process.PID, vm.Options{QMP: o.QMP})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	if v.dirty.blocks, err = t.Layout(ctx); err != nil {
		return err
	}
	v.dirty.vcpus = nil
	for _, c := range t.VCPUs {
		v.dirty.vcpus = append(v.dirty.vcpus, c.TID)
	}
	return nil
}
