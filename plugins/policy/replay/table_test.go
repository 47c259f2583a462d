package replay

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

var update = flag.Bool("update", false, "write the tables of docs/policies.md again")

// The bounds of auto's intervals by default: it is held against what is best within them.
const (
	shortest = 10 * time.Second
	longest  = 15 * time.Minute
)

// worse is how much more auto may cost than the best fixed interval, known in hindsight.
const worse = 1.10

func replayed(t *testing.T, trace []*policy.Signals, name string, m Model) *Result {
	t.Helper()
	p, err := shipped.All[name](nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), trace, InProcess{p}, m)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return r
}

// outcome is what auto and the best fixed interval cost on a trace.
type outcome struct {
	trace      []*policy.Signals
	auto, best *Result
	interval   time.Duration
}

// outcomes are known, once they were asked for, by the names of the traces.
var outcomes = map[string]outcome{}

func (s scenario) outcome(t *testing.T) outcome {
	t.Helper()
	if o, known := outcomes[s.name]; known {
		return o
	}
	o := outcome{trace: s.trace(t)}
	var err error
	if o.best, o.interval, err = BestFixed(t.Context(), o.trace, s.model, shortest, longest); err != nil {
		t.Fatal(err)
	}
	o.auto = replayed(t, o.trace, shipped.Default, s.model)
	outcomes[s.name] = o
	return o
}

// TestAuto: on no trace does auto cost a tenth more than the best fixed interval, and on
// traces of a guest that changes it costs less. The interval is the best in hindsight,
// within the same bounds.
func TestAuto(t *testing.T) {
	for _, s := range slices.Concat(recorded, tuning, heldBack) {
		t.Run(s.name, func(t *testing.T) {
			o := s.outcome(t)
			ratio := o.auto.Cost / o.best.Cost
			t.Logf("%d checkpoints, %.3f times the cost of one every %v", len(o.auto.Checkpoints), ratio, o.interval.Round(time.Second))
			if ratio > worse || s.mixed && ratio > 1 {
				t.Errorf("auto costs %.2f times what the best fixed interval does", ratio)
			}
		})
	}
}

// TestBeginnings: where in its phases a guest is when its protection begins makes no
// difference to that.
func TestBeginnings(t *testing.T) {
	for _, s := range tuning {
		trace := s.trace(t)
		for _, from := range []int{7, 22, 37, 53} {
			part := trace[from : len(trace)-60+from]
			best, interval, err := BestFixed(t.Context(), part, s.model, shortest, longest)
			if err != nil {
				t.Fatal(err)
			}
			if ratio := replayed(t, part, shipped.Default, s.model).Cost / best.Cost; ratio > worse {
				t.Errorf("%s from minute %d on: auto costs %.2f times what %v does", s.name, from, ratio, interval)
			}
		}
	}
}

const document = "../../../docs/policies.md"

const begin, end = "<!-- tables: go test ./plugins/policy/replay -run TestTables -update -->\n", "<!-- end of tables -->\n"

// TestTables: the tables in the document are those that the replay makes.
func TestTables(t *testing.T) {
	b, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(b), begin)
	was, after, ended := strings.Cut(rest, end)
	if !ok || !ended {
		t.Fatalf("%s: no place for the tables", document)
	}
	is := tables(t)
	if *update {
		if err := os.WriteFile(document, []byte(before+begin+is+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if was != is {
		t.Errorf("%s is of another replay: run it with -update", document)
	}
}

func tables(t *testing.T) string {
	var b strings.Builder
	for _, s := range recorded {
		o := s.outcome(t)
		fmt.Fprintf(&b, "\nRecorded, `%s`: %s.\n\n", s.name, s.what)
		b.WriteString("| policy | checkpoints | overhead | expected loss | together | of the best fixed | lost at a failure | at worst |\n|---|---|---|---|---|---|---|---|\n")
		row := func(name string, r *Result) {
			fmt.Fprintf(&b, "| %s | %d | %.4f %% | %.4f %% | %.4f %% | %.2f | %.1f s | %.1f s |\n", name, len(r.Checkpoints), 100*r.Overhead,
				100*r.Exposure, 100*r.Cost, r.Cost/o.best.Cost, float64(r.MeanLossNS)/1e9, float64(r.MaxLossNS)/1e9)
		}
		for _, name := range slices.Sorted(maps.Keys(shipped.All)) {
			row("`"+name+"`", replayed(t, o.trace, name, s.model))
		}
		row("fixed, every "+o.interval.Round(time.Second).String()+": the best", o.best)
	}
	b.WriteString("\nMade, those that constants were chosen by, and drawn at random, held back from that:\n\n")
	b.WriteString("| trace | guest | best fixed interval | it costs | `auto` costs | of it | of the best without a bound |\n|---|---|---|---|---|---|---|\n")
	for _, s := range slices.Concat(tuning, heldBack) {
		o := s.outcome(t)
		free := o.best
		if longer, _, err := BestFixed(t.Context(), o.trace, s.model, longest, 24*time.Hour); err != nil {
			t.Fatal(err)
		} else if longer.Cost < free.Cost {
			free = longer
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %.4f %% | %.4f %% | %.2f | %.2f |\n", s.name, s.what, o.interval.Round(time.Second), 100*o.best.Cost, 100*o.auto.Cost,
			o.auto.Cost/o.best.Cost, o.auto.Cost/free.Cost)
	}
	return b.String()
}
