package diskcopy

import (
	"context"
	"errors"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// base is what an incremental copy continues.
type base struct {
	bitmap string
	dirty  uint64 // bytes written since
	chain  []image.Volume
}

// findBase looks for a bitmap of ours that has recorded everything since a checkpoint
// whose volumes are still there. It returns nil if the disk has to be copied whole.
// The parent is leased until the Set ends, so that its volumes stay.
func (s *Set) findBase(ctx context.Context, d *item) (*base, error) {
	for _, b := range d.src.Own() {
		id, _ := disk.BitmapOwner(b.Name)
		if !b.Recording || b.Busy || b.Inconsistent {
			continue
		}
		img, err := s.parent(ctx, id)
		if err != nil {
			return nil, err
		}
		if img == nil {
			continue
		}
		for _, old := range img.Manifest().Disks {
			if old.Name == d.src.Drive.Name && old.Method == image.DiskBackup && old.SizeBytes == d.src.Bytes &&
				len(old.Volumes) < FullEvery {
				return &base{bitmap: b.Name, dirty: b.Count, chain: old.Volumes}, nil
			}
		}
	}
	return nil, nil
}

// parent opens the checkpoint that a bitmap belongs to; nil if there is none that
// could be continued.
func (s *Set) parent(ctx context.Context, id string) (*store.Image, error) {
	if img, ok := s.parents[id]; ok {
		return img, nil
	}
	if !image.ValidID(id) {
		return nil, nil
	}
	img, err := s.c.Store.OpenImage(ctx, id)
	if err == nil {
		if m := img.Manifest(); m.ID != id || m.VM != s.c.VM {
			err = problem.New(problem.NotFound, "continue", id, "it is another VM's")
		} else {
			err = s.c.Store.CheckVolumes(ctx, m, false)
		}
		if err != nil {
			err = errors.Join(err, img.Close())
			img = nil
		}
	}
	switch problem.CodeOf(err) {
	case problem.Cancelled, problem.Busy, problem.Store:
		if err != nil {
			return nil, err
		}
	}
	// What is damaged or gone is no reason to fail: the disk is copied whole.
	if err != nil {
		img = nil
	}
	s.parents[id] = img
	return img, nil
}

func (s *Set) closeParents() error {
	var errs []error
	for _, img := range s.parents {
		if img != nil {
			errs = append(errs, img.Close())
		}
	}
	s.parents = nil
	return errors.Join(errs...)
}
