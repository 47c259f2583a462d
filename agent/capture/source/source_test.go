package source

import (
	"bytes"
	"os"
	"testing"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mapping maps 1024 pages and writes to pages 3, 4 and 700.
func mapping(t *testing.T, fd, flags int) (hva uint64, mem []byte) {
	t.Helper()
	mem, err := unix.Mmap(fd, 0, 1024*PageBytes, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	for _, p := range []int{3, 4, 700} {
		mem[p*PageBytes+5] = byte(p)
	}
	return uint64(uintptr(unsafe.Pointer(&mem[0]))), mem
}

func tmpfsFile(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("source-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(1024 * PageBytes); err != nil {
		t.Fatal(err)
	}
	return f
}

func openSelf(t *testing.T, b Block) *Source {
	t.Helper()
	s, err := Open(os.Getpid(), []Block{b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func runs(t *testing.T, s *Source, first, n uint64) []Run {
	t.Helper()
	got, err := s.Runs(0, first, n, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

var wantRuns = []Run{{0, 3, true}, {3, 2, false}, {5, 695, true}, {700, 1, false}, {701, 323, true}}

func TestRunsOfAnonymousMemory(t *testing.T) {
	hva, mem := mapping(t, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	s := openSelf(t, Block{HVA: hva, Pages: 1024})
	if d := cmp.Diff(wantRuns, runs(t, s, 0, 1024)); d != "" {
		t.Fatal(d)
	}
	if mem[9*PageBytes] != 0 { // the read maps the zero page
		t.Fatal("page 9 is not zero")
	}
	if d := cmp.Diff(wantRuns, runs(t, s, 0, 1024)); d != "" {
		t.Fatal(d)
	}
	if d := cmp.Diff([]Run{{4, 1, false}, {5, 5, true}}, runs(t, s, 4, 6)); d != "" {
		t.Fatal(d)
	}
	dst := make([]byte, 2*PageBytes)
	if err := s.Read(0, 3, dst); err != nil || !bytes.Equal(dst, mem[3*PageBytes:5*PageBytes]) {
		t.Fatal("read of pages 3 and 4 is not what is there", err)
	}
}

// Arming puts a marker on every absent page, which the page map shows as
// swapped out. They still read as zero.
func TestRunsOfArmedMemory(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  Kind
		flags int
	}{
		{"anonymous", Anonymous, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS},
		{"shared", Shared, unix.MAP_SHARED},
		{"private file", PrivateFile, unix.MAP_PRIVATE},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd := -1
			if c.kind != Anonymous {
				fd = int(tmpfsFile(t).Fd())
			}
			hva, _ := mapping(t, fd, c.flags)
			f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
			if err != nil {
				t.Fatal(err)
			}
			h, err := uffd.Adopt(f, uffd.FeatureWPUnpopulated|uffd.FeatureWPHugetlbfsShmem)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			if _, err := h.Register(hva, 1024*PageBytes, uffd.ModeWP); err != nil {
				t.Fatal(err)
			}
			if err := h.WriteProtect(hva, 1024*PageBytes); err != nil {
				t.Fatal(err)
			}
			s := openSelf(t, Block{HVA: hva, Pages: 1024, Kind: c.kind})
			if d := cmp.Diff(wantRuns, runs(t, s, 0, 1024)); d != "" {
				t.Fatal(d)
			}
		})
	}
}

// A page that is in the file but not in the page table has content, and asking
// does not fill holes.
func TestRunsOfFiles(t *testing.T) {
	f := tmpfsFile(t)
	if _, err := f.WriteAt([]byte{1}, 100*PageBytes); err != nil {
		t.Fatal(err)
	}
	hva, _ := mapping(t, int(f.Fd()), unix.MAP_PRIVATE)
	private := openSelf(t, Block{HVA: hva, Pages: 1024, Kind: PrivateFile})
	want := []Run{{0, 3, true}, {3, 2, false}, {5, 95, true}, {100, 1, false}, {101, 599, true}, {700, 1, false}, {701, 323, true}}
	if d := cmp.Diff(want, runs(t, private, 0, 1024)); d != "" {
		t.Fatal(d)
	}
	sharedHVA, _ := mapping(t, int(f.Fd()), unix.MAP_SHARED)
	shared := openSelf(t, Block{HVA: sharedHVA, Pages: 1024, Kind: Shared})
	if d := cmp.Diff(want, runs(t, shared, 0, 1024)); d != "" {
		t.Fatal(d)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks != 4*PageBytes/512 {
		t.Fatalf("the file holds %d blocks, four pages were written (%v)", st.Blocks, err)
	}
}

func TestRangesOutsideTheBlockAreErrors(t *testing.T) {
	hva, _ := mapping(t, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	s := openSelf(t, Block{HVA: hva, Pages: 1000})
	if _, err := s.Runs(0, 999, 2, nil); err == nil {
		t.Error("runs beyond the block")
	}
	if err := s.Read(0, 999, make([]byte, 2*PageBytes)); err == nil {
		t.Error("read beyond the block")
	}
}

// Kernels without PAGEMAP_SCAN are asked entry by entry. The zero page, which
// they do not tell apart, is the one difference.
func TestRunsByEntries(t *testing.T) {
	hva, mem := mapping(t, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	s := openSelf(t, Block{HVA: hva, Pages: 1024})
	if d := cmp.Diff(wantRuns, s.entryRuns(&s.blocks[0], 0, 1024, 0, nil)); d != "" {
		t.Fatal(d)
	}
	if d := cmp.Diff([]Run{{4, 1, false}, {5, 5, true}}, s.entryRuns(&s.blocks[0], 4, 10, 0, nil)); d != "" {
		t.Fatal(d)
	}
	if mem[9*PageBytes] != 0 { // a bare read is optimized away
		t.Fatal("page 9 is not zero")
	}
	if d := cmp.Diff([]Run{{9, 1, false}}, s.entryRuns(&s.blocks[0], 9, 10, 0, nil)); d != "" {
		t.Fatal(d)
	}
}

// Each tells the same of every page as Runs does, in runs that end at its steps.
func TestEachCoversTheBlockInSteps(t *testing.T) {
	fd, err := unix.MemfdCreate("source-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	const large = 4*eachPages + 77
	if err := f.Truncate(large * PageBytes); err != nil {
		t.Fatal(err)
	}
	const touched = 64 // spread over it, at the step's edges above all
	want := map[uint64]bool{}
	for i := range uint64(touched) {
		for _, p := range []uint64{i * (large / touched), i/16*eachPages + i%16, (i/16+1)*eachPages - 1 - i%16} {
			if _, err := f.WriteAt([]byte{1}, int64(p*PageBytes)); err != nil {
				t.Fatal(err)
			}
			want[p] = true
		}
	}
	mem, err := unix.Mmap(fd, 0, large*PageBytes, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	s := openSelf(t, Block{HVA: uint64(uintptr(unsafe.Pointer(&mem[0]))), Pages: large, Kind: Shared})
	next := uint64(0)
	if err := s.Each(0, func(r Run) {
		if r.First != next || r.First/eachPages != (r.First+r.Pages-1)/eachPages {
			t.Errorf("run %+v, want one from page %d within a step", r, next)
		}
		next = r.First + r.Pages
		for p := r.First; p < next; p++ {
			if want[p] == r.Zero {
				t.Errorf("page %d: zero %v", p, r.Zero)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if next != large {
		t.Errorf("ended at page %d of %d", next, large)
	}
}
