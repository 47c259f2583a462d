package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// readOnly reports whether err says that the file system takes no writes.
func readOnly(err error) bool { return errors.Is(err, unix.EROFS) }

// Remove deletes the checkpoint that an id or its abbreviation names; others that
// continue it have names of their own for what they took over. It refuses
// (problem.Busy) what somebody uses, and (problem.Refused) what is pinned and the last
// good checkpoint of its VM. force overrides the pin, the last good one and leases that
// cannot be checked from here; never a live lease, because somebody's guest would lose
// its memory.
func (s *Store) Remove(ctx context.Context, id string, force bool) (Info, error) {
	const op = "remove checkpoint"
	c, err := s.resolveID(ctx, op, id)
	if err != nil {
		return Info{}, err
	}
	var info Info
	err = s.locked(ctx, op, func() error {
		// Again under the lock: leases and pins may have changed.
		if c, err = s.look(op, c.vmDir, c.id); err != nil {
			return err
		}
		if info, _, err = s.info(c); err != nil {
			return err
		}
		if l := held(c.leases, force); len(l) > 0 {
			return leaseProblem(op, c.id, l)
		}
		if c.pinned && !force {
			return problem.New(problem.Refused, op, c.id, "it is pinned").WithHint("ckagent unpin %s, or --force", c.id)
		}
		siblings, err := s.candidates(op, c.vmDir)
		if err != nil {
			return err
		}
		return s.unlink(ctx, op, c, siblings, force)
	})
	if err != nil {
		return info, err
	}
	if err := removeDir(s.fs, c.dir); err != nil {
		return info, fsys.Problem(op, c.dir, err)
	}
	return info, s.sweepVolumes(ctx, op, c.vmDir)
}

// unlink makes a checkpoint vanish if it is not the last good one. The caller holds the
// lock and removes the rest without it.
func (s *Store) unlink(ctx context.Context, op string, c candidate, siblings []candidate, force bool) error {
	others := false
	for _, o := range siblings {
		others = others || o.id != c.id && o.committed && !force && s.good(ctx, o)
	}
	if !others && !force && s.good(ctx, c) {
		return problem.New(problem.Refused, op, c.id, "it is the last good checkpoint of its VM").WithHint("--force removes it all the same")
	}
	return s.vanish(op, c)
}

// vanish takes the manifest away, durably.
func (s *Store) vanish(op string, c candidate) error {
	if err := removeFile(s.fs, manifestPath(c.dir)); err != nil {
		return fsys.Problem(op, c.dir, err)
	}
	return fsys.Problem(op, c.dir, s.fs.SyncDir(c.dir))
}

// Pin protects a checkpoint from retention and from Remove without force.
func (s *Store) Pin(ctx context.Context, id string) error {
	return s.pin(ctx, "pin checkpoint", id, func(path string) error {
		f, err := s.fs.Create(path)
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return f.Close()
	})
}

// Unpin takes the protection back.
func (s *Store) Unpin(ctx context.Context, id string) error {
	return s.pin(ctx, "unpin checkpoint", id, func(path string) error { return removeFile(s.fs, path) })
}

func (s *Store) pin(ctx context.Context, op, id string, change func(path string) error) error {
	c, err := s.resolveID(ctx, op, id)
	if err != nil {
		return err
	}
	return s.locked(ctx, op, func() error {
		if c, err = s.look(op, c.vmDir, c.id); err != nil {
			return err
		}
		if !c.committed {
			return problem.New(problem.NotFound, op, c.id, "it was removed just now")
		}
		if err := change(filepath.Join(c.dir, pinName)); err != nil {
			return fsys.Problem(op, c.dir, err)
		}
		return fsys.Problem(op, c.dir, s.fs.SyncDir(c.dir))
	})
}

// Kept is a checkpoint that retention left although it is beyond the count.
type Kept struct {
	ID     string
	Reason string
}

// RetentionReport says what ApplyRetention did.
type RetentionReport struct {
	Removed []string
	Kept    []Kept
}

// ApplyRetention removes a VM's checkpoints beyond the keepLast newest good ones.
// Pinned ones do not count and stay, as do those that somebody uses, and damaged ones
// newer than the last that counts: somebody may want to know. keepLast is at least 1, so the last good one always stays.
func (s *Store) ApplyRetention(ctx context.Context, vm string, keepLast int) (RetentionReport, error) {
	const op = "apply retention"
	var rep RetentionReport
	if keepLast < 1 {
		return rep, problem.New(problem.Usage, op, vm, "keep %d: at least one checkpoint is kept", keepLast)
	}
	if _, err := s.fs.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return rep, nil
	}
	var gone []candidate
	err := s.locked(ctx, op, func() error {
		list, err := s.committedOf(op, vm)
		if err != nil {
			return err
		}
		good := 0
		for _, c := range list {
			if err := ctx.Err(); err != nil {
				return problem.New(problem.Cancelled, op, vm, "%w", err)
			}
			reason := ""
			switch {
			case c.pinned:
				reason = "pinned"
			case good < keepLast:
				switch _, err := s.check(ctx, c, GetOptions{}); {
				case err == nil:
					good++
				case problem.Is(err, problem.Integrity), problem.Is(err, problem.Refused):
					rep.Kept = append(rep.Kept, Kept{c.id, "damaged: " + err.Error()})
				default:
					return err
				}
				continue
			case len(held(c.leases, false)) > 0:
				reason = held(c.leases, false)[0].String()
			}
			if reason != "" {
				rep.Kept = append(rep.Kept, Kept{c.id, reason})
				continue
			}
			if err := s.vanish(op, c); err != nil {
				return err
			}
			rep.Removed = append(rep.Removed, c.id)
			gone = append(gone, c)
		}
		return nil
	})
	for _, c := range gone {
		if rerr := removeDir(s.fs, c.dir); rerr != nil && err == nil {
			err = fsys.Problem(op, c.dir, rerr)
		}
	}
	if len(gone) > 0 && err == nil {
		err = s.sweepVolumes(ctx, op, vmDir(vm))
	}
	return rep, err
}

