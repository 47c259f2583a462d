package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestQuantiles(t *testing.T) {
	s := Samples{5, 1, 3}
	if s.Median() != 3 || s.Max() != 5 || s.Quantile(0.25) != 2 {
		t.Errorf("median %v, max %v, quarter %v", s.Median(), s.Max(), s.Quantile(0.25))
	}
	if !math.IsNaN(Samples(nil).Median()) {
		t.Error("no samples have a median")
	}
	if s[0] != 5 {
		t.Error("the order of the samples was changed")
	}
	var f Figures
	f.Add("b", 1)
	f.Add("a", 2)
	f.Add("b", math.NaN())
	f.Add("b", 3)
	if diff := cmp.Diff([]string{"b", "a"}, f.Names()); diff != "" || f.Get("b").Median() != 2 || f.Get("c") != nil {
		t.Errorf("names %v, b %v", f.Names(), f.Get("b"))
	}
}

func TestVerdicts(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		ours, peer float64
		goal       Goal
		want       Verdict
	}{
		{1, 2, Goal{}, Open},
		{1, 2, Goal{Ratio: 0.5}, Met},
		{1.01, 2, Goal{Ratio: 0.5}, Missed},
		{6, 2, Goal{Ratio: 1, Slack: 4}, Met},
		{6.1, 2, Goal{Ratio: 1, Slack: 4}, Missed},
		{0.7, 1, Goal{Ratio: 0.7, AtLeast: true}, Met},
		{0.6, 1, Goal{Ratio: 0.7, AtLeast: true}, Missed},
		{9, nan, Goal{Value: 10}, Met},
		{11, nan, Goal{Value: 10}, Missed},
		{nan, 1, Goal{Value: 10}, Open},
		{1, nan, Goal{Ratio: 1}, Open},
		{0, 5, Goal{Ratio: 0.5}, Met},
		{3, 10, Goal{Ratio: 0.5, Value: 2}, Missed},
	} {
		if got := (Row{Ours: c.ours, Peer: c.peer, Goal: c.goal}).Met(); got != c.want {
			t.Errorf("%v against %v with %+v: %s, want %s", c.ours, c.peer, c.goal, got, c.want)
		}
	}
}

func TestMarkdownAndSplice(t *testing.T) {
	rows := []Row{
		{ID: "a", Group: "one", What: "pause", Ours: 2.5e6, Peer: 5e6, PeerName: "peer", Goal: Goal{Text: "half", Ratio: 0.5}, N: 3},
		{ID: "b", Group: "two", What: "left", Unit: Percent, Ours: 0.125, Peer: math.NaN(), N: 1},
	}
	got := Markdown(rows)
	for _, want := range []string{"### one", "### two", "| pause | 2.50 ms | 5.00 ms (peer) | 0.50 | half | yes | 3 |", "| left | 12.5 % | – | – | – | – | 1 |"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	if g := Goals(rows); len(g) != 1 || g[0].What != "one: pause" || rows[0].What != "pause" {
		t.Errorf("goals %+v", g)
	}
	doc, err := Splice("top\n<!-- a -->\nold\n<!-- b -->\nend\n", "<!-- a -->", "<!-- b -->", "new")
	if err != nil || doc != "top\n<!-- a -->\nnew\n<!-- b -->\nend\n" {
		t.Errorf("%q, %v", doc, err)
	}
	if _, err := Splice("nothing", "a-", "-b", "new"); err == nil {
		t.Error("a document without markers was spliced")
	}
}

func TestRatiosRoundTripAndCompare(t *testing.T) {
	rows := []Row{
		{ID: "time", Ours: 1, Peer: 4, N: 3},
		{ID: "speed", Unit: PerSecond, Ours: 3, Peer: 4, N: 5},
		{ID: "once", Ours: 1, Peer: 4, N: 1},
		{ID: "alone", Ours: 3, Peer: math.NaN()},
		{ID: "zero", Ours: 3, Peer: 0},
	}
	var b bytes.Buffer
	if err := WriteTSV(&b, Ratios(rows)); err != nil {
		t.Fatal(err)
	}
	old, err := ReadTSV(&b)
	if err != nil || len(old) != 3 {
		t.Fatalf("%v, %v", old, err)
	}
	rows[0].Ours, rows[1].Ours, rows[2].Ours = 1.1, 2, 9
	got, few := Compare(old, Ratios(rows))
	if len(got) != 2 || few != 1 || got[0].ID != "speed" || math.Abs(got[0].Worse-0.5) > 1e-9 || math.Abs(got[1].Worse-0.1) > 1e-9 {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"x\n", ratioHeader + "\na\tb\n", ratioHeader + "\na\tb\t1\t1\t1\ttrue\n"} {
		if _, err := ReadTSV(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestChartIsWellFormed(t *testing.T) {
	for _, c := range []Chart{
		{Title: "a < b", Series: []Series{{Name: "x&y", Points: []Point{{1, 1}, {2, 1000}, {3, math.NaN()}, {4, 0}}}}},
		{Title: "spikes", Spikes: true, Series: []Series{{Name: "s", Points: []Point{{1, 5}}}}},
		{Title: "empty"},
	} {
		svg := c.SVG()
		for d := xml.NewDecoder(strings.NewReader(svg)); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v\n%s", c.Title, err, svg)
			}
		}
		if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
			t.Errorf("%s: a coordinate is no number:\n%s", c.Title, svg)
		}
	}
}
