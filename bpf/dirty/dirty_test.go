package dirty

import (
	"errors"
	"os"
	"slices"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func loaded(t *testing.T) *Counter {
	t.Helper()
	c, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestCounts writes to chosen pages of this process and compares bit by bit.
func TestCounts(t *testing.T) {
	c := loaded(t)
	const pages = 3*HeatPages + 70
	b, start, err := scratch(pages)
	if err != nil {
		t.Fatal(err)
	}
	defer unmapScratch(b)
	// Two ranges with a hole, so that numbers and addresses differ.
	const hole = 64
	tg, err := c.Track(os.Getpid(), []Range{
		{Start: start, Bytes: HeatPages * PageBytes},
		{Start: start + (HeatPages+hole)*PageBytes, Bytes: (pages - HeatPages - hole) * PageBytes},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Track(os.Getpid(), []Range{{Start: start, Bytes: PageBytes}}); !errors.Is(err, ErrTracked) {
		t.Errorf("tracked twice: %v", err)
	}
	var want []uint64 // page numbers
	for _, p := range []int{0, 1, 63, 64, 511, HeatPages + hole, HeatPages + hole + 700, pages - 1} {
		b[p*PageBytes+8] = 1
		n := uint64(p)
		if p >= HeatPages {
			n -= hole
		}
		want = append(want, n)
	}
	b[(HeatPages+3)*PageBytes] = 1 // in the hole: not asked about
	_ = b[200*PageBytes]           // a read is no write
	var got []uint64
	for i := range tg.Words() {
		for w, bit := tg.Word(i), 0; w != 0; w, bit = w>>1, bit+1 {
			if w&1 != 0 {
				got = append(got, uint64(i*64+bit))
			}
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("bits %v, want %v", got, want)
	}
	n, err := tg.Counts()
	if err != nil || n.Pages != uint64(len(want)) || n.Faults < n.Pages {
		t.Errorf("counts %+v, %v", n, err)
	}
	if heat := tg.Heat(nil); !slices.Equal(heat, []uint64{5, 1, 1, 1}) {
		t.Errorf("heat %v", heat)
	}
	if w := tg.TakeWord(0); w != 1|2|1<<63 || tg.Word(0) != 0 {
		t.Errorf("took %#x, left %#x", w, tg.Word(0))
	}
	tg.Clear()
	for i := range tg.Words() {
		if tg.Word(i) != 0 {
			t.Fatal("bits left by Clear")
		}
	}
	if err := tg.Untrack(); err != nil {
		t.Error(err)
	}
	if n, err := c.Self(100); err != nil || n != 100 {
		t.Errorf("self-test saw %d of 100 pages: %v", n, err)
	}
}

// TestKernelFaults: a system call that writes to user memory faults in kernel
// mode.
func TestKernelFaults(t *testing.T) {
	c := loaded(t)
	b, start, err := scratch(8)
	if err != nil {
		t.Fatal(err)
	}
	defer unmapScratch(b)
	tg, err := c.Track(os.Getpid(), []Range{{Start: start, Bytes: uint64(len(b))}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Read(b[:3*PageBytes]); err != nil {
		t.Fatal(err)
	}
	n, err := tg.Counts()
	if err != nil || n.Pages != 3 || n.KernelFaults == 0 {
		t.Errorf("counts %+v, %v", n, err)
	}
	if err := tg.Untrack(); err != nil {
		t.Error(err)
	}
}

// TestNothingStays: tracking over and over leaves no entry in any map.
func TestNothingStays(t *testing.T) {
	c := loaded(t)
	for range 10 {
		if n, err := c.Self(4); err != nil || n != 4 {
			t.Fatalf("saw %d of 4: %v", n, err)
		}
	}
	var key uint32
	if err := c.objs.Targets.NextKey(nil, &key); err == nil {
		t.Error("a target is left")
	}
	var mm uint64
	if err := c.objs.Spaces.NextKey(nil, &mm); err == nil {
		t.Error("an address space is left")
	}
	if err := c.objs.Bitmaps.NextKey(nil, &key); err == nil {
		t.Error("a bitmap is left")
	}
}

func TestRefused(t *testing.T) {
	c := loaded(t)
	for _, r := range [][]Range{nil, {{Start: 1, Bytes: PageBytes}}, {{Start: 0, Bytes: 0}}, make([]Range, MaxRanges+1)} {
		if _, err := c.Track(os.Getpid(), r); err == nil {
			t.Errorf("%v was taken", r)
		}
	}
}
