package storetest

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

// Run runs the contract of a store. open makes an empty file system and names a
// directory in it that does not exist yet.
func Run(t *testing.T, open func(t *testing.T) (fsys.FS, string)) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, e *env)
	}{
		{"NoStore", testNoStore},
		{"CommitAndRead", testCommit},
		{"HalfWrittenIsInvisible", testHalfWritten},
		{"Abort", testAbort},
		{"CommitTwice", testCommitTwice},
		{"CommitNamesMissingFile", testCommitMissing},
		{"CommitCancelled", testCommitCancelled},
		{"ListOrder", testListOrder},
		{"GetByAbbreviation", testAbbreviation},
		{"NewestThatVerifies", testNewest},
		{"RemoveRefusals", testRemove},
		{"ReadersKeep", testReaders},
		{"Chain", testChain},
		{"Merge", testMerge},
		{"ParentByID", testParentByID},
		{"Pins", testPins},
		{"Retention", testRetention},
		{"GCKeepsTheLiving", testGC},
		{"NamesOfVMs", testNames},
		{"Concurrent", testConcurrent},
		{"Inspect", testInspect},
		{"Space", testSpace},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, dir := open(t)
			e := &env{fs: f, dir: dir, ctx: context.Background()}
			e.Store = e.reopen(t)
			c.run(t, e)
		})
	}
}

type env struct {
	*store.Store
	fs  fsys.FS
	dir string
	ctx context.Context
}

