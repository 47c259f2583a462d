package track

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals/estimate"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// SampleConfig says how memory is sampled.
type SampleConfig struct {
	Precision float64 // half-width wanted, relative; 0.12 if 0
	MaxShare  float64 // of memory armed in a window at most; 0.5 if 0
	Content   int     // pages read per window to see what they are made of; 0: none
}

// unitPages is the size of a unit: small, so that contiguous loads do not need
// most of memory, and not a single page, as arming costs a call per unit.
const unitPages = 16

// Sampled estimates by arming a random sample, window by window.
type Sampled struct {
	t       *Tracker
	c       SampleConfig
	sampler *estimate.Sampler
	content *content
	panel   *panel
	curve   estimate.Curve
	windows int
	blocks  []float64 // estimated pages written in each block, summed over windows
}

// Window is what one window told.
type Window struct {
	Begin       time.Time // half of the sample was armed
	Time        time.Duration
	Rate, Error float64 // pages per second; Error is half the 95 % interval
	Armed       float64 // share of memory
	Observed    int     // pages seen written
	Busy        time.Duration
}

// Sample prepares sampling.
func (t *Tracker) Sample(c SampleConfig) *Sampled {
	if c.MaxShare <= 0 {
		c.MaxShare = 0.5
	}
	units := int((t.pages + unitPages - 1) / unitPages)
	s := &Sampled{t: t, c: c, blocks: make([]float64, len(t.Blocks)), sampler: estimate.NewSampler(estimate.SamplerConfig{
		UnitPages: unitPages, Units: units, Precision: c.Precision, MaxUnits: max(256, int(float64(units)*c.MaxShare)),
	})}
	if c.Content > 0 {
		s.content = newContent(t, c.Content)
	}
	return s
}

// Rebind goes on with another Tracker of the same memory, after the former was
// closed: what was learned of where memory is hot is kept, the sample that was
// being followed is not. It reports false if the memory has another size now.
func (s *Sampled) Rebind(t *Tracker) bool {
	if t.pages != s.t.pages || len(t.Blocks) != len(s.t.Blocks) {
		return false
	}
	s.t, s.panel = t, nil
	if s.content != nil {
		s.content.t = t
	}
	return true
}

// panelAfter is the window whose sample is followed from then on: by then the
// sampler knows where to look.
const panelAfter = 3

