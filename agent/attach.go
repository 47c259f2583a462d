package agent

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
)

// Options say how to attach.
type Options struct {
	Name string // of the VM in the store; default: QEMU's -name, else vm-PID
	QMP  string // address of the monitor; default: found
	// LeaveDisksOut takes VMs whose writable disks are to be left out of checkpoints.
	LeaveDisksOut bool
	// Overlays takes those whose disks only an overlay can keep (capture.DisksOverlay).
	Overlays bool

	// Track has checkpoints by engine bpf leave their marks in the VM's memory, so that the
	// next one reads only what was written since (capture.Tracking).
	Track bool

	// Spare is started while the VM is looked at, for the checkpoint that follows; nil: no
	// checkpoint will need it. It is the VM's from Attach on.
	Spare *capture.Spare

	Hooks  Hooks
	Freeze time.Duration // freeze the guest's file systems for the pause, no longer than this; 0: do not

	// Apart has each checkpoint taken by a process of its own (package taker), which is
	// started by the command line Self; empty: this binary.
	Apart bool
	Self  []string
}

// VM is a running VM that we may take checkpoints of.
type VM struct {
	Name   string
	opts   Options
	pid    int
	lock   *vm.FileLock
	proc   *vm.Process // held all the time, against reuse of the pid
	target *vm.Target  // nil between checkpoints
	// machine and qemu are as the last look at the machine found them.
	machine image.Machine
	qemu    image.QEMU

	witness   *witness
	track     *capture.Tracking // nil: nothing is tracked between checkpoints
	interlude interlude
}

// Attach takes hold of the VM that runs as process pid. It changes nothing, but puts
// right what a dead ckagent left: a VM that it had stopped, and what it had put into its
// block graph. What
// cannot be protected is problem.Refused, with all reasons; a VM that another
// ckagent works on is problem.Busy.
func Attach(ctx context.Context, pid int, o Options) (*VM, error) {
	proc, err := vm.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	lock, err := vm.Lock(ctx, proc)
	if err != nil {
		return nil, errors.Join(err, proc.Close())
	}
	if _, err := guardian.Recover(ctx, proc); err != nil {
		return nil, errors.Join(err, lock.Close(), proc.Close())
	}
	v := &VM{opts: o, pid: pid, lock: lock, proc: proc, interlude: interlude{taken: true}}
	v.witness = &witness{v: v}
	if o.Track {
		v.track = &capture.Tracking{}
	}
	if err := v.open(ctx); err != nil {
		return nil, errors.Join(v.proc.Explain(err), v.Close())
	}
	if v.Name, err = chooseName(o.Name, v.target.Name, pid); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return v, nil
}

// numeric names would be taken for pids on the command line.
var numeric = regexp.MustCompile(`^[0-9]+$`)

func chooseName(asked, own string, pid int) (string, error) {
	if asked != "" {
		if numeric.MatchString(asked) || !nameable(asked) {
			return "", problem.New(problem.Usage, "attach", "name "+asked, "a name must not be a number, contain a slash, or be longer than %d bytes", image.MaxNameBytes)
		}
		return asked, nil
	}
	if own == "" || !nameable(own) {
		return fmt.Sprintf("vm-%d", pid), nil
	}
	if numeric.MatchString(own) {
		return "vm-" + own, nil
	}
	return own, nil
}

// nameable reports whether a VM can be called by a name. Bytes that are no text would be
// told as others: by QEMU's monitor, for one, as the replacement character.
func nameable(name string) bool {
	return len(name) <= image.MaxNameBytes && utf8.ValidString(name) && !strings.ContainsAny(name, "/\x00\n\uFFFD")
}

// open connects, and looks at the machine as it is now.
func (v *VM) open(ctx context.Context) error {
	if v.target != nil {
		return nil
	}
	v.witness.pause() // it may have the monitor
	if !v.opts.Apart {
		v.opts.Spare.Start()
	}
	t, err := vm.Open(ctx, v.pid, vm.Options{QMP: v.opts.QMP})
	if err != nil {
		return err
	}
	if t.Process.StartTicks != v.proc.StartTicks {
		return errors.Join(problem.New(problem.NotFound, "attach", v.proc.String(), "the process ended and its pid was given to another"), t.Close())
	}
	if err := v.look(ctx, t); err != nil {
		return errors.Join(err, t.Close())
	}
	v.target = t
	v.witness.follow(t.QMP)
	return nil
}