func (e *env) reopen(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.OpenFS(e.fs, e.dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (e *env) ids(t *testing.T) []string {
	t.Helper()
	list, err := e.List(e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, i := range list {
		out = append(out, i.ID)
	}
	return out
}

func want(t *testing.T, err error, code problem.Code) {
	t.Helper()
	if !problem.Is(err, code) {
		t.Fatalf("got %v (%s), expected %s", err, problem.CodeOf(err), code)
	}
}

// damage shortens a file of a checkpoint by putting another in its place.
func (e *env) damage(t *testing.T, id, name string) {
	t.Helper()
	in, err := e.Store.Inspect(e.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(in.Dir, name)
	data, err := fsys.ReadFileLimit(e.fs, path, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.fs.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := fsys.WriteFile(e.fs, path, data[:len(data)-1]); err != nil {
		t.Fatal(err)
	}
}

func testNoStore(t *testing.T, e *env) {
	_, err := e.List(e.ctx)
	want(t, err, problem.NotFound)
	_, err = e.Get(e.ctx, "vm:a", store.GetOptions{})
	want(t, err, problem.NotFound)
	_, err = e.GC(e.ctx, store.GCOptions{})
	want(t, err, problem.NotFound)
	_, err = e.OpenImage(e.ctx, "a")
	want(t, err, problem.NotFound)
	want(t, e.Pin(e.ctx, "a"), problem.NotFound)
}

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

func testListOrder(t *testing.T, e *env) {
	b1 := Commit(t, e.Store, "b", 1)
	a1 := Commit(t, e.Store, "a", 2)
	b2 := Commit(t, e.Store, "b", 3)
	if diff := cmp.Diff([]string{a1, b1, b2}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
	// Foreign names do not disturb, and GC leaves them alone.
	for _, name := range []string{"lost+found", "notes"} {
		if err := e.fs.Mkdir(filepath.Join(e.dir, "vms", "a", name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := fsys.WriteFile(e.fs, filepath.Join(e.dir, "vms", "README"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	rep, err := e.GC(e.ctx, store.GCOptions{Force: true})
	if err != nil || len(rep.Removed) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if diff := cmp.Diff([]string{a1, b1, b2}, e.ids(t)); diff != "" {
		t.Error(diff)
	}
}

func testAbbreviation(t *testing.T, e *env) {
	first := Commit(t, e.Store, "a", 1)
	second := Commit(t, e.Store, "b", 2)
	for _, ref := range []string{first, first[:18], first[19:], first[19:25]} {
		sel, err := e.Get(e.ctx, ref, store.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if sel.Info.ID != first {
			t.Errorf("%s found %s", ref, sel.Info.ID)
		}
	}
	_, err := e.Get(e.ctx, second[:8], store.GetOptions{})
	want(t, err, problem.Usage)
	_, err = e.Get(e.ctx, "nosuch", store.GetOptions{})
	want(t, err, problem.NotFound)
	_, err = e.Get(e.ctx, "", store.GetOptions{})
	want(t, err, problem.NotFound)
	_, err = e.Get(e.ctx, "vm:"+first, store.GetOptions{})
	want(t, err, problem.NotFound)
	_, err = e.Get(e.ctx, "../vms/a/"+first, store.GetOptions{})
	want(t, err, problem.NotFound)
	sel, err := e.Get(e.ctx, "vm:b", store.GetOptions{Deep: true})
	if err != nil || sel.Info.ID != second {
		t.Errorf("%s, %v", sel.Info.ID, err)
	}
}

func testNewest(t *testing.T, e *env) {
	first := Commit(t, e.Store, "a", 1)
	second := Commit(t, e.Store, "a", 2)
	third := Commit(t, e.Store, "a", 3)
	e.damage(t, third, "pagemap")
	e.damage(t, second, "device-state")
	sel, err := e.Get(e.ctx, "a", store.GetOptions{})
	if err != nil || sel.Info.ID != first {
		t.Fatalf("%s, %v", sel.Info.ID, err)
	}
	if len(sel.Skipped) != 2 || sel.Skipped[0].ID != third || sel.Skipped[1].ID != second {
		t.Fatalf("%+v", sel.Skipped)
	}
	for _, s := range sel.Skipped {
		want(t, s.Err, problem.Integrity)
	}
	// By its id, the damaged one is an error and not another one.
	_, err = e.Get(e.ctx, third, store.GetOptions{})
	want(t, err, problem.Integrity)
	_, err = e.Verify(e.ctx, third, nil)
	want(t, err, problem.Integrity)
	e.damage(t, first, image.ManifestName)
	_, err = e.Get(e.ctx, "a", store.GetOptions{})
	want(t, err, problem.Integrity)
	list, err := e.List(e.ctx)
	if err != nil || len(list) != 3 || list[0].Damage == nil {
		t.Fatalf("%+v, %v", list, err)
	}
}

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

func testChain(t *testing.T, e *env) {
	c := NewChain("a", 1)
	var ids []string
	for i := range 12 {
		ids = append(ids, c.Next(t, e.Store, image.WriterOptions{Compress: []string{"none", "s2", "zstd"}[i%3], Dedup: i%2 == 0}))
	}
	in, err := e.Store.Inspect(e.ctx, ids[11])
	if err != nil || in.Parent != ids[10] || in.Depth != 11 || in.Inherited == 0 {
		t.Fatalf("%+v, %v", in.Info, err)
	}
	// Any member goes, the others stay; a pinned one and the last one go only if told.
	for _, i := range []int{5, 0, 11, 3} {
		if _, err := e.Remove(e.ctx, ids[i], false); err != nil {
			t.Fatal(err)
		}
		if n := c.Check(t, e.Store); n == 0 {
			t.Fatal("nothing left")
		}
	}
	if err := e.Pin(e.ctx, ids[1]); err != nil {
		t.Fatal(err)
	}
	rep, err := e.ApplyRetention(e.ctx, "a", 2)
	if err != nil || len(rep.Removed) != 5 || len(rep.Kept) != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if n := c.Check(t, e.Store); n != 3 {
		t.Fatalf("%d left", n)
	}
	// A removed parent is not continued; the newest is.
	id := c.Next(t, e.Store, image.WriterOptions{})
	if in, err := e.Store.Inspect(e.ctx, id); err != nil || in.Parent != ids[10] {
		t.Fatalf("%+v, %v", in.Info, err)
	}
	rep2, err := e.GC(e.ctx, store.GCOptions{})
	if err != nil || len(rep2.Removed) != 0 {
		t.Fatalf("%+v, %v", rep2, err)
	}
	c.Check(t, e.Store)
}

func testMerge(t *testing.T, e *env) {
	c := NewChain("a", 2)
	var ids []string
	for range 6 {
		ids = append(ids, c.Next(t, e.Store, image.WriterOptions{}))
	}
	reader, err := e.OpenImage(e.ctx, ids[5])
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	info, err := e.Merge(e.ctx, ids[5], store.MergeOptions{Compress: "zstd"})
	if err != nil || info.Depth != 0 || info.Parent != "" || info.Inherited != 0 {
		t.Fatalf("%+v, %v", info, err)
	}
	c.Check(t, e.Store)
	// The one who read it has the files of before, and reads on.
	got := make([]byte, len(c.RAM))
	if _, err := reader.ReadRun(0, 0, got); err != nil || !bytes.Equal(got, c.Want[ids[5]]) {
		t.Fatalf("RAM differs or %v", err)
	}
	files := func() int {
		in, err := e.Store.Inspect(e.ctx, ids[5])
		if err != nil {
			t.Fatal(err)
		}
		return len(in.Files)
	}
	before := files()
	if rep, err := e.GC(e.ctx, store.GCOptions{}); err != nil || len(rep.Removed) != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	if rep, err := e.GC(e.ctx, store.GCOptions{}); err != nil || len(rep.Removed) == 0 || files() >= before {
		t.Fatalf("%+v, %v: %d files, %d before", rep, err, files(), before)
	}
	// Continued and merged again; in the middle of a chain as well as at its end.
	for range 3 {
		ids = append(ids, c.Next(t, e.Store, image.WriterOptions{}))
	}
	for _, i := range []int{7, 8, 2} {
		for range 2 { // the second time there is nothing to do
			if _, err := e.Merge(e.ctx, ids[i], store.MergeOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := c.Check(t, e.Store); n != 9 {
		t.Fatalf("%d left", n)
	}
	if _, err := e.ApplyRetention(e.ctx, "a", 1); err != nil {
		t.Fatal(err)
	}
	c.Check(t, e.Store)
}

func testParentByID(t *testing.T, e *env) {
	c := NewChain("a", 3)
	first := c.Next(t, e.Store, image.WriterOptions{})
	other := NewChain("b", 3).Next(t, e.Store, image.WriterOptions{})
	old := Commit(t, e.Store, "a", 1) // without tags, as version 1.1 wrote them
	key, err := e.TagKey(e.ctx, "vm:a")
	if err != nil {
		t.Fatal(err)
	}
	if p, err := e.OpenParent(e.ctx, "a", first, key); err != nil || p.Close() != nil {
		t.Fatal(err)
	}
	for _, id := range []string{other, old} {
		_, err := e.OpenParent(e.ctx, "a", id, key)
		want(t, err, problem.Refused)
	}
	if p, err := e.OpenParent(e.ctx, "a", "", key); p != nil || err != nil {
		t.Fatalf("%v, %v", p, err)
	}
	if p, err := e.OpenParent(e.ctx, "nosuch", "", key); p != nil || err != nil {
		t.Fatalf("%v, %v", p, err)
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

func testNames(t *testing.T, e *env) {
	long := ""
	for len(long) < 255 {
		long += "x/"
	}
	names := []string{"web 1", "../../etc", ".", "..", "a/b", "%41", "A", "ü", long[:255], long[:254] + "y"}
	ids := map[string]string{}
	for i, name := range names {
		ids[name] = Commit(t, e.Store, name, int64(i))
	}
	for i, name := range names {
		sel, err := e.Get(e.ctx, "vm:"+name, store.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if sel.Info.ID != ids[name] || sel.Info.VM != name {
			t.Errorf("%q found %s of %q", name, sel.Info.ID, sel.Info.VM)
		}
		Check(t, e.Store, ids[name], int64(i))
	}
	entries, err := e.fs.ReadDir(filepath.Join(e.dir, "vms"))
	if err != nil || len(entries) != len(names) {
		t.Errorf("%v, %v", entries, err)
	}
	_, err = e.Begin(e.ctx, "")
	want(t, err, problem.Usage)
}

func testConcurrent(t *testing.T, e *env) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s, err := store.OpenFS(e.fs, e.dir)
			if err != nil {
				t.Error(err)
				return
			}
			vm := []string{"a", "b"}[i%2]
			for n := range int64(5) {
				seed := int64(i)*10 + n
				txn, err := s.Begin(e.ctx, vm)
				if err != nil {
					t.Error(err)
					return
				}
				m, err := Fill(e.ctx, txn, seed, image.WriterOptions{})
				if err == nil {
					err = txn.Commit(e.ctx, m)
				}
				if err == nil {
					_, err = s.Get(e.ctx, "vm:"+vm, store.GetOptions{Deep: n == 0})
				}
				if err == nil {
					_, err = s.GC(e.ctx, store.GCOptions{})
				}
				if err == nil {
					_, err = s.ApplyRetention(e.ctx, vm, 3)
				}
				if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	for _, vm := range []string{"a", "b"} {
		if _, err := e.ApplyRetention(e.ctx, vm, 3); err != nil {
			t.Error(err)
		}
	}
	ids := e.ids(t)
	if len(ids) != 6 {
		t.Errorf("%d checkpoints: %v", len(ids), ids)
	}
	for _, id := range ids {
		if _, err := e.Verify(e.ctx, id, nil); err != nil {
			t.Error(err)
		}
	}
}

func testInspect(t *testing.T, e *env) {
	id := Commit(t, e.Store, "a", 1)
	in, err := e.Store.Inspect(e.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if in.ID != id || in.Manifest == nil || in.Manifest.ID != id {
		t.Errorf("%+v", in)
	}
	var sum int64
	for _, f := range in.Files {
		if f.Name != image.ManifestName {
			sum += f.Bytes
		}
	}
	if uint64(sum) != in.StoredBytes {
		t.Errorf("%d bytes in files, %d stored", sum, in.StoredBytes)
	}
}

func testSpace(t *testing.T, e *env) {
	free, err := e.FreeBytes() // although the directory is not there yet
	if err != nil || free == 0 {
		t.Fatalf("%d, %v", free, err)
	}
	if err := e.CheckSpace(4096, 4096); err != nil {
		t.Error(err)
	}
	for _, c := range [][2]uint64{{1 << 62, 0}, {0, 1 << 62}, {^uint64(0), ^uint64(0)}} {
		err := e.CheckSpace(c[0], c[1])
		want(t, err, problem.Store)
		if !errors.Is(err, unix.ENOSPC) {
			t.Error(err)
		}
	}
}
