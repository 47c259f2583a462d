package bench

import (
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/tools/vmtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == TouchVerb {
		if TouchMain(os.Args[2]) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func TestWorkIsInterpolated(t *testing.T) {
	t0 := time.Now()
	at := func(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }
	w := &workLog{}
	w.add(at(0), 100)
	w.add(at(100), 190)
	w.add(at(100), 200) // found together with the one before
	w.add(at(200), 500)
	if n, ok := w.between(at(50), at(150)); !ok || math.Abs(n-200) > 1e-6 {
		t.Errorf("%v, %v: want 350-150", n, ok)
	}
	for _, c := range [][2]int{{-1, 50}, {50, 201}} {
		if _, ok := w.between(at(c[0]), at(c[1])); ok {
			t.Errorf("reports do not cover %v", c)
		}
	}
}

func TestUsualGapIsTheMedian(t *testing.T) {
	t0 := time.Now()
	var beats []vmtest.Beat
	for _, us := range []int{0, 250, 500, 20500, 20750} {
		beats = append(beats, vmtest.Beat{At: t0.Add(time.Duration(us) * time.Microsecond)})
	}
	if got := usualGap(beats); got != 250*time.Microsecond {
		t.Error(got)
	}
	if got := usualGap(beats[:1]); got != 0 {
		t.Error(got)
	}
}

func TestWorkLogFollowsAConsole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("WS w=1 bad=0 *0000\n"); err != nil {
		t.Fatal(err)
	}
	w := followWork(path)
	defer w.close()
	deadline := time.Now().Add(10 * time.Second)
	for n := 0; ; n++ {
		// What it may have read of the file before this is unknown: write until it
		// has stamped two moments.
		if _, err := f.WriteString("noise\r\nWS w=5 bad=0 seq=1 *0123\r\nWS w=7 cut"); err != nil {
			t.Fatal(err)
		}
		if err := wait(t.Context(), followEvery); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("\n"); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		marks := slices.Clone(w.marks)
		w.mu.Unlock()
		if len(marks) >= 2 {
			for _, m := range marks {
				if m.pages != 5 {
					t.Errorf("a mark of %v pages", m.pages)
				}
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no report was stamped")
		}
	}
}

func TestPartsAreChosen(t *testing.T) {
	names := PartNames()
	for _, want := range []string{"faults/missing", "faults/write", "resume", "restore/1g", "checkpoint/1g-huge", "disk", "afterwards"} {
		if !slices.Contains(names, want) {
			t.Errorf("no part %s in %v", want, names)
		}
	}
	o := Options{Only: []string{"checkpoint", "restore/1g"}}
	for name, want := range map[string]bool{"checkpoint/3g-4k": true, "restore/1g": true, "restore/3g": false, "resume": false} {
		if o.wants(name) != want {
			t.Errorf("%s chosen: %v", name, !want)
		}
	}
	if _, err := Run(t.Context(), Options{Only: []string{"nonsense"}}); err == nil {
		t.Error("a part that is not there was measured")
	}
}

// The switch is inherited by what is started, and taken back here.
func TestHugePagesAreSwitchedOffForTheChild(t *testing.T) {
	enabled := func() string {
		out, err := exec.Command("cat", "/proc/self/status").Output()
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`THP_enabled:\s*(\d)`).FindSubmatch(out)
		if m == nil {
			t.Skip("this kernel does not tell THP_enabled")
		}
		return string(m[1])
	}
	for _, allow := range []bool{true, false, true} {
		var got string
		if err := withHugePages(allow, func() error { got = enabled(); return nil }); err != nil {
			t.Fatal(err)
		}
		if want := map[bool]string{true: "1", false: "0"}[allow]; got != want {
			t.Errorf("allowed %v: THP_enabled %s", allow, got)
		}
	}
}

func TestKeyValues(t *testing.T) {
	f, err := keyValues("kind=write wait=poll faults=10 median_ns=5000 total_ns=7 x")
	if err != nil || f["median_ns"] != 5000 || f["faults"] != 10 {
		t.Errorf("%v, %v", f, err)
	}
	if _, err := keyValues("nothing"); err == nil {
		t.Error("a line without figures was read")
	}
}

func TestStepsAreFoundInTheLog(t *testing.T) {
	m := stepLine.FindStringSubmatch(`time=2026-01-01T00:00:00.000Z level=DEBUG msg=prearm detail="RAM is protected" took=3ms`)
	if m == nil || m[1] != "prearm" {
		t.Errorf("%q", m)
	}
}

func TestProfileShowsEveryStage(t *testing.T) {
	tab := stageTable{title: "a guest"}
	tab.add(0, []stage{{"one", 1e6}})
	tab.add(1, []stage{{"one", 2e6}, {"two", 5e3}})
	tab.add(2, []stage{{"one", 4e6}, {"two", 5e3}})
	got := profileMarkdown([]stageTable{tab})
	for _, want := range []string{"### a guest", "| one | 1.00 ms | 3.00 ms | 4.00 ms |", "| two | – | 5.00 µs | 5.00 µs |"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
}

// The peer really serves: a page read through it is the file's.
func TestTouchThroughThePeer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("userfaultfd needs privilege here")
	}
	raw := filepath.Join(t.TempDir(), "raw")
	const pages = 64
	content := make([]byte, pages*pageBytes)
	var sum byte
	for p := range pages {
		content[p*pageBytes] = byte(3*p + 1)
		sum += byte(3*p + 1)
	}
	if err := os.WriteFile(raw, content, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, err := touchPeer(ctx, touchSpec{Pages: pages, Touches: pages, Raw: raw})
	if err != nil {
		t.Fatal(err)
	}
	if got.Sum != sum || got.P50NS <= 0 || got.P99NS < got.P50NS {
		t.Errorf("%+v, want the sum %d", got, sum)
	}
}

func TestWriteSpeedWritesAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	const n = 3<<20 + 4096
	v, err := writeSpeed(t.Context(), path, n, true)
	if err != nil || v <= 0 {
		t.Fatalf("%v, %v", v, err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != n {
		t.Errorf("%v, %v", st, err)
	}
}
