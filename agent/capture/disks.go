package capture

import (
	"context"

	"github.com/ckagent/ckagent/agent/capture/diskcopy"
	"github.com/ckagent/ckagent/agent/capture/disksnap"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
)

// diskMethod is a way to keep the disks of a checkpoint: *diskcopy.Set, whose life
// cycle it is, or *disksnap.Set.
type diskMethod interface {
	NeededBytes() uint64
	Prepare(context.Context) error
	Requests() []*qmp.Request
	Confirm(context.Context, []*qmp.Call) error
	Start(context.Context) error
	Wait(context.Context) error
	Finish(context.Context) error
	Seal(context.Context) ([]image.Disk, error)
	Keep(context.Context) error
	Drop(context.Context) error
}

// planDisks decides what becomes of each writable disk, and makes sure that the store
// has room for it beside the ramBytes that memory needs.
func (s *session) planDisks(ctx context.Context, txn *store.Txn, ramBytes uint64) error {
	sources, refused, err := s.target.DiskSources(ctx)
	if err != nil {
		return problem.New(problem.CodeOf(err), "look at the disks", s.object, "%w", err)
	}
	c := diskcopy.Config{QMP: s.target.QMP, Store: s.store, Txn: txn, VM: s.sub.Name,
		SpeedBytes: s.o.DiskSpeedBytes, MemoryBytes: s.o.DiskMemoryBytes}
	if s.o.Disks == DisksNone {
		if s.left, err = s.leaveOut(ctx); err != nil {
			return err
		}
	} else {
		if err := s.target.Refused("checkpoint", refused); err != nil {
			return err
		}
		c.Sources = sources
	}
	if m := s.sub.Machine.Facts[image.FactManager]; m != "" && (s.o.Disks == DisksSnapshot || s.o.Disks == DisksOverlay) {
		return problem.New(problem.Refused, "checkpoint", s.object, "%s manages this VM, and would not know what --disks %s does to its images", m, s.o.Disks).
			WithHint("use --disks backup, which leaves its images what they are")
	}
	if s.o.Disks == DisksOverlay {
		c.Overlay = &diskcopy.Overlay{Dir: s.o.OverlayDir, Outside: s.target.Process.Outside}
	}
	if s.o.Disks == DisksSnapshot {
		s.disks, err = disksnap.Plan(disksnap.Config{QMP: c.QMP, Sources: sources, Store: s.store, ID: txn.ID(), VM: s.sub.Name})
	} else {
		s.disks, err = diskcopy.Plan(ctx, c)
	}
	if err != nil {
		return err
	}
	return s.store.CheckSpace(ramBytes+s.disks.NeededBytes(), s.o.MinFreeBytes)
}

// leaveOut records the writable disks without their content, so that a restore knows
// that something is missing.
func (s *session) leaveOut(ctx context.Context) ([]image.Disk, error) {
	drives, err := s.target.Disks(ctx)
	if err != nil {
		return nil, problem.New(problem.CodeOf(err), "look at the disks", s.object, "%w", err)
	}
	var out []image.Disk
	for i := range drives {
		d := &drives[i]
		if !d.Writable() || d.Pflash || d.QOMPath == "" {
			continue
		}
		out = append(out, image.Disk{Name: d.Name, Device: d.Device, Node: d.Node, QOMPath: d.QOMPath, Type: d.Type,
			Format: d.Driver, Path: d.File, SizeBytes: d.Bytes, Method: image.DiskNone, Content: image.ContentGuest})
	}
	return out, nil
}
