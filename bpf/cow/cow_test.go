package cow

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "faults" {
		fmt.Println(faultCost())
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const asyncFeatures = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated | uffd.FeatureWPAsync

// bed is memory of this process, tracked asynchronously, with the programs attached.
type bed struct {
	t     testing.TB
	mem   []byte
	start uint64
	h     *uffd.Handle
	pm    *pagemap.Pagemap
	p     *Programs
	epoch uint64
}

type memory struct {
	name   string
	shared bool
	huge   bool
}

func newBed(t testing.TB, m memory, pages, ring int) *bed {
	t.Helper()
	const align = 2 << 20
	flags, fd := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1
	var err error
	if m.shared {
		if fd, err = unix.MemfdCreate("cow", unix.MFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64(pages*PageBytes+align)); err != nil {
			t.Fatal(err)
		}
		flags = unix.MAP_SHARED
	}
	whole, err := unix.Mmap(fd, 0, pages*PageBytes+align, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(whole) })
	b := &bed{t: t, mem: whole[-addressOf(whole)%align:][:pages*PageBytes]}
	b.start = addressOf(b.mem)
	advice := unix.MADV_NOHUGEPAGE
	if m.huge {
		advice = unix.MADV_HUGEPAGE
	}
	if err := unix.Madvise(b.mem, advice); err != nil && !m.shared {
		t.Fatal(err)
	}
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	if b.h, err = uffd.Adopt(f, asyncFeatures); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.h.Close() })
	if b.pm, err = pagemap.OpenSelf(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.pm.Close() })
	if _, err := b.h.Register(b.start, uint64(len(b.mem)), uffd.ModeWP); err != nil {
		t.Fatal(err)
	}
	if b.p, err = Load(Options{Ranges: []Range{{b.start, uint64(len(b.mem))}}, RingBytes: ring}); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := b.p.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := b.p.Attach(int(b.h.FD())); err != nil {
		t.Fatalf("%+v", err)
	}
	for point, err := range b.p.Lacking() {
		t.Errorf("%s: %+v", point, err)
	}
	return b
}

// arm makes the memory as it is now the next epoch's, and returns a copy of it.
func (b *bed) arm() []byte {
	b.t.Helper()
	b.p.SetMode(Off, 0)
	if err := b.h.WriteProtect(b.start, uint64(len(b.mem))); err != nil {
		b.t.Fatal(err)
	}
	want := make([]byte, len(b.mem))
	for w := range b.p.Blank().Len() { // nobody but us fills the memfd, by way of mem
		b.p.Blank().Exchange(w, ^uint64(0))
	}
	for r := range b.runs(pagemap.IsPresent) {
		copy(want[r[0]:r[1]], b.mem[r[0]:r[1]])
	}
	b.p.Captured().Clear()
	b.p.Dirty().Clear()
	b.epoch++
	b.p.SetMode(Capture, b.epoch)
	return want
}

// runs are the runs of pages of a category, from the page map: looking maps nothing.
func (b *bed) runs(c uint64) map[[2]uint64]bool {
	out := map[[2]uint64]bool{}
	var buf [256]pagemap.Region
	q := pagemap.Query{Mask: c, Return: c}
	if err := b.pm.ScanAll(b.start, b.start+uint64(len(b.mem)), q, buf[:], func(r pagemap.Region) bool {
		out[[2]uint64{r.Start - b.start, r.End - b.start}] = true
		return true
	}); err != nil {
		b.t.Fatal(err)
	}
	return out
}

// check reads the ring and compares every record with the memory at the arm, and the
// set of records with the set of written pages. It returns how many records there were.
func (b *bed) check(want []byte) (records int) {
	b.t.Helper()
	got := map[uint64]bool{}
	for {
		r, ok := b.p.Next()
		if !ok {
			break
		}
		if r.Epoch == b.epoch {
			if got[r.Page] {
				b.t.Errorf("page %d came twice", r.Page)
			}
			got[r.Page] = true
			if old := want[r.Page*PageBytes:][:PageBytes]; !bytes.Equal(content(r), old) {
				b.t.Fatalf("page %d: % x..., was % x...", r.Page, content(r)[:16], old[:16])
			}
		}
		b.p.Advance()
	}
	missing := 0
	for r := range b.runs(pagemap.IsWritten) {
		for page := r[0] / PageBytes; page < r[1]/PageBytes; page++ {
			if !got[page] {
				missing++
			}
			if b.p.Dirty().Load(int(page/64))>>(page%64)&1 == 0 {
				b.t.Errorf("page %d was written and is not dirty", page)
			}
		}
	}
	if missing > 0 {
		b.t.Errorf("%d written pages without a record: %+v", missing, b.p.Losses())
	}
	return len(got)
}

