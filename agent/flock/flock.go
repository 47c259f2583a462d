package flock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Held is the error that somebody else has a lock.
type Held struct {
	By string // what the holder says of itself, see Sign
}

func (h *Held) Error() string { return "held by " + h.By }

// look is how often Wait looks: the kernel knows no deadline for flock(2).
const look = 5 * time.Millisecond

// Try takes the lock of a file. If another has it the error is a *Held.
func Try(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lock(f); err != nil {
			if errors.Is(err, unix.EWOULDBLOCK) {
				err = &Held{By: holder(f)}
			} else {
				err = &os.PathError{Op: "flock", Path: path, Err: err}
			}
			return nil, errors.Join(err, f.Close())
		}
		named, err := sameFile(f, path)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if named {
			return f, nil
		}
		// Its holder removed it between our open and our lock, which is one on nothing.
		f.Close()
	}
}

// Wait takes the lock of a file as soon as it is free. worth, if not nil, says whether a
// holder is worth waiting for. When it is not, or when ctx is done, the error is the
// last *Held.
func Wait(ctx context.Context, path string, worth func(*Held) bool) (*os.File, error) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		f, err := Try(path)
		held, taken := errors.AsType[*Held](err)
		if !taken || worth != nil && !worth(held) {
			return f, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// Sign writes into a locked file who has it, for others to tell.
func Sign(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt(fmt.Appendf(nil, "pid %d (%s)\n", os.Getpid(), filepath.Base(os.Args[0])), 0)
	return err
}

// PID is the process that took the lock, as far as it signed.
func (h *Held) PID() (pid int, ok bool) {
	n, _ := fmt.Sscanf(h.By, "pid %d", &pid)
	return pid, n == 1
}

func lock(f *os.File) error {
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

// holder reads what the holder wrote; it may not have come to that yet.
func holder(f *os.File) string {
	b := make([]byte, 128)
	n, _ := f.ReadAt(b, 0)
	text := strings.TrimSpace(string(b[:n]))
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "another process (" + strconv.Quote(filepath.Base(f.Name())) + ")"
	}
	return text
}
