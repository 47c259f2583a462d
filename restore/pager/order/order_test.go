package order

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTranscripts plays testdata/*.txt: each line is an event, "=" a decision that
// must come out.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { play(t, file) })
	}
}

func play(t *testing.T, file string) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var (
		need *Need
		hot  []Run
		o    Options
		p    *Planner
		line int
	)
	run := func(words []string) Run {
		r := Run{}
		if _, err := fmt.Sscanf(strings.Join(words, " "), "%d %d+%d", &r.Block, &r.First, &r.Pages); err != nil {
			t.Fatalf("%s:%d: %v", file, line, err)
		}
		return r
	}
	page := func(words []string) (b int, n uint64) {
		if _, err := fmt.Sscanf(strings.Join(words, " "), "%d %d", &b, &n); err != nil {
			t.Fatalf("%s:%d: %v", file, line, err)
		}
		return b, n
	}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line++
		text, want, asks := strings.Cut(sc.Text(), " = ")
		w := strings.Fields(text)
		if len(w) == 0 || w[0][0] == '#' {
			continue
		}
		got := ""
		switch w[0] {
		case "blocks":
			var pages []uint64
			for _, s := range w[1:] {
				var n uint64
				fmt.Sscan(s, &n)
				pages = append(pages, n)
			}
			need = NewNeed(pages)
		case "options":
			if _, err := fmt.Sscanf(text, "options chunk=%d region=%d window=%d regions=%d",
				&o.Chunk, &o.Region, &o.Window, &o.Regions); err != nil {
				t.Fatalf("%s:%d: %v", file, line, err)
			}
		case "need":
			need.Add(run(w[1:]))
		case "hot":
			hot = append(hot, run(w[1:]))
		case "start":
			p = NewPlanner(need, hot, o)
		case "fault":
			p.Fault(page(w[1:]))
		case "settle":
			need.Settle(run(w[1:]))
		case "hold":
			need.Hold(page(w[1:]))
		case "release":
			need.Release()
		case "again":
			p.Again()
		case "done":
			p.Done(run(w[1:]))
		case "left":
			got = fmt.Sprint(need.Left())
		case "next":
			if r, why, ok := p.Next(); ok {
				got = fmt.Sprintf("%s %d %d+%d", why, r.Block, r.First, r.Pages)
			} else {
				got = "none"
			}
		default:
			t.Fatalf("%s:%d: unknown event %q", file, line, w[0])
		}
		if asks && got != want {
			t.Fatalf("%s:%d: %s gave %q, want %q", file, line, text, got, want)
		}
	}
}

// TestPlannerFetchesEverythingOnce drives random transcripts: whatever faults,
// completions and put-backs happen, claims never overlap, only needed pages are
// handed out, and it ends with nothing left.
func TestPlannerFetchesEverythingOnce(t *testing.T) {
	for seed := uint64(0); seed < 60; seed++ {
		r := rand.New(rand.NewPCG(seed, 7))
		sizes := make([]uint64, 1+r.IntN(3))
		for i := range sizes {
			sizes[i] = 1 + r.Uint64N(3000)
		}
		need := NewNeed(sizes)
		for i, s := range sizes {
			for at := uint64(0); at < s; at += 1 + r.Uint64N(200) {
				need.Add(Run{i, at, 1 + r.Uint64N(150)})
			}
		}
		var hot []Run
		for range r.IntN(5) {
			hot = append(hot, Run{r.IntN(len(sizes)), r.Uint64N(3000), r.Uint64N(300)})
		}
		p := NewPlanner(need, hot, Options{Chunk: 1 + r.Uint64N(80), Region: 64 << r.IntN(4), Window: 4 << r.IntN(3), Regions: 1 + r.IntN(8)})
		var out []Run
		for steps := 0; need.Left() > 0; steps++ {
			if steps > 200000 {
				t.Fatalf("seed %d: %d pages left after %d steps", seed, need.Left(), steps)
			}
			switch k := r.IntN(10); {
			case k < 2:
				b := r.IntN(len(sizes))
				page := r.Uint64N(sizes[b])
				p.Fault(b, page)
				if r.IntN(2) == 0 {
					need.SettlePage(b, page)
				}
			case k < 6 && len(out) < 4:
				got, _, ok := p.Next()
				if !ok {
					if len(out) == 0 && need.Left() > 0 {
						t.Fatalf("seed %d: nothing offered, nothing out, %d left", seed, need.Left())
					}
					continue
				}
				for _, c := range out {
					if c.Block == got.Block && c.First < got.End() && got.First < c.End() {
						t.Fatalf("seed %d: %v overlaps %v", seed, got, c)
					}
				}
				for q := got.First; q < got.End(); q++ {
					if !need.Needed(got.Block, q) {
						t.Fatalf("seed %d: page %d of %v is not needed", seed, q, got)
					}
				}
				out = append(out, got)
			case len(out) > 0:
				i := r.IntN(len(out))
				part := out[i]
				if r.IntN(3) == 0 {
					part.Pages = r.Uint64N(part.Pages + 1) // the rest is put back
				}
				need.Settle(part)
				p.Done(out[i])
				out = append(out[:i], out[i+1:]...)
			}
		}
	}
}

func TestNeedAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const pages = 517
	need, model, held := NewNeed([]uint64{pages}), [pages]bool{}, [pages]bool{}
	for range 20000 {
		run := Run{0, r.Uint64N(pages + 20), r.Uint64N(200)}
		switch r.IntN(6) {
		case 0:
			need.Add(run)
			for q := run.First; q < min(pages, run.End()); q++ {
				model[q] = true
			}
		case 1:
			need.Settle(run)
			for q := run.First; q < min(pages, run.End()); q++ {
				model[q], held[q] = false, false
			}
		case 2:
			q := r.Uint64N(pages)
			if got, want := need.Hold(0, q), model[q] && !held[q]; got != want {
				t.Fatalf("Hold(%d) = %v, want %v", q, got, want)
			}
			held[q] = model[q]
		case 3:
			q := r.Uint64N(pages)
			if got := need.SettlePage(0, q); got != model[q] {
				t.Fatalf("SettlePage(%d) = %v", q, got)
			}
			model[q], held[q] = false, false
		case 4:
			if r.IntN(50) == 0 {
				need.Release()
				held = [pages]bool{}
			}
		case 5:
			got, ok := need.Next(run)
			want := Run{}
			for q := run.First; q < min(pages, run.End()); q++ {
				if model[q] && !held[q] {
					if want.Pages == 0 {
						want.First = q
					}
					want.Pages++
				} else if want.Pages != 0 {
					break
				}
			}
			if ok != (want.Pages > 0) || got != want {
				t.Fatalf("Next(%v) = %v, %v; want %v", run, got, ok, want)
			}
		}
		var left, heldCount int64
		for q := range model {
			if model[q] {
				left++
			}
			if held[q] {
				heldCount++
			}
		}
		if need.Left() != left || need.Held() != heldCount {
			t.Fatalf("left %d held %d, want %d %d", need.Left(), need.Held(), left, heldCount)
		}
	}
}

func TestNeedConcurrentSettleCountsOnce(t *testing.T) {
	const pages = 1 << 14
	need := NewNeed([]uint64{pages})
	need.Add(Run{0, 0, pages})
	var wg sync.WaitGroup
	counts := make([]uint64, 4)
	for g := range counts {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for need.Left() > 0 {
				if run, ok := need.Next(Run{0, r.Uint64N(pages), pages}); ok {
					run.Pages = min(run.Pages, 1+r.Uint64N(90))
					counts[g] += need.Settle(run)
				}
				if need.SettlePage(0, r.Uint64N(pages)) {
					counts[g]++
				}
			}
		})
	}
	wg.Wait()
	var sum uint64
	for _, c := range counts {
		sum += c
	}
	if sum != pages || need.Left() != 0 {
		t.Fatalf("settled %d of %d, left %d", sum, pages, need.Left())
	}
}

func TestStreamFollowsWalksOnly(t *testing.T) {
	var s Stream
	if got := s.Fault(0, 100, 32); got != 0 {
		t.Fatalf("first fault reads %d ahead", got)
	}
	page, ahead := uint64(101), []uint64{}
	for range 6 {
		a := s.Fault(0, page, 32)
		ahead = append(ahead, a)
		page += a + 1
	}
	if want := "[2 4 8 16 32 32]"; fmt.Sprint(ahead) != want {
		t.Fatalf("read-ahead %v, want %s", ahead, want)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 1000 {
		if got := s.Fault(1, r.Uint64N(1<<40), 32); got != 0 {
			t.Fatalf("a random fault reads %d ahead", got)
		}
	}
	// Two interleaved walks are both followed.
	s = Stream{}
	a, b := uint64(1000), uint64(90000)
	s.Fault(0, a-1, 8)
	s.Fault(0, b-1, 8)
	for i := range 5 {
		x, y := s.Fault(0, a, 8), s.Fault(0, b, 8)
		if x == 0 || y == 0 {
			t.Fatalf("step %d: walks lost (%d, %d)", i, x, y)
		}
		a, b = a+x+1, b+y+1
	}
}
