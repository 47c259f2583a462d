package store_test

import (
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/store/storetest"
)

// mountTmpfs gives a file system of its own, which can be full or read-only.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("ckagent-test", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestReadOnlyStore(t *testing.T) {
	ctx := context.Background()
	dir := mountTmpfs(t, "size=8m")
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	id := storetest.Commit(t, s, "a", 1)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s, err = store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	storetest.Check(t, s, id, 1)
	img, err := s.OpenImage(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if img.Leased {
		t.Error("a lease on a read-only store")
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	sel, err := s.Get(ctx, "a", store.GetOptions{Deep: true})
	if err != nil || sel.Info.ID != id {
		t.Errorf("%+v, %v", sel, err)
	}
	for name, f := range map[string]func() error{
		"begin":  func() error { _, err := s.Begin(ctx, "a"); return err },
		"pin":    func() error { return s.Pin(ctx, id) },
		"remove": func() error { _, err := s.Remove(ctx, id, true); return err },
	} {
		if err := f(); !problem.Is(err, problem.Store) || !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFullStore(t *testing.T) {
	ctx := context.Background()
	dir := mountTmpfs(t, "size=300k")
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	id := storetest.Commit(t, s, "a", 1)
	if err := s.CheckSpace(1<<20, 0); !problem.Is(err, problem.Store) {
		t.Errorf("checked: %v", err)
	}
	free, err := s.FreeBytes()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/ballast", make([]byte, free-64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	txn, err := s.Begin(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	_, err = storetest.Fill(ctx, txn, 2, image.WriterOptions{})
	if !problem.Is(err, problem.Store) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("filled: %v", err)
	}
	if err := txn.Abort(); err != nil {
		t.Error(err)
	}
	if list, err := s.List(ctx); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	storetest.Check(t, s, id, 1)
	if err := os.Remove(dir + "/ballast"); err != nil {
		t.Fatal(err)
	}
	storetest.Commit(t, s, "a", 3)
}

// TestOpenToOthers refuses to put a guest's memory where others can read it.
func TestOpenToOthers(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	storetest.Commit(t, s, "a", 1)
	if err := os.Chmod(dir+"/vms", 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Begin(context.Background(), "a"); !problem.Is(err, problem.Refused) {
		t.Errorf("got %v", err)
	}
}
