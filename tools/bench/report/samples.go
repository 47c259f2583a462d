package report

import (
	"math"
	"slices"
)

// Samples are the values of one figure, in the order they were measured.
type Samples []float64

// Quantile is the value below which the share q of the samples lies, between two
// of them by linear interpolation; NaN without samples.
func (s Samples) Quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(s))
	at := q * float64(len(v)-1)
	i := int(at)
	if i+1 >= len(v) {
		return v[len(v)-1]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}

// Median is Quantile(0.5).
func (s Samples) Median() float64 { return s.Quantile(0.5) }

// Max is the largest sample; NaN without samples.
func (s Samples) Max() float64 { return s.Quantile(1) }

// Figures collects samples by name and remembers the order of the names.
type Figures struct {
	names  []string
	values map[string]Samples
}

// Add appends one sample; NaN is not one.
func (f *Figures) Add(name string, v float64) {
	if math.IsNaN(v) {
		return
	}
	if f.values == nil {
		f.values = map[string]Samples{}
	}
	if _, known := f.values[name]; !known {
		f.names = append(f.names, name)
	}
	f.values[name] = append(f.values[name], v)
}

// Get returns the samples of a name, nil if there are none.
func (f *Figures) Get(name string) Samples { return f.values[name] }

// Names are all names, in the order of their first sample.
func (f *Figures) Names() []string { return f.names }
