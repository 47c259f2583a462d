package agent

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/taker"
	"github.com/ckagent/ckagent/agent/vm"
)

// checkpointApart has a process of its own take the checkpoint. Hooks stay here: what the
// first has begun the other has to undo, whatever became of that process. This process has
// no monitor meanwhile.
func (v *VM) checkpointApart(ctx context.Context, st *store.Store, o capture.Options) (res *capture.Result, err error) {
	if err := v.disconnect(); err != nil {
		return nil, v.proc.Explain(err)
	}
	t, err := taker.Start(ctx, taker.Config{Helper: selfexe.Or(v.opts.Self), Lock: v.lock.File(), Heard: v.witness.see, Track: v.track, Order: taker.Order{
		PID: v.pid, StartTicks: v.proc.StartTicks, Name: v.Name, QMP: v.opts.QMP, LeaveDisksOut: v.opts.LeaveDisksOut,
		Overlays: v.opts.Overlays, Freeze: v.opts.Freeze, Store: st.Dir(), Capture: o}})
	if err != nil {
		return nil, v.proc.Explain(err)
	}
	missed, err := v.opts.Hooks.around(ctx, v, func() (string, error) {
		var err error
		res, err = t.Take(ctx)
		// Before the hook: nothing of ours is left in the VM then.
		if err = errors.Join(err, t.Close()); err != nil {
			return "", v.proc.Explain(errors.Join(err, v.putRight(ctx)))
		}
		return res.Manifest.ID, nil
	})
	if err = errors.Join(err, t.Close()); err != nil { // the first hook may have refused it
		return nil, err
	}
	if missed != nil {
		res.Notes = append(res.Notes, missed.Error())
	}
	if words := t.Said(); words != "" {
		res.Notes = append(res.Notes, words)
	}
	return res, nil
}

// putRight lets the VM run again should the process that took a checkpoint have died
// together with its guardian: to whoever comes next it would be a VM that somebody else
// has paused. Otherwise there is nothing to do.
func (v *VM) putRight(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rightPatience)
	defer cancel()
	_, err := guardian.Recover(ctx, v.proc)
	if problem.Is(err, problem.Busy) {
		return nil // a guardian is at it
	}
	return err
}

// rightPatience bounds it: QEMU has to answer, and may be flushing its disks.
const rightPatience = 15 * time.Second

// Take carries out the order of another process of ours, whose lock of the VM we share.
func Take(ctx context.Context, o *taker.Order, lock *os.File, l *taker.Line) (res *capture.Result, err error) {
	share := vm.Inherited(lock)
	proc, err := vm.OpenProcessAs(o.PID, o.StartTicks)
	if err != nil {
		return nil, errors.Join(err, share.Close())
	}
	v := &VM{Name: o.Name, pid: o.PID, lock: share, proc: proc, track: o.Capture.Track,
		opts: Options{QMP: o.QMP, LeaveDisksOut: o.LeaveDisksOut, Overlays: o.Overlays, Freeze: o.Freeze, Spare: capture.NewSpare(o.Capture)}}
	v.witness = &witness{v: v, tell: l.Heard}
	defer func() { err = errors.Join(err, v.Close()) }()
	st, err := store.Open(o.Store)
	if err != nil {
		return nil, err
	}
	// If that could not be done before. While a guardian is still at it, it is not our turn.
	if _, err := guardian.Recover(ctx, proc); err != nil {
		return nil, proc.Explain(err)
	}
	if err := v.open(ctx); err != nil {
		return nil, proc.Explain(err)
	}
	if err := l.Ready(ctx); err != nil {
		return nil, err
	}
	if res, err = v.Checkpoint(ctx, st, o.Capture); err == nil {
		v.track = nil // whose marks they are has more to come
	}
	return res, err
}
