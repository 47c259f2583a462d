package pagemap

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestSetAgainstMap runs random operations on a Set and on a plain map.
func TestSetAgainstMap(t *testing.T) {
	for _, n := range []uint64{1, 63, 64, 65, 1000} {
		rng := rand.New(rand.NewPCG(n, 7))
		s, ref := NewSet(n), map[uint64]bool{}
		for range 2000 {
			p := rng.Uint64N(n)
			c := rng.Uint64N(n-p) + 1
			switch rng.IntN(5) {
			case 0:
				if s.Add(p) == ref[p] {
					t.Fatal("Add's answer")
				}
				ref[p] = true
			case 1:
				if s.Remove(p) != ref[p] {
					t.Fatal("Remove's answer")
				}
				delete(ref, p)
			case 2:
				s.AddRange(p, c)
				for i := p; i < p+c; i++ {
					ref[i] = true
				}
			case 3:
				s.RemoveRange(p, c)
				for i := p; i < p+c; i++ {
					delete(ref, i)
				}
			case 4:
				var want uint64
				for i := p; i < p+c; i++ {
					if ref[i] {
						want++
					}
				}
				if got := s.CountRange(p, c); got != want {
					t.Fatalf("CountRange %d, want %d", got, want)
				}
			}
			if s.Count() != uint64(len(ref)) || s.Has(p) != ref[p] {
				t.Fatal("count or membership")
			}
		}
		var pages []uint64
		last := Run{}
		for r := range s.Runs() {
			if r.Count == 0 || last.Count != 0 && r.First <= last.First+last.Count {
				t.Fatalf("run %+v after %+v is not maximal", r, last)
			}
			for i := range r.Count {
				pages = append(pages, r.First+i)
			}
			last = r
		}
		if len(pages) != len(ref) {
			t.Fatal("runs do not cover the set")
		}
		for _, p := range pages {
			if !ref[p] {
				t.Fatal("a run has a foreign page")
			}
		}
	}
}

func TestSetAlgebra(t *testing.T) {
	a, b := NewSet(130), NewSet(130)
	a.AddRange(0, 70)
	b.AddRange(60, 70)
	u, d, i := a.Clone(), a.Clone(), a.Clone()
	u.Union(b)
	d.Subtract(b)
	i.Intersect(b)
	if u.Count() != 130 || d.Count() != 60 || i.Count() != 10 {
		t.Error(u.Count(), d.Count(), i.Count())
	}
	if !u.Contains(a) || a.Contains(b) {
		t.Error("contains")
	}
	if p, ok := u.NextAbsent(0); ok {
		t.Errorf("absent %d in a full set", p)
	}
	u.Clear()
	if _, ok := u.Next(0); ok || u.Count() != 0 {
		t.Error("clear")
	}
	u.Fill()
	if u.Count() != 130 || u.Words()[2] != 3 {
		t.Errorf("fill %d %#x", u.Count(), u.Words()[2])
	}
	u.Clear()
	u.AddRegion(0x10000, Region{Start: 0xe000, End: 0x12000})
	if got := slices.Collect(u.Runs()); len(got) != 1 || got[0] != (Run{0, 2}) {
		t.Error(got)
	}
	for name, f := range map[string]func(){
		"page":   func() { u.Add(130) },
		"range":  func() { u.AddRange(129, 2) },
		"length": func() { u.Union(NewSet(5)) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s outside the set was accepted", name)
				}
			}()
			f()
		}()
	}
}
