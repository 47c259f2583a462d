package formula

import (
	"math"
	"testing"
)

func near(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if math.Abs(got-want) > tolerance {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestDaly(t *testing.T) {
	const minute = 60
	near(t, "24 h", Daly(5*minute, 24*60*minute)/minute, 116.7, 0.05)
	near(t, "6 h", Daly(5*minute, 6*60*minute)/minute, 56.7, 0.05)
	near(t, "15 min", Daly(5*minute, 15*minute)/minute, 9.14, 0.005)
	near(t, "more than it saves", Daly(100, 30), 30, 0)
	near(t, "no failures known", Daly(5, 0), 0, 0)
	if y, d := Young(300, 86400), Daly(300, 86400); d >= y {
		t.Errorf("Daly %v is to be shorter than Young %v here", d, y)
	}
}

func TestCurve(t *testing.T) {
	c := Curve{Pages: 10000, Tau: 20}
	for _, s := range []float64{0.1, 1, 20, 100} {
		near(t, "there and back", c.Until(c.Dirty(s)), s, 1e-6*s)
	}
	if !math.IsInf(c.Until(10000), 1) || c.Dirty(0) != 0 || c.Dirty(-1) != 0 || (Curve{Pages: 5}).Dirty(1) != 5 {
		t.Error("limits")
	}
}

func TestKeepsUp(t *testing.T) {
	c := Curve{Pages: 100000, Tau: 10} // 10,000 pages/s at first
	at := func(base, bytesPerSecond float64) func(float64) float64 {
		return func(t float64) float64 { return base + c.Dirty(t)*4096/bytesPerSecond }
	}
	near(t, "a store that is always quicker", KeepsUp(at(0, 100e6), 1), 0, 1e-9)
	near(t, "as long each time", KeepsUp(func(float64) float64 { return 3 }, 0.5), 6, 1e-9)
	for _, base := range []float64{0, 2} {
		took := at(base, 20e6) // 4,883 pages/s
		got := KeepsUp(took, 0.8)
		near(t, "the store just keeps up", took(got), 0.8*got, 1e-6*got)
		if took(got*0.9) <= 0.8*got*0.9 || got < 1 {
			t.Errorf("%v is not the least", got)
		}
	}
	near(t, "a base alone keeps it from any interval", KeepsUp(at(2, 100e6), 1), 3.088, 0.001)
	if KeepsUp(func(float64) float64 { return 0 }, 0.5) != 0 || !math.IsInf(KeepsUp(at(1, 1e6), 0), 1) {
		t.Error("limits")
	}
}

func TestOverheadCap(t *testing.T) {
	near(t, "twice too much", OverheadCap(10, 0.02, 0.01), 20, 0)
	near(t, "ten times", OverheadCap(10, 0.1, 0.01), 20, 0)
	near(t, "none", OverheadCap(10, 0, 0.01), 5, 0)
	near(t, "as wanted", OverheadCap(10, 0.01, 0.01), 10, 0)
}

// TestLeast: without anything that follows what was written it is Young's.
func TestLeast(t *testing.T) {
	c := Cost{Fixed: 0.5, FailureRate: 1.0 / 86400, Weight: 1}
	near(t, "Young", c.Least(1, 1e5), Young(0.5, 86400), 0.5)
	g := Curve{Pages: 1e6, Tau: 100}
	c.PerPage, c.Pages = 1e-5, func(s float64) float64 { return g.Met(g.Dirty(s) * 4096 / 1e8) }
	c.Commit = func(s float64) float64 { return g.Dirty(s) * 4096 / 1e8 }
	best := c.Least(1, 1e5)
	for s := 1.0; s < 1e5; s *= 1.1 {
		if c.At(s) < c.At(best)*0.999 {
			t.Errorf("%v s costs %v, %v s costs %v", s, c.At(s), best, c.At(best))
		}
	}
	near(t, "never below the bound", c.Least(500, 1e5), max(500, c.Least(500, 1e5)), 0)
}

// TestMet: the closed form is the mean of the curve.
func TestMet(t *testing.T) {
	c := Curve{Pages: 10000, Tau: 20}
	for _, s := range []float64{1e-3, 0.019, 0.021, 1, 20, 2000} {
		const steps = 100000
		sum := 0.0
		for i := range steps {
			sum += c.Dirty(s * (float64(i) + 0.5) / steps)
		}
		near(t, "mean of G", c.Met(s), sum/steps, 1e-5*c.Met(s))
	}
	if c.Met(0) != 0 || (Curve{Pages: 5}).Met(1) != 5 || (Curve{}).Met(1) != 0 {
		t.Error("limits")
	}
}

func TestWithin(t *testing.T) {
	g := Curve{Pages: 1e5, Tau: 30}
	c := Cost{Fixed: 0.01, PerPage: 1e-5, Pages: g.Dirty}
	got := c.Within(0.01, 1)
	near(t, "as much as is allowed", c.Lost(got)/got, 0.01, 1e-6)
	near(t, "already so", c.Within(0.01, 500), 500, 0)
	near(t, "no limit", c.Within(0, 7), 7, 0)
}
