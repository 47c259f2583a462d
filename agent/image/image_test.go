package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testBlocks has a large block, one that ends within a chunk, an empty one and
// one of huge pages.
func testBlocks() []Block {
	return []Block{
		{Name: "pc.ram", UsedBytes: 1500 * 4096, TotalBytes: 1500 * 4096, PageBytes: 4096, GPA: 0, Backing: "anonymous", Main: true},
		{Name: "pc.bios", UsedBytes: 64 * 4096, TotalBytes: 80 * 4096, PageBytes: 4096, GPA: 0xfffc0000, Backing: "anonymous", ReadOnly: true},
		{Name: "empty", UsedBytes: 0, TotalBytes: 4096, PageBytes: 4096, GPA: -1, Backing: "anonymous"},
		{Name: "huge", UsedBytes: 3 * 2 << 20, TotalBytes: 4 * 2 << 20, PageBytes: 2 << 20, BackingPageBytes: 2 << 20, GPA: -1, Backing: "hugetlb", Shared: true},
	}
}

// fillPages makes RAM like a guest's: zeros, text that compresses, noise.
func fillPages(seed int64, n uint64) []byte {
	rnd := rand.New(rand.NewSource(seed))
	b := make([]byte, n)
	for off := 0; off < len(b); off += 4096 {
		p := b[off:min(off+4096, len(b))]
		switch rnd.Intn(4) {
		case 0: // zeros
		case 1:
			rnd.Read(p)
		default:
			for i := 0; i+8 <= len(p); i += 8 {
				binary.LittleEndian.PutUint64(p[i:], uint64(off+i)&0xff00|0x4000)
			}
		}
	}
	return b
}

func testManifest(s Summary) *Manifest {
	m := &Manifest{Format: FormatName, Version: FormatMajor, Minor: FormatMinor,
		ID: "20260102T030405678-0123abcd", VM: "web 1", CreatedAt: time.Unix(1767323045, 678000000),
		Mode: "cow", Engine: "uffd", QEMU: QEMU{Version: "7.2.22", BinaryPath: "/usr/bin/qemu-system-x86_64"},
		Machine: Machine{Type: "pc-i440fx-7.2", Accel: "tcg", Argv: []string{"qemu", "-m", "1G"},
			Env: []EnvVar{{"QEMU_AUDIO_DRV", "none"}}, Facts: map[string]string{"kernel": "6.18"}},
		Hot: HotRuns{{0, 16, 4}, {1, 0, 1}}}
	s.Apply(m)
	return m
}

