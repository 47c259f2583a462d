package track

import (
	"context"
	"math"
	"time"

	"github.com/ckagent/ckagent/agent/signals/estimate"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// HeatPages is the size of a heat region: 2 MiB.
const HeatPages = 512

// Exact is what exact tracking found.
type Exact struct {
	Time     time.Duration // from the first arm to the last scan
	Interval time.Duration // mean time between two scans
	Epochs   int
	Pages    uint64  // pages found written, summed over epochs
	Rate     float64 // Pages per second
	Spread   float64 // standard deviation of the epochs' rates
	Peak     float64 // the highest of them
	WSSPages uint64  // distinct pages written in the whole time
	Blocks   []BlockRate
	// Heat is how many pages of each 2 MiB were found written, summed over epochs,
	// block after block (each begins a region of its own).
	Heat [][]uint32
	// Live is what the live counter saw in the same time, and whether there was one.
	Live    uint64
	HasLive bool
	Curve   estimate.Curve
	ArmNS   int64 // the first arm
	ScanNS  int64 // all scans
}

// BlockRate is one block's share.
type BlockRate struct {
	Name     string
	Rate     float64
	WSSPages uint64
}

// levels of unions: the curve gets points at 1, 2, 4, ... epochs.
const levels = 12

// exactRun is the state of one measurement.
type exactRun struct {
	t    *Tracker
	e    *Exact
	sets [levels]*pagemap.Set // what was written in the current 2^i epochs
	span [levels]time.Duration
	all  *pagemap.Set
	per  []uint64 // pages per block
}

// MeasureExact arms everything and scans every interval until the time is over or
// ctx ends: then it returns what it has, if there was an epoch, and the error of
// ctx. epoch, if not nil, is told of every epoch.
func (t *Tracker) MeasureExact(ctx context.Context, whole, interval time.Duration, epoch func(pages uint64, took time.Duration)) (*Exact, error) {
	r := exactRun{t: t, e: &Exact{}, all: pagemap.NewSet(t.pages), per: make([]uint64, len(t.Blocks))}
	for i := range r.sets {
		r.sets[i] = pagemap.NewSet(t.pages)
	}
	for _, b := range t.Blocks {
		r.e.Heat = append(r.e.Heat, make([]uint32, (b.Pages()+HeatPages-1)/HeatPages))
	}
	begin := time.Now()
	if err := t.ArmAll(); err != nil {
		return nil, err
	}
	r.e.ArmNS = time.Since(begin).Nanoseconds()
	// What was written while we armed is not an epoch of its own.
	scanned := time.Now()
	if err := t.TakeAll(func(uint64, uint64) {}); err != nil {
		return nil, err
	}
	begin = scanned
	counted, err := r.restartLive()
	if err != nil {
		return nil, err
	}
	var rates []float64
	ctxErr := error(nil)
	for ctxErr == nil && time.Since(begin) < whole {
		if ctxErr = r.wait(ctx, scanned, min(interval, whole-scanned.Sub(begin))); ctxErr != nil && time.Since(scanned) < interval/2 {
			break // too short to say anything
		}
		now := time.Now()
		pages, err := r.take(now.Sub(scanned))
		if err != nil {
			return nil, err
		}
		rates = append(rates, float64(pages)/now.Sub(scanned).Seconds())
		if epoch != nil {
			epoch(pages, now.Sub(scanned))
		}
		scanned = now
	}
	r.finish(rates, scanned.Sub(begin))
	if t.live != nil {
		n, err := t.live.Counts()
		if err != nil {
			return nil, err
		}
		r.e.Live, r.e.HasLive = n.Pages-counted, true
	}
	if r.e.Epochs == 0 && ctxErr != nil {
		return nil, ctxErr
	}
	return r.e, ctxErr
}

// curveSteps is how often per epoch the live counter is read.
const curveSteps = 8

// wait returns at the end of an epoch; the live counter, which sees each page's
// first write, gives the curve's points within it.
func (r *exactRun) wait(ctx context.Context, scanned time.Time, epoch time.Duration) error {
	steps := 1
	var first uint64
	if r.t.live != nil && epoch >= 40*time.Millisecond {
		steps = curveSteps
		n, err := r.t.live.Counts()
		if err != nil {
			return err
		}
		first = n.Pages
	}
	began := time.Now()
	for i := 1; i <= steps; i++ {
		timer := time.NewTimer(time.Until(scanned.Add(epoch * time.Duration(i) / time.Duration(steps))))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		if i < steps {
			n, err := r.t.live.Counts()
			if err != nil {
				return err
			}
			r.e.Curve.Add(time.Since(began), float64(n.Pages-first))
		}
	}
	return nil
}

// take ends an epoch.
func (r *exactRun) take(took time.Duration) (pages uint64, err error) {
	begin := time.Now()
	err = r.t.TakeAll(func(first, count uint64) {
		pages += count
		r.sets[0].AddRange(first, count)
		r.note(first, count)
	})
	if err != nil {
		return 0, err
	}
	if _, err := r.restartLive(); err != nil {
		return 0, err
	}
	r.e.ScanNS += time.Since(begin).Nanoseconds()
	r.e.Epochs++
	r.e.Pages += pages
	r.all.Union(r.sets[0])
	r.span[0] = took
	// Level i holds the union of the last 2^i epochs whenever their number is a
	// multiple of that.
	for i := range levels {
		r.e.Curve.Add(r.span[i], float64(r.sets[i].Count()))
		if i+1 == levels {
			r.sets[i].Clear()
			r.span[i] = 0
			break
		}
		r.sets[i+1].Union(r.sets[i])
		r.span[i+1] += r.span[i]
		r.sets[i].Clear()
		r.span[i] = 0
		if r.e.Epochs%(1<<(i+1)) != 0 {
			break
		}
	}
	return pages, nil
}

// note adds a run to its block's heat and count. A run lies in one block.
func (r *exactRun) note(first, count uint64) {
	b := r.t.BlockOf(first)
	i := 0
	for &r.t.Blocks[i] != b {
		i++
	}
	r.per[i] += count
	heat := r.e.Heat[i]
	for p, end := first-b.First, first-b.First+count; p < end; {
		n := min(end-p, HeatPages-p%HeatPages)
		heat[p/HeatPages] += uint32(n)
		p += n
	}
}

// restartLive lets every page count anew, and says how many were counted so far.
func (r *exactRun) restartLive() (counted uint64, err error) {
	if r.t.live == nil {
		return 0, nil
	}
	r.t.live.Clear()
	n, err := r.t.live.Counts()
	return n.Pages, err
}

func (r *exactRun) finish(rates []float64, took time.Duration) {
	e := r.e
	e.Time = took
	if e.Epochs == 0 || took <= 0 {
		return
	}
	e.Interval = took / time.Duration(e.Epochs)
	e.Rate = float64(e.Pages) / took.Seconds()
	for _, x := range rates {
		e.Spread += (x - e.Rate) * (x - e.Rate)
		e.Peak = max(e.Peak, x)
	}
	e.Spread = math.Sqrt(e.Spread / float64(len(rates)))
	e.WSSPages = r.all.Count()
	for i, b := range r.t.Blocks {
		e.Blocks = append(e.Blocks, BlockRate{Name: b.Name, Rate: float64(r.per[i]) / took.Seconds(),
			WSSPages: r.all.CountRange(b.First, b.Pages())})
	}
}
