package estimate

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestCurveFindsTheLoad: points with 5 % noise give back the parameters.
func TestCurveFindsTheLoad(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, want := range []struct{ w, tau float64 }{{8192, 0.5}, {100000, 5}, {300, 0.02}} {
		var c Curve
		for range 20 {
			for x := 0.01; x < 20; x *= 1.5 {
				g := want.w * -math.Expm1(-x/want.tau)
				c.Add(time.Duration(x*1e9), g*(1+0.05*r.NormFloat64()))
			}
		}
		f, ok := c.Fit()
		if !ok {
			t.Fatal("no fit")
		}
		if e := f.Pages/want.w - 1; math.Abs(e) > 0.05 {
			t.Errorf("W %.0f, want %.0f", f.Pages, want.w)
		}
		if e := f.Tau.Seconds()/want.tau - 1; math.Abs(e) > 0.1 {
			t.Errorf("tau %v, want %.3g s", f.Tau, want.tau)
		}
		if f.Error > 0.05 || f.Longest < 10*time.Second {
			t.Errorf("fit %+v", f)
		}
		if g := f.At(3 * f.Tau); math.Abs(g/(f.Pages*0.9502)-1) > 1e-3 {
			t.Errorf("G(3 tau) = %.0f of %.0f", g, f.Pages)
		}
		if got, want := f.Initial(), want.w/want.tau; math.Abs(got/want-1) > 0.12 {
			t.Errorf("initial rate %.0f, want %.0f", got, want)
		}
	}
}

// TestCurveForgets: a guest that changes is followed.
func TestCurveForgets(t *testing.T) {
	var c Curve
	add := func(w float64) {
		for _, x := range []float64{0.1, 0.2, 0.5, 1, 2} {
			c.Add(time.Duration(x*1e9), w*-math.Expm1(-x))
		}
	}
	for range 100 {
		add(1000)
	}
	for range 40 {
		add(50000)
	}
	if f, _ := c.Fit(); math.Abs(f.Pages/50000-1) > 0.05 {
		t.Errorf("W %.0f after the change", f.Pages)
	}
}

func TestCurveOfNothing(t *testing.T) {
	var c Curve
	if _, ok := c.Fit(); ok {
		t.Error("a fit of no point")
	}
	c.Add(time.Second, 0)
	c.Add(0, 5)
	c.Add(time.Second, -1)
	if _, ok := c.Fit(); ok {
		t.Error("a fit of zeros")
	}
	c.Add(time.Second, 100)
	f, ok := c.Fit()
	if !ok || math.Abs(f.At(time.Second)/52.63-1) > 0.01 { // 0 and 100, the newer counts more
		t.Errorf("%+v %v: G(1 s) = %v", f, ok, f.At(time.Second))
	}
	if (Fit{}).At(time.Second) != 0 || (Fit{}).Initial() != 0 {
		t.Error("the empty fit is not zero")
	}
}

func TestStudent(t *testing.T) {
	for df, want := range map[float64]float64{1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962, math.Inf(1): 1.960} {
		if got := t95(df); math.Abs(got-want) > 0.03 {
			t.Errorf("t95(%v) = %.3f, want %.3f", df, got, want)
		}
	}
}
