package estimate

import (
	"math/rand/v2"
	"testing"
)

// load writes into a memory of pages and reports which were written in a window.
type load struct {
	name  string
	pages int
	write func(r *rand.Rand, window int, mark func(page int))
	// still: once its place is known nothing is left to chance. The bar allows for what
	// was not looked at, and nothing ever is there.
	still bool
}

func loads(pages int) []load {
	random := func(first, size, n int) func(*rand.Rand, int, func(int)) {
		return func(r *rand.Rand, _ int, mark func(int)) {
			for range n {
				mark(first + r.IntN(size))
			}
		}
	}
	noise := func(r *rand.Rand, mark func(int)) { // a kernel at rest
		for range 60 {
			mark(r.IntN(40) * 97)
		}
	}
	with := func(f func(*rand.Rand, int, func(int))) func(*rand.Rand, int, func(int)) {
		return func(r *rand.Rand, w int, mark func(int)) { f(r, w, mark); noise(r, mark) }
	}
	all := []load{
		{name: "random 500 of 32 MiB", pages: pages, write: with(random(20000, 8192, 500))},
		{name: "random 2000 of 256 MiB", pages: pages, write: with(random(9000, 65536, 2000))},
		{name: "random 20000 of 512 MiB", pages: pages, write: with(random(9000, 131072, 20000))},
		{name: "random 100000 of 32 MiB", pages: pages, write: with(random(30000, 8192, 100000))},
		{name: "random 100000 of everything", pages: pages, write: with(random(0, pages, 100000))},
		{name: "sequential 2000", pages: pages, write: with(func(_ *rand.Rand, w int, mark func(int)) {
			for i := range 2000 {
				mark((w*2000 + i) % pages)
			}
		})},
		{name: "sequential 20000", pages: pages, write: with(func(_ *rand.Rand, w int, mark func(int)) {
			for i := range 20000 {
				mark((w*20000 + i) % pages)
			}
		})},
		{name: "sequential 5000 in bursts", pages: pages, write: with(func(r *rand.Rand, w int, mark func(int)) {
			for i := range 3500 + r.IntN(3000) {
				mark((w*6500 + i) % pages)
			}
		})},
		{name: "eight sequential streams", pages: pages, write: with(func(_ *rand.Rand, w int, mark func(int)) {
			for i := range 8000 {
				mark((i%8*pages/8 + (w*8000+i)/8) % pages)
			}
		})},
		{name: "each 64th page of a part", pages: pages, write: with(func(_ *rand.Rand, _ int, mark func(int)) {
			for i := range 2000 {
				mark(4096 + 64*i)
			}
		})},
		{name: "runs of 64 KiB anywhere", pages: pages, write: with(func(r *rand.Rand, _ int, mark func(int)) {
			for range 600 {
				at := r.IntN(pages - 16)
				for i := range 16 {
					mark(at + i)
				}
			}
		})},
		{name: "a hot place that moves", pages: pages, write: with(func(r *rand.Rand, w int, mark func(int)) {
			random(w/20*9000%(pages-4096), 4096, 12000)(r, w, mark)
		})},
		{name: "hot and cold", pages: pages, write: with(func(r *rand.Rand, w int, mark func(int)) {
			random(40000, 2048, 18000)(r, w, mark)
			random(50000, 131072, 2000)(r, w, mark)
		})},
	}
	for i := range all {
		switch all[i].name {
		case "random 100000 of 32 MiB", "each 64th page of a part", "a hot place that moves":
			all[i].still = true
		}
	}
	return all
}

// TestErrorBarIsHonest: over 200 windows of each load, the 95 % bar covers the truth
// in 92 to 98 of 100, and it is no wider than 15 % of the rate.
func TestErrorBarIsHonest(t *testing.T) {
	const pages, unit, windows, warmup = 1 << 18, 16, 200, 6 // 1 GiB
	var all, hit int
	for i, l := range loads(pages) {
		t.Run(l.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(i), 7))
			s := NewSampler(SamplerConfig{UnitPages: unit, Units: pages / unit, Rand: rand.New(rand.NewPCG(1, uint64(i)))})
			written := make([]int, pages) // the window in which a page was last written
			var covered int
			var wide, armed, bias float64
			for w := 1; w <= windows+warmup; w++ {
				truth := 0
				l.write(r, w, func(p int) {
					if written[p] != w {
						written[p], truth = w, truth+1
					}
				})
				units := s.Draw()
				for k, u := range units {
					for p := u.Index * unit; p < (u.Index+1)*unit; p++ {
						if written[p] == w {
							units[k].Written++
						}
					}
				}
				e := s.Observe(units)
				if w <= warmup {
					continue
				}
				d := e.Pages - float64(truth)
				bias += d / float64(truth)
				armed += e.Armed
				wide += e.Error / float64(truth)
				if d <= e.Error+1e-6 && -d <= e.Error+1e-6 {
					covered++
				}
			}
			share := 100 * float64(covered) / windows
			t.Logf("%-30s covered %5.1f %%, half-width %4.1f %%, bias %+.2f %%, armed %4.1f %%", l.name, share, 100*wide/windows, 100*bias/windows, 100*armed/windows)
			if share < 92 || share > 98 && !l.still {
				t.Errorf("the bar covers %.1f %% of the windows", share)
			}
			if wide/windows > 0.15 {
				t.Errorf("half-width %.1f %%", 100*wide/windows)
			}
			if b := bias / windows; b > 0.02 || b < -0.02 {
				t.Errorf("bias %.2f %%", 100*b)
			}
			all, hit = all+windows, hit+covered
		})
	}
	if share := 100 * float64(hit) / float64(all); share < 92 || share > 98 {
		t.Errorf("over all loads the bar covers %.1f %%", share)
	}
	t.Logf("all: %.1f %% of %d windows covered", 100*float64(hit)/float64(all), all)
}
