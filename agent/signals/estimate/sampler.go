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
	// per stratum: variance between neighbours in the samples of the last windows
	variance [strata]float64
	weight   [strata]float64 // observations behind it, the older the less
	total    float64         // expected pages written per window
	asked    float64         // units that the precision asked for, last
	drawn    []Unit
	members  [strata][]int32 // units of each stratum in the last Draw
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

// Design is how a sample was drawn: what it takes to judge it later. Units that are
// judged have to be in order of address.
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

// pilotShare is the part of memory that the first window arms: nothing is known yet.
const pilotShare = 8

// Draw chooses the units of the next window, in ascending order.
func (s *Sampler) Draw() []Unit {
	for h := range s.members {
		s.members[h] = s.members[h][:0]
	}
	s.eachExpected(func(i int, heat float32) {
		h := stratumOf(heat, s.c.UnitPages)
		s.members[h] = append(s.members[h], int32(i))
	})
	s.drawn = s.drawn[:0]
	for h, n := range s.allocate() {
		m := s.members[h]
		s.design.sizes[h] = len(m)
		s.spread(len(m), n, func(k int) {
			s.drawn = append(s.drawn, Unit{Index: int(m[k]), Weight: float64(len(m)) / float64(n), stratum: h})
		})
	}
	slices.SortFunc(s.drawn, func(a, b Unit) int { return a.Index - b.Index })
	return s.drawn
}

// spread chooses n of m members that are in order of address: one at random of each
// of n equal stretches. The stretches' beginning is random and the last one goes on
// at the first member, so that every member is as likely to be chosen as any other.
func (s *Sampler) spread(m, n int, choose func(k int)) {
	if n == 0 {
		return
	}
	step, at := float64(m)/float64(n), s.c.Rand.Float64()*float64(m)
	begin := int(math.Ceil(at))
	for k, lo := 0, begin; k < n; k++ {
		hi := int(math.Ceil(at + float64(k+1)*step))
		if k == n-1 {
			hi = begin + m
		}
		choose((lo + s.c.Rand.IntN(hi-lo)) % m)
		lo = hi
	}
}

// eachExpected tells the heat of every unit; one never seen is as hot as its
// neighbours in the same 2 MiB, since heat comes in patches.
func (s *Sampler) eachExpected(do func(i int, heat float32)) {
	around := max(1, 512/s.c.UnitPages)
	for first := 0; first < s.c.Units; first += around {
		last := min(first+around, s.c.Units)
		var sum, n float32
		for i := first; i < last; i++ {
			if s.seen[i] {
				sum, n = sum+s.heat[i], n+1
			}
		}
		mean := sum / max(n, 1)
		for i := first; i < last; i++ {
			if s.seen[i] {
				do(i, s.heat[i])
			} else {
				do(i, mean)
			}
		}
	}
}

// allocate says how many units to draw of each stratum.
func (s *Sampler) allocate() (n [strata]int) {
	if s.windows == 0 {
		n[0] = max(s.c.MinUnits, min(s.c.MaxUnits, s.c.Units/pilotShare))
		s.asked = float64(n[0])
		return n
	}
	// Neyman: n_h in proportion to N_h S_h, as many in all as the precision asks
	// for. Of a stratum of which nothing is known the variance is guessed from its
	// upper bound of heat.
	var spread, both float64 // sum of N_h S_h, of N_h S_h^2
	var sd [strata]float64
	for h, m := range s.members {
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
	// The variance is that between neighbours in the sample. Of a load that is random
	// it does not depend on how many there are; of one that is in one place it falls
	// as they come closer. Going there by steps converges for both.
	want = s.asked * math.Pow(want/s.asked, 0.7)
	want = min(max(want, float64(s.c.MinUnits)), float64(s.c.MaxUnits))
	s.asked = want
	const least = 48 // per stratum: a variance wants that many
	for h, m := range s.members {
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
	var seen [strata][]float64 // in order of address
	for _, u := range units {
		seen[u.stratum] = append(seen[u.stratum], float64(u.Written))
		e.Observed += u.Written
	}
	var variance, denominator float64
	for h := range strata {
		n, size := float64(len(seen[h])), float64(d.sizes[h])
		if n == 0 {
			continue
		}
		sum := 0.0
		for _, y := range seen[h] {
			sum += y
		}
		v := localVariance(seen[h])
		e.Pages += size * sum / n
		pooled, weight := pool(h, v, n)
		if n < size {
			// A sample that happens to miss what is rare has too small a total and
			// too small a variance at once: the former windows' variance is heeded
			// as well. What none of them has seen may still be there, one page in
			// one unit more than were looked at.
			part := size * size * (1 - n/size) * max(pooled, 1/(weight+1)) / n
			variance += part
			// Differences that share a unit hold two thirds of what as many
			// independent ones would.
			denominator += part * part / max(2*(n-1)/3, 1)
		}
	}
	if variance > 0 {
		e.Error = t95(variance*variance/denominator) * math.Sqrt(variance)
	}
	return e
}

// localVariance is the variance of a sample of one unit of each stretch, by the
// differences between neighbours. Half of a squared difference is the variance of
// units that differ by chance. A step, with units alike on either side of it, is the
// end of a run instead: it lies anywhere in its stretch with equal likelihood, at a
// part f of it, and the variance is the mean of f(1-f) times the square: a sixth.
func localVariance(y []float64) (v float64) {
	if len(y) < 2 {
		return 0
	}
	flat := func(i int, d float64) bool { // between i and i+1, compared with a difference
		return i < 0 || i+1 >= len(y) || 4*math.Abs(y[i+1]-y[i]) <= math.Abs(d)
	}
	for i := range len(y) - 1 {
		d := y[i+1] - y[i]
		if flat(i-1, d) && flat(i+1, d) {
			v += d * d / 6
		} else {
			v += d * d / 2
		}
	}
	return v / float64(len(y)-1)
}

// memory is the weight of the former windows in a stratum's variance.
const memory = 0.6

// pool adds a window's variance of n units to what is remembered of a stratum.
func (s *Sampler) pool(h int, v, n float64) (pooled, weight float64) {
	old := memory * s.weight[h]
	s.weight[h] = old + n
	s.variance[h] = (old*s.variance[h] + n*v) / s.weight[h]
	// A load that has just grown is not measured by what it was.
	return max(s.variance[h], 0.75*v), s.weight[h]
}

// Heat appends the expected pages written per window in each run of pages pages to
// out: what a heat map shows.
func (s *Sampler) Heat(pages int, out []float64) []float64 {
	per := max(1, pages/s.c.UnitPages)
	s.eachExpected(func(i int, heat float32) {
		if i%per == 0 {
			out = append(out, 0)
		}
		out[len(out)-1] += float64(heat)
	})
	return out
}
