package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/problem"
)

// failingFS lets the operation that brings countdown to zero fail.
type failingFS struct {
	fsys.FS
	mu        sync.Mutex
	countdown int
	errno     unix.Errno
}

func (f *failingFS) step(op, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.errno == 0 {
		return nil
	}
	if f.countdown--; f.countdown != 0 {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: f.errno}
}

func (f *failingFS) Mkdir(name string) error {
	if err := f.step("mkdir", name); err != nil {
		return err
	}
	return f.FS.Mkdir(name)
}

func (f *failingFS) Create(name string) (fsys.File, error) {
	if err := f.step("create", name); err != nil {
		return nil, err
	}
	w, err := f.FS.Create(name)
	return &failingFile{w, f, name}, err
}

func (f *failingFS) Rename(o, n string) error {
	if err := f.step("rename", o); err != nil {
		return err
	}
	return f.FS.Rename(o, n)
}

func (f *failingFS) SyncDir(name string) error {
	if err := f.step("sync", name); err != nil {
		return err
	}
	return f.FS.SyncDir(name)
}

func (f *failingFS) TryLock(name string) (io.Closer, error) {
	if err := f.step("lock", name); err != nil {
		return nil, err
	}
	return f.FS.TryLock(name)
}

type failingFile struct {
	fsys.File
	f    *failingFS
	name string
}

func (w *failingFile) WriteVec(bufs [][]byte, off int64) error {
	if err := w.f.step("write", w.name); err != nil {
		return err
	}
	return w.File.WriteVec(bufs, off)
}

func (w *failingFile) Sync() error {
	if err := w.f.step("sync", w.name); err != nil {
		return err
	}
	return w.File.Sync()
}

func (w *failingFile) Close() error {
	if err := w.f.step("close", w.name); err != nil {
		return err
	}
	return w.File.Close()
}

// fillErr is fill for storage that fails.
func fillErr(ctx context.Context, txn *Txn) (*image.Manifest, error) {
	blocks := []image.Block{{Name: "pc.ram", UsedBytes: 2 * 4096, TotalBytes: 2 * 4096, PageBytes: 4096, Backing: "anonymous"}}
	w, err := image.NewWriter(txn.Dir(), blocks, image.WriterOptions{FS: txn.FS(), Lanes: 1})
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	for p := range uint64(2) {
		if err := w.WritePages(0, p, bytes.Repeat([]byte{1}, 4096)); err != nil {
			return nil, err
		}
	}
	if err := w.WriteDeviceState(bytes.NewReader([]byte("state"))); err != nil {
		return nil, err
	}
	s, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	m := &image.Manifest{}
	s.Apply(m)
	return m, nil
}

// TestFailingStorage makes every operation of a whole checkpoint fail in turn.
// Whatever fails: the errno is kept, what was there stays there, nothing half
// is visible, and the store goes on once the disk does.
func TestFailingStorage(t *testing.T) {
	ctx := context.Background()
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EIO, unix.EROFS} {
		for n := 1; ; n++ {
			f := &failingFS{FS: memfs.New(1 << 30)}
			s, err := OpenFS(f, "/store")
			if err != nil {
				t.Fatal(err)
			}
			old := commitOne(t, s, "a")
			f.countdown, f.errno = n, errno
			id, err := tryCommit(ctx, s)
			failed := f.countdown <= 0
			f.countdown = 0
			f.errno = 0
			if !failed {
				if err != nil {
					t.Fatal(err)
				}
				if n < 20 {
					t.Fatalf("only %d operations", n)
				}
				break
			}
			if err != nil && (!errors.Is(err, errno) || !problem.Is(err, problem.Store)) {
				t.Errorf("operation %d failing with %v: %v (%s)", n, errno, err, problem.CodeOf(err))
			}
			list, lerr := s.List(ctx)
			if lerr != nil {
				t.Fatal(lerr)
			}
			for _, i := range list {
				if i.ID != old && (i.ID != id || err != nil) {
					t.Errorf("operation %d failing with %v: %s is visible", n, errno, i.ID)
				}
				if _, err := s.Verify(ctx, i.ID, nil); err != nil {
					t.Error(err)
				}
			}
			if len(list) == 0 || list[0].ID != old {
				t.Errorf("operation %d failing with %v: the old one is gone", n, errno)
			}
			commitOne(t, s, "a")
		}
	}
}

func tryCommit(ctx context.Context, s *Store) (id string, err error) {
	txn, err := s.Begin(ctx, "a")
	if err != nil {
		return "", err
	}
	defer txn.Abort()
	m, err := fillErr(ctx, txn)
	if err != nil {
		return txn.ID(), err
	}
	return txn.ID(), txn.Commit(ctx, m)
}
