package store

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// Format of the store's own directory, as against that of a checkpoint.
const (
	storeFormat  = "ckagent-store"
	storeVersion = 1
)

// lockPatience bounds how long a method waits for the store's lock. Its holders
// need milliseconds; one that needs longer is stopped or hangs in its disk.
const lockPatience = 10 * time.Second

// Store is a directory of checkpoints. Safe for concurrent use.
type Store struct {
	fs  fsys.FS
	dir string
	id  identity
	now func() time.Time
	mu  chan struct{} // a mutex that a context can leave: one user of the file lock per process
}

// Open gives access to the store in a directory of this host. It needs not exist
// yet: the first Begin makes it. An existing one of a later version is refused.
func Open(dir string) (*Store, error) { return OpenFS(fsys.OS{}, dir) }

// OpenFS is Open on another file system.
func OpenFS(f fsys.FS, dir string) (*Store, error) {
	const op = "open store"
	abs, err := filepath.Abs(dir)
	if err != nil || dir == "" {
		return nil, problem.New(problem.Usage, op, dir, "no directory: %v", err)
	}
	id, err := self()
	if err != nil {
		return nil, problem.New(problem.Failed, op, dir, "cannot tell who we are: %w", err)
	}
	s := &Store{fs: f, dir: abs, id: id, now: time.Now, mu: make(chan struct{}, 1)}
	info, err := f.Stat(abs)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, nil
	case err != nil:
		return nil, fsys.Problem(op, abs, err)
	case !info.Dir:
		return nil, problem.New(problem.Store, op, abs, "not a directory").WithHint("name a directory with --store")
	}
	return s, s.checkMarker()
}

// Dir is the absolute path of the store.
func (s *Store) Dir() string { return s.dir }

type marker struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
}

func (s *Store) checkMarker() error {
	const op = "open store"
	path := filepath.Join(s.dir, markerName)
	data, err := fsys.ReadFileLimit(s.fs, path, 4096)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // empty, or made by hand: Begin adds it
	}
	if err != nil {
		return fsys.Problem(op, path, err)
	}
	var m marker
	if err := json.Unmarshal(data, &m); err != nil || m.Format != storeFormat || m.Version < 1 {
		return problem.New(problem.Integrity, op, path, "this does not describe a store: %.60q", data).
			WithHint("is this the directory you meant? if so, remove that file: checkpoints do not depend on it")
	}
	if m.Version > storeVersion {
		return problem.New(problem.Refused, op, path, "a store from the future: version %d, this ckagent knows %d", m.Version, storeVersion).
			WithHint("use a newer ckagent")
	}
	return nil
}

// prepare makes the directories down to a VM's and makes their names durable,
// also if they were there: whoever made them may have died before the sync. The
// caller holds no lock, since the lock file lies in the directory.
func (s *Store) prepare() error {
	const op = "prepare store"
	vms := filepath.Join(s.dir, vmsName)
	if err := fsys.MkdirAll(s.fs, vms); err != nil {
		return fsys.Problem(op, s.dir, err)
	}
	info, err := s.fs.Stat(vms)
	if err != nil {
		return fsys.Problem(op, vms, err)
	}
	if info.Mode&0o077 != 0 {
		return problem.New(problem.Refused, op, vms, "others may read it (mode %v), and checkpoints hold the guests' secrets", info.Mode).
			WithHint("chmod 700 %s", vms)
	}
	return nil
}

// syncUp makes the path down to a VM's directory durable.
func (s *Store) syncUp(vmPath string) error {
	for _, d := range []string{vmPath, filepath.Join(s.dir, vmsName), s.dir, filepath.Dir(s.dir)} {
		err := s.fs.SyncDir(d)
		if d == filepath.Dir(s.dir) && errors.Is(err, fs.ErrPermission) {
			err = nil // not ours, so we did not make the name in it
		}
		if err != nil {
			return fsys.Problem("sync directory", d, err)
		}
	}
	return nil
}

