package storetest

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

func testRemove(t *testing.T, e *env) {
	first := Commit(t, e.Store, "a", 1)
	_, err := e.Remove(e.ctx, first, false)
	want(t, err, problem.Refused)
	second := Commit(t, e.Store, "a", 2)
	e.damage(t, second, "seg-0000")
	_, err = e.Remove(e.ctx, first, false) // the only good one still
	want(t, err, problem.Refused)
	if _, err := e.Remove(e.ctx, second, false); err != nil {
		t.Fatal(err)
	}
	third := Commit(t, e.Store, "a", 3)
	if _, err := e.Remove(e.ctx, first, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{third}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
	if _, err := e.Remove(e.ctx, third, true); err != nil {
		t.Fatal(err)
	}
	if ids := e.ids(t); len(ids) != 0 {
		t.Error(ids)
	}
	_, err = e.Remove(e.ctx, third, true)
	want(t, err, problem.NotFound)
}

func testReaders(t *testing.T, e *env) {
	first := Commit(t, e.Store, "a", 1)
	Commit(t, e.Store, "a", 2)
	img, err := e.OpenImage(e.ctx, first)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	other := e.reopen(t)
	_, err = other.Remove(e.ctx, first, true)
	want(t, err, problem.Busy)
	rep, err := other.ApplyRetention(e.ctx, "a", 1)
	if err != nil || len(rep.Removed) != 0 || len(rep.Kept) != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if _, err := other.GC(e.ctx, store.GCOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	list, err := other.List(e.ctx)
	if err != nil || !list[0].Leased() || list[1].Leased() {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Remove(e.ctx, first, false); err != nil {
		t.Fatal(err)
	}
}

func testPins(t *testing.T, e *env) {
	first := Commit(t, e.Store, "a", 1)
	Commit(t, e.Store, "a", 2)
	for range 2 {
		if err := e.Pin(e.ctx, first); err != nil {
			t.Fatal(err)
		}
	}
	_, err := e.Remove(e.ctx, first, false)
	want(t, err, problem.Refused)
	if rep, err := e.ApplyRetention(e.ctx, "a", 1); err != nil || len(rep.Removed) != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if list, err := e.List(e.ctx); err != nil || !list[0].Pinned || list[1].Pinned {
		t.Fatalf("%+v, %v", list, err)
	}
	for range 2 {
		if err := e.Unpin(e.ctx, first); err != nil {
			t.Fatal(err)
		}
	}
	if rep, err := e.ApplyRetention(e.ctx, "a", 1); err != nil || len(rep.Removed) != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

func testRetention(t *testing.T, e *env) {
	var ids []string
	for seed := range int64(6) {
		ids = append(ids, Commit(t, e.Store, "a", seed))
	}
	other := Commit(t, e.Store, "b", 7)
	_, err := e.ApplyRetention(e.ctx, "a", 0)
	want(t, err, problem.Usage)
	if err := e.Pin(e.ctx, ids[0]); err != nil {
		t.Fatal(err)
	}
	e.damage(t, ids[5], "pagemap") // does not count
	rep, err := e.ApplyRetention(e.ctx, "a", 2)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{ids[2], ids[1]}, rep.Removed); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{ids[0], ids[3], ids[4], ids[5], other}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
	if rep, err := e.ApplyRetention(e.ctx, "nosuch", 1); err != nil || len(rep.Removed) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
}

func testGC(t *testing.T, e *env) {
	keep := Commit(t, e.Store, "a", 1)
	txn, err := e.Begin(e.ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(e.ctx, txn, 2, image.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Ours is alive: another process of the store leaves it alone, forced or not.
	rep, err := e.reopen(t).GC(e.ctx, store.GCOptions{Force: true})
	if err != nil || len(rep.Removed) != 0 || len(rep.Kept) != 1 || rep.Kept[0].ID != txn.ID() {
		t.Fatalf("%+v, %v", rep, err)
	}
	if err := txn.Commit(e.ctx, m); err != nil {
		t.Fatal(err)
	}
	// Something half-written that nobody holds.
	dead := filepath.Join(e.dir, "vms", "c", "20260102T030405678-0123abcd")
	if err := fsys.MkdirAll(e.fs, dead); err != nil {
		t.Fatal(err)
	}
	if err := fsys.WriteFile(e.fs, filepath.Join(dead, "seg-0000"), make([]byte, 10000)); err != nil {
		t.Fatal(err)
	}
	dry, err := e.GC(e.ctx, store.GCOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	rep, err = e.GC(e.ctx, store.GCOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(dry, rep); diff != "" {
		t.Errorf("a dry run tells something else: %s", diff)
	}
	if len(rep.Removed) != 1 || rep.FreedBytes < 10000 {
		t.Errorf("%+v", rep)
	}
	if _, err := e.fs.Stat(filepath.Dir(dead)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("the empty directory of the VM is still there: %v", err)
	}
	Check(t, e.Store, keep, 1)
	Check(t, e.Store, txn.ID(), 2)
}
