package proving

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

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
	case len(os.Args) > 3 && os.Args[1] == Verb:
		err = Subject(os.Args[2], os.Args[3])
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

// TestLoad: on this host the engine is proved for both kinds of RAM; the answer is kept
// for this boot and this binary, and for no other.
func TestLoad(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "run")
	// Several at once: one makes the trial, and all get its answer.
	reports := make([]*Report, 3)
	var wg sync.WaitGroup
	for i := range reports {
		wg.Go(func() {
			var err error
			if reports[i], err = loadFrom(t.Context(), dir, []string{self}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	r := reports[0]
	for _, other := range reports[1:] {
		if other.Paths[0].TookNS != r.Paths[0].TookNS {
			t.Errorf("two trials: %+v and %+v", r.Paths[0], other.Paths[0])
		}
	}
	file := fileOf(dir, r.Binary)
	for _, p := range r.Paths {
		t.Logf("%+v", p)
	}
	for _, kind := range []source.Kind{source.Anonymous, source.Shared} {
		for _, accel := range []string{"tcg", "kvm"} {
			if err := r.Proven(accel, kind); err != nil {
				t.Error(err)
			}
		}
	}
	for accel, kind := range map[string]source.Kind{"xen": source.Anonymous, "tcg": source.PrivateFile} {
		if err := r.Proven(accel, kind); err == nil || !strings.Contains(err.Error(), accel) {
			t.Errorf("%s, kind %d: %v", accel, kind, err)
		}
	}
	// What is written down is believed.
	r.Paths[0].OK, r.Paths[0].Detail = false, "made up"
	if err := write(file, r); err != nil {
		t.Fatal(err)
	}
	again, err := loadFrom(t.Context(), dir, []string{self})
	if err != nil || again.Paths[0].OK || again.Proven("tcg", source.Anonymous) == nil {
		t.Errorf("%+v, %v", again, err)
	}
	for _, change := range []func(r *Report){func(r *Report) { r.BootID = "x" }, func(r *Report) { r.Binary = "x" }, func(r *Report) { r.Schema = "x" }} {
		old := *r
		change(&old)
		b, err := json.Marshal(&old)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if kept, err := read(file); err != nil || kept.Paths[0].OK {
			t.Fatalf("%+v, %v", kept, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // so that a new trial shows by its end
		if r, err := loadFrom(ctx, dir, []string{self}); err == nil {
			t.Errorf("believed: %+v", r)
		}
	}
}

// TestWrongByteIsSeen: a comparison with another memory fails.
func TestComparison(t *testing.T) {
	w := wayOf("tcg", source.Anonymous)
	c := newComparison(w, make([]byte, w.pages*pageBytes))
	c.want[7*pageBytes+99] = 1
	data := make([]byte, 2*pageBytes)
	if err := c.compare(record(5, 2, data)); err != nil {
		t.Error(err)
	}
	for _, r := range []struct {
		first, pages uint64
		says         string
	}{{7, 1, "not what it was"}, {6, 1, "twice"}, {uint64(w.pages), 1, "does not exist"}} {
		if err := c.compare(record(r.first, r.pages, data)); err == nil || !strings.Contains(err.Error(), r.says) {
			t.Errorf("page %d: %v", r.first, err)
		}
	}
	if err := c.whole(); err == nil {
		t.Error("whole with pages missing")
	}
}

func record(first, pages uint64, data []byte) arena.Record {
	return arena.Record{First: first, Pages: pages, Data: data[:pages*pageBytes], Origin: arena.ByFault}
}
