package store

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// GetOptions say how sure Get has to be.
type GetOptions struct {
	// Deep reads every page. Without it the manifest, the head of the pagemap, the
	// sizes of all files and the device state are checked, which takes the same
	// time for any VM; pages are then checked as they are read.
	Deep     bool
	Progress func(done, total uint64) // bytes of RAM, with Deep
}

// Skipped is a newer checkpoint that was passed over, and why.
type Skipped struct {
	ID  string
	Err error
}

// Selection is what Get found. If Skipped is not empty, a newer checkpoint of the
// VM is damaged: whoever goes on with this one has to say so.
type Selection struct {
	Info    Info
	Skipped []Skipped
}

// Get finds a checkpoint by id, by the beginning of its id or of the id's random
// part, or by its VM's name ("vm:NAME" for a name that could be an id): then the
// newest that verifies.
func (s *Store) Get(ctx context.Context, ref string, o GetOptions) (Selection, error) {
	const op = "find checkpoint"
	vm, only := strings.CutPrefix(ref, "vm:")
	// Retention may remove what was listed a moment ago; what it leaves is newer,
	// so that a second look finds it.
	for range 3 {
		list, err := s.committedOf(op, vm)
		if err != nil {
			return Selection{}, err
		}
		if len(list) == 0 {
			if only {
				if _, err := s.vmDirs(op); err != nil {
					return Selection{}, err
				}
				return Selection{}, s.noVM(op, vm)
			}
			c, err := s.resolveID(ctx, op, ref)
			if err != nil {
				return Selection{}, err
			}
			list = []candidate{c}
		}
		sel, err := s.choose(ctx, list, o)
		if err != errGone {
			return sel, err
		}
	}
	return Selection{}, problem.New(problem.Busy, op, ref, "checkpoints vanish faster than they can be read")
}

var errGone = errors.New("all of them were removed meanwhile")

// choose takes the first of these that verifies.
func (s *Store) choose(ctx context.Context, list []candidate, o GetOptions) (Selection, error) {
	var sel Selection
	for _, c := range list {
		m, err := s.check(ctx, c, o)
		switch {
		case err == nil:
			sel.Info = infoOf(c, m)
			return sel, nil
		case s.gone(c):
			// Removed while we looked: neither damaged nor skipped.
		case problem.Is(err, problem.Integrity), problem.Is(err, problem.Refused):
			sel.Skipped = append(sel.Skipped, Skipped{c.id, err})
		default:
			return sel, err // the store fails, not this checkpoint: do not call it damaged
		}
	}
	if len(sel.Skipped) == 0 {
		return sel, errGone
	}
	return sel, sel.Skipped[0].Err
}

// gone reports whether a checkpoint that existed does not any more.
func (s *Store) gone(c candidate) bool {
	_, err := s.fs.Stat(manifestPath(c.dir))
	return errors.Is(err, fs.ErrNotExist)
}

// check verifies a checkpoint, shallow or deep.
func (s *Store) check(ctx context.Context, c candidate, o GetOptions) (*image.Manifest, error) {
	if o.Deep {
		img, err := s.openLeased(ctx, c)
		if err != nil {
			return nil, err
		}
		defer img.Close()
		if err := img.Verify(ctx, o.Progress); err != nil {
			return img.Manifest(), err
		}
		return img.Manifest(), s.CheckVolumes(ctx, img.Manifest(), true)
	}
	r, err := s.openReader(c)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if _, err = r.DeviceState(ctx); err == nil {
		err = s.CheckVolumes(ctx, r.Manifest(), false)
	}
	return r.Manifest(), err
}

// good reports whether the shallow check passes.
func (s *Store) good(ctx context.Context, c candidate) bool {
	_, err := s.check(ctx, c, GetOptions{})
	return err == nil
}

// openReader opens a checkpoint and makes sure that it is the one its path says.
func (s *Store) openReader(c candidate) (*image.Reader, error) {
	r, err := image.OpenReaderFS(s.fs, c.dir)
	for range 2 {
		if !problem.Is(err, problem.Integrity) || !errors.Is(err, fs.ErrNotExist) {
			break
		}
		// Merged just now: its manifest names other files.
		r, err = image.OpenReaderFS(s.fs, c.dir)
	}
	if err != nil {
		return nil, err
	}
	if err := c.matches(r.Manifest()); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Verify reads every byte of the checkpoint that ref names.
func (s *Store) Verify(ctx context.Context, ref string, progress func(done, total uint64)) (Info, error) {
	c, err := s.resolveAny(ctx, "verify", ref)
	if err != nil {
		return Info{}, err
	}
	i, _, err := s.info(c)
	if err != nil {
		return i, err
	}
	if i.Damage != nil {
		return i, i.Damage
	}
	_, err = s.check(ctx, c, GetOptions{Deep: true, Progress: progress})
	return i, err
}

// Image is a checkpoint open for reading, protected by a lease until Close.
type Image struct {
	*image.Reader
	// Leased is false if the store is read-only: then nothing can be removed from
	// it by way of this mount either.
	Leased bool

	s     *Store
	lease string
	once  sync.Once
	err   error
}

// OpenImage opens a checkpoint by its id, or an abbreviation of it.
func (s *Store) OpenImage(ctx context.Context, id string) (*Image, error) {
	c, err := s.resolveID(ctx, "open checkpoint", id)
	if err != nil {
		return nil, err
	}
	return s.openLeased(ctx, c)
}

func (s *Store) openLeased(ctx context.Context, c candidate) (*Image, error) {
	const op = "open checkpoint"
	img := &Image{s: s}
	err := s.locked(ctx, op, func() error {
		// Under the lock: whoever removes it either sees the lease or has made the
		// manifest vanish before.
		now, err := s.look(op, c.vmDir, c.id)
		if err != nil {
			return err
		}
		if !now.committed {
			return problem.New(problem.NotFound, op, c.id, "it was removed just now")
		}
		name, err := s.addLease(c.dir, Reading)
		if readOnly(err) {
			return nil
		}
		if err != nil {
			return fsys.Problem(op, c.dir, err)
		}
		img.lease, img.Leased = filepath.Join(c.dir, name), true
		return nil
	})
	if err != nil {
		return nil, err
	}
	r, err := s.openReader(c)
	if err != nil {
		img.release()
		return nil, err
	}
	img.Reader = r
	return img, nil
}

func (i *Image) release() error {
	if !i.Leased {
		return nil
	}
	return fsys.Problem("release lease", i.lease, removeFile(i.s.fs, i.lease))
}

// Close closes the files and gives the lease back.
func (i *Image) Close() error {
	i.once.Do(func() {
		i.err = i.Reader.Close()
		if err := i.release(); i.err == nil {
			i.err = err
		}
	})
	return i.err
}
