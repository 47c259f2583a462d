package fsys

import (
	"errors"
	"io"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// FS is what images and the store need of a file system. Names are paths as the
// store composes them; no call follows a symbolic link in the last component.
type FS interface {
	// Mkdir makes one directory, mode 0700; EEXIST if there is one.
	Mkdir(name string) error
	// Create makes a new file, mode 0600; EEXIST if there is one.
	Create(name string) (File, error)
	// Open opens a regular file for reading.
	Open(name string) (ReadFile, error)
	// ReadDir lists a directory, sorted by name.
	ReadDir(name string) ([]Entry, error)
	// Stat describes a name without following a link.
	Stat(name string) (Info, error)
	// Rename replaces newname by oldname, atomically.
	Rename(oldname, newname string) error
	// Link gives a file a second name, in any directory of the file system: its content
	// stays until the last name is removed. ErrNoLinks where that cannot be.
	Link(oldname, newname string) error
	// Remove unlinks a file or an empty directory.
	Remove(name string) error
	// SyncDir makes the entries of a directory durable.
	SyncDir(name string) error
	// TryLock takes the advisory lock of a lock file, made if absent, without
	// waiting: ErrLocked if somebody holds it. The kernel drops the lock with
	// its holder. On a read-only file system without that file it locks nothing.
	TryLock(name string) (io.Closer, error)
	// Space says how much room the file system under name has.
	Space(name string) (Space, error)
}

// File is a file being written. Not safe for concurrent use.
type File interface {
	// WriteVec writes bufs, one after the other, at off (bytes); all or an error.
	WriteVec(bufs [][]byte, off int64) error
	// StartWriteback asks for n bytes at off to be written out soon. A hint: it
	// makes a later Sync short and promises nothing.
	StartWriteback(off, n int64)
	// Direct asks for writes that go past the page cache. A hint: buffers that do not
	// start and end on pages, and file systems without it, are written as usual.
	Direct()
	// Sync makes content and size durable.
	Sync() error
	Close() error
}

// ReadFile is a file being read. ReadAt is safe for concurrent use.
type ReadFile interface {
	io.ReaderAt
	// Size is the size in bytes when it was opened.
	Size() int64
	// Sync makes what others wrote to the file durable.
	Sync() error
	Close() error
}

// Entry is one name in a directory.
type Entry struct {
	Name string
	Dir  bool // a directory, not a link to one
}

// Info describes a name.
type Info struct {
	Dir       bool
	Regular   bool
	Mode      fs.FileMode // permission bits
	Bytes     int64       // size
	DiskBytes int64       // blocks allocated, in bytes
	ModTimeNS int64       // Unix time
}

// Space is the room of a file system, in bytes.
type Space struct {
	FreeBytes  uint64 // what this user may still write
	TotalBytes uint64
}

// ErrLocked says that somebody else holds a lock file.
var ErrLocked = errors.New("locked by another process")

// ErrNoLinks says that a file can be given no second name here: the file system has
// none, the two names would be on different ones, or the file has as many as it may.
var ErrNoLinks = errors.New("no second name for a file")

// WriteFile creates a file with this content and makes the content durable. The
// name is durable once the caller syncs the directory.
func WriteFile(f FS, name string, data []byte) error {
	w, err := f.Create(name)
	if err != nil {
		return err
	}
	if len(data) > 0 {
		err = w.WriteVec([][]byte{data}, 0)
	}
	if err == nil {
		err = w.Sync()
	}
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	return err
}

// ReadFileLimit reads a whole regular file of at most limit bytes; ErrTooLarge
// for a longer one.
func ReadFileLimit(f FS, name string, limit int64) ([]byte, error) {
	r, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: ErrTooLarge}
	}
	data := make([]byte, r.Size())
	if n, err := r.ReadAt(data, 0); n < len(data) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// ErrTooLarge says that a file is larger than its kind may be.
var ErrTooLarge = errors.New("larger than allowed")

// MkdirAll makes a directory and its parents and makes each new name durable,
// so that a crash afterwards cannot take the path away from under a commit.
func MkdirAll(f FS, name string) error {
	if info, err := f.Stat(name); err == nil {
		if !info.Dir {
			return &fs.PathError{Op: "mkdir", Path: name, Err: unix.ENOTDIR}
		}
		return nil
	}
	parent := filepath.Dir(name)
	if parent != name {
		if err := MkdirAll(f, parent); err != nil {
			return err
		}
	}
	if err := f.Mkdir(name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.SyncDir(parent)
}

// storeErrnos are the failures that mean "the store", not "this operation", and
// what to do about each.
var storeErrnos = []struct {
	errno     unix.Errno
	retryable bool
	hint      string
}{
	{unix.ENOSPC, true, "free space in the store: ckagent gc, ckagent rm, or a smaller --keep-last"},
	{unix.EDQUOT, true, "the quota of the store is used up: ckagent rm, or a larger quota"},
	{unix.EROFS, false, "the store is read-only: remount it, or name another one with --store"},
	{unix.EIO, true, "the device under the store reports errors: see the kernel log"},
	{unix.ENODEV, true, "the device under the store is gone"},
	{unix.ENXIO, true, "the device under the store is gone"},
	{unix.ESTALE, true, "the network file system under the store lost this file: remount it"},
	{unix.ENOTCONN, true, "the file system under the store is not connected: remount it"},
	{unix.ETIMEDOUT, true, "the file system under the store does not answer"},
	{unix.EHOSTDOWN, true, "the file system under the store does not answer"},
	{unix.ECONNABORTED, true, "the file system under the store does not answer"},
	{unix.EFBIG, false, "the file system under the store allows no file this large"},
	{unix.EMFILE, true, "too many open files: raise the limit of open files"},
	{unix.ENFILE, true, "the host has too many open files"},
	{unix.EACCES, false, "run as the user who owns the store"},
	{unix.EPERM, false, "run as the user who owns the store"},
	{unix.ENOTDIR, false, "a file is where the store wants a directory"},
}

// Problem turns a failed file operation into what an operator reads: code store
// for a store that is full, read-only or out of reach, failed for the rest. An
// error that already is a problem stays what it is.
func Problem(op, object string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*problem.Error](err); ok {
		return err
	}
	p := &problem.Error{Code: problem.Failed, Op: op, Object: object, Err: err}
	for _, s := range storeErrnos {
		if errors.Is(err, s.errno) {
			p.Code, p.Hint, p.Retryable = problem.Store, s.hint, s.retryable
			break
		}
	}
	return p
}
