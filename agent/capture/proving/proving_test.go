package proving

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

// The test binary plays the helpers when it is started as one of them.
func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == capture.FaultServerVerb:
		err = faultserver.Main(faultserver.Deps{Take: take, OpenControl: beat})
	case len(os.Args) > 1 && os.Args[1] == SubjectVerb:
		err = Subject(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == Verb:
		err = pretend()
	default:
		goleak.VerifyTestMain(m)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func take(pid int, _ []int) (*os.File, error) {
	f, _, err := inject.Userfaultfd(context.Background(), pid, inject.Options{})
	return f, err
}

func beat(f *os.File) (func(), error) {
	c, err := guardian.OpenControl(f)
	if err != nil {
		return nil, err
	}
	return c.BeatServer, nil
}

// prover makes real trials, with answers of its own.
func prover(t *testing.T) *Prover {
	p := New(nil)
	p.dir = filepath.Join(t.TempDir(), "run")
	return p
}

// TestAll: on this host the engine is proved for both kinds of RAM under both accelerators.
// Of several who ask at once one makes the trial, and all get its answer.
func TestAll(t *testing.T) {
	p := prover(t)
	p.efforts = []effort{{20 * time.Second, 0}, {time.Minute, 0}} // beside other tests, which are no guests
	answers := make([][]Path, 3)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			var err error
			if answers[i], err = p.All(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for i, path := range answers[0] {
		t.Logf("%+v", path)
		if path.Outcome != Proved {
			t.Errorf("%+v", path)
		}
		for _, other := range answers[1:] {
			if other[i] != path {
				t.Errorf("two trials: %+v and %+v", path, other[i])
			}
		}
	}
	for _, kind := range kinds {
		for _, accel := range []string{ByAuto, KVM} {
			if err := p.Known(accel, kind); err != nil {
				t.Error(err)
			}
		}
	}
	if left, err := filepath.Glob(filepath.Join(p.dir, "*")); err != nil || len(left) != 4 {
		t.Errorf("files %q, %v: want one for each path", left, err)
	}
}

// TestSubjectThatCannotBegin says why, and one that has not the time is no failure.
func TestSubjectThatCannotBegin(t *testing.T) {
	w := wayOf(ByAuto, source.Anonymous)
	if _, err := startSubject(t.Context(), []string{"/bin/echo", `{"error":"no such thing"}`}, w, 0); find(err) != doubtful || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("%v", err)
	}
	p := prover(t)
	if _, err := p.once(t.Context(), w, effort{patience: time.Microsecond}); find(err) != late {
		t.Errorf("out of time: %v", err)
	}
}

// TestComparison: a comparison with another memory fails.
func TestComparison(t *testing.T) {
	w := wayOf(ByAuto, source.Anonymous)
	c := newComparison(w, make([]byte, w.pages*pageBytes))
	c.want[7*pageBytes+99] = 1
	data := make([]byte, 2*pageBytes)
	if err := c.compare(recordOf(5, 2, data)); err != nil {
		t.Error(err)
	}
	for _, r := range []struct {
		first, pages uint64
		says         string
	}{{7, 1, "not what it was"}, {6, 1, "twice"}, {uint64(w.pages), 1, "does not exist"}} {
		if err := c.compare(recordOf(r.first, r.pages, data)); find(err) != wrong || !strings.Contains(err.Error(), r.says) {
			t.Errorf("page %d: %v", r.first, err)
		}
	}
	if err := c.whole(); find(err) != wrong {
		t.Errorf("whole with pages missing: %v", err)
	}
	for page := range c.seen {
		c.seen[page] = true
	}
	if err := c.whole(); find(err) != late {
		t.Errorf("with nothing that came by the ring: %v", err)
	}
}

func recordOf(first, pages uint64, data []byte) arena.Record {
	return arena.Record{First: first, Pages: pages, Data: data[:pages*pageBytes], Origin: arena.ByFault}
}
