package store

import (
	"context"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// MergeOptions tune Merge.
type MergeOptions struct {
	Compress string // of what is rewritten: none, s2 or zstd
	// Sparse takes over only the pages of segments less than half of which the
	// checkpoint needs. Without it no page is left in another checkpoint's segment, but
	// for content that is shared with other VMs and not sparse.
	Sparse bool
}

// Merge makes a checkpoint that continues others independent of them: what it took over
// is copied, and its manifest replaced by one that names the copies. That rename is the
// instant of the change; before and after it the checkpoint is whole, and who reads it
// meanwhile goes on. The files of before go when nobody else holds a lease, or with GC.
// problem.Busy while somebody else merges it.
func (s *Store) Merge(ctx context.Context, ref string, o MergeOptions) (Info, error) {
	const op = "merge checkpoint"
	c, err := s.resolveAny(ctx, op, ref)
	if err != nil {
		return Info{}, err
	}
	var lease string
	err = s.locked(ctx, op, func() error {
		if c, err = s.look(op, c.vmDir, c.id); err != nil {
			return err
		}
		if !c.committed {
			return problem.New(problem.NotFound, op, c.id, "it was removed just now")
		}
		for _, l := range held(c.leases, false) {
			if l.Role == Writing {
				return leaseProblem(op, c.id, []Lease{l})
			}
		}
		lease, err = s.addLease(c.dir, Writing)
		return err
	})
	if err != nil {
		return Info{}, fsys.Problem(op, c.dir, err)
	}
	defer func() { _ = removeFile(s.fs, filepath.Join(c.dir, lease)) }() // else it ends with us
	// What an earlier one left would be in the way of the new names.
	if err := s.sweepReplaced(ctx, op, c, lease); err != nil {
		return Info{}, err
	}
	m, err := s.merge(ctx, op, c, o)
	if err != nil {
		return Info{}, err
	}
	return infoOf(c, m), s.sweepReplaced(ctx, op, c, lease)
}

// merge writes the new files and puts their manifest into place.
func (s *Store) merge(ctx context.Context, op string, c candidate, o MergeOptions) (*image.Manifest, error) {
	r, err := s.openReader(c)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	absorb := func(g *image.Segment) bool {
		sparse := g.Pages*image.MinPageBytes < g.Bytes/2
		return sparse || !o.Sparse && g.VM == ""
	}
	if !needsMerge(r.Manifest(), absorb) {
		return r.Manifest(), nil
	}
	m, err := image.Merge(ctx, r, image.MergeOptions{FS: s.fs, Compress: o.Compress, Absorb: absorb})
	if err != nil {
		return nil, err
	}
	data, err := image.EncodeManifest(m)
	if err != nil {
		return nil, err
	}
	return m, fsys.Problem(op, c.dir, s.putManifest(ctx, c.dir, data))
}

func needsMerge(m *image.Manifest, absorb func(*image.Segment) bool) bool {
	for i := range m.Segments {
		if g := m.Segments[i]; g.Owner != "" && absorb(&g) {
			return true
		}
	}
	return false
}

// putManifest replaces or makes the manifest in a directory whose other files are
// durable. On an error the new one may or may not be there; both are whole.
func (s *Store) putManifest(ctx context.Context, dir string, data []byte) error {
	tmp := manifestPath(dir) + tmpSuffix
	if err := removeFile(s.fs, tmp); err != nil { // of one that failed
		return err
	}
	if err := fsys.WriteFile(s.fs, tmp, data); err != nil {
		return err
	}
	// The names must be durable before the rename can be: a power loss between the
	// two would otherwise leave a manifest that names files that are not there.
	if err := s.fs.SyncDir(dir); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return problem.New(problem.Cancelled, "commit checkpoint", dir, "%w", err)
	}
	if err := s.fs.Rename(tmp, manifestPath(dir)); err != nil {
		return err
	}
	return s.fs.SyncDir(dir)
}

// sweepReplaced removes what the manifest of a checkpoint does not name any more, or
// not yet, unless somebody but the holder of our lease uses the checkpoint.
func (s *Store) sweepReplaced(ctx context.Context, op string, c candidate, ours string) error {
	return s.locked(ctx, op, func() error {
		files, err := s.replaced(op, c, ours, false)
		for _, path := range files {
			if err == nil {
				err = removeFile(s.fs, path)
			}
		}
		return fsys.Problem(op, c.dir, err)
	})
}

// replaced lists the files of a committed checkpoint that its manifest does not name,
// none while somebody else holds a lease: a reader may have the manifest of before. The
// caller holds the lock.
func (s *Store) replaced(op string, c candidate, ours string, force bool) ([]string, error) {
	now, err := s.look(op, c.vmDir, c.id)
	if err != nil || !now.committed {
		return nil, err
	}
	for _, l := range held(now.leases, force) {
		if l.file != ours && l.Role != Disk {
			return nil, nil
		}
	}
	_, m, err := s.info(now)
	if err != nil || m == nil {
		return nil, err // of a manifest that cannot be read nothing is known to be superfluous
	}
	named := m.Named()
	var out []string
	for _, name := range now.files {
		if image.IsImageFile(name) && !named[name] {
			out = append(out, filepath.Join(c.dir, name))
		}
	}
	return out, nil
}
