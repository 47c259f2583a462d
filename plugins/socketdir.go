package plugins

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketPrefix begins the names of directories for sockets.
const socketPrefix = "ckagent-policy-sock-"

// socketDir is the directory of one program's socket. A lock on it, which the kernel
// drops with this process, says that it is in use: a killed process leaves directories
// that nobody holds, and whoever starts a program next takes them away.
type socketDir struct {
	path string
	lock *os.File
}

// newSocketDir makes one in a directory; empty: the system's for such things.
func newSocketDir(in string) (*socketDir, error) {
	for {
		path, err := os.MkdirTemp(in, socketPrefix)
		if err != nil {
			return nil, err
		}
		f, err := openDir(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // swept before it was ours
		}
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		// A sweep that came in between holds it, and then it is gone.
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		d := &socketDir{path: path, lock: f}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), d.remove())
		}
		if d.there() {
			return d, nil
		}
		_ = f.Close() // of nothing
	}
}

// openDir opens a directory of ours, and nothing that somebody else put there.
func openDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, os.ErrPermission), f.Close())
	}
	return f, nil
}

// there reports whether the path still leads to what is locked.
func (d *socketDir) there() bool {
	a, err := d.lock.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(d.path)
	return err == nil && os.SameFile(a, b)
}

// remove takes the directory away, while it is locked.
func (d *socketDir) remove() error {
	return errors.Join(os.RemoveAll(d.path), d.lock.Close())
}

// sweepSocketDirs takes away the directories whose owners are dead.
func sweepSocketDirs(in string) {
	if in == "" {
		in = os.TempDir()
	}
	paths, _ := filepath.Glob(filepath.Join(in, socketPrefix+"*")) // the pattern is well-formed
	for _, path := range paths {
		f, err := openDir(path)
		if err != nil {
			continue // gone, or not ours
		}
		d := &socketDir{path: path, lock: f}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil || !d.there() {
			_ = f.Close() // held by who uses it
			continue
		}
		_ = d.remove() // what stays does so until the next sweep
	}
}
