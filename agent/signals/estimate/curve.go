package estimate

import (
	"math"
	"slices"
	"time"
)

// Curve collects points of G(T), the distinct pages written within T, and fits
// the model to them. Points of about the same T share a cell of a grid with eight
// cells per octave; each cell forgets slowly, so that the curve follows a guest
// that changes.
type Curve struct {
	// Memory is the weight of the past in a cell, 0 (none) to below 1. The zero
	// value takes 0.9.
	Memory float64
	cells  map[int]cell
}

type cell struct{ t, g, weight float64 }

// Fit is the model with the parameters that fit best.
type Fit struct {
	Pages   float64       // W: distinct pages written in the long run
	Tau     time.Duration // time after which 63 % of W have been written
	Error   float64       // root mean square of the relative deviation of the points
	Points  int           // cells that had points
	Longest time.Duration // the largest T observed: beyond it G is an extrapolation
}

// Point is a mean of what was observed near T.
type Point struct {
	T     time.Duration
	Pages float64
}

const cellsPerOctave = 8

// Add notes that pages distinct pages were written within t.
func (c *Curve) Add(t time.Duration, pages float64) {
	if t <= 0 || pages < 0 {
		return
	}
	if c.cells == nil {
		c.cells = map[int]cell{}
	}
	memory := c.Memory
	if memory == 0 {
		memory = 0.9
	}
	k := int(math.Round(math.Log2(t.Seconds()) * cellsPerOctave))
	old := c.cells[k]
	// Weighted mean of the last 1/(1-memory) points or so.
	w := old.weight*memory + 1
	a := 1 / w
	c.cells[k] = cell{t: old.t + a*(t.Seconds()-old.t), g: old.g + a*(pages-old.g), weight: w}
}

// Points are the means, by T.
func (c *Curve) Points() []Point {
	out := make([]Point, 0, len(c.cells))
	for _, v := range c.cells {
		out = append(out, Point{T: time.Duration(v.t * 1e9), Pages: v.g})
	}
	slices.SortFunc(out, func(a, b Point) int { return int(a.T - b.T) })
	return out
}

// Fit finds W and tau by least squares of the relative deviation. Without a point
// above zero it reports false.
func (c *Curve) Fit() (Fit, bool) {
	points := c.Points()
	points = slices.DeleteFunc(points, func(p Point) bool { return p.Pages < 1 })
	if len(points) == 0 {
		return Fit{}, false
	}
	first, last := points[0].T.Seconds(), points[len(points)-1].T.Seconds()
	// For a given tau the best W is a formula; tau is found on a logarithmic grid
	// and then between its neighbours. Above 100 times the longest T the curve is
	// a straight line and tau means nothing more.
	best, lo, hi := math.Inf(1), math.Log(first/8), math.Log(last*100)
	at := lo
	const steps = 96
	for i := range steps + 1 {
		x := lo + (hi-lo)*float64(i)/steps
		if e, _ := deviation(points, math.Exp(x)); e < best {
			best, at = e, x
		}
	}
	width := (hi - lo) / steps
	for range 20 {
		width *= 0.6
		for _, x := range []float64{at - width, at + width} {
			if e, _ := deviation(points, math.Exp(x)); e < best {
				best, at = e, x
			}
		}
	}
	e, w := deviation(points, math.Exp(at))
	return Fit{Pages: w, Tau: time.Duration(math.Exp(at) * 1e9), Error: math.Sqrt(e),
		Points: len(points), Longest: points[len(points)-1].T}, true
}

// deviation is the mean square of (model-g)/g for the best W at this tau.
func deviation(points []Point, tau float64) (mean, w float64) {
	var num, den float64
	for _, p := range points {
		x := -math.Expm1(-p.T.Seconds()/tau) / p.Pages
		num, den = num+x, den+x*x
	}
	w = num / den
	for _, p := range points {
		d := w*-math.Expm1(-p.T.Seconds()/tau)/p.Pages - 1
		mean += d * d
	}
	return mean / float64(len(points)), w
}

// At is G(t).
func (f Fit) At(t time.Duration) float64 {
	if f.Tau <= 0 {
		return 0
	}
	return f.Pages * -math.Expm1(-t.Seconds()/f.Tau.Seconds())
}

// Initial is the rate of first writes right after an arm, W/tau, in pages per
// second: an upper bound of the dirty rate at any interval.
func (f Fit) Initial() float64 {
	if f.Tau <= 0 {
		return 0
	}
	return f.Pages / f.Tau.Seconds()
}
