package signals

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/vm"
)

// dirtyState is what sampling knows of one VM; Watcher.mu guards the first part, who
// holds watched.busy owns the rest.
type dirtyState struct {
	result  *Dirty
	at      time.Time
	note    string
	due     time.Time
	working bool // a window is running or about to

	blocks  []vm.RAMBlock
	vcpus   []int
	sampled *track.Sampled
	round   int
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

// together bounds the VMs whose memory is sampled at one time. A window is nearly all
// waiting; on a host of many VMs they would come too seldom one after another.
const together = 8

// sampleDirty runs windows of the VMs, those first that have waited longest. Between
// two windows of a VM its memory is free for others: a checkpoint that comes
// meanwhile finds it so.
func (w *Watcher) sampleDirty(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var running sync.WaitGroup
	defer running.Wait()
	room := make(chan struct{}, together)
	for {
		for _, v := range w.due(time.Now()) {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return
			}
			running.Go(func() {
				defer func() { <-room }()
				w.sampleOne(ctx, v)
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// due lists the VMs whose next window is due, the longest due first, and marks them
// as being worked on.
func (w *Watcher) due(now time.Time) (out []*watched) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range w.vms {
		if d := &v.dirty; !d.working && !now.Before(d.due) {
			d.working = true
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b *watched) int { return a.dirty.due.Compare(b.dirty.due) })
	return out
}

func (w *Watcher) sampleOne(ctx context.Context, v *watched) {
	v.busy.Lock()
	defer v.busy.Unlock()
	if v.gone || ctx.Err() != nil {
		return
	}
	r, err := v.window(ctx, w.o)
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	v.dirty.working, v.dirty.due = false, now.Add(w.o.DirtyEvery)
	switch {
	case ctx.Err() != nil: // what it brought was our own end
	case err != nil:
		v.dirty.note = err.Error()
	default:
		v.dirty.result, v.dirty.at, v.dirty.note = r, now, ""
	}
}

// window takes the VM, samples once and lets go.
func (v *watched) window(ctx context.Context, o WatchOptions) (out *Dirty, err error) {
	ctx, done := v.whileAlive(ctx)
	defer done()
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

// whileAlive returns a context that ends with the VM, so that a window of a VM that
// was killed is not waited for; done ends it and what watches.
func (v *watched) whileAlive(ctx context.Context) (alive context.Context, done func()) {
	alive, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-v.process.Done():
			cancel()
		case <-alive.Done():
		}
	})
	return alive, func() {
		cancel()
		watch.Wait()
	}
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
