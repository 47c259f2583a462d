package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

var errNoSpace error = unix.ENOSPC

// Txn is a checkpoint being written. Commit or Abort ends it; a process that dies
// before leaves something that only GC sees.
type Txn struct {
	s     *Store
	vm    string
	id    string
	dir   string
	lease string

	mu   sync.Mutex
	done bool
}

// Begin starts a checkpoint of a VM: a directory, claimed by a lease.
func (s *Store) Begin(ctx context.Context, vm string) (*Txn, error) {
	const op = "begin checkpoint"
	if vm == "" || len(vm) > image.MaxNameBytes {
		return nil, problem.New(problem.Usage, op, vm, "a VM name has 1 to %d bytes", image.MaxNameBytes)
	}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	t := &Txn{s: s, vm: vm}
	err := s.locked(ctx, op, func() error {
		if err := s.writeMarker(); err != nil {
			return fsys.Problem(op, s.dir, err)
		}
		vmPath := filepath.Join(s.dir, vmsName, vmDir(vm))
		if err := s.fs.Mkdir(vmPath); err != nil && !errors.Is(err, fs.ErrExist) {
			return fsys.Problem(op, vmPath, err)
		}
		entries, err := s.fs.ReadDir(vmPath)
		if err != nil {
			return fsys.Problem(op, vmPath, err)
		}
		// Ids of a VM only grow, also when the clock was set back: their order
		// decides which checkpoint is the newest.
		at := s.now().Truncate(time.Millisecond)
		for _, e := range entries {
			if last, ok := parseID(e.Name); ok && !at.After(last) {
				at = last.Add(time.Millisecond)
			}
		}
		t.id = formatID(at, s.random())
		t.dir = filepath.Join(vmPath, t.id)
		if err := s.fs.Mkdir(t.dir); err != nil {
			return fsys.Problem(op, t.dir, err)
		}
		if t.lease, err = s.addLease(t.dir, Writing); err != nil {
			removeDir(s.fs, t.dir)
			return fsys.Problem(op, t.dir, err)
		}
		// Here and not in Commit: it takes time, and here nobody waits for it.
		if err := s.syncUp(vmPath); err != nil {
			removeDir(s.fs, t.dir)
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// ID is the id the checkpoint will have.
func (t *Txn) ID() string { return t.id }

// VM is the name Begin was given.
func (t *Txn) VM() string { return t.vm }

// Dir is where an image.Writer puts the files.
func (t *Txn) Dir() string { return t.dir }

// FS is the file system Dir is on, for image.WriterOptions.
func (t *Txn) FS() fsys.FS { return t.s.fs }

// Commit makes the checkpoint exist. It sets the manifest's format, version, id,
// VM and (if zero) time; the files it names must be finished. On an error nothing
// exists and Abort is still to be called.
func (t *Txn) Commit(ctx context.Context, m *image.Manifest) error {
	const op = "commit checkpoint"
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return problem.New(problem.Failed, op, t.id, "the transaction has ended")
	}
	m.Format, m.Version, m.Minor = image.FormatName, image.FormatMajor, image.FormatMinor
	m.ID, m.VM = t.id, t.vm
	if m.CreatedAt.IsZero() {
		m.CreatedAt = t.s.now()
	}
	data, err := image.EncodeManifest(m)
	if err != nil {
		return err
	}
	if err := t.syncFiles(ctx, m); err != nil {
		return err
	}
	if err := t.syncVolumes(m); err != nil {
		return err
	}
	if err := t.s.putManifest(ctx, t.dir, data); err != nil {
		// If it is visible, then maybe not for long. Take it back: a checkpoint that
		// might vanish is worse than none.
		return fsys.Problem(op, t.dir, errors.Join(err, t.uncommit()))
	}
	t.done = true
	// A lease that stays behind ends with this process.
	_ = removeFile(t.s.fs, filepath.Join(t.dir, t.lease))
	return nil
}

func (t *Txn) uncommit() error {
	err := t.s.fs.Remove(manifestPath(t.dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never was
	}
	if err != nil {
		return err
	}
	return t.s.fs.SyncDir(t.dir)
}

// syncFiles checks that every named file is there in full, and syncs it once
// more: for files that are clean it costs nothing, and the promise of Commit does
// not hang on another package having kept its own.
func (t *Txn) syncFiles(ctx context.Context, m *image.Manifest) error {
	const op = "commit checkpoint"
	files := []image.FileRef{m.DeviceState, {Name: m.Pagemap.Name, Bytes: m.Pagemap.Bytes}}
	if m.Tags != nil {
		files = append(files, m.Tags.FileRef)
	}
	for _, s := range m.Segments {
		files = append(files, image.FileRef{Name: s.Name, Bytes: s.Bytes})
	}
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return problem.New(problem.Cancelled, op, t.id, "%w", err)
		}
		path := filepath.Join(t.dir, f.Name)
		r, err := t.s.fs.Open(path)
		if err != nil {
			return fsys.Problem(op, path, err)
		}
		size := uint64(r.Size())
		err = r.Sync()
		if cerr := r.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fsys.Problem(op, path, err)
		}
		if size != f.Bytes {
			return problem.New(problem.Failed, op, path, "%d bytes: the manifest says %d", size, f.Bytes)
		}
	}
	return nil
}

// Abort removes what was written. Harmless after Commit or another Abort. What
// it cannot remove, GC will once this process is gone.
func (t *Txn) Abort() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return nil
	}
	t.done = true
	// The volumes first: the lease in the directory is what protects them.
	err := t.dropVolumes()
	return fsys.Problem("abort checkpoint", t.dir, errors.Join(err, removeDir(t.s.fs, t.dir)))
}

// removeDir removes a checkpoint's directory: the manifest first and durably, so
// that a crash in between leaves no checkpoint with missing files; the leases
// last, so that nobody takes it for abandoned while it goes.
func removeDir(f fsys.FS, dir string) error {
	entries, err := f.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name == image.ManifestName {
			if err := removeFile(f, manifestPath(dir)); err != nil {
				return err
			}
			if err := f.SyncDir(dir); err != nil {
				return err
			}
		}
	}
	var last []string
	for _, e := range entries {
		switch {
		case e.Name == image.ManifestName:
		case len(e.Name) > len(leasePrefix) && e.Name[:len(leasePrefix)] == leasePrefix:
			last = append(last, e.Name)
		default:
			if err := removeFile(f, filepath.Join(dir, e.Name)); err != nil {
				return err
			}
		}
	}
	for _, name := range last {
		if err := removeFile(f, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return removeFile(f, dir)
}
