package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// Volumes hold the disks of checkpoints. They lie beside the checkpoints of a VM and
// not inside, because an incremental one needs those it builds on for longer than
// their checkpoints may live. Whoever writes one has its checkpoint's lease and, for
// what it builds on, a reader's lease on the parent, whose manifest names it all.

// VolumeDir is where the VM's volumes lie, whether or not there are any.
func (s *Store) VolumeDir(vm string) string {
	return filepath.Join(s.dir, vmsName, vmDir(vm), image.DisksDirName)
}

// VolumeDir makes the directory for the volumes of the checkpoint being written, and
// returns it. A volume's name is image.VolumeName(t.ID(), n).
func (t *Txn) VolumeDir(ctx context.Context) (string, error) {
	const op = "begin checkpoint"
	dir := t.s.VolumeDir(t.vm)
	// Under the lock: GC removes an empty one.
	return dir, t.s.locked(ctx, op, func() error {
		err := t.s.fs.Mkdir(dir)
		if errors.Is(err, fs.ErrExist) {
			err = nil
		}
		if err == nil {
			err = t.s.fs.SyncDir(filepath.Dir(dir))
		}
		return fsys.Problem(op, dir, err)
	})
}

// syncVolumes is syncFiles for the volumes written for this checkpoint.
func (t *Txn) syncVolumes(m *image.Manifest) error {
	const op = "commit checkpoint"
	dir, any := t.s.VolumeDir(t.vm), false
	for _, d := range m.Disks {
		for k, v := range d.Volumes {
			any = true
			if err := t.s.checkVolume(dir, v, k == 0); err != nil {
				return fsys.Problem(op, filepath.Join(dir, v.Name), err)
			}
		}
	}
	if !any {
		return nil
	}
	return fsys.Problem(op, dir, t.s.fs.SyncDir(dir))
}

// checkVolume makes sure that a volume is there in full, and durable if it is new.
func (s *Store) checkVolume(dir string, v image.Volume, sync bool) error {
	path := filepath.Join(dir, v.Name)
	r, err := s.fs.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return problem.New(problem.Integrity, "open volume", path, "%w", err)
	}
	if err != nil {
		return err
	}
	size := uint64(r.Size())
	if sync {
		err = r.Sync()
	}
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	if err == nil && size != v.Bytes {
		err = problem.New(problem.Integrity, "open volume", path, "%d bytes: the manifest says %d", size, v.Bytes)
	}
	return err
}

// CheckVolumes makes sure that the volumes a checkpoint names are there: by their
// sizes, with deep by their content. problem.Integrity if not.
func (s *Store) CheckVolumes(ctx context.Context, m *image.Manifest, deep bool) error {
	dir := s.VolumeDir(m.VM)
	for _, d := range m.Disks {
		for _, v := range d.Volumes {
			if err := ctx.Err(); err != nil {
				return problem.New(problem.Cancelled, "verify", m.ID, "%w", err)
			}
			if err := s.checkVolume(dir, v, false); err != nil {
				return fsys.Problem("verify", filepath.Join(dir, v.Name), err)
			}
			if !deep {
				continue
			}
			path := filepath.Join(dir, v.Name)
			bytes, sum, err := image.SumFile(ctx, s.fs, path)
			if err != nil {
				return err
			}
			if bytes != v.Bytes || sum != v.Checksum {
				return problem.New(problem.Integrity, "verify", path, "%d bytes with checksum %v: expected %d with %v", bytes, sum, v.Bytes, v.Checksum).
					WithHint("the disk of checkpoint %s is damaged, or of another checkpoint", m.ID)
			}
		}
	}
	return nil
}

// dropVolumes removes the volumes that were written for a checkpoint that will never
// be committed.
func (t *Txn) dropVolumes() error {
	dir := t.s.VolumeDir(t.vm)
	entries, err := t.s.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if owner, ok := image.VolumeOwner(e.Name); ok && owner == t.id {
			if err := removeFile(t.s.fs, filepath.Join(dir, e.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// unusedVolumes lists a VM's volumes that no committed checkpoint names and nobody
// is writing. If a manifest cannot be read there are none: it may name any of them.
// The caller holds the lock.
func (s *Store) unusedVolumes(op, vm string, force bool) ([]string, error) {
	dir := filepath.Join(s.dir, vmsName, vm, image.DisksDirName)
	entries, err := s.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fsys.Problem(op, dir, err)
	}
	list, err := s.candidates(op, vm)
	if err != nil {
		return nil, err
	}
	named, writing := map[string]bool{}, map[string]bool{}
	for _, c := range list {
		if !c.committed {
			writing[c.id] = len(held(c.leases, force)) > 0
			continue
		}
		_, m, err := s.info(c)
		if err != nil || m == nil {
			return nil, err
		}
		for _, name := range m.VolumeNames() {
			named[name] = true
		}
	}
	var out []string
	for _, e := range entries {
		if owner, ok := image.VolumeOwner(e.Name); ok && !named[e.Name] && !writing[owner] {
			out = append(out, filepath.Join(dir, e.Name))
		}
	}
	return out, nil
}

// sweepVolumes removes the unused volumes of a VM. They are found under the lock and
// removed without it: nobody can come to need them any more.
func (s *Store) sweepVolumes(ctx context.Context, op, vm string) error {
	var unused []string
	err := s.locked(ctx, op, func() (err error) {
		unused, err = s.unusedVolumes(op, vm, false)
		return err
	})
	for _, path := range unused {
		if rerr := removeFile(s.fs, path); rerr != nil && err == nil {
			err = fsys.Problem(op, path, rerr)
		}
	}
	return err
}
