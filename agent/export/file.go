package export

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/problem"
)

// File is an output that gets its name when it is whole. Its mode is 0600: it holds
// the guest's memory.
type File struct {
	f      *os.File
	path   string
	offset uint64
	holes  bool // the last thing was one
}

// CreateFile begins a file that will be called path.
func CreateFile(path string) (*File, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part")
	if err != nil {
		return nil, problem.New(problem.Failed, "create", path, "%w", err)
	}
	return &File{f: f, path: path}, nil
}

// Write appends.
func (f *File) Write(p []byte) (int, error) {
	n, err := f.f.WriteAt(p, int64(f.offset))
	f.offset += uint64(n)
	f.holes = false
	return n, err
}

// Skip leaves a hole.
func (f *File) Skip(n uint64) error {
	f.offset += n
	f.holes = true
	return nil
}

// Commit makes the file durable and gives it its name, replacing another one.
func (f *File) Commit() error {
	err := error(nil)
	if f.holes {
		err = f.f.Truncate(int64(f.offset))
	}
	if err == nil {
		err = f.f.Sync()
	}
	if err = errors.Join(err, f.f.Close()); err == nil {
		err = os.Rename(f.f.Name(), f.path)
	}
	if err != nil {
		_ = os.Remove(f.f.Name()) // it has no name anybody looks for
		return problem.New(problem.Failed, "write", f.path, "%w", err)
	}
	dir, err := os.Open(filepath.Dir(f.path))
	if err == nil {
		err = errors.Join(dir.Sync(), dir.Close())
	}
	if err != nil {
		return problem.New(problem.Failed, "write", f.path, "%w", err)
	}
	return nil
}

// Abort removes what was written.
func (f *File) Abort() error {
	return errors.Join(f.f.Close(), os.Remove(f.f.Name()))
}