// Window arms a fresh sample, waits, and estimates.
func (s *Sampled) Window(ctx context.Context, d time.Duration) (Window, error) {
	units := s.sampler.Draw()
	if len(units) == 0 {
		return Window{}, problem.New(problem.Refused, "sample", s.t.object, "no memory that can be tracked")
	}
	begin := time.Now()
	if err := s.panel.save(units); err != nil {
		return Window{}, err
	}
	// Units are armed one after another and looked at in the same order: a unit's
	// window is, in the mean, the time between the middles.
	arming := time.Now()
	if err := s.eachRun(units, s.t.Arm); err != nil {
		return Window{}, err
	}
	armSpan := time.Since(arming)
	armed := middle(arming, arming.Add(armSpan))
	if s.windows == panelAfter {
		s.panel = newPanel(s.t, s.sampler.Design(), units, armed)
	}
	if s.content != nil {
		if err := s.content.before(units); err != nil {
			return Window{}, err
		}
	}
	busy := time.Since(begin)
	timer := time.NewTimer(time.Until(armed.Add(d)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return Window{}, ctx.Err()
	case <-timer.C:
	}
	looking := time.Now()
	if err := s.look(units); err != nil {
		return Window{}, err
	}
	lookSpan := time.Since(looking)
	looked := middle(looking, looking.Add(lookSpan))
	if s.content != nil {
		if err := s.content.after(); err != nil {
			return Window{}, err
		}
	}
	e := s.sampler.Observe(units)
	s.windows++
	s.share(units)
	took := looked.Sub(armed)
	e.Error = math.Hypot(e.Error, edge(e.Pages/took.Seconds(), armSpan, lookSpan))
	s.curve.Add(took, e.Pages)
	if g, at, err := s.panel.total(looked); err != nil {
		return Window{}, err
	} else if at > 0 {
		s.curve.Add(at, g.Pages)
	}
	return Window{Begin: armed, Time: took, Rate: e.Pages / took.Seconds(), Error: e.Error / took.Seconds(), Armed: e.Armed,
		Observed: e.Observed, Busy: busy + time.Since(looking)}, nil
}

// edge is what the window's edges add to the error bar: a load that sits in one place
// while the sample is armed or looked at falls into the window up to half of that time
// too early or too late. On a host with time to spare it is next to nothing.
func edge(pagesPerSecond float64, arm, look time.Duration) float64 {
	return 1.96 * pagesPerSecond * math.Hypot(arm.Seconds(), look.Seconds()) / (2 * math.Sqrt(3))
}

func middle(a, b time.Time) time.Time { return a.Add(b.Sub(a) / 2) }

// eachRun joins neighbouring units.
func (s *Sampled) eachRun(units []estimate.Unit, do func(first, count uint64) error) error {
	for i := 0; i < len(units); {
		j := i + 1
		for j < len(units) && units[j].Index == units[j-1].Index+1 {
			j++
		}
		first := uint64(units[i].Index) * unitPages
		end := min(uint64(units[j-1].Index+1)*unitPages, s.t.pages)
		if err := do(first, end-first); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// look fills in what was written.
func (s *Sampled) look(units []estimate.Unit) error {
	at := 0
	return s.eachRun(units, func(first, count uint64) error {
		return s.t.Look(first, count, func(p, n uint64) {
			for ; n > 0; p, n = p+1, n-1 {
				for uint64(units[at].Index) < p/unitPages {
					at++
				}
				units[at].Written++
				if s.content != nil {
					s.content.written(p)
				}
			}
		})
	})
}

// share adds a window's pages to the blocks they lie in.
func (s *Sampled) share(units []estimate.Unit) {
	at := 0
	for _, u := range units {
		if u.Written == 0 {
			continue
		}
		first := uint64(u.Index) * unitPages
		for at+1 < len(s.t.Blocks) && first >= s.t.Blocks[at+1].First {
			at++
		}
		s.blocks[at] += u.Weight * float64(u.Written)
	}
}

// Curve is what was learned of G(T).
func (s *Sampled) Curve() *estimate.Curve { return &s.curve }

// Heat is how many pages of each 2 MiB of each block are expected to be written per
// window.
func (s *Sampled) Heat() [][]float64 {
	unit := s.sampler.Heat(unitPages, nil)
	out := make([][]float64, 0, len(s.t.Blocks))
	for _, b := range s.t.Blocks {
		heat := make([]float64, (b.Pages()+HeatPages-1)/HeatPages)
		for p := uint64(0); p < b.Pages(); p += unitPages {
			heat[p/HeatPages] += unit[(b.First+p)/unitPages]
		}
		out = append(out, heat)
	}
	return out
}

// Shares are what the pages written consist of.
func (s *Sampled) Shares() (estimate.Shares, bool) {
	if s.content == nil {
		return estimate.Shares{}, false
	}
	return s.content.makeup.Shares()
}

// WSS estimates the distinct pages written since a sample is being followed, over
// that time; it is zero in the first windows.
func (s *Sampled) WSS() (pages, halfWidth float64, over time.Duration) {
	if s.panel == nil {
		return 0, 0, 0
	}
	e := s.panel.last
	return e.Pages, e.Error, s.panel.over
}

// panel is a sample whose pages are followed over many windows: the written ones
// accumulate.
type panel struct {
	t      *Tracker
	design estimate.Design
	units  []estimate.Unit
	began  time.Time
	member map[int]int // unit index -> position
	done   *pagemap.Set
	last   estimate.Estimate
	over   time.Duration
}

func newPanel(t *Tracker, d estimate.Design, units []estimate.Unit, began time.Time) *panel {
	p := &panel{t: t, design: d, units: append([]estimate.Unit(nil), units...), began: began, member: map[int]int{}, done: pagemap.NewSet(t.pages)}
	for i := range p.units {
		p.units[i].Written = 0
		p.member[p.units[i].Index] = i
	}
	return p
}

// save notes what is written in those members that are about to be armed anew.
func (p *panel) save(units []estimate.Unit) error {
	if p == nil {
		return nil
	}
	for _, u := range units {
		if i, ok := p.member[u.Index]; ok {
			if err := p.collect(i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *panel) collect(i int) error {
	u := &p.units[i]
	first := uint64(u.Index) * unitPages
	count := min(unitPages, p.t.pages-first)
	if u.Written == int(count) {
		return nil
	}
	if err := p.t.Look(first, count, func(at, n uint64) { p.done.AddRange(at, n) }); err != nil {
		return err
	}
	u.Written = int(p.done.CountRange(first, count))
	return nil
}

// total collects all members and estimates the pages written since the beginning.
func (p *panel) total(now time.Time) (estimate.Estimate, time.Duration, error) {
	if p == nil {
		return estimate.Estimate{}, 0, nil
	}
	for i := range p.units {
		if err := p.collect(i); err != nil {
			return estimate.Estimate{}, 0, err
		}
	}
	p.last, p.over = p.design.Estimate(p.units), now.Sub(p.began)
	return p.last, p.over, nil
}

// pagesIn estimates the pages of one block written since the beginning.
func (p *panel) pagesIn(b Block) uint64 {
	if p == nil {
		return 0
	}
	var sum float64
	for _, u := range p.units {
		if first := uint64(u.Index) * unitPages; first >= b.First && first < b.First+b.Pages() {
			sum += u.Weight * float64(u.Written)
		}
	}
	return uint64(sum)
}

// SampledResult is a whole sampled measurement.
type SampledResult struct {
	Time, Interval time.Duration
	Windows        int
	Rate, Error    float64 // pages per second, mean over the windows and half its 95 % interval
	Spread, Peak   float64 // standard deviation and highest of the windows' rates
	WSSPages       float64
	WSSError       float64
	WSSOver        time.Duration
	Armed          float64 // mean share of memory
	Busy           time.Duration
	Curve          *estimate.Curve
	Shares         *estimate.Shares
	Blocks         []BlockRate
	Heat           [][]float64 // pages per second in each 2 MiB, block after block
}

// MeasureSampled runs windows until the time is over or ctx ends.
func (t *Tracker) MeasureSampled(ctx context.Context, whole, interval time.Duration, c SampleConfig, window func(Window)) (*SampledResult, error) {
	s := t.Sample(c)
	r := &SampledResult{Curve: &s.curve}
	begin := time.Now()
	var sum, squares, armed, weight float64
	var ctxErr error
	var rates []float64
	for time.Since(begin) < whole {
		w, err := s.Window(ctx, interval)
		if ctx.Err() != nil {
			ctxErr = ctx.Err()
			break
		}
		if err != nil {
			return nil, fmt.Errorf("window %d: %w", s.windows+1, err)
		}
		if window != nil {
			window(w)
		}
		rates = append(rates, w.Rate)
		r.Windows++
		r.Interval += w.Time
		r.Busy += w.Busy
		k := w.Time.Seconds()
		weight += k
		sum += k * w.Rate
		squares += k * k * w.Error * w.Error
		armed += w.Armed
	}
	if r.Windows == 0 {
		return nil, ctxErr
	}
	n := float64(r.Windows)
	r.Time = time.Since(begin)
	r.Interval /= time.Duration(r.Windows)
	r.Rate, r.Error, r.Armed = sum/weight, math.Sqrt(squares)/weight, armed/n
	r.WSSPages, r.WSSError, r.WSSOver = s.WSS()
	for _, x := range rates {
		r.Spread += (x - r.Rate) * (x - r.Rate) / n
		r.Peak = max(r.Peak, x)
	}
	r.Spread = math.Sqrt(r.Spread)
	r.Heat = s.Heat()
	for i, b := range t.Blocks {
		k := BlockRate{Name: b.Name, Rate: s.blocks[i] / weight, WSSPages: s.panel.pagesIn(b)}
		r.Blocks = append(r.Blocks, k)
		// What is remembered says where; how much is written is known better.
		var sum float64
		for _, h := range r.Heat[i] {
			sum += h
		}
		for j := range r.Heat[i] {
			r.Heat[i][j] *= k.Rate / max(sum, 1e-9)
		}
	}
	if sh, ok := s.Shares(); ok {
		r.Shares = &sh
	}
	return r, ctxErr
}
