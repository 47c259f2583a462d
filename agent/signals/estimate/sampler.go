package estimate

import (
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// SamplerConfig says what is sampled and how precisely.
type SamplerConfig struct {
	UnitPages int // pages per unit
	Units     int // units of the whole memory
	// Precision is the half-width of the error bar wanted, relative to the rate.
	Precision float64
	// MaxUnits bounds the units armed per window, MinUnits is drawn at least; both
	// are cut to Units.
	MaxUnits, MinUnits int
	Rand               *rand.Rand
}

// strata are classes of expected pages written per unit and window. Units of which
// nothing is known are in the first.
const strata = 4

// stratumOf puts a unit of m pages into a stratum by its expected heat.
func stratumOf(heat float32, m int) int {
	switch share := float64(heat) / float64(m); {
	case share < 0.002:
		return 0
	case share < 0.04:
		return 1
	case share < 0.4:
		return 2
	default:
		return 3
	}
}

// Sampler draws units window by window and makes estimates of what was seen.
type Sampler struct {
	c      SamplerConfig
	heat   []float32 // expected pages written per unit and window
	seen   []bool    // the unit was in a sample
	design Design
	// per stratum: variance of the last windows
	variance [strata]float64
	weight   [strata]float64 // observations behind it, the older the less
	total    float64         // expected pages written per window
	drawn    []Unit
	windows  int
}

// Unit is a unit in a window's sample.
type Unit struct {
	Index   int
	Written int     // pages written, to be filled in by who observed the window
	Weight  float64 // how many units of the memory it stands for
	stratum int
}

// Hot reports that some of the unit's pages are expected to be written.
func (u Unit) Hot() bool { return u.stratum > 0 }

// Design is how a sample was drawn: what it takes to judge it later.
type Design struct {
	units int // of the whole memory
	sizes [strata]int
}

// Estimate is what one window tells about the whole memory.
type Estimate struct {
	Pages    float64 // distinct pages written in the window
	Error    float64 // half-width of the 95 % confidence interval
	Observed int     // pages seen written
	Units    int     // units armed
	Armed    float64 // share of memory armed
}

// NewSampler makes a sampler that knows nothing yet.
func NewSampler(c SamplerConfig) *Sampler {
	if c.Precision <= 0 {
		c.Precision = 0.12
	}
	if c.MinUnits <= 0 {
		c.MinUnits = 256
	}
	if c.MaxUnits <= 0 {
		c.MaxUnits = c.Units
	}
	c.MaxUnits = min(c.MaxUnits, c.Units)
	c.MinUnits = min(c.MinUnits, c.MaxUnits)
	if c.Rand == nil {
		c.Rand = rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0x9e3779b97f4a7c15))
	}
	return &Sampler{c: c, design: Design{units: c.Units}, heat: make([]float32, c.Units), seen: make([]bool, c.Units)}
}

// pilotShare is how much of memory the first window arms: nothing is known yet.
const pilotShare = 4

// Draw chooses the units of the next window, in ascending order.
func (s *Sampler) Draw() []Unit {
	var members [strata][]int32
	for i := range s.heat {
		h := stratumOf(s.expected(i), s.c.UnitPages)
		members[h] = append(members[h], int32(i))
	}
	s.drawn = s.drawn[:0]
	for h, n := range s.allocate(&members) {
		m := members[h]
		s.design.sizes[h] = len(m)
		for k := range n { // the first n of a random permutation
			j := k + s.c.Rand.IntN(len(m)-k)
			m[k], m[j] = m[j], m[k]
			s.drawn = append(s.drawn, Unit{Index: int(m[k]), Weight: float64(len(m)) / float64(n), stratum: h})
		}
	}
	slices.SortFunc(s.drawn, func(a, b Unit) int { return a.Index - b.Index })
	return s.drawn
}

// expected is the heat of a unit; one never seen is as hot as its neighbours in
// the same 2 MiB, since heat comes in patches.
func (s *Sampler) expected(i int) float32 {
	if s.seen[i] {
		return s.heat[i]
	}
	around := 512 / s.c.UnitPages
	first := i / around * around
	var sum float32
	var n int
	for j := first; j < min(first+around, s.c.Units); j++ {
		if s.seen[j] {
			sum += s.heat[j]
			n++
		}
	}
	if n == 0 {
		return 0
	}
	return sum / float32(n)
}