// NameOf is the name that the VM of a process is protected by, if asked for as given.
func NameOf(pid int, asked string) (string, error) {
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return "", err
	}
	name, err := chooseName(asked, p.GivenName(), pid)
	return name, errors.Join(err, p.Close())
}

// look refuses what cannot be protected, and learns the rest.
func (v *VM) look(ctx context.Context, t *vm.Target) error {
	if _, err := t.Layout(ctx); err != nil {
		return err
	}
	// What a dead ckagent left in the block graph would be taken for the machine's
	// own; nobody else is at work on it, for we hold its lock.
	if _, err := t.TakeOutLeftovers(ctx); err != nil {
		return problem.New(problem.CodeOf(err), "protect", t.Process.String(), "an earlier checkpoint's disks: %w", err)
	}
	t.LeaveDisksOut, t.Overlays = v.opts.LeaveDisksOut, v.opts.Overlays
	refusals, err := t.Refusals(ctx)
	if err != nil {
		return err
	}
	if v.track.Since() != "" { // ours
		refusals = slices.DeleteFunc(refusals, func(r vm.Refusal) bool { return r.Code == vm.RefusedUserfaultfd })
	}
	m, err := t.Describe(ctx)
	if err != nil {
		return err
	}
	if refusals = append(refusals, m.Refusals...); len(refusals) > 0 {
		return Refuse(t.Process.String(), refusals)
	}
	v.machine, v.qemu = recordMachine(t.Process, m)
	return nil
}

// Refuse turns refusals into one error: the first as the cause, all of them
// named.
func Refuse(object string, refusals []vm.Refusal) error {
	var reasons, advice []string
	for _, r := range refusals {
		reasons = append(reasons, fmt.Sprintf("[%s] %s: %s", r.Code, r.Object, r.Reason))
		if r.Advice != "" {
			advice = append(advice, r.Advice)
		}
	}
	return problem.New(problem.Refused, "protect", object, "%s", strings.Join(reasons, "; ")).
		WithHint("%s", strings.Join(advice, "; "))
}

// Checkpoint takes one checkpoint.
func (v *VM) Checkpoint(ctx context.Context, st *store.Store, o capture.Options) (*capture.Result, error) {
	v.interlude.take()
	if v.opts.Apart {
		return v.checkpointApart(ctx, st, o)
	}
	if err := v.open(ctx); err != nil {
		return nil, v.proc.Explain(err)
	}
	if v.opts.Freeze > 0 {
		o.Quiesce = func(ctx context.Context) (func() error, error) {
			return freeze(ctx, v.target, o.Helper, v.opts.Freeze)
		}
	}
	if o.Proofs == nil {
		o.Proofs = proving.New(o.Helper)
	}
	o.Track, o.Spare = v.track, v.opts.Spare
	var res *capture.Result
	missed, err := v.opts.Hooks.around(ctx, v, func() (id string, err error) {
		res, err = capture.Take(ctx, capture.Subject{Target: v.target, Name: v.Name, Machine: v.machine, QEMU: v.qemu, Lock: v.lock.File()}, st, o)
		if err != nil {
			return "", err
		}
		return res.Manifest.ID, nil
	})
	if err != nil {
		return nil, err
	}
	if missed != nil {
		res.Notes = append(res.Notes, missed.Error())
	}
	return res, nil
}

// Rest gives the monitor back until the next checkpoint.
func (v *VM) Rest() error {
	err := v.disconnect()
	v.witness.resume()
	v.interlude.give()
	return err
}

// disconnect leaves the monitor to anybody.
func (v *VM) disconnect() error {
	v.witness.pause()
	t := v.target
	v.target = nil
	if t == nil {
		return nil
	}
	return t.Close()
}

// Ended is closed when the QEMU process has ended.
func (v *VM) Ended() <-chan struct{} { return v.proc.Done() }

// Close lets go of the VM.
func (v *VM) Close() error {
	v.interlude.take()
	err := v.disconnect()
	v.witness.end()
	return errors.Join(err, v.opts.Spare.Close(), v.track.Close(), v.lock.Close(), v.proc.Close())
}
