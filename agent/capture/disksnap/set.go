package disksnap

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// Config is what a Set works on.
type Config struct {
	QMP     *qmp.Client
	Sources []vm.DiskSource
	Store   *store.Store
	ID      string // of the checkpoint
	VM      string
}

// Set is the disks of one checkpoint.
type Set struct {
	c     Config
	mark  string // of the store: whose snapshots are ours to delete
	reqs  []*qmp.Request
	taken bool // the snapshots may be there
}

// undoPatience is for deleting snapshots after a failure or a cancel.
const undoPatience = 20 * time.Second

// name is what the snapshots of a checkpoint are called. Checkpoints of one VM may be in
// several stores, none of which knows of the others.
func (s *Set) name(id string) string { return disk.Prefix + id + "-" + s.mark }

// Plan refuses disks that cannot hold a snapshot. It touches nothing.
func Plan(c Config) (*Set, error) {
	for i := range c.Sources {
		s := &c.Sources[i]
		if s.Format != "qcow2" || s.Root != s.Image {
			return nil, problem.New(problem.Refused, "snapshot", "disk "+s.Drive.Name, "it is no qcow2 image, or a filter is over it").
				WithHint("use --disks backup")
		}
	}
	return &Set{c: c}, nil
}

// NeededBytes is what will be stored: nothing.
func (s *Set) NeededBytes() uint64 { return 0 }

func (s *Set) action(command, node, name string) map[string]any {
	return map[string]any{"type": command, "data": map[string]any{"device": node, "name": name}}
}

// Prepare deletes what nobody needs and encodes the command for the pause.
func (s *Set) Prepare(ctx context.Context) error {
	if len(s.c.Sources) == 0 {
		return nil
	}
	key, err := s.c.Store.TagKey(ctx, "disk snapshots")
	if err != nil {
		return err
	}
	s.mark = key.ID()
	if err := s.prune(ctx); err != nil {
		return err
	}
	var actions []any
	for _, d := range s.c.Sources {
		actions = append(actions, s.action("blockdev-snapshot-internal-sync", d.Root, s.name(s.c.ID)))
	}
	r, err := qmp.Encode("transaction", map[string]any{"actions": actions})
	s.reqs, s.taken = []*qmp.Request{r}, true
	return err
}

// prune deletes the snapshots of checkpoints that are gone from this store.
func (s *Set) prune(ctx context.Context) error {
	list, err := s.c.Store.List(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, i := range list {
		known[s.name(i.ID)] = true
	}
	for _, d := range s.c.Sources {
		for _, name := range d.Snapshots {
			id, ours := strings.CutSuffix(strings.TrimPrefix(name, disk.Prefix), "-"+s.mark)
			// The form of the id keeps this from what somebody named likewise.
			if _, whole := image.VolumeOwner(image.VolumeName(id, 0)); !ours || !whole || name != s.name(id) || known[name] {
				continue
			}
			if err := s.remove(ctx, d.Root, name); err != nil {
				return problem.New(problem.Failed, "delete an old snapshot", "disk "+d.Drive.Name, "%s: %w", name, err)
			}
		}
	}
	return nil
}

func (s *Set) remove(ctx context.Context, node, name string) error {
	return s.c.QMP.Execute(ctx, "blockdev-snapshot-delete-internal-sync", map[string]any{"device": node, "name": name}, nil)
}

// Requests are the commands for the pause.
func (s *Set) Requests() []*qmp.Request { return s.reqs }

// Confirm waits for the replies to Requests.
func (s *Set) Confirm(ctx context.Context, calls []*qmp.Call) error {
	for _, c := range calls {
		if err := c.Wait(ctx, nil); err != nil {
			return problem.New(problem.Failed, "snapshot", "VM "+s.c.VM, "%w", err).WithHint("use --disks backup")
		}
	}
	return nil
}

// Start, Wait and Finish have nothing to do: the snapshots are there.
func (s *Set) Start(context.Context) error  { return nil }
func (s *Set) Wait(context.Context) error   { return nil }
func (s *Set) Finish(context.Context) error { return nil }

// Seal describes the disks.
func (s *Set) Seal(context.Context) ([]image.Disk, error) {
	var out []image.Disk
	for i := range s.c.Sources {
		d := s.c.Sources[i].Record()
		d.Method, d.Snapshot = image.DiskSnapshot, s.name(s.c.ID)
		out = append(out, d)
	}
	return out, nil
}

// Keep is called when the checkpoint exists.
func (s *Set) Keep(context.Context) error { return nil }

// Drop deletes the snapshots of a checkpoint that will not exist.
func (s *Set) Drop(ctx context.Context) error {
	if !s.taken || s.c.QMP.Err() != nil {
		return nil
	}
	s.taken = false
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	var errs []error
	for _, d := range s.c.Sources {
		err := s.remove(ctx, d.Root, s.name(s.c.ID))
		if _, none := errors.AsType[*qmp.Error](err); err != nil && !none { // it was not made yet
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
