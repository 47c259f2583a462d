package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"golang.org/x/sys/unix"
)

// LockDir is where the per-VM locks live: on tmpfs, since a lock ends with the
// host's boot, and beside no store, since two agents may use different stores.
const LockDir = "/run/ckagent/locks"

// FileLock says that this process works on a VM. The kernel drops it when the
// process ends, however it ends.
type FileLock struct {
	path string
	file *os.File
	once sync.Once
	err  error
}

// aftermath is how long a lock whose holder is dead is waited for: a guardian that
// inherited it is putting the VM right.
const aftermath = 5 * time.Second

// Lock takes the lock of a VM, or fails with problem.Busy naming the holder. It waits
// a while for the guardian of a holder that was killed.
func Lock(ctx context.Context, p *Process) (*FileLock, error) {
	ctx, cancel := context.WithTimeout(ctx, aftermath)
	defer cancel()
	return lockIn(ctx, LockDir, p.PID, p.StartTicks)
}

func lockIn(ctx context.Context, dir string, pid int, start uint64) (*FileLock, error) {
	fail := func(err error) (*FileLock, error) {
		return nil, problem.New(problem.Failed, "lock", object(pid), "%w", err).
			WithHint("locks live in %s, which must be writable", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%d-%d.lock", pid, start))
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return fail(err)
		}
		switch err = flock(f); {
		case errors.Is(err, unix.EWOULDBLOCK):
			holder := lockHolder(f)
			f.Close()
			if dead(holder) {
				select {
				case <-again.C:
					continue
				case <-ctx.Done():
					holder += ", which is dead, and whose guardian is not done with the VM"
				}
			}
			return nil, problem.New(problem.Busy, "lock", object(pid), "held by %s", holder).
				WithHint("one ckagent works on a VM at a time; wait for it or end it")
		case err != nil:
			f.Close()
			return fail(err)
		}
		// The former holder removes the file while it holds the lock. If that
		// happened between our open and our flock, we hold a lock on nothing.
		same, err := sameFile(f, path)
		if err != nil {
			f.Close()
			return fail(err)
		}
		if !same {
			f.Close()
			continue
		}
		text := fmt.Sprintf("pid %d (%s)\n", os.Getpid(), filepath.Base(os.Args[0]))
		if err := f.Truncate(0); err != nil {
			f.Close()
			return fail(err)
		}
		if _, err := f.WriteAt([]byte(text), 0); err != nil {
			f.Close()
			return fail(err)
		}
		return &FileLock{path: path, file: f}, nil
	}
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// lockHolder reads the text the holder wrote; it may not have come to that yet.
func lockHolder(f *os.File) string {
	b := make([]byte, 128)
	n, _ := f.ReadAt(b, 0)
	text := strings.TrimSpace(string(b[:n]))
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "another process (" + strconv.Quote(filepath.Base(f.Name())) + ")"
	}
	return text
}

// dead reports whether a holder (as lockHolder names it) has certainly ended.
func dead(holder string) bool {
	var pid int
	if n, _ := fmt.Sscanf(holder, "pid %d", &pid); n != 1 {
		return false
	}
	s, err := procstat.Read(pid)
	return errors.Is(err, os.ErrNotExist) || err == nil && s.Ended()
}

// Path is the lock file.
func (l *FileLock) Path() string { return l.path }

// File is the lock itself: a process that inherits it keeps others from the VM after
// this one was killed, until it has ended too. Close gives the lock back all the same.
func (l *FileLock) File() *os.File { return l.file }

// Close gives the lock back. The file goes first, while the lock still keeps
// others from taking it.
func (l *FileLock) Close() error {
	l.once.Do(func() {
		l.err = errors.Join(os.Remove(l.path), l.file.Close())
	})
	return l.err
}
