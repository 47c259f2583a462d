package liveness

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/flock"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// QEMU locks single bytes of an image: 100 + n for a permission it uses, 200 + n
// for one it does not share (block/file-posix.c).
const (
	lockStart = 100
	lockBytes = 200
)

// Locked reports whether anybody holds one of QEMU's locks on an image. A file
// that does not exist is not locked.
func Locked(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: lockStart, Len: lockBytes}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOLCK) {
			return false, nil // a file system without locks: QEMU had none either
		}
		return false, err
	}
	return l.Type != unix.F_UNLCK, nil
}

// Guard keeps other restores of a VM away while this one runs.
type Guard struct {
	path string
	file *os.File
}

// Hold takes the guard of the VM called name, in dir. problem.Refused when
// another restore holds it.
func Hold(dir, name string) (*Guard, error) {
	fail := func(err error) error {
		return problem.New(problem.Failed, "lock", "VM "+name, "%w", err).WithHint("%s must be writable", dir)
	}
	path := filepath.Join(dir, "."+image.FileName(name)+".lock")
	f, err := flock.Try(path)
	if held, ok := errors.AsType[*flock.Held](err); ok {
		return nil, problem.New(problem.Refused, "restore", "VM "+name, "another restore of it is under way (%s)", held.By).
			WithHint("wait for it or end it; --clone makes another VM")
	}
	if err != nil {
		return nil, fail(err)
	}
	if err := flock.Sign(f); err != nil {
		f.Close()
		return nil, fail(err)
	}
	return &Guard{path: path, file: f}, nil
}

// Close gives the guard back; the file goes while the lock still keeps others
// from taking it.
func (g *Guard) Close() error { return errors.Join(os.Remove(g.path), g.file.Close()) }
