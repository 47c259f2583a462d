package storetest

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

func testCommit(t *testing.T, e *env) {
	for seed := range int64(3) {
		id := Commit(t, e.Store, "a", seed)
		Check(t, e.Store, id, seed)
	}
	list, err := e.reopen(t).List(e.ctx)
	if err != nil || len(list) != 3 {
		t.Fatalf("%d checkpoints, %v", len(list), err)
	}
	i := list[0]
	if i.VM != "a" || i.Pages != Pages || i.ZeroPages != Pages/3 || i.RAMBytes != Pages*4096 ||
		i.StoredBytes == 0 || i.Mode != "cow" || i.Leased() || i.Pinned || i.Damage != nil || i.CreatedAt.IsZero() {
		t.Errorf("%+v", i)
	}
	if info, err := e.fs.Stat(i.Dir); err != nil || info.Mode != 0o700 {
		t.Errorf("mode of the directory %v, %v", info.Mode, err)
	}
	if info, err := e.fs.Stat(filepath.Join(i.Dir, image.ManifestName)); err != nil || info.Mode != 0o600 {
		t.Errorf("mode of the manifest %v, %v", info.Mode, err)
	}
}

func testHalfWritten(t *testing.T, e *env) {
	txn, err := e.Begin(e.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(e.ctx, txn, 1, image.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if ids := e.ids(t); len(ids) != 0 {
		t.Fatalf("visible: %v", ids)
	}
	_, err = e.Get(e.ctx, txn.ID(), store.GetOptions{})
	want(t, err, problem.NotFound)
	_, err = e.OpenImage(e.ctx, txn.ID())
	want(t, err, problem.NotFound)
	_, err = e.Remove(e.ctx, txn.ID(), true)
	want(t, err, problem.NotFound)
	if err := txn.Commit(e.ctx, m); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{txn.ID()}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
	if err := txn.Abort(); err != nil {
		t.Fatal(err)
	}
	Check(t, e.Store, txn.ID(), 1)
}

func testAbort(t *testing.T, e *env) {
	keep := Commit(t, e.Store, "a", 1)
	txn, err := e.Begin(e.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(e.ctx, txn, 2, image.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := txn.Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.fs.Stat(txn.Dir()); !errors.Is(err, unix.ENOENT) {
		t.Errorf("the directory is still there: %v", err)
	}
	if err := txn.Commit(e.ctx, m); err == nil {
		t.Error("committed after Abort")
	}
	if err := txn.Abort(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{keep}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
}

func testCommitTwice(t *testing.T, e *env) {
	txn, err := e.Begin(e.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(e.ctx, txn, 1, image.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := txn.Commit(e.ctx, m); err != nil {
		t.Fatal(err)
	}
	want(t, txn.Commit(e.ctx, m), problem.Failed)
}

func testCommitMissing(t *testing.T, e *env) {
	for _, name := range []string{"pagemap", "device-state", "seg-0000"} {
		txn, err := e.Begin(e.ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		m, err := Fill(e.ctx, txn, 1, image.WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.fs.Remove(filepath.Join(txn.Dir(), name)); err != nil {
			t.Fatal(err)
		}
		if err := txn.Commit(e.ctx, m); !errors.Is(err, unix.ENOENT) {
			t.Errorf("without %s: %v", name, err)
		}
		if err := txn.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	if ids := e.ids(t); len(ids) != 0 {
		t.Error(ids)
	}
}

func testCommitCancelled(t *testing.T, e *env) {
	txn, err := e.Begin(e.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(e.ctx, txn, 1, image.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	want(t, txn.Commit(ctx, m), problem.Cancelled)
	if ids := e.ids(t); len(ids) != 0 {
		t.Error(ids)
	}
	// Nothing is lost by it: the same transaction can still be committed.
	if err := txn.Commit(e.ctx, m); err != nil {
		t.Fatal(err)
	}
	Check(t, e.Store, txn.ID(), 1)
}
