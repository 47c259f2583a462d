package fsys

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// OS is the host's file system.
type OS struct{}

// Mkdir implements FS.
func (OS) Mkdir(name string) error { return os.Mkdir(name, 0o700) }

// Create implements FS.
func (OS) Create(name string) (File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f, fd: int(f.Fd())}, nil
}

// Open implements FS. O_NONBLOCK keeps a FIFO put in a file's place from
// blocking the open; it is refused afterwards for not being a regular file.
func (OS) Open(name string) (ReadFile, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	fd := int(f.Fd())
	if err := retryEINTR(func() error { return unix.Fstat(fd, &st) }); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	return &osReadFile{f: f, fd: fd, size: st.Size}, nil
}

// ReadDir implements FS.
func (OS) ReadDir(name string) ([]Entry, error) {
	d, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	list, err := d.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	out := make([]Entry, len(list))
	for i, e := range list {
		out[i] = Entry{Name: e.Name(), Dir: e.IsDir()}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// Stat implements FS.
func (OS) Stat(name string) (Info, error) {
	var st unix.Stat_t
	if err := retryEINTR(func() error { return unix.Lstat(name, &st) }); err != nil {
		return Info{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return Info{
		Dir:       st.Mode&unix.S_IFMT == unix.S_IFDIR,
		Regular:   st.Mode&unix.S_IFMT == unix.S_IFREG,
		Mode:      fs.FileMode(st.Mode & 0o777),
		Bytes:     st.Size,
		DiskBytes: st.Blocks * 512,
		ModTimeNS: st.Mtim.Nano(),
	}, nil
}

// Rename implements FS.
func (OS) Rename(oldname, newname string) error { return os.Rename(oldname, newname) }

// Link implements FS. EPERM is what file systems without links answer, and what
// fs.protected_hardlinks does for files of others.
func (OS) Link(oldname, newname string) error {
	err := os.Link(oldname, newname)
	for _, none := range []unix.Errno{unix.EPERM, unix.EOPNOTSUPP, unix.ENOSYS, unix.EXDEV, unix.EMLINK} {
		if errors.Is(err, none) {
			return fmt.Errorf("%w: %w", ErrNoLinks, err)
		}
	}
	return err
}

// Remove implements FS.
func (OS) Remove(name string) error { return os.Remove(name) }

// SyncDir implements FS.
func (OS) SyncDir(name string) error {
	d, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// TryLock implements FS with flock(2), which the kernel drops when the last
// descriptor closes, however its holder ended.
func (OS) TryLock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		f, err = os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nopCloser{}, nil // nobody can change a store through this mount
		}
	}
	if err != nil {
		return nil, err
	}
	err = retryEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return nil, &fs.PathError{Op: "lock", Path: name, Err: err}
}

// Space implements FS.
func (OS) Space(name string) (Space, error) {
	var st unix.Statfs_t
	if err := retryEINTR(func() error { return unix.Statfs(name, &st) }); err != nil {
		return Space{}, &fs.PathError{Op: "statfs", Path: name, Err: err}
	}
	unit := uint64(st.Frsize)
	if st.Frsize <= 0 {
		unit = uint64(st.Bsize)
	}
	return Space{FreeBytes: st.Bavail * unit, TotalBytes: st.Blocks * unit}, nil
}

type nopCloser struct{}

func (nopCloser) Close() error { return nil }

func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// maxVec bounds the buffers of one pwritev; the kernel's own limit is 1024.
const maxVec = 256

type osFile struct {
	f      *os.File
	fd     int
	direct bool               // wanted
	is     bool               // the descriptor's flag now
	iov    [maxVec]unix.Iovec // reused: a File has one user at a time
}

func (w *osFile) WriteVec(bufs [][]byte, off int64) error {
	for len(bufs) > 0 {
		n := min(len(bufs), maxVec)
		w.aim(bufs[:n], off)
		written, err := writeVec(w.fd, w.iov[:0], bufs[:n], off)
		if errors.Is(err, unix.EINVAL) && w.is { // the file system or its device wants more
			w.direct = false
			continue
		}
		if err != nil {
			return &fs.PathError{Op: "write", Path: fmt.Sprintf("%s at %d", w.f.Name(), off), Err: err}
		}
		off += written
		bufs = bufs[n:]
	}
	return nil
}

// Direct implements File.
func (w *osFile) Direct() { w.direct = true }

const directAlign = 4096

// aim sets or clears O_DIRECT for a write.
func (w *osFile) aim(bufs [][]byte, off int64) {
	want := w.direct && off%directAlign == 0
	for _, b := range bufs {
		want = want && len(b)%directAlign == 0 && aligned(b, directAlign)
	}
	if want == w.is {
		return
	}
	flags := unix.O_WRONLY
	if want {
		flags |= unix.O_DIRECT
	}
	if _, err := unix.FcntlInt(uintptr(w.fd), unix.F_SETFL, flags); err != nil {
		w.direct = false // it has none
		return
	}
	w.is = want
}

func (w *osFile) StartWriteback(off, n int64) {
	if w.is {
		return
	}
	// A hint: errors show up in Sync, which decides.
	_ = unix.SyncFileRange(w.fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
}

func (w *osFile) Sync() error  { return w.f.Sync() }
func (w *osFile) Close() error { return w.f.Close() }

type osReadFile struct {
	f    *os.File
	fd   int
	size int64
}

// ReadAt calls pread directly: os.File's own takes a lock per call, which is a
// tenth of a 4 KiB read from the page cache.
func (r *osReadFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(r.fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, &fs.PathError{Op: "read", Path: r.f.Name(), Err: err}
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return n, nil
}

func (r *osReadFile) Size() int64  { return r.size }
func (r *osReadFile) Sync() error  { return r.f.Sync() }
func (r *osReadFile) Close() error { return r.f.Close() }