// content is what the page of a record held.
func content(r Record) []byte {
	if r.Data == nil {
		return make([]byte, PageBytes)
	}
	return r.Data
}

// fill writes a page so that a torn copy shows.
func (b *bed) fill(page int, seed uint64) {
	p := b.mem[page*PageBytes:][:PageBytes]
	for i := 0; i < PageBytes; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], seed*0x9e3779b97f4a7c15+uint64(page*512+i/8))
	}
}

// race has several threads write every page at the same time.
func (b *bed) race(threads int, seed uint64) {
	var wg sync.WaitGroup
	for id := range threads {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			pages := len(b.mem) / PageBytes
			for i := range pages {
				b.fill((i*7+id)%pages, seed+uint64(id))
			}
		})
	}
	wg.Wait()
}

// TestEveryFirstWriteIsCopiedBefore: several threads write all pages, epoch after epoch;
// each record is what the page was at the arm, and each written page has one, also where
// nothing was mapped and two threads are first at the same time.
func TestEveryFirstWriteIsCopiedBefore(t *testing.T) {
	for _, m := range []memory{{name: "anonymous"}, {name: "huge", huge: true}, {name: "memfd", shared: true}} {
		t.Run(m.name, func(t *testing.T) {
			const pages = 1537
			b := newBed(t, m, pages, 16<<20)
			for p := range pages {
				if p%8 < 5 || m.huge { // the rest is absent at the first arm
					b.fill(p, 1)
				}
			}
			for epoch := range uint64(6) {
				want := b.arm()
				b.race(3, 10+epoch*10)
				if n := b.check(want); n != pages {
					t.Errorf("epoch %d: %d records of %d pages: %+v", epoch, n, pages, b.p.Losses())
				}
			}
			if l := b.p.Losses(); l.Lost() != 0 {
				t.Errorf("losses %+v", l)
			}
		})
	}
}

