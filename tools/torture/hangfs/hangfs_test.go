package hangfs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func mount(t *testing.T) (*Mounted, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	dir, below := t.TempDir(), t.TempDir()
	m, err := Mount(dir, below)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, dir
}

func TestPassesOn(t *testing.T) {
	m, dir := mount(t)
	before := m.Ops()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != "text" {
		t.Fatalf("%q, %v", b, err)
	}
	if m.Ops() < before+3 {
		t.Errorf("%d operations were counted", m.Ops()-before)
	}
}

func TestFull(t *testing.T) {
	m, dir := mount(t)
	m.FullAfter(10000)
	err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 1<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
}

// TestHangs: a write does not return while the store hangs, and fails when it is
// closed.
func TestHangs(t *testing.T) {
	m, dir := mount(t)
	f, err := os.Create(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	m.HangAfter(0)
	wrote := make(chan error, 1)
	go func() {
		_, err := f.Write([]byte("text"))
		wrote <- errors.Join(err, f.Close())
	}()
	<-m.Hung()
	select {
	case err := <-wrote:
		t.Fatalf("the write returned: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	m.release()
	if err := <-wrote; err == nil {
		t.Error("a write that hung succeeded")
	}
}