// allocate says how many units to draw of each stratum.
func (s *Sampler) allocate(members *[strata][]int32) (n [strata]int) {
	if s.windows == 0 {
		n[0] = max(s.c.MinUnits, min(s.c.MaxUnits, s.c.Units/pilotShare))
		return n
	}
	// Neyman: n_h in proportion to N_h S_h, as many in all as the precision asks
	// for. Of a stratum of which nothing is known the variance is guessed from its
	// upper bound of heat.
	var spread, both float64 // sum of N_h S_h, of N_h S_h^2
	var sd [strata]float64
	for h, m := range members {
		v := max(s.variance[h], 1/(s.weight[h]+1))
		if s.weight[h] == 0 {
			v = []float64{0.1, 1, 8, float64(s.c.UnitPages)}[h]
		}
		sd[h] = math.Sqrt(v)
		spread += float64(len(m)) * sd[h]
		both += float64(len(m)) * v
	}
	aim := max(s.total, 1) * s.c.Precision / 2.0
	want := spread * spread / (aim*aim + both)
	room := float64(s.c.MaxUnits)
	want = min(max(want, float64(s.c.MinUnits)), room)
	const least = 48 // per stratum: a variance wants that many
	for h, m := range members {
		k := least
		if spread > 0 {
			k = max(k, int(math.Ceil(want*float64(len(m))*sd[h]/spread)))
		}
		n[h] = min(k, len(m))
	}
	return n
}

// Design is how the last sample was drawn.
func (s *Sampler) Design() Design { return s.design }

// Observe takes what was seen of the units of the last Draw, Written filled in,
// learns from it and makes the estimate.
func (s *Sampler) Observe(units []Unit) Estimate {
	e := s.design.estimate(units, s.pool)
	for _, u := range units {
		if s.seen[u.Index] {
			s.heat[u.Index] += 0.5 * (float32(u.Written) - s.heat[u.Index])
		} else {
			s.heat[u.Index], s.seen[u.Index] = float32(u.Written), true
		}
	}
	if s.windows == 0 {
		s.total = e.Pages
	} else {
		s.total += 0.5 * (e.Pages - s.total)
	}
	s.windows++
	return e
}

// Estimate is what a sample tells by itself.
func (d Design) Estimate(units []Unit) Estimate {
	return d.estimate(units, func(_ int, v, n float64) (float64, float64) { return v, n })
}

// estimate makes the stratified estimate. pool says which variance of a stratum to
// go by, given the sample's own and its size, and how many units are behind it.
func (d Design) estimate(units []Unit, pool func(h int, v, n float64) (pooled, weight float64)) Estimate {
	e := Estimate{Units: len(units), Armed: float64(len(units)) / float64(max(d.units, 1))}
	var sum, squares, count [strata]float64
	for _, u := range units {
		y := float64(u.Written)
		h := u.stratum
		sum[h], squares[h], count[h] = sum[h]+y, squares[h]+y*y, count[h]+1
		e.Observed += u.Written
	}
	var variance, denominator float64
	for h := range strata {
		n, size := count[h], float64(d.sizes[h])
		if n == 0 {
			continue
		}
		mean := sum[h] / n
		v := 0.0
		if n > 1 {
			v = max(0, (squares[h]-n*mean*mean)/(n-1))
		}
		e.Pages += size * mean
		pooled, weight := pool(h, v, n)
		if n < size {
			// A sample that happens to miss what is rare has too small a total and
			// too small a variance at once: the former windows' variance is heeded
			// as well. What none of them has seen may still be there, one page in
			// one unit more than were looked at.
			part := size * size * (1 - n/size) * max(pooled, 1/(weight+1)) / n
			variance += part
			denominator += part * part / max(n-1, 1)
		}
	}
	if variance > 0 {
		e.Error = t95(variance*variance/denominator) * math.Sqrt(variance)
	}
	return e
}

// memory is the weight of the former windows in a stratum's variance.
const memory = 0.6

// pool adds a window's variance of n units to what is remembered of a stratum.
func (s *Sampler) pool(h int, v, n float64) (pooled, weight float64) {
	old := memory * s.weight[h]
	s.weight[h] = old + n
	s.variance[h] = (old*s.variance[h] + n*v) / s.weight[h]
	return s.variance[h], s.weight[h]
}

// Heat appends the expected pages written per window in each run of pages pages to
// out: what a heat map shows.
func (s *Sampler) Heat(pages int, out []float64) []float64 {
	per := max(1, pages/s.c.UnitPages)
	for first := 0; first < s.c.Units; first += per {
		var sum float64
		for i := first; i < min(first+per, s.c.Units); i++ {
			sum += float64(s.expected(i))
		}
		out = append(out, sum)
	}
	return out
}