// GCOptions tune GC.
type GCOptions struct {
	DryRun bool
	// Force discounts leases of other hosts and pid namespaces. Only for an
	// operator who knows that they are gone.
	Force bool
}

// GCReport says what GC removed, or would have.
type GCReport struct {
	Removed    []string // paths below the store
	FreedBytes uint64   // on disk
	Kept       []Kept   // half-written checkpoints that somebody may still be writing
}

// GC removes what nobody can use: checkpoints that were never committed or were
// half removed, temporary files, and leases of the dead. Whatever a lease covers
// stays, and so does whatever is not the store's own.
func (s *Store) GC(ctx context.Context, o GCOptions) (GCReport, error) {
	const op = "collect garbage"
	var rep GCReport
	vms, err := s.vmDirs(op)
	if err != nil {
		return rep, err
	}
	for _, vm := range vms {
		if err := s.gcVM(ctx, op, vm, o, &rep); err != nil {
			return rep, err
		}
	}
	err = s.locked(ctx, op, func() error {
		for _, name := range []string{markerName, secretName} {
			if err := s.gcFile(filepath.Join(s.dir, name+tmpSuffix), o, &rep); err != nil {
				return err
			}
		}
		return nil
	})
	return rep, fsys.Problem(op, s.dir, err)
}

func (s *Store) gcVM(ctx context.Context, op, vm string, o GCOptions, rep *GCReport) error {
	var dead []candidate
	err := s.locked(ctx, op, func() error {
		list, err := s.candidates(op, vm)
		if err != nil {
			return err
		}
		for _, c := range list {
			if err := ctx.Err(); err != nil {
				return problem.New(problem.Cancelled, op, vm, "%w", err)
			}
			if !c.committed {
				if l := held(c.leases, o.Force); len(l) > 0 {
					rep.Kept = append(rep.Kept, Kept{c.id, l[0].String()})
				} else {
					dead = append(dead, c)
				}
				continue
			}
			for _, l := range c.leases {
				if l.State == Dead || l.State == Unknown && o.Force {
					if err := s.gcFile(filepath.Join(c.dir, l.file), o, rep); err != nil {
						return err
					}
				}
			}
			// While a merge is under way the rest is its own.
			files, err := s.replaced(op, c, "", o.Force)
			if err != nil {
				return err
			}
			if len(held(c.leases, o.Force)) == 0 {
				files = append(files, manifestPath(c.dir)+tmpSuffix)
			}
			for _, path := range files {
				if err := s.gcFile(path, o, rep); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fsys.Problem(op, s.dir, err)
	}
	// Without the lock: nobody can reach these any more, ids are never used again.
	for _, c := range dead {
		rep.Removed = append(rep.Removed, filepath.Join(vmsName, vm, c.id))
		for _, name := range c.files {
			if st, err := s.fs.Stat(filepath.Join(c.dir, name)); err == nil {
				rep.FreedBytes += uint64(st.DiskBytes)
			}
		}
		if !o.DryRun {
			if err := removeDir(s.fs, c.dir); err != nil {
				return fsys.Problem(op, c.dir, err)
			}
		}
	}
	if err := s.gcVolumes(ctx, op, vm, o, rep); err != nil || o.DryRun {
		return err
	}
	return s.locked(ctx, op, func() error {
		for _, dir := range []string{filepath.Join(vm, image.DisksDirName), vm} {
			err := s.fs.Remove(filepath.Join(s.dir, vmsName, dir)) // only if empty
			if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, fs.ErrNotExist) {
				return fsys.Problem(op, dir, err)
			}
		}
		return nil
	})
}

// gcVolumes removes what no checkpoint of a VM names any more.
func (s *Store) gcVolumes(ctx context.Context, op, vm string, o GCOptions, rep *GCReport) error {
	return s.locked(ctx, op, func() error {
		unused, err := s.unusedVolumes(op, vm, o.Force)
		for _, path := range unused {
			if err == nil {
				err = fsys.Problem(op, path, s.gcFile(path, o, rep))
			}
		}
		return err
	})
}

// gcFile removes one file if it is there.
func (s *Store) gcFile(path string, o GCOptions, rep *GCReport) error {
	st, err := s.fs.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(s.dir, path)
	if err != nil {
		return err
	}
	rep.Removed = append(rep.Removed, rel)
	rep.FreedBytes += uint64(st.DiskBytes)
	if o.DryRun {
		return nil
	}
	return removeFile(s.fs, path)
}