// writeMarker writes store.json unless it is there. The caller holds the lock.
func (s *Store) writeMarker() error {
	path := filepath.Join(s.dir, markerName)
	if _, err := s.fs.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return s.checkMarker()
	}
	data, err := json.Marshal(marker{storeFormat, storeVersion})
	if err != nil {
		return err
	}
	return s.replaceFile(path, append(data, '\n'))
}

// replaceFile puts a whole file in place, durably but for the directory.
func (s *Store) replaceFile(path string, data []byte) error {
	tmp := path + tmpSuffix
	if err := removeFile(s.fs, tmp); err != nil {
		return err
	}
	if err := fsys.WriteFile(s.fs, tmp, data); err != nil {
		return err
	}
	return s.fs.Rename(tmp, path)
}

func (s *Store) random() uint32 { return rand.Uint32() }

// locked runs f under the store's lock.
func (s *Store) locked(ctx context.Context, op string, f func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, lockPatience, errPatience)
	defer cancel()
	select {
	case s.mu <- struct{}{}:
	case <-ctx.Done():
		return s.lockProblem(ctx, op)
	}
	defer func() { <-s.mu }()
	l, err := s.tryUntil(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return s.lockProblem(ctx, op)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return s.noStore(op)
		}
		return fsys.Problem(op, filepath.Join(s.dir, lockName), err)
	}
	err = f()
	if cerr := l.Close(); err == nil && cerr != nil {
		err = fsys.Problem(op, filepath.Join(s.dir, lockName), cerr)
	}
	return err
}

var errPatience = errors.New("the lock of the store was not released in time")

func (s *Store) lockProblem(ctx context.Context, op string) error {
	if cause := context.Cause(ctx); cause == errPatience {
		return problem.New(problem.Busy, op, filepath.Join(s.dir, lockName), "%w (%v)", cause, lockPatience).
			WithHint("another ckagent is stopped or hangs: fuser %s", filepath.Join(s.dir, lockName))
	}
	return problem.New(problem.Cancelled, op, s.dir, "%w", ctx.Err())
}

// tryUntil tries again with growing pauses: flock(2) can be waited for only in a
// way that no context ends, and offers nothing to poll.
func (s *Store) tryUntil(ctx context.Context) (io.Closer, error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		l, err := s.fs.TryLock(filepath.Join(s.dir, lockName))
		if !errors.Is(err, fsys.ErrLocked) {
			return l, err
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
	}
}

func (s *Store) noStore(op string) error {
	return problem.New(problem.NotFound, op, s.dir, "there is no store").
		WithHint("name the directory with --store; the first checkpoint makes it")
}

// FreeBytes is what this user may still write to the store.
func (s *Store) FreeBytes() (uint64, error) {
	for d := s.dir; ; d = filepath.Dir(d) {
		sp, err := s.fs.Space(d)
		if errors.Is(err, fs.ErrNotExist) && d != filepath.Dir(d) {
			continue // not made yet: it will be on this file system
		}
		if err != nil {
			return 0, fsys.Problem("measure free space", d, err)
		}
		return sp.FreeBytes, nil
	}
}

// CheckSpace fails with problem.Store (ENOSPC) unless need bytes fit and minFree
// bytes stay free. Called before a VM is armed: a disk that fills up later costs
// the checkpoint, one found full now costs nothing.
func (s *Store) CheckSpace(need, minFree uint64) error {
	free, err := s.FreeBytes()
	if err != nil {
		return err
	}
	if free >= need && free-need >= minFree {
		return nil
	}
	return problem.New(problem.Store, "check space", s.dir,
		"%w: %d bytes are free, the checkpoint may need %d and %d must stay free", errNoSpace, free, need, minFree).
		WithHint("free space: ckagent gc, ckagent rm; or lower --keep-last or --min-free")
}

// manifestPath is the file whose presence makes a checkpoint.
func manifestPath(dir string) string { return filepath.Join(dir, image.ManifestName) }
