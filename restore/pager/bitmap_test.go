package pager

import (
	"math/rand/v2"
	"testing"
)

func TestBitmapAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		const n = 300
		var model [n]bool
		b := make(bitmap, (n+63)/64)
		for range r.IntN(6) {
			first := r.Uint64N(n)
			pages := r.Uint64N(n - first + 1)
			b.add(first, pages)
			for p := first; p < first+pages; p++ {
				model[p] = true
			}
		}
		for p := range uint64(n) {
			if b.has(p) != model[p] {
				t.Fatalf("has(%d) = %v", p, b.has(p))
			}
			end, want := p+r.Uint64N(n-p+1), uint64(0)
			for q := p; q < end && model[q]; q++ {
				want++
			}
			if got := b.run(p, end); got != want {
				t.Fatalf("run(%d, %d) = %d, want %d", p, end, got, want)
			}
		}
	}
}

func TestHistogramKeepsOneEighth(t *testing.T) {
	for _, ns := range []int64{8, 9, 15, 100, 5000, 12345, 1 << 20, 987654321, 1 << 40} {
		if got := histValue(histBucket(ns)); got < ns*7/8-1 || got > ns*9/8+1 {
			t.Errorf("%d ns is counted as %d", ns, got)
		}
	}
}
