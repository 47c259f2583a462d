package storetest

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

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
