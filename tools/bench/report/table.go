package report

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Unit says how a value is printed.
type Unit int

const (
	Nanoseconds Unit = iota
	Percent          // a share: 0.2 is 20 %
	PerSecond        // bytes per second
	Bytes
	Count
	Seconds // of processor time
)

// Goal is what a row is held against: a bound on the ratio (ours / peer) or on
// our own value. The zero Goal is none.
type Goal struct {
	Text    string  // as shown
	Ratio   float64 // most (or, with AtLeast, least) of ours / peer; 0: not bounded
	Value   float64 // most (or least) of ours, in the unit; 0: not bounded
	AtLeast bool
	Slack   float64 // ours / peer may exceed by this absolute amount of the unit: ours <= Ratio*peer + Slack
}

// Row is one comparison.
type Row struct {
	ID       string // stable: key of the ratio table
	Group    string // heading
	What     string
	Unit     Unit
	Ours     float64 // NaN: not measured
	Peer     float64 // NaN: none
	PeerName string
	Goal     Goal
	N        int // samples behind the smaller side
}

// Ratio is ours / peer; NaN if either is missing or the peer is zero.
func (r Row) Ratio() float64 {
	if r.Peer == 0 {
		return math.NaN()
	}
	return r.Ours / r.Peer
}

// Verdict of a row.
type Verdict string

const (
	Met    Verdict = "yes"
	Missed Verdict = "**no**"
	Open   Verdict = "–" // no goal, or not measured
)

// Met tells whether the goal was reached. Every bound the goal has must hold.
func (r Row) Met() Verdict {
	g := r.Goal
	if (g.Ratio == 0 && g.Value == 0) || math.IsNaN(r.Ours) || (g.Ratio != 0 && math.IsNaN(r.Peer)) {
		return Open
	}
	ok := true
	if g.Ratio != 0 {
		if bound := g.Ratio*r.Peer + g.Slack; g.AtLeast {
			ok = ok && r.Ours >= bound
		} else {
			ok = ok && r.Ours <= bound
		}
	}
	if g.Value != 0 {
		if g.AtLeast {
			ok = ok && r.Ours >= g.Value
		} else {
			ok = ok && r.Ours <= g.Value
		}
	}
	if ok {
		return Met
	}
	return Missed
}

// Text prints a value of a unit with three digits or so.
func (u Unit) Text(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	switch u {
	case Nanoseconds:
		return duration(v)
	case Percent:
		return strconv.FormatFloat(v*100, 'f', 1, 64) + " %"
	case PerSecond:
		return digits(v/1e6) + " MB/s"
	case Bytes:
		return digits(v/(1<<20)) + " MiB"
	case Seconds:
		return digits(v) + " s"
	default:
		return digits(v)
	}
}

func duration(ns float64) string {
	switch d := time.Duration(math.Abs(ns)); {
	case d < 10*time.Microsecond:
		return digits(ns/1e3) + " µs"
	case d < time.Millisecond:
		return digits(ns/1e3) + " µs"
	case d < time.Second:
		return digits(ns/1e6) + " ms"
	default:
		return digits(ns/1e9) + " s"
	}
}

func digits(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a < 10:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case a < 100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	default:
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
}

// Markdown prints rows as tables, one for each group, in order.
func Markdown(rows []Row) string {
	var b strings.Builder
	group := ""
	for i, r := range rows {
		if i == 0 || r.Group != group {
			group = r.Group
			fmt.Fprintf(&b, "\n### %s\n\n| what | ckagent | peer | ratio | goal | met? | n |\n|---|---:|---:|---:|---|---|---:|\n", group)
		}
		peer := r.Unit.Text(r.Peer)
		if r.PeerName != "" && !math.IsNaN(r.Peer) {
			peer += " (" + r.PeerName + ")"
		}
		ratio := "–"
		if v := r.Ratio(); !math.IsNaN(v) {
			ratio = digits(v)
		}
		goal := r.Goal.Text
		if goal == "" {
			goal = "–"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %d |\n", r.What, r.Unit.Text(r.Ours), peer, ratio, goal, r.Met(), r.N)
	}
	return b.String()
}

// Goals are the rows that are held against a goal, as one group.
func Goals(rows []Row) (out []Row) {
	for _, r := range rows {
		if r.Goal.Text != "" {
			r.What, r.Group = r.Group+": "+r.What, "Against the goals"
			out = append(out, r)
		}
	}
	return out
}

// Splice replaces what lies between the two marker lines of a document. Without
// the markers it says so rather than guess where the table belongs.
func Splice(document, begin, end, content string) (string, error) {
	i := strings.Index(document, begin)
	j := strings.Index(document, end)
	if i < 0 || j < i {
		return "", fmt.Errorf("no %q followed by %q in the document", begin, end)
	}
	return document[:i+len(begin)] + "\n" + strings.Trim(content, "\n") + "\n" + document[j:], nil
}
