package image

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image/fsys"
)

// testKey is the key of a scope in a store whose secret is all ones.
func testKey(t testing.TB, scope string) *TagKey {
	t.Helper()
	k, err := NewTagKey(bytes.Repeat([]byte{1}, TagSecretBytes), scope)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// line is a VM whose checkpoints continue each other, on a file system in memory.
type line struct {
	t      testing.TB
	fs     fsys.FS
	vm     string
	blocks []Block
	ram    [][]byte
	key    *TagKey
	n      int
}

func newLine(t testing.TB, f fsys.FS, vm string) *line {
	l := &line{t: t, fs: f, vm: vm, blocks: testBlocks(), key: testKey(t, "x")}
	for i, b := range l.blocks {
		l.ram = append(l.ram, fillPages(int64(i), b.UsedBytes))
	}
	if err := f.Mkdir("/" + vm); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *line) id(n int) string {
	return fmt.Sprintf("20260102T030405%03d-%08x", n, uint32(Sum([]byte(l.vm))))
}

func (l *line) dir(n int) string { return filepath.Join("/", l.vm, l.id(n)) }

// take writes the next checkpoint of what ram holds now. unwritten lists runs that are
// not handed over but called unchanged.
func (l *line) take(o WriterOptions, unwritten ...PageRun) *Manifest {
	l.t.Helper()
	l.n++
	dir := l.dir(l.n)
	if err := l.fs.Mkdir(dir); err != nil {
		l.t.Fatal(err)
	}
	o.FS, o.Key, o.VM = l.fs, l.key, l.vm
	parent := o.Parent
	w, err := NewWriter(dir, l.blocks, o)
	if err != nil {
		l.t.Fatal(err)
	}
	defer w.Abort()
	skip := map[PageRun]bool{}
	for _, r := range unwritten {
		if err := w.WriteUnchanged(r.Block, r.First, r.Pages); err != nil {
			l.t.Fatal(err)
		}
		for p := r.First; p < r.End(); p++ {
			skip[PageRun{r.Block, p, 1}] = true
		}
	}
	for i, b := range l.blocks {
		for first, n := uint64(0), uint64(0); first < b.Pages(); first += n {
			if skip[PageRun{i, first, 1}] {
				n = 1
				continue
			}
			for n = 1; n < 137 && first+n < b.Pages() && !skip[PageRun{i, first + n, 1}] && b.PageBytes == 4096; n++ {
			}
			if err := w.WritePages(i, first, l.ram[i][first*b.PageBytes:(first+n)*b.PageBytes]); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	state := strings.Repeat("state", l.n)
	if err := w.WriteDeviceState(strings.NewReader(state)); err != nil {
		l.t.Fatal(err)
	}
	p := w.Progress()
	s, err := w.Finish(context.Background())
	if err != nil {
		l.t.Fatal(err)
	}
	m := testManifest(s)
	m.ID, m.VM, m.Hot = l.id(l.n), l.vm, nil
	if parent != nil {
		m.Parent, m.Depth = parent.Manifest().ID, parent.Manifest().Depth+1
	}
	l.put(dir, m)
	if own := m.Stats.StoredBytes - m.DeviceState.Bytes - m.Pagemap.Bytes - m.Tags.Bytes; own != p.StoredBytes-m.DeviceState.Bytes {
		l.t.Errorf("own segments have %d bytes, %d were written", own, p.StoredBytes-m.DeviceState.Bytes)
	}
	return m
}

func (l *line) put(dir string, m *Manifest) {
	l.t.Helper()
	data, err := EncodeManifest(m)
	if err != nil {
		l.t.Fatal(err)
	}
	_ = l.fs.Remove(filepath.Join(dir, ManifestName))
	if err := fsys.WriteFile(l.fs, filepath.Join(dir, ManifestName), data); err != nil {
		l.t.Fatal(err)
	}
}

func (l *line) open(n int) *Reader {
	l.t.Helper()
	r, err := OpenReaderFS(l.fs, l.dir(n))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { r.Close() })
	return r
}

// check reads a checkpoint back whole.
func (l *line) check(n int, ram [][]byte) {
	l.t.Helper()
	r, err := OpenReaderFS(l.fs, l.dir(n))
	if err != nil {
		l.t.Fatal(err)
	}
	defer r.Close()
	for i, want := range ram {
		got := make([]byte, len(want))
		if len(got) == 0 {
			continue
		}
		if _, err := r.ReadRun(i, 0, got); err != nil || !bytes.Equal(got, want) {
			l.t.Fatalf("checkpoint %d: block %d differs, or %v", n, i, err)
		}
	}
	if state, err := r.DeviceState(context.Background()); err != nil || string(state) != strings.Repeat("state", n) {
		l.t.Fatalf("checkpoint %d: device state differs, or %v", n, err)
	}
	if err := r.Verify(context.Background(), nil); err != nil {
		l.t.Fatal(err)
	}
}

// remove deletes a checkpoint as the store does.
func (l *line) remove(n int) {
	l.t.Helper()
	list, err := l.fs.ReadDir(l.dir(n))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range list {
		if err := l.fs.Remove(filepath.Join(l.dir(n), e.Name)); err != nil {
			l.t.Fatal(err)
		}
	}
}

func (l *line) copyRAM() (out [][]byte) {
	for _, r := range l.ram {
		out = append(out, bytes.Clone(r))
	}
	return out
}

// change gives pages of the first block another content: some new, some zero.
func (l *line) change(rnd *rand.Rand, pages int) {
	for range pages {
		p := l.ram[0][rnd.Intn(len(l.ram[0])/4096)*4096:][:4096]
		if rnd.Intn(5) == 0 {
			clear(p)
		} else {
			rnd.Read(p[:1+rnd.Intn(4096)])
		}
	}
}

func testManifestOf(s Summary) *Manifest {
	m := testManifest(s)
	m.Hot = nil
	return m
}
