package liveness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

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
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fail(err)
	}
	clean := strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '_'
		}
		return r
	}, name)
	if len(clean) > 200 {
		clean = clean[:200]
	}
	path := filepath.Join(dir, "."+clean+".lock")
	f, err := takeLock(path)
	var holder heldBy
	if errors.As(err, &holder) {
		return nil, problem.New(problem.Refused, "restore", "VM "+name, "another restore of it is under way (%s)", string(holder)).
			WithHint("wait for it or end it; --clone makes another VM")
	}
	if err != nil {
		return nil, fail(err)
	}
	text := fmt.Sprintf("pid %d\n", os.Getpid())
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, fail(err)
	}
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		f.Close()
		return nil, fail(err)
	}
	return &Guard{path: path, file: f}, nil
}

// heldBy is the error that somebody has the lock.
type heldBy string

func (h heldBy) Error() string { return "held by " + string(h) }

// takeLock opens and locks a file. Its holder removes it before letting go, so a
// lock got on a file that has lost its name is a lock on nothing: try again.
func takeLock(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			var who [64]byte
			n, _ := f.ReadAt(who[:], 0)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, heldBy(strings.TrimSpace(string(who[:n])))
			}
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return nil, err
		}
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := os.Lstat(path); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
		f.Close()
	}
}

// Close gives the guard back; the file goes while the lock still keeps others
// from taking it.
func (g *Guard) Close() error { return errors.Join(os.Remove(g.path), g.file.Close()) }
