package track

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

// TestTakesWhatWasWritten, page by page, across two blocks.
func TestTakesWhatWasWritten(t *testing.T) {
	a, b := newMemory(t, "a", 700), newMemory(t, "b", 1100)
	rom := newMemory(t, "rom", 16)
	rom.block.ReadOnly, rom.block.Main = true, false
	tr := open(t, counter(t), a.block, rom.block, b.block)
	if tr.Pages() != 1800 || len(tr.Blocks) != 2 || len(tr.Skipped) != 1 {
		t.Fatalf("%d pages, %+v, skipped %+v", tr.Pages(), tr.Blocks, tr.Skipped)
	}
	if err := tr.ArmAll(); err != nil {
		t.Fatal(err)
	}
	for round := range 20 {
		var want []int
		for p := range 1800 {
			if rand.IntN(5+round) != 0 {
				continue
			}
			if want = append(want, p); p < 700 {
				a.write(p)
			} else {
				b.write(p - 700)
			}
		}
		before, err := tr.Live().Counts()
		if err != nil {
			t.Fatal(err)
		}
		if got := collect(t, func(f func(uint64, uint64)) error { return tr.Look(0, tr.Pages(), f) }); !slices.Equal(got, want) {
			t.Fatalf("look: got %d pages, want %d", len(got), len(want))
		}
		if got := collect(t, tr.TakeAll); !slices.Equal(got, want) {
			t.Fatalf("take: got %d pages, want %d", len(got), len(want))
		}
		if got := collect(t, tr.TakeAll); len(got) != 0 {
			t.Fatalf("%d pages were not armed again", len(got))
		}
		var bits int
		for i := range tr.Live().Words() {
			for w := tr.Live().TakeWord(i); w != 0; w &= w - 1 {
				bits++
			}
		}
		if bits != len(want) {
			t.Errorf("the live counter saw %d of %d pages (%+v)", bits, len(want), before)
		}
	}
	if got := tr.BlockOf(699).Name + tr.BlockOf(700).Name + tr.BlockOf(1799).Name; got != "abb" {
		t.Error(got)
	}
	// Reads of guest memory by us are no writes.
	buf := make([]byte, 2*pageBytes)
	b.b[5*pageBytes] = 77
	collect(t, tr.TakeAll)
	if err := tr.Read(705, buf); err != nil || buf[0] != 77 {
		t.Errorf("read %d, %v", buf[0], err)
	}
	if got := collect(t, tr.TakeAll); len(got) != 0 {
		t.Errorf("our own read dirtied %v", got)
	}
}

// TestBusy: what somebody else has registered is refused, and nothing is left.
func TestBusy(t *testing.T) {
	a, b := newMemory(t, "a", 64), newMemory(t, "b", 64)
	tr := open(t, nil, b.block)
	_, err := Open(t.Context(), Config{PID: os.Getpid(), Blocks: []vm.RAMBlock{a.block, b.block}, Take: takeOwn})
	if !problem.Is(err, problem.Busy) {
		t.Fatalf("second tracker: %v", err)
	}
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, nil, a.block, b.block) // the failed attempt has let go of a
}

func TestRefused(t *testing.T) {
	if _, err := Open(t.Context(), Config{PID: os.Getpid(), Take: takeOwn}); !problem.Is(err, problem.Refused) {
		t.Errorf("no block: %v", err)
	}
	gone := 1 << 22 // above pid_max
	if _, err := Open(t.Context(), Config{PID: gone, Take: takeOwn}); !problem.Is(err, problem.NotFound) {
		t.Errorf("no process: %v", err)
	}
}

// load writes at a known rate and remembers when each page was written, twice back.
type load struct {
	m          *memory
	last, prev []atomic.Int64
	writes     atomic.Int64
	stop       chan struct{}
	done       sync.WaitGroup
}

