package image_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/store/storetest"
)

// goldenChain is a store of format 1.2 with a chain, a merged member, one whose parent is
// gone, and another VM. Like golden it is never written again:
//
//	go test ./agent/image -run TestWriteGoldenChain -golden-write DIR
//
// keeps one like it.
const goldenChain = "testdata/golden-v1.2"

func TestGoldenChain(t *testing.T) {
	var want map[string]string // id -> SHA-256 of RAM
	data, err := os.ReadFile(goldenChain + "/expected.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &want); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir() // reading takes leases
	if err := os.CopyFS(dir, os.DirFS(goldenChain)); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, book := map[string]string{}, map[string]string{}
	kinds, codecs := map[uint64]int{}, map[byte]int{}
	depth := 0
	for _, i := range list {
		depth = max(depth, i.Depth)
		if _, err := s.Verify(t.Context(), i.ID, nil); err != nil {
			t.Fatal(err)
		}
		img, err := s.OpenImage(t.Context(), i.ID)
		if err != nil {
			t.Fatal(err)
		}
		ram := make([]byte, img.Manifest().Blocks[0].UsedBytes)
		if _, err := img.ReadRun(0, 0, ram); err != nil {
			t.Fatal(err)
		}
		got[i.ID] = sha(ram)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		// A reader that knows nothing of chains reads each directory by itself.
		_, sums, err := readByTheBook(i.Dir, kinds, codecs)
		if err != nil {
			t.Fatal(err)
		}
		book[i.ID] = sums["pc.ram"]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want, book); diff != "" {
		t.Error(diff)
	}
	if depth < 2 || kinds[3] == 0 {
		t.Errorf("depth %d, pages by kind %v", depth, kinds)
	}
	// It can be continued.
	key, err := s.TagKey(t.Context(), "vm:a")
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.OpenParent(t.Context(), "a", "", key)
	if err != nil || p == nil {
		t.Fatalf("%v, %v", p, err)
	}
	p.Close()
}

func TestWriteGoldenChain(t *testing.T) {
	root := *goldenWrite
	if root == "" {
		root = t.TempDir()
	}
	root = filepath.Join(root, "chain")
	s, err := store.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	c, other := storetest.NewChain("a", 1), storetest.NewChain("b", 1)
	var ids []string
	for i := range 5 {
		ids = append(ids, c.Next(t, s, image.WriterOptions{Lanes: 1, Dedup: i > 1, Compress: []string{"none", "zstd", "s2"}[i%3]}))
	}
	if _, err := s.Merge(t.Context(), ids[2], store.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), ids[1], false); err != nil {
		t.Fatal(err)
	}
	other.Next(t, s, image.WriterOptions{Lanes: 1})
	c.Check(t, s)
	other.Check(t, s)
	sums := map[string]string{}
	for _, chain := range []*storetest.Chain{c, other} {
		for id, ram := range chain.Want {
			sums[id] = sha(ram)
		}
	}
	delete(sums, ids[1])
	data, err := json.MarshalIndent(sums, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "expected.json"), append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}
