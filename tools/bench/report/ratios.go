package report

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"sort"
	"strconv"
	"strings"
)

// Ratio is one line of the table for machines.
type Ratio struct {
	ID         string
	Ratio      float64
	Ours, Peer float64
	N          int
	// LargerIsBetter is set for throughputs: a ratio that fell got worse.
	LargerIsBetter bool
}

const ratioHeader = "id\tratio\tours\tpeer\tn\tlarger_is_better"

// Ratios are the comparable rows: those with a ratio.
func Ratios(rows []Row) (out []Ratio) {
	for _, r := range rows {
		if v := r.Ratio(); !math.IsNaN(v) && !math.IsInf(v, 0) {
			out = append(out, Ratio{r.ID, v, r.Ours, r.Peer, r.N, r.Unit == PerSecond || r.Goal.AtLeast})
		}
	}
	return out
}

// WriteTSV writes ratios as tab-separated values with a header.
func WriteTSV(w io.Writer, ratios []Ratio) error {
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, ratioHeader)
	for _, r := range ratios {
		fmt.Fprintf(b, "%s\t%.4g\t%.6g\t%.6g\t%d\t%t\n", r.ID, r.Ratio, r.Ours, r.Peer, r.N, r.LargerIsBetter)
	}
	return b.Flush()
}

// ReadTSV reads what WriteTSV wrote.
func ReadTSV(r io.Reader) (out []Ratio, err error) {
	s := bufio.NewScanner(r)
	for line := 1; s.Scan(); line++ {
		if line == 1 {
			if s.Text() != ratioHeader {
				return nil, fmt.Errorf("line 1 is %q, want %q", s.Text(), ratioHeader)
			}
			continue
		}
		f := strings.Split(s.Text(), "\t")
		if len(f) != 6 {
			return nil, fmt.Errorf("line %d: %d fields, want 6", line, len(f))
		}
		v := Ratio{ID: f[0]}
		var errs [5]error
		v.Ratio, errs[0] = strconv.ParseFloat(f[1], 64)
		v.Ours, errs[1] = strconv.ParseFloat(f[2], 64)
		v.Peer, errs[2] = strconv.ParseFloat(f[3], 64)
		v.N, errs[3] = strconv.Atoi(f[4])
		v.LargerIsBetter, errs[4] = strconv.ParseBool(f[5])
		for _, err := range errs {
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", line, err)
			}
		}
		out = append(out, v)
	}
	return out, s.Err()
}

// Change is how a ratio moved between two runs.
type Change struct {
	ID       string
	Old, New float64
	Worse    float64 // share by which it got worse: 0.2 is 20 %; negative: better
}

// compared is how many rounds make a ratio that is compared with another run's: of fewer
// each is chance for the most part, such as that of the single first checkpoint of a guest.
const compared = 3

// Compare returns the changes of the ratios that both runs have, of enough rounds each, the
// worst first; few is how many have too few.
func Compare(old, now []Ratio) (out []Change, few int) {
	byID := map[string]Ratio{}
	for _, r := range old {
		byID[r.ID] = r
	}
	for _, r := range now {
		o, ok := byID[r.ID]
		if !ok || o.Ratio <= 0 || r.Ratio <= 0 {
			continue
		}
		if min(o.N, r.N) < compared {
			few++
			continue
		}
		worse := r.Ratio/o.Ratio - 1
		if r.LargerIsBetter {
			worse = o.Ratio/r.Ratio - 1
		}
		out = append(out, Change{r.ID, o.Ratio, r.Ratio, worse})
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Worse > out[j].Worse })
	return out, few
}
