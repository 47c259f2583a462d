package storetest

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

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