// TestKernelWrites: copies by system calls, and direct I/O, which pins pages without a
// fault, from one buffer and from several.
func TestKernelWrites(t *testing.T) {
	b := newBed(t, memory{}, 256, 4<<20)
	b.race(1, 1)
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	plain, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	direct, err := os.OpenFile(file, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	want := b.arm()
	if _, err := plain.ReadAt(b.mem[3*PageBytes+100:][:5*PageBytes], 0); err != nil {
		t.Fatal(err)
	}
	if n := b.check(want); n != 6 {
		t.Errorf("read: %d records, want 6", n)
	}
	want = b.arm()
	if _, err := unix.Pread(int(direct.Fd()), b.mem[20*PageBytes:][:16*PageBytes], 0); err != nil {
		t.Fatal(err)
	}
	if n := b.check(want); n != 16 {
		t.Errorf("direct read: %d records, want 16", n)
	}
	want = b.arm()
	var vector [][]byte
	for i := range 9 {
		vector = append(vector, b.mem[(40+i*4)*PageBytes:][:2*PageBytes])
	}
	if _, err := unix.Preadv(int(direct.Fd()), vector, 0); err != nil {
		t.Fatal(err)
	}
	if n := b.check(want); n != 18 {
		t.Errorf("direct read into several buffers: %d records, want 18", n)
	}
	if l := b.p.Losses(); l.Lost() != 0 {
		t.Errorf("losses %+v", l)
	}
}

// TestTrackOnlyMarksDirty, and a record that is lost on purpose is counted.
func TestTrackAndDrop(t *testing.T) {
	b := newBed(t, memory{}, 128, 1<<20)
	b.race(1, 1)
	b.arm()
	b.p.SetMode(Track, 0)
	b.fill(7, 2)
	b.fill(100, 2)
	if _, ok := b.p.Next(); ok || b.p.Dirty().Load(0) != 1<<7 || b.p.Dirty().Load(1) != 1<<36 {
		t.Errorf("record %v, dirty %#x %#x", ok, b.p.Dirty().Load(0), b.p.Dirty().Load(1))
	}
	want := b.arm()
	b.p.Captured().Or(0, 1<<9) // somebody has it
	b.p.DropRecord(3)
	for p := range 16 {
		b.fill(p, 3)
	}
	var seen []uint64
	for {
		r, ok := b.p.Next()
		if !ok {
			break
		}
		seen = append(seen, r.Page)
		if !bytes.Equal(r.Data, want[r.Page*PageBytes:][:PageBytes]) {
			t.Errorf("page %d differs", r.Page)
		}
		b.p.Advance()
	}
	if fmt.Sprint(seen) != "[0 1 3 4 5 6 7 8 10 11 12 13 14 15]" {
		t.Errorf("records of pages %v", seen)
	}
	if l := b.p.Losses(); l.Dropped != 1 || l.Lost() != 1 {
		t.Errorf("losses %+v", l)
	}
}

// TestFullRingIsCounted: nothing is read, and what does not fit is a loss.
func TestFullRingIsCounted(t *testing.T) {
	const pages = 512
	b := newBed(t, memory{}, pages, 1<<20)
	b.race(1, 1)
	want := b.arm()
	for p := range pages {
		b.fill(p, 2)
	}
	read := 0
	for {
		r, ok := b.p.Next()
		if !ok {
			break
		}
		if !bytes.Equal(r.Data, want[r.Page*PageBytes:][:PageBytes]) {
			t.Errorf("page %d differs", r.Page)
		}
		read++
		b.p.Advance()
	}
	l := b.p.Losses()
	if read < 200 || int(l.Full)+read != pages {
		t.Errorf("%d records, losses %+v, of %d pages", read, l, pages)
	}
	if b.p.Waiting() != 0 {
		t.Errorf("%d bytes wait", b.p.Waiting())
	}
}

func TestRefusedOptions(t *testing.T) {
	good := Range{PageBytes, PageBytes}
	for _, o := range []Options{
		{RingBytes: 1 << 20}, {Ranges: []Range{{1, PageBytes}}, RingBytes: 1 << 20}, {Ranges: []Range{good}, RingBytes: 3 << 20},
		{Ranges: []Range{good}, RingBytes: 4096}, {Ranges: make([]Range, MaxRanges+1), RingBytes: 1 << 20},
	} {
		if p, err := Load(o); err == nil {
			t.Errorf("%+v was taken", o)
			p.Close()
		}
	}
}

// TestDirectMapIsProvedByContent: nothing but the bytes that were put into a page has
// prepare believe that it can read page tables, and what it finds is the same for all.
func TestDirectMapIsProvedByContent(t *testing.T) {
	b := newBed(t, memory{}, 64, 1<<20)
	found := b.p.state.Tables
	if found.DirectMap == 0 || found.DirectMap%(1<<30) != 0 || found.Levels != 4 && found.Levels != 5 {
		t.Errorf("found %+v", found)
	}
	page, err := unix.Mmap(-1, 0, PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(page)
	args := prepareArgs(int(b.h.FD()), page)
	for i := range args.Known {
		args.Known[i] = 0x9e3779b97f4a7c15 * uint64(i+1)
		binary.NativeEndian.PutUint64(page[i*8:], args.Known[i])
	}
	for last := range len(args.Known) {
		lie := args
		lie.Known[last] ^= 1 << 63
		if answer, err := b.p.ask(lie); err != nil || answer != unmapped {
			t.Errorf("word %d is another: answer %d, %v", last, answer, err)
		}
	}
	if answer, err := b.p.ask(args); err != nil || answer != 0 || b.p.state.Tables != found {
		t.Errorf("answer %d, %v, found %+v, before %+v", answer, err, b.p.state.Tables, found)
	}
}
