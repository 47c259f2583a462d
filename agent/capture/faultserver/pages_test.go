package faultserver

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/ckagent/ckagent/agent/capture/source"
)

func TestEveryPageHasOneOwner(t *testing.T) {
	tab := newPageTable(source.Block{HVA: 0, Pages: 10_000})
	var wg sync.WaitGroup
	owned := make([][]uint64, 4)
	for id := range owned {
		owned[id] = make([]uint64, tab.block.Pages)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(id), 7))
			take := func(w int, mask uint64) {
				for got := tab.claim(w, mask); got != 0; {
					off, n := lowestRun(got)
					got &^= maskOf(off, n)
					first := uint64(w)*wordPages + off
					for p := first; p < first+n; p++ {
						owned[id][p]++
					}
					setRange(tab.done, first, n)
				}
			}
			for range 20_000 {
				page := rng.Uint64N(tab.block.Pages)
				take(int(page/wordPages), tab.around(page, 1<<rng.UintN(7)))
			}
			for w := range tab.words() {
				take(w, tab.full(w))
			}
		})
	}
	wg.Wait()
	for p := range tab.block.Pages {
		n := uint64(0)
		for id := range owned {
			n += owned[id][p]
		}
		if n != 1 {
			t.Fatalf("page %d has %d owners", p, n)
		}
	}
	for p := range tab.block.Pages {
		if !tab.isDone(p) {
			t.Fatalf("page %d was not captured", p)
		}
	}
}

func TestAroundIsContiguousAlignedAndFree(t *testing.T) {
	tab := newPageTable(source.Block{Pages: 100})
	for _, c := range []struct {
		page, n, claimed, want uint64
	}{
		{page: 5, n: 1, want: 1 << 5},
		{page: 5, n: 8, want: 0xff},
		{page: 5, n: 8, claimed: 1 << 3, want: 0xf0},
		{page: 5, n: 8, claimed: 1<<3 | 1<<6, want: 0x30},
		{page: 5, n: 8, claimed: 1 << 5, want: 0},
		{page: 63, n: 64, want: ^uint64(0)},
		{page: 0, n: 64, claimed: 1 << 63, want: ^uint64(0) >> 1},
	} {
		tab.claimed[0] = c.claimed
		if got := tab.around(c.page, c.n); got != c.want {
			t.Errorf("around(%d, %d) with %#x claimed: %#x, want %#x", c.page, c.n, c.claimed, got, c.want)
		}
	}
	if got, want := tab.around(99, 64), uint64(1)<<36-1; got != want {
		t.Errorf("around at the block's end: %#x, want %#x", got, want)
	}
}

func TestTakeDirtyMergesRunsAcrossWords(t *testing.T) {
	tab := newPageTable(source.Block{Pages: 1000})
	setRange(tab.dirty, 60, 200)
	setRange(tab.dirty, 300, 1)
	setRange(tab.dirty, 999, 1)
	type run struct{ first, n uint64 }
	var got []run
	n, err := tab.takeDirty(func(first, n uint64) error { got = append(got, run{first, n}); return nil })
	want := []run{{60, 200}, {300, 1}, {999, 1}}
	if err != nil || n != 3 || len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Fatalf("%v (%d, %v), want %v", got, n, err, want)
	}
	if again, _ := tab.takeDirty(func(first, n uint64) error { return nil }); again != 0 {
		t.Fatalf("%d runs were dirty twice", again)
	}
	clearRange(tab.hot, 60, 200)
	clearRange(tab.hot, 300, 1)
	clearRange(tab.hot, 999, 1)
	if slices.Max(tab.hot) != 0 {
		t.Fatal("hot pages are not those that were dirty")
	}
}

func TestGranuleNeverSplitsAHugePage(t *testing.T) {
	tab := newPageTable(source.Block{HVA: 4 << 20, Pages: 1200})
	tab.markHuge(1)
	for _, c := range []struct{ page, first, n uint64 }{
		{3, 0, 16}, {511, 496, 16}, {512, 512, 512}, {1023, 512, 512}, {1024, 1024, 16}, {1199, 1184, 16},
	} {
		if first, n := tab.granule(c.page); first != c.first || n != c.n {
			t.Errorf("granule(%d) = %d+%d, want %d+%d", c.page, first, n, c.first, c.n)
		}
	}
	shared := newPageTable(source.Block{Pages: 100, Kind: source.Shared})
	if first, n := shared.granule(7); first != 7 || n != 1 {
		t.Errorf("granule of shared memory = %d+%d, want the page alone", first, n)
	}
}
