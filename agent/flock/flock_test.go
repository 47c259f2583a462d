package flock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTry(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "lock")
	f, err := Try(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Try(path)
	held, ok := errors.AsType[*Held](err)
	if !ok || !strings.Contains(held.By, `"lock"`) {
		t.Errorf("before the holder signed: %v", err)
	}
	if err := Sign(f); err != nil {
		t.Fatal(err)
	}
	_, err = Try(path)
	if held, ok = errors.AsType[*Held](err); !ok || !strings.HasPrefix(held.By, "pid "+strconv.Itoa(os.Getpid())+" (") {
		t.Errorf("signed: %v", err)
	}
	if pid, ok := held.PID(); !ok || pid != os.Getpid() {
		t.Errorf("pid %d, %v", pid, ok)
	}
	if err := os.WriteFile(path, []byte("pid 7\x1b[2J\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Try(path); strings.Contains(err.Error(), "\x1b") {
		t.Errorf("what a file says went through as it is: %q", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = Try(path); err != nil {
		t.Fatalf("given back: %v", err)
	}
	f.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", path); err != nil {
		t.Fatal(err)
	}
	if f, err := Try(path); err == nil {
		f.Close()
		t.Error("a symbolic link was followed")
	}
}

func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := Try(path)
	if err != nil {
		t.Fatal(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 4*look)
	defer cancel()
	_, err = Wait(soon, path, nil)
	if _, held := errors.AsType[*Held](err); !held || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("held for ever: %v", err)
	}
	if _, err := Wait(t.Context(), path, func(*Held) bool { return false }); err == nil {
		t.Error("taken from its holder")
	}
	got := make(chan error, 1)
	looked := make(chan struct{}, 1)
	go func() { // ends when the lock is given back
		g, err := Wait(t.Context(), path, func(*Held) bool {
			select {
			case looked <- struct{}{}:
			default:
			}
			return true
		})
		if err == nil {
			err = g.Close()
		}
		got <- err
	}()
	<-looked
	if err := errors.Join(os.Remove(path), f.Close()); err != nil { // as a holder that tidies up
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a lock that was given back is still waited for")
	}
}
