package vmtest

import (
	"strings"
	"testing"
)

func lines(texts ...string) string {
	var b strings.Builder
	for _, s := range texts {
		b.WriteString(s + " *" + sum(s) + "\n")
	}
	return b.String()
}

func ws(w, bad string) string {
	return "WS w=" + w + " bad=" + bad + " seq=1 v=" + w + " sweeps=0 late=0 mono_us=1"
}

func TestReportCheck(t *testing.T) {
	good := lines("TICK 4 mono_us=1", ws("8", "0"), "TICK 5 mono_us=2", ws("12", "0"))
	for _, tc := range []struct {
		name, log, want string // want: part of the error, "" for none
	}{
		{"good", good, ""},
		{"kernel text is no report", "[    1.0] random: crng init done\n" + good, ""},
		{"last line cut off", good + "TICK 6 mono", ""},
		{"first line is the second half of one", "4 mono_us=1 *abcd\n" + good, ""},
		{"first line mangled and another", "4 mono_us=1 *abcd\n" + good + "TICK 6 mono_us=3 *0000\n", "mangled"},
		{"a line in the middle mangled", good + "TICK 6 mono_us=3 *0000\n", "mangled"},
		{"bad page", good + lines(ws("16", "1")), "wrong in 1 places"},
		{"bad without a number yet", good + lines("BAD kind=torn page=1"), "kind=torn"},
		{"tick missing", good + lines("TICK 7 mono_us=3"), "tick 7 follows tick 5"},
		{"tick repeated", good + lines("TICK 5 mono_us=3"), "tick 5 follows tick 5"},
		{"writes go back", good + lines(ws("8", "0")), "w went back from 12 to 8"},
		{"clock goes back", good + lines("TICK 6 mono_us=1"), "mono_us went back"},
		{"panic", good + "Kernel panic - not syncing\n", "Kernel panic"},
		{"oops", good + "BUG: unable to handle page fault\n", "in trouble"},
		{"bad file", good + lines("FILES wrote=3 checked=2 bad=1"), "files are wrong"},
		{"not a number", good + lines("WS w=x bad=0 seq=1 v=1 sweeps=0 late=0 mono_us=1"), "no number w"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := ParseReport(tc.log).Check()
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestReportNumbers(t *testing.T) {
	r := ParseReport(lines("WSREADY pages=100 members=4", "READY mono_us=1", "TICK 0 mono_us=1", ws("4", "0"), "TICK 1 mono_us=2",
		ws("40", "0"), "GAP max_us=1500 laps=1 beats=0", "GAP max_us=300 laps=2 beats=0"))
	if !r.Ready || r.WSPages != 100 || r.FirstWrites != 4 || r.Writes != 40 || r.Ticks != 2 || r.LastTick != 1 || r.LongestGap.Microseconds() != 1500 {
		t.Fatalf("%+v", r)
	}
}

func FuzzReport(f *testing.F) {
	f.Add(lines("TICK 4 mono_us=1", ws("8", "0")))
	f.Add("TICK *0000\nWS\nFILES *1234\n" + lines("TICK", "FILES", "ECHO", "GAP", "WS"))
	f.Fuzz(func(t *testing.T, log string) {
		r := ParseReport(log)
		_ = r.Check()
		if len(r.SeqErrors) > maxList || len(r.Mangled) > maxList {
			t.Fatal("unbounded")
		}
	})
}