func startLoad(t testing.TB, m *memory, rate float64, next func(r *rand.Rand, i int) int) *load {
	l := &load{m: m, last: make([]atomic.Int64, len(m.b)/pageBytes), prev: make([]atomic.Int64, len(m.b)/pageBytes), stop: make(chan struct{})}
	l.done.Go(func() {
		r := rand.New(rand.NewPCG(1, 2))
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		begin, n := time.Now(), 0
		for {
			for want := int(time.Since(begin).Seconds() * rate); n < want; n++ {
				p := next(r, n)
				l.prev[p].Store(l.last[p].Load())
				l.last[p].Store(time.Now().UnixNano())
				m.b[p*pageBytes+8]++
				l.writes.Store(int64(n + 1))
			}
			select {
			case <-l.stop:
				return
			case <-tick.C:
			}
		}
	})
	t.Cleanup(l.end)
	return l
}

func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.done.Wait()
}

// between counts the pages written in a time that has just passed.
func (l *load) between(begin, end int64) (pages int) {
	in := func(x int64) bool { return x >= begin && x <= end }
	for p := range l.last {
		if in(l.last[p].Load()) || in(l.prev[p].Load()) {
			pages++
		}
	}
	return pages
}

// TestExactRate measures a sequential load, of which every write is a page, and a
// random one in a small set, of which the working set is known.
func TestExactRate(t *testing.T) {
	m := newMemory(t, "ram", 1<<15) // 128 MiB
	tr := open(t, counter(t), m.block)
	const rate, set = 8000, 2048
	for _, c := range []struct {
		name string
		next func(*rand.Rand, int) int
		wss  float64
		want float64 // distinct pages per epoch of 250 ms
	}{
		{"sequential", func(_ *rand.Rand, i int) int { return i % (1 << 15) }, rate * 1.5, rate / 4},
		{"random", func(r *rand.Rand, _ int) int { return 5000 + r.IntN(set) }, set * (1 - math.Exp(-1.5*rate/set)), set * (1 - math.Exp(-0.25*rate/set))},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := startLoad(t, m, rate, c.next)
			defer l.end()
			e, err := tr.MeasureExact(t.Context(), 1500*time.Millisecond, 250*time.Millisecond, nil)
			if err != nil {
				t.Fatal(err)
			}
			near := func(what string, got, want, within float64) {
				if math.Abs(got/want-1) > within {
					t.Errorf("%s %.0f, want %.0f", what, got, want)
				}
			}
			t.Logf("%d epochs of %v: %.0f pages/s, live %d of %d, wss %d", e.Epochs, e.Interval, e.Rate, e.Live, e.Pages, e.WSSPages)
			near("rate", e.Rate, c.want*4, 0.10)
			near("wss", float64(e.WSSPages), c.wss, 0.10)
			near("live", float64(e.Live), float64(e.Pages), 0.02)
			var heat uint64
			for _, h := range e.Heat[0] {
				heat += uint64(h)
			}
			if heat != e.Pages || len(e.Blocks) != 1 || e.Blocks[0].WSSPages != e.WSSPages {
				t.Errorf("heat %d of %d pages; blocks %+v", heat, e.Pages, e.Blocks)
			}
			f, ok := e.Curve.Fit()
			if !ok {
				t.Fatal("no curve")
			}
			t.Logf("G: %+v", f)
			if c.name == "random" {
				near("W", f.Pages, set, 0.10)
				near("initial rate", f.Initial(), rate, 0.15)
			}
		})
	}
}

