package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestChain(t *testing.T) {
	for _, codec := range codecs() {
		for _, dedup := range []bool{false, true} {
			t.Run(fmt.Sprint(codec, dedup), func(t *testing.T) {
				l := newLine(t, memfs.New(1<<30), "vm")
				rnd := rand.New(rand.NewSource(7))
				full := l.take(WriterOptions{Compress: codec, Lanes: 2, Dedup: dedup})
				states := [][][]byte{nil, l.copyRAM()}
				for range 5 {
					l.change(rnd, 15)
					m := l.take(WriterOptions{Compress: codec, Lanes: 2, Parent: l.open(l.n), Dedup: dedup})
					states = append(states, l.copyRAM())
					if files := m.Stats.StoredBytes - m.Pagemap.Bytes - m.Tags.Bytes; files > 17*4096 {
						t.Errorf("checkpoint %d stores %d bytes of 15 pages", l.n, files)
					}
				}
				if full.Stats.StoredBytes < 1<<20 {
					t.Errorf("the full one stores %d bytes", full.Stats.StoredBytes)
				}
				for n := 1; n < len(states); n++ {
					l.check(n, states[n])
				}
				// Any of them may go: the others stay readable.
				for _, n := range rnd.Perm(len(states) - 1)[:3] {
					l.remove(n + 1)
					states[n+1] = nil
				}
				for n := range states {
					if states[n] != nil {
						l.check(n, states[n])
					}
				}
			})
		}
	}
}

func TestChainOfUnwrittenPages(t *testing.T) {
	l := newLine(t, memfs.New(1<<30), "vm")
	l.take(WriterOptions{})
	rnd := rand.New(rand.NewSource(1))
	rnd.Read(l.ram[0][200*4096 : 203*4096])
	m := l.take(WriterOptions{Parent: l.open(1)}, PageRun{0, 0, 200}, PageRun{0, 203, 1297}, PageRun{1, 0, 64}, PageRun{3, 0, 3})
	l.check(2, l.ram)
	if own := m.Stats.StoredBytes - m.Pagemap.Bytes - m.Tags.Bytes - m.DeviceState.Bytes; own != 3*4096 {
		t.Errorf("%d bytes stored for three pages", own)
	}
	// What a parent does not have cannot be unchanged.
	w, err := NewWriter("/", l.blocks, WriterOptions{FS: l.fs, Key: l.key})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.WriteUnchanged(0, 5, 1); err == nil {
		t.Error("a page without a parent is called unchanged")
	}
}

func TestChainDropsWhatItDoesNotNeed(t *testing.T) {
	l := newLine(t, memfs.New(1<<30), "vm")
	l.take(WriterOptions{})
	rnd := rand.New(rand.NewSource(1))
	for i := range l.ram {
		rnd.Read(l.ram[i])
	}
	m := l.take(WriterOptions{Parent: l.open(1)})
	if m.InheritedBytes() != 0 {
		t.Errorf("%d bytes taken over for nothing", m.InheritedBytes())
	}
	list, err := l.fs.ReadDir(l.dir(2))
	if err != nil || len(list) != len(m.Named()) {
		t.Errorf("%v, %v", list, err)
	}
	l.check(2, l.ram)
}

func TestDedup(t *testing.T) {
	for _, codec := range []string{"none", "zstd"} {
		t.Run(codec, func(t *testing.T) {
			f := memfs.New(1 << 30)
			a, b := newLine(t, f, "a"), newLine(t, f, "b")
			rnd := rand.New(rand.NewSource(3))
			// The same pages elsewhere, some of them more than once, and a few of its own.
			for p := range 1500 {
				copy(b.ram[0][p*4096:(p+1)*4096], a.ram[0][rnd.Intn(1500)*4096:])
			}
			own := 0
			for p := 0; p < 1500; p += 100 {
				rnd.Read(b.ram[0][p*4096 : (p+1)*4096])
				own++
			}
			for i := 1; i < len(b.ram); i++ {
				clear(b.ram[i])
			}
			a.take(WriterOptions{Compress: codec, Dedup: true})
			m := b.take(WriterOptions{Compress: codec, Dedup: true, Donors: []*Reader{a.open(1)}})
			if got := m.Stats.StoredBytes - m.Pagemap.Bytes - m.Tags.Bytes - m.DeviceState.Bytes; got != uint64(own)*4096 {
				t.Errorf("%d bytes stored: expected %d pages", got, own)
			}
			for _, s := range m.Segments {
				if s.Owner != "" && s.VM != "a" {
					t.Errorf("segment %+v is not marked as the other VM's", s)
				}
			}
			a.remove(1)
			b.check(1, b.ram)
			// Its own, twice.
			copy(b.ram[0][7*4096:], b.ram[0][:4096])
			rnd.Read(b.ram[0][9*4096 : 10*4096])
			copy(b.ram[0][11*4096:], b.ram[0][9*4096:10*4096])
			m = b.take(WriterOptions{Compress: codec, Dedup: true, Parent: b.open(1)})
			if got := m.Stats.StoredBytes - m.Pagemap.Bytes - m.Tags.Bytes - m.DeviceState.Bytes; got < 4096 || got > 4160 { // in a frame with its copy
				t.Errorf("%d bytes stored for one new page", got)
			}
			b.check(2, b.ram)
		})
	}
}

