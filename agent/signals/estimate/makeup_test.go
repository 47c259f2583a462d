package estimate

import (
	"math"
	"testing"
)

func TestMakeup(t *testing.T) {
	var m Makeup
	if _, ok := m.Shares(); ok {
		t.Error("shares of nothing")
	}
	m.Add(Written{Weight: 1, Zero: true})
	m.Add(Written{Weight: 2, Same: true, Stored: 0.2})
	m.Add(Written{Weight: 1, Duplicate: true, Stored: 0.8})
	s, ok := m.Shares()
	want := Shares{Pages: 3, Zero: 0.25, FalseDirty: 0.5, Duplicate: 0.25, Compressible: 0.5, Ratio: (2*0.2 + 0.8) / 3}
	if !ok || math.Abs(s.Ratio-want.Ratio) > 1e-12 {
		t.Errorf("%+v", s)
	}
	if s.Ratio = want.Ratio; s != want {
		t.Errorf("%+v, want %+v", s, want)
	}
	for range 200 { // what was long ago hardly counts
		m.Window()
		m.Add(Written{Weight: 1, Zero: true})
	}
	if s, _ := m.Shares(); s.Zero < 0.99 {
		t.Errorf("%+v", s)
	}
}
