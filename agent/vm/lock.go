package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/flock"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
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
	path := filepath.Join(dir, fmt.Sprintf("%d-%d.lock", pid, start))
	f, err := flock.Wait(ctx, path, dead)
	if held, ok := errors.AsType[*flock.Held](err); ok {
		holder := held.By
		if dead(held) {
			holder += ", which is dead, and whose guardian is not done with the VM"
		}
		return nil, problem.New(problem.Busy, "lock", object(pid), "held by %s", holder).
			WithHint("one ckagent works on a VM at a time; wait for it or end it")
	}
	if err == nil {
		if err = flock.Sign(f); err != nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, problem.New(problem.Failed, "lock", object(pid), "%w", err).
			WithHint("locks live in %s, which must be writable", dir)
	}
	return &FileLock{path: path, file: f}, nil
}

// dead reports whether a holder has certainly ended.
func dead(held *flock.Held) bool {
	pid, ok := held.PID()
	if !ok {
		return false
	}
	s, err := procstat.Read(pid)
	return errors.Is(err, os.ErrNotExist) || err == nil && s.Ended()
}

// Inherited is a share in the lock of the process that started this one. Close gives the
// share back; the lock is free when nobody has one.
func Inherited(f *os.File) *FileLock { return &FileLock{file: f} }

// Path is the lock file; empty for a share that was inherited.
func (l *FileLock) Path() string { return l.path }

// File is the lock itself: a process that inherits it keeps others from the VM after
// this one was killed, until it has ended too. Close gives the lock back all the same.
func (l *FileLock) File() *os.File { return l.file }

// Close gives the lock back. The file goes first, while the lock still keeps
// others from taking it.
func (l *FileLock) Close() error {
	l.once.Do(func() {
		if l.path != "" {
			l.err = os.Remove(l.path)
		}
		l.err = errors.Join(l.err, l.file.Close())
	})
	return l.err
}