func TestKeysKeepApart(t *testing.T) {
	page := bytes.Repeat([]byte("secret"), 1000)[:4096]
	var a, b, again Tag
	testKey(t, "a").sum(&a, page)
	testKey(t, "b").sum(&b, page)
	testKey(t, "a").sum(&again, page)
	if a == b || a != again {
		t.Errorf("%x %x %x", a, b, again)
	}
	l := newLine(t, memfs.New(1<<30), "vm")
	m := l.take(WriterOptions{})
	if err := Usable(m, testKey(t, "y")); err == nil {
		t.Error("another scope's tags are of use")
	}
	if err := Usable(m, l.key); err != nil {
		t.Error(err)
	}
}

func TestMerge(t *testing.T) {
	for _, codec := range codecs() {
		t.Run(codec, func(t *testing.T) {
			f := memfs.New(1 << 30)
			l, other := newLine(t, f, "vm"), newLine(t, f, "other")
			other.take(WriterOptions{})
			rnd := rand.New(rand.NewSource(7))
			l.take(WriterOptions{Compress: codec, Dedup: true, Donors: []*Reader{other.open(1)}})
			for range 5 {
				l.change(rnd, 30)
				l.take(WriterOptions{Compress: codec, Parent: l.open(l.n), Dedup: true})
			}
			for range 2 { // what was merged can be continued, and merged again
				before := l.open(l.n)
				m, err := Merge(context.Background(), l.open(l.n), MergeOptions{FS: f, Compress: codec, Absorb: func(s *Segment) bool { return s.VM == "" }})
				if err != nil {
					t.Fatal(err)
				}
				l.put(l.dir(l.n), m)
				if m.Parent != "" || m.Depth != 0 || m.Pagemap.Name != "pagemap-m1" {
					t.Errorf("parent %q, depth %d, %s", m.Parent, m.Depth, m.Pagemap.Name)
				}
				for _, s := range m.Segments {
					if s.Owner != "" && s.VM != "other" {
						t.Errorf("still in %+v", s)
					}
				}
				l.check(l.n, l.ram)
				checkImage(t, before, l.ram, []byte(strings.Repeat("state", l.n))) // who read it goes on
				l.change(rnd, 30)
				l.take(WriterOptions{Compress: codec, Parent: l.open(l.n)})
				l.check(l.n, l.ram)
			}
			for n := 1; n < l.n; n++ {
				l.remove(n)
			}
			l.check(l.n, l.ram)
		})
	}
}

// TestDirect writes past the page cache, from buffers that lie on pages and from others.
func TestDirect(t *testing.T) {
	dir := t.TempDir()
	page := 0
	mem, err := unix.Mmap(-1, 0, 3<<20+4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	}()
	rand.New(rand.NewSource(1)).Read(mem)
	clear(mem[40*4096 : 43*4096])
	blocks := []Block{{Name: "r", UsedBytes: 6 << 20, TotalBytes: 6 << 20, PageBytes: 4096}}
	w, err := NewWriter(dir, blocks, WriterOptions{Direct: true, Lanes: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	var want []byte
	for _, part := range [][]byte{mem[:3<<20], mem[8 : 8+3<<20]} {
		if err := w.WritePages(0, uint64(page), part); err != nil {
			t.Fatal(err)
		}
		page += len(part) / 4096
		want = append(want, part...)
	}
	if err := w.WriteDeviceState(strings.NewReader("x")); err != nil {
		t.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	data, err := EncodeManifest(testManifestOf(s))
	if err != nil {
		t.Fatal(err)
	}
	if err := fsys.WriteFile(fsys.OS{}, filepath.Join(dir, ManifestName), data); err != nil {
		t.Fatal(err)
	}
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := make([]byte, len(want))
	if _, err := r.ReadRun(0, 0, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("differs, or %v", err)
	}
	if err := r.Verify(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
}

func TestInheritFromDamaged(t *testing.T) {
	f := memfs.New(1 << 30)
	l := newLine(t, f, "vm")
	m := l.take(WriterOptions{})
	if err := f.Mkdir("/next"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{m.Tags.Name, m.Pagemap.Name} {
		r := l.open(1)
		flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
		if err := f.Update(filepath.Join(l.dir(1), name), flip); err != nil {
			t.Fatal(err)
		}
		_, err := NewWriter("/next", l.blocks, WriterOptions{FS: f, Key: l.key, Parent: r})
		if !problem.Is(err, problem.Integrity) || !NotInherited(err) {
			t.Errorf("%s: %v", name, err)
		}
		if list, err := f.ReadDir("/next"); err != nil || len(list) != 0 {
			t.Errorf("%s: %v left, %v", name, list, err)
		}
		if err := f.Update(filepath.Join(l.dir(1), name), flip); err != nil {
			t.Fatal(err)
		}
	}
}

// noLinks is a file system without second names.
type noLinks struct{ *memfs.FS }

func (noLinks) Link(string, string) error { return fsys.ErrNoLinks }

func TestNoLinks(t *testing.T) {
	f := noLinks{memfs.New(1 << 30)}
	l := newLine(t, f, "vm")
	l.take(WriterOptions{})
	if err := f.Mkdir("/next"); err != nil {
		t.Fatal(err)
	}
	if _, err := NewWriter("/next", l.blocks, WriterOptions{FS: f, Key: l.key, Parent: l.open(1)}); !errors.Is(err, ErrNoLinks) || !NotInherited(err) {
		t.Error(err)
	}
}