// writeImage writes a whole image and returns the content of its blocks.
func writeImage(t testing.TB, f fsys.FS, dir string, o WriterOptions) (*Manifest, [][]byte, []byte) {
	t.Helper()
	o.FS = f
	blocks := testBlocks()
	w, err := NewWriter(dir, blocks, o)
	if err != nil {
		t.Fatal(err)
	}
	var ram [][]byte
	var wg sync.WaitGroup
	errs := make(chan error, 1000)
	for i, b := range blocks {
		data := fillPages(int64(i), b.UsedBytes)
		ram = append(ram, data)
		if i == 3 {
			clear(data[2<<20 : 4<<20]) // a zero page among the huge ones
		}
		// Odd sizes, so that runs and frames cross chunks and slices.
		for first, n := uint64(0), uint64(0); first < b.Pages(); first += n {
			n = min(137, b.Pages()-first)
			if b.PageBytes > 4096 {
				n = 1
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				part := data[first*b.PageBytes : (first+n)*b.PageBytes]
				if IsZero(part) {
					errs <- w.WriteZero(i, first, n)
				} else {
					errs <- w.WritePages(i, first, part)
				}
			}()
		}
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	state := fillPages(99, 70000)
	if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
		t.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m := testManifest(s)
	data, err := EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := fsys.WriteFile(f, filepath.Join(dir, ManifestName), data); err != nil {
		t.Fatal(err)
	}
	return m, ram, state
}

func checkImage(t testing.TB, r *Reader, ram [][]byte, state []byte) {
	t.Helper()
	for i, b := range r.Manifest().Blocks {
		got := make([]byte, b.UsedBytes)
		if len(got) == 0 {
			continue
		}
		for j := range got {
			got[j] = 0xaa
		}
		if _, err := r.ReadRun(i, 0, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, ram[i]) {
			t.Fatalf("block %s differs", b.Name)
		}
		page := make([]byte, b.PageBytes)
		rnd := rand.New(rand.NewSource(5))
		for range 200 {
			p := uint64(rnd.Int63n(int64(b.Pages())))
			want := ram[i][p*b.PageBytes : (p+1)*b.PageBytes]
			zero, err := r.ReadPage(i, p, page)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(page, want) || zero != IsZero(want) {
				t.Fatalf("block %s page %d differs (zero %v)", b.Name, p, zero)
			}
			n, zero, err := r.Extent(i, p, 50)
			if err != nil || n == 0 || zero != IsZero(want) {
				t.Fatalf("extent %d %v %v", n, zero, err)
			}
			for k := uint64(0); k < n; k++ {
				if IsZero(ram[i][(p+k)*b.PageBytes:(p+k+1)*b.PageBytes]) != zero {
					t.Fatalf("page %d of the extent of %d at %d is not alike", k, n, p)
				}
			}
		}
	}
	got, err := r.DeviceState(context.Background())
	if err != nil || !bytes.Equal(got, state) {
		t.Fatalf("device state differs: %v", err)
	}
}

// codecs are those that a test is run with: in a short run, for the race detector, the
// one that has most happen at once.
func codecs() []string {
	if testing.Short() {
		return []string{"zstd"}
	}
	return []string{"none", "s2", "zstd"}
}

func TestRoundTrip(t *testing.T) {
	for _, codec := range []string{"none", "s2", "zstd"} {
		for _, lanes := range []int{1, 4} {
			if testing.Short() && lanes == 1 {
				continue
			}
			t.Run(fmt.Sprint(codec, lanes), func(t *testing.T) {
				dir := t.TempDir()
				m, ram, state := writeImage(t, fsys.OS{}, dir, WriterOptions{Compress: codec, Lanes: lanes, SegmentBytes: 1})
				r, err := OpenReader(dir)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				if diff := cmp.Diff(m.Stats, r.Manifest().Stats); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(m.Hot, r.Manifest().Hot); diff != "" {
					t.Error(diff)
				}
				checkImage(t, r, ram, state)
				var last, total uint64
				if err := r.Verify(context.Background(), func(d, n uint64) { last, total = d, n }); err != nil {
					t.Fatal(err)
				}
				if last != total || total != m.Stats.RAMBytes {
					t.Errorf("progress ended at %d of %d", last, total)
				}
				for _, s := range m.Segments {
					if s.Bytes > minSegmentBytes {
						t.Errorf("segment %s has %d bytes", s.Name, s.Bytes)
					}
					info, err := os.Stat(filepath.Join(dir, s.Name))
					if err != nil || info.Mode().Perm() != 0o600 {
						t.Errorf("%s: %v %v", s.Name, info.Mode(), err)
					}
				}
			})
		}
	}
}

func TestWriterRefusals(t *testing.T) {
	newWriter := func(t *testing.T) *Writer {
		w, err := NewWriter(t.TempDir(), testBlocks(), WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Abort)
		return w
	}
	page := bytes.Repeat([]byte{1}, 4096)
	t.Run("twice", func(t *testing.T) {
		w := newWriter(t)
		if err := w.WritePages(0, 100, bytes.Repeat(page, 100)); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteZero(0, 10, 91); !errors.Is(err, ErrTwice) {
			t.Fatalf("got %v", err)
		}
		if err := w.WritePages(0, 500, page); !errors.Is(err, ErrTwice) {
			t.Fatalf("a failed writer goes on: %v", err)
		}
		if _, err := w.Finish(context.Background()); !errors.Is(err, ErrTwice) {
			t.Fatalf("a failed writer finishes: %v", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		w := newWriter(t)
		if err := w.WriteZero(0, 0, 1499); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteZero(1, 1, 62); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]PageRun{{0, 1499, 1}}, w.Missing(0)); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]PageRun{{1, 0, 1}, {1, 63, 1}}, w.Missing(1)); diff != "" {
			t.Error(diff)
		}
		if got := w.Missing(2); got != nil {
			t.Error(got)
		}
		if _, err := w.Finish(context.Background()); !errors.Is(err, ErrIncomplete) {
			t.Fatalf("got %v", err)
		}
		if err := w.WriteZero(0, 1499, 1); !errors.Is(err, ErrClosed) {
			t.Fatalf("after Finish: %v", err)
		}
	})
	t.Run("no device state", func(t *testing.T) {
		w := newWriter(t)
		for i, b := range w.Blocks() {
			if err := w.WriteZero(i, 0, b.Pages()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.Finish(context.Background()); !errors.Is(err, ErrIncomplete) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		w := newWriter(t)
		for i, b := range w.Blocks() {
			if err := w.WriteZero(i, 0, b.Pages()); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteDeviceState(bytes.NewReader(page)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := w.Finish(ctx); !problem.Is(err, problem.Cancelled) {
			t.Fatalf("got %v", err)
		}
	})
	for name, f := range map[string]func(w *Writer) error{
		"beyond":     func(w *Writer) error { return w.WritePages(0, 1499, bytes.Repeat(page, 2)) },
		"overflow":   func(w *Writer) error { return w.WriteZero(0, 1, ^uint64(0)) },
		"half page":  func(w *Writer) error { return w.WritePages(0, 0, page[1:]) },
		"no block":   func(w *Writer) error { return w.WritePages(4, 0, page) },
		"minus one":  func(w *Writer) error { return w.WriteZero(-1, 0, 1) },
		"small page": func(w *Writer) error { return w.WritePages(3, 0, page) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWriter(t)
			if err := f(w); !problem.Is(err, problem.Failed) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestWritePagesDoesNotAllocate(t *testing.T) {
	blocks := []Block{{Name: "r", UsedBytes: 1 << 30, TotalBytes: 1 << 30, PageBytes: 4096}}
	w, err := NewWriter(t.TempDir(), blocks, WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	data := fillPages(1, 256<<10)
	var page uint64
	allocs := testing.AllocsPerRun(50, func() {
		if err := w.WritePages(0, page, data); err != nil {
			t.Fatal(err)
		}
		page += 64
	})
	if allocs > 0 {
		t.Errorf("%v allocations a call", allocs)
	}
}

func TestChunkEviction(t *testing.T) {
	dir := t.TempDir()
	_, ram, state := writeImage(t, fsys.OS{}, dir, WriterOptions{})
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.loaded.ring = make([]uint64, 0, 1) // every other chunk evicts
	checkImage(t, r, ram, state)
	n := 0
	for i := range r.chunks {
		if r.chunks[i].Load() != nil {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d chunks in memory, 1 allowed", n)
	}
}

func TestReaderAfterClose(t *testing.T) {
	dir := t.TempDir()
	writeImage(t, fsys.OS{}, dir, WriterOptions{Compress: "zstd"})
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 4096)
	if _, err := r.ReadPage(0, 1500, page); !problem.Is(err, problem.Failed) {
		t.Errorf("beyond the end: %v", err)
	}
	if _, err := r.ReadPage(0, 0, page[:100]); !problem.Is(err, problem.Failed) {
		t.Errorf("short buffer: %v", err)
	}
	r.Close()
	if _, err := r.ReadPage(0, 0, page); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := r.Verify(context.Background(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestVerifyCancel(t *testing.T) {
	dir := t.TempDir()
	writeImage(t, fsys.OS{}, dir, WriterOptions{})
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := r.Verify(ctx, func(d, n uint64) { cancel() }); !problem.Is(err, problem.Cancelled) {
		t.Errorf("got %v", err)
	}
}
