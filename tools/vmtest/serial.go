package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// ErrEnded says that QEMU ended while something was waited for.
var ErrEnded = errors.New("QEMU has ended")

// Serial is what the guest wrote to its console so far.
func (v *VM) Serial() string {
	b, _ := readFrom(v.serial, v.from)
	return string(b)
}

// SerialSize is the length of the console log in bytes: a mark for AwaitSerialFrom
// and for the part of a restored machine (Adopt).
func (v *VM) SerialSize() int64 {
	st, err := os.Stat(v.serial)
	if err != nil {
		return 0
	}
	return st.Size()
}

// AwaitSerial waits until a whole line of the console matches the expression and
// returns the first that does.
func (v *VM) AwaitSerial(ctx context.Context, expr string) (string, error) {
	return v.AwaitSerialFrom(ctx, v.from, expr)
}

// AwaitSerialFrom is AwaitSerial for what comes after byte from of the log.
func (v *VM) AwaitSerialFrom(ctx context.Context, from int64, expr string) (string, error) {
	re, err := regexp.Compile(expr)
	if err != nil {
		return "", err
	}
	var found string
	err = v.watch(ctx, from, func(line []byte) bool {
		if re.Match(line) {
			found = string(line)
			return true
		}
		return false
	})
	if err != nil {
		return "", fmt.Errorf("wait for %q on the console of pid %d: %w", expr, v.pid, err)
	}
	return found, nil
}

// watch calls see with every whole line after byte from until it returns true,
// the machine ends or ctx does.
func (v *VM) watch(ctx context.Context, from int64, see func(line []byte) bool) error {
	process, err := v.holdProcess()
	if err != nil {
		return err
	}
	defer unix.Close(process)
	w, err := newWatcher(filepath.Dir(v.serial))
	if err != nil {
		return err
	}
	defer w.close()
	var rest []byte
	at, ended := from, false
	for {
		data, err := readFrom(v.serial, at)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		at += int64(len(data))
		rest = append(rest, data...)
		for {
			line, tail, ok := bytes.Cut(rest, []byte("\n"))
			if !ok {
				break
			}
			if see(bytes.TrimRight(line, "\r")) {
				return nil
			}
			rest = tail
		}
		if ended { // and everything it wrote before was seen
			return ErrEnded
		}
		if ended, err = w.wait(ctx, process); err != nil {
			return err
		}
	}
}

func readFrom(path string, from int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// watcher waits for changes to the files of a directory.
type watcher struct{ fd int }

func newWatcher(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	return &watcher{fd: fd}, nil
}

func (w *watcher) close() { unix.Close(w.fd) }

// wait returns when something changed, or with ended when the process is gone.
func (w *watcher) wait(ctx context.Context, pidfd int) (ended bool, err error) {
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		// In slices, so that a cancelled context is noticed without a second
		// descriptor and goroutine for each wait.
		n, err := unix.Poll(fds, int(sliceUntil(ctx).Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("poll: %w", err)
		}
		if n <= 0 {
			continue
		}
		var buf [4096]byte
		for {
			if k, err := unix.Read(w.fd, buf[:]); k <= 0 || err != nil {
				break
			}
		}
		return fds[1].Revents != 0, nil
	}
}

func sliceUntil(ctx context.Context) time.Duration {
	slice := 100 * time.Millisecond
	if d, ok := ctx.Deadline(); ok {
		slice = min(slice, max(time.Millisecond, time.Until(d)))
	}
	return slice
}

// awaitFile returns when path exists.
func awaitFile(ctx context.Context, path string, pidfd int) error {
	w, err := newWatcher(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer w.close()
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		ended, err := w.wait(ctx, pidfd)
		if err != nil {
			return fmt.Errorf("wait for %s: %w", path, err)
		}
		if ended {
			return fmt.Errorf("wait for %s: %w", path, ErrEnded)
		}
	}
}