// TestInterrupted: what was measured until then is returned.
func TestInterrupted(t *testing.T) {
	m := newMemory(t, "ram", 1024)
	tr := open(t, nil, m.block)
	ctx, cancel := context.WithCancel(t.Context())
	e, err := tr.MeasureExact(ctx, time.Minute, 20*time.Millisecond, func(uint64, time.Duration) { cancel() })
	if !errors.Is(err, context.Canceled) || e == nil || e.Epochs != 1 {
		t.Errorf("%+v, %v", e, err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if e, err := tr.MeasureExact(ctx, time.Minute, time.Second, nil); e != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", e, err)
	}
	if r, err := tr.MeasureSampled(ctx, time.Minute, time.Second, SampleConfig{}, nil); r != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestSampledBar arms real samples of real loads and compares with what was really
// written. CKAGENT_SIGNALS_WINDOWS=200 makes it the campaign of docs/signals.md.
func TestSampledBar(t *testing.T) {
	windows, d := 40, 100*time.Millisecond
	if s := os.Getenv("CKAGENT_SIGNALS_WINDOWS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		windows, d = n, 250*time.Millisecond
	}
	const pages = 1 << 17 // 512 MiB
	m := newMemory(t, "ram", pages)
	for p := range pages {
		m.b[p*pageBytes] = 1
	}
	random := func(first, n int) func(*rand.Rand, int) int {
		return func(r *rand.Rand, _ int) int { return first + r.IntN(n) }
	}
	type kind struct {
		name string
		rate float64
		next func(*rand.Rand, int) int
	}
	all := []kind{
		{"random 20000/s in 256 MiB", 20000, random(30000, 1<<16)},
		{"hot and cold 20000/s", 20000, func(r *rand.Rand, _ int) int {
			if r.IntN(10) > 0 {
				return 40000 + r.IntN(4096)
			}
			return r.IntN(pages)
		}},
		{"sequential 20000/s", 20000, func(_ *rand.Rand, i int) int { return i % pages }},
		{"random 2000/s in 32 MiB", 2000, random(9000, 8192)},
	}
	if windows < 200 {
		all = all[:2]
	}
	var covered, total int
	for _, k := range all {
		t.Run(k.name, func(t *testing.T) {
			tr := open(t, nil, m.block)
			l := startLoad(t, m, k.rate, k.next)
			defer l.end()
			s := tr.Sample(SampleConfig{MaxShare: 0.9, Content: 64})
			var hit, used int
			var width, bias, armed, busy float64
			const warmup = 5
			for i := range windows + warmup {
				w, err := s.Window(t.Context(), d)
				if err != nil {
					t.Fatal(err)
				}
				truth := float64(l.between(w.Begin.UnixNano(), w.Begin.Add(w.Time).UnixNano())) / w.Time.Seconds()
				// A host that did not let the load run makes a window of nothing.
				if i < warmup || truth == 0 {
					continue
				}
				used++
				off := w.Rate - truth
				if math.Abs(off) <= w.Error+1e-6 {
					hit++
				}
				width += w.Error / truth
				bias += off / truth
				armed += w.Armed
				busy += w.Busy.Seconds() / w.Time.Seconds()
			}
			if used < windows/2 {
				t.Fatalf("the load ran in %d of %d windows", used, windows)
			}
			n := float64(used)
			t.Logf("%-28s %d windows of %v: covered %.1f %%, half-width %.1f %%, bias %+.2f %%, armed %.1f %%, busy %.2f %% of a CPU",
				k.name, used, d, 100*float64(hit)/n, 100*width/n, 100*bias/n, 100*armed/n, 100*busy/n)
			// Of 40 windows 95 % miss more than 6 only once in 2000 runs; of 200, 8 %
			// is the promise.
			if lowest := map[bool]float64{true: 0.92, false: 0.82}[windows >= 200]; float64(hit)/n < lowest {
				t.Errorf("the bar covers %d of %d windows", hit, used)
			}
			if width/n > 0.15 && windows >= 200 {
				t.Errorf("half-width %.1f %%", 100*width/n)
			}
			if sh, ok := s.Shares(); !ok || sh.Pages == 0 {
				t.Errorf("shares %+v", sh)
			} else {
				t.Logf("shares %+v", sh)
			}
			covered, total = covered+hit, total+used
		})
	}
	t.Logf("all: %.1f %% of %d windows covered", 100*float64(covered)/float64(total), total)
}

// askedOf is a context that tells when somebody begins to wait for its end. A window
// does so once it is open.
type askedOf struct {
	context.Context
	once  sync.Once
	asked chan struct{}
}

func (w *askedOf) Done() <-chan struct{} {
	w.once.Do(func() { close(w.asked) })
	return w.Context.Done()
}

// TestShares: the make-up of a load that is known.
func TestShares(t *testing.T) {
	const pages = 4096
	m := newMemory(t, "ram", pages)
	for p := range pages {
		for i := range pageBytes / 8 { // incompressible
			*(*uint64)(unsafe.Pointer(&m.b[p*pageBytes+i*8])) = rand.Uint64()
		}
	}
	tr := open(t, nil, m.block)
	s := tr.Sample(SampleConfig{MaxShare: 1, Content: 4096})
	round := 0
	for range 8 {
		round++
		var wg sync.WaitGroup
		ctx := &askedOf{Context: t.Context(), asked: make(chan struct{})}
		wg.Go(func() {
			<-ctx.asked
			for p := range 2000 {
				page := m.b[p*pageBytes : (p+1)*pageBytes]
				switch p % 4 {
				case 0:
					clear(page)
				case 1: // the same content
					atomic.AddUint32((*uint32)(unsafe.Pointer(&page[16])), 0)
				case 2: // the same as others
					clear(page)
					page[0] = byte(round)
				case 3:
					page[round] ^= 0x55
				}
			}
		})
		_, err := s.Window(ctx, 60*time.Millisecond)
		ctx.Done() // should it have failed before
		if wg.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	sh, ok := s.Shares()
	t.Logf("%+v", sh)
	near := func(what string, got, want, within float64) {
		if math.Abs(got-want) > within {
			t.Errorf("%s %.2f, want %.2f", what, got, want)
		}
	}
	if !ok {
		t.Fatal("no shares")
	}
	near("zero", sh.Zero, 0.25, 0.08)
	near("duplicate", sh.Duplicate, 0.25, 0.08)
	near("compressible", sh.Compressible, 0.25, 0.08)
	if sh.FalseDirty < 0.25 || sh.FalseDirty > 0.60 { // zeros rewritten with zeros are false as well
		t.Errorf("false dirty %.2f", sh.FalseDirty)
	}
}

// TestHugePagesAreMadeWhole: tracking splits them, Close mends that.
func TestHugePagesAreMadeWhole(t *testing.T) {
	hold, err := unix.Mmap(-1, 0, 6*hugeBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(hold)
	skip := int(-uintptr(unsafe.Pointer(&hold[0])) & (hugeBytes - 1))
	b := hold[skip : skip+4*hugeBytes]
	if err := unix.Madvise(b, unix.MADV_HUGEPAGE); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(b); i += pageBytes {
		b[i] = 1
	}
	block := vm.RAMBlock{Name: "ram", HVA: uint64(uintptr(unsafe.Pointer(&b[0]))), TotalBytes: uint64(len(b)), Main: true}
	tr := open(t, nil, block)
	if len(tr.huge) == 0 {
		t.Skip("no huge page to be had") // memory is fragmented
	}
	had := len(tr.huge)
	if err := tr.ArmAll(); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(b); i += hugeBytes {
		b[i+5000] = 2
	}
	tr.huge = nil
	if err := tr.noteHuge(); err != nil || len(tr.huge) != 0 {
		t.Errorf("%d huge pages survived the writes: %v", len(tr.huge), err)
	}
	for i := range had {
		tr.huge = append(tr.huge, block.HVA+uint64(i)*hugeBytes)
	}
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, nil, block)
	if len(again.huge) != had {
		t.Errorf("%d of %d huge pages are whole again", len(again.huge), had)
	}
}

func ExampleTracker_BlockOf() {
	t := &Tracker{Blocks: []Block{{Name: "pc.ram", Bytes: 8 * pageBytes}, {Name: "vga.vram", First: 8, Bytes: 4 * pageBytes}}}
	fmt.Println(t.BlockOf(7).Name, t.BlockOf(8).Name)
	// Output: pc.ram vga.vram
}
