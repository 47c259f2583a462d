package restore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
)

// Rehearsal is what a test restore found.
type Rehearsal struct {
	Schema             string   `json:"schema"`
	ID                 string   `json:"id"`
	VM                 string   `json:"vm"`
	Name               string   `json:"name"` // of the clone, which is gone
	RAMBytes           uint64   `json:"ram_bytes"`
	CommandToRunningNS int64    `json:"command_to_running_ns"`
	DrainedNS          int64    `json:"drained_ns"` // all of its memory was read and verified by then
	RanNS              int64    `json:"ran_ns"`     // watched, running all the time
	Notes              []string `json:"notes"`
}

const rehearsalSchema = "ckagent.rehearse/1"

// rehearseLook is how often a rehearsed guest is looked at.
const rehearseLook = 200 * time.Millisecond

// Rehearse restores a checkpoint as a clone without a network, has all of its memory
// read and verified, watches its guest run for a while, and takes everything away again.
// The guest is told nothing; its disks are overlays, which go with it. Should we be
// killed meanwhile, the next restore or rehearsal takes the clone away.
func Rehearse(ctx context.Context, st *store.Store, ref string, o Options, watch time.Duration) (_ *Rehearsal, err error) {
	o.Clone, o.Detach, o.Paused, o.rehearsal = true, false, false, true
	o.Disks, o.FlattenDisks = DisksCheckpoint, false
	res, err := Run(ctx, st, ref, o)
	if res == nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, endRehearsal(res, o)) }()
	if err != nil {
		return nil, problem.New(problem.CodeOf(err), "rehearse", res.ID, "it came up as pid %d, but: %w", res.QEMUPID, err)
	}
	r := &Rehearsal{Schema: rehearsalSchema, ID: res.ID, VM: res.VM, Name: res.Name, RAMBytes: res.RAMBytes,
		CommandToRunningNS: res.CommandToRunningNS, DrainedNS: res.DrainedNS, Notes: append([]string{}, res.Notes...)}
	began := time.Now()
	if err := watchRunning(ctx, res, watch); err != nil {
		return nil, problem.New(problem.CodeOf(err), "rehearse", res.ID, "%w", err)
	}
	r.RanNS = int64(time.Since(began))
	return r, nil
}

// watchRunning fails if the guest stops, panics or ends within a time.
func watchRunning(ctx context.Context, res *Result, watch time.Duration) error {
	p, err := vm.OpenProcess(res.QEMUPID)
	if err != nil {
		return err
	}
	defer p.Close() // holds a pidfd, nothing else
	c, _, err := vm.Connect(ctx, p, vm.Options{QMP: "unix:" + res.QMP})
	if err != nil {
		return err
	}
	defer c.Close()
	bad := c.Subscribe(8, "SHUTDOWN", "RESET", "GUEST_PANICKED", "BLOCK_IO_ERROR")
	tick := time.NewTicker(rehearseLook)
	defer tick.Stop()
	end := time.NewTimer(watch)
	defer end.Stop()
	for {
		s, err := vm.ReadStatus(ctx, c)
		if err != nil {
			return p.Explain(err)
		}
		if !s.Running {
			return problem.New(problem.Integrity, "watch", res.Name, "the guest is %s and does not run", s.State)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.Done():
			return problem.New(problem.Integrity, "watch", res.Name, "its QEMU ended")
		case e, open := <-bad.C():
			if !open { // nothing was announced: the monitor is lost
				return p.Explain(c.Err())
			}
			return problem.New(problem.Integrity, "watch", res.Name, "the guest came to %s %s", e.Name, e.Data)
		case <-tick.C:
		case <-end.C:
			return nil
		}
	}
}

// endRehearsal takes the clone away with everything that was made for it.
func endRehearsal(res *Result, o Options) error {
	start, err := startTicks(res.QEMUPID)
	if err == nil {
		identity{res.QEMUPID, start}.end()
	}
	if _, err := Sweep(o.RunRoot); err != nil {
		return fmt.Errorf("take the clone away: %w", err)
	}
	return nil
}
