package estimate

// Makeup is what the pages that are written consist of, as weighted shares of the
// pages that were looked at. It forgets slowly.
type Makeup struct {
	weight, zero, same, twin, small, stored float64
	pages                                   int
}

// Written is one page that was written in a window.
type Written struct {
	Weight    float64 // how many pages it stands for
	Zero      bool    // all its bytes are zero now
	Same      bool    // it holds what it held before: it was rewritten with the same content
	Duplicate bool    // another page that was looked at holds the same
	Stored    float64 // size after compression, relative to the page
}

// Shares are a Makeup's figures, each between 0 and 1.
type Shares struct {
	Pages      int     // pages looked at
	Zero       float64 // all zeros
	FalseDirty float64 // rewritten with the same content
	// Duplicate is a lower bound: only pages that were looked at are compared.
	Duplicate    float64
	Compressible float64 // compress to half their size or less
	Ratio        float64 // size after compression over size before, zero pages left out
}

// forget is what remains of a window's weight in the next.
const forget = 0.97

// Window begins a new window.
func (m *Makeup) Window() {
	for _, v := range []*float64{&m.weight, &m.zero, &m.same, &m.twin, &m.small, &m.stored} {
		*v *= forget
	}
}

// Add notes a page.
func (m *Makeup) Add(w Written) {
	m.pages++
	m.weight += w.Weight
	switch {
	case w.Zero:
		m.zero += w.Weight
	default:
		m.stored += w.Weight * w.Stored
		if w.Stored <= 0.5 {
			m.small += w.Weight
		}
		if w.Duplicate {
			m.twin += w.Weight
		}
	}
	if w.Same {
		m.same += w.Weight
	}
}

// Shares reports whether any page was seen, and the shares.
func (m *Makeup) Shares() (Shares, bool) {
	if m.weight <= 0 {
		return Shares{}, false
	}
	s := Shares{Pages: m.pages, Zero: m.zero / m.weight, FalseDirty: m.same / m.weight,
		Duplicate: m.twin / m.weight, Compressible: m.small / m.weight}
	if rest := m.weight - m.zero; rest > 0 {
		s.Ratio = m.stored / rest
	}
	return s, true
}
