package proving

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/flock"
)

// scripted is a prover whose trials end as given, one after the other.
func scripted(t *testing.T, ends ...error) (p *Prover, made *int) {
	p, made = prover(t), new(int)
	p.try = func(_ context.Context, _ []string, _ way, e effort) (uint64, error) {
		if e != efforts[*made%len(efforts)] {
			t.Errorf("trial %d with %+v", *made, e)
		}
		*made++
		return 7, ends[*made-1]
	}
	return p, made
}

func files(t *testing.T, p *Prover) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(p.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestOutcomes: what is wrong is so at once; what may be the host's fault is, if it comes
// again; what ran out of time says nothing, and nothing is written down.
func TestOutcomes(t *testing.T) {
	server := func(f faultserver.Failure) error { return fmt.Errorf("x: %w", &faultserver.Error{Failure: f}) }
	bad := fmt.Errorf("%w: page 3", errWrong)
	few := fmt.Errorf("%w: 3", errTooFew)
	patience := errors.Join(context.DeadlineExceeded, os.ErrDeadlineExceeded)
	refused := server(faultserver.Unsupported)
	for _, c := range []struct {
		name string
		ends []error
		want Outcome
	}{
		{"at once", []error{nil}, Proved},
		{"after two busy ones", []error{patience, few, nil}, Proved},
		{"after a doubt", []error{server(faultserver.Unproven), nil}, Proved},
		{"a wrong page", []error{bad}, Refuted},
		{"a wrong page, out of time", []error{errors.Join(bad, patience)}, Refuted},
		{"a wrong page late", []error{patience, patience, bad}, Refuted},
		{"refused", []error{refused, refused}, Refuted},
		{"no right", []error{unix.EPERM, patience, unix.EPERM}, Refuted},
		{"seen by nobody", []error{server(faultserver.Unproven), server(faultserver.Unproven)}, Refuted},
		{"killed once", []error{server(faultserver.Broken), patience, few}, Inconclusive},
		{"out of time", []error{patience, patience, patience}, Inconclusive},
		{"by its own limits", []error{server(faultserver.Silent), server(faultserver.Stalled), server(faultserver.Aborted)}, Inconclusive},
		{"too few", []error{few, few, few}, Inconclusive},
	} {
		p, made := scripted(t, c.ends...)
		err := p.Prove(t.Context(), ByAuto, source.Shared)
		known := p.Known(ByAuto, source.Shared)
		if *made != len(c.ends) {
			t.Errorf("%s: %d trials, want %d", c.name, *made, len(c.ends))
		}
		if c.want == Inconclusive {
			if !errors.Is(err, capture.ErrUntried) || !errors.Is(known, capture.ErrUntried) || len(files(t, p)) > 0 {
				t.Errorf("%s: %v, known %v, files %q", c.name, err, known, files(t, p))
			}
			continue
		}
		if (err == nil) != (c.want == Proved) || errors.Is(err, capture.ErrUntried) || len(files(t, p)) != 1 {
			t.Errorf("%s: %v, files %q", c.name, err, files(t, p))
		}
		if fmt.Sprint(known) != fmt.Sprint(err) {
			t.Errorf("%s: known is %v, not %v", c.name, known, err)
		}
		if err := p.Known(ByAuto, source.Anonymous); !errors.Is(err, capture.ErrUntried) {
			t.Errorf("%s: of another path: %v", c.name, err)
		}
		if _ = p.Prove(t.Context(), ByAuto, source.Shared); *made != len(c.ends) {
			t.Errorf("%s: tried again", c.name)
		}
	}
}

// TestTriedAgain: what the host had no time for is tried anew by who asks next.
func TestTriedAgain(t *testing.T) {
	late := context.DeadlineExceeded
	p, made := scripted(t, late, late, late, nil)
	if err := p.Prove(t.Context(), KVM, source.Anonymous); !errors.Is(err, capture.ErrUntried) {
		t.Error(err)
	}
	if err := p.Prove(t.Context(), KVM, source.Anonymous); err != nil || *made != 4 {
		t.Errorf("%v after %d trials", err, *made)
	}
}

// TestPatience: a trial that does not end by itself is ended, and was no failure; one that
// its caller gave up says nothing at all.
func TestPatience(t *testing.T) {
	p, begun := prover(t), make(chan struct{}, len(efforts))
	p.try = func(ctx context.Context, _ []string, _ way, _ effort) (uint64, error) {
		begun <- struct{}{}
		<-ctx.Done()
		return 0, errors.New("interrupted")
	}
	if _, err := p.once(t.Context(), wayOf(KVM, source.Shared), effort{patience: time.Millisecond}); find(err) != late {
		t.Error(err)
	}
	<-begun
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // ends with the trial
		<-begun
		cancel()
	}()
	if err := p.Prove(ctx, KVM, source.Shared); !errors.Is(err, context.Canceled) || len(files(t, p)) > 0 {
		t.Errorf("%v, files %q", err, files(t, p))
	}
}

// TestNoSuchPath: for other accelerators and kinds of RAM there is no test.
func TestNoSuchPath(t *testing.T) {
	p, _ := scripted(t)
	for accel, kind := range map[string]source.Kind{"xen": source.Anonymous, ByAuto: source.PrivateFile} {
		for _, err := range []error{p.Known(accel, kind), p.Prove(t.Context(), accel, kind)} {
			if err == nil || errors.Is(err, capture.ErrUntried) || !strings.Contains(err.Error(), accel) {
				t.Errorf("%s, kind %d: %v", accel, kind, err)
			}
		}
	}
}

// TestBelieved: an answer holds for its boot and its binary alone.
func TestBelieved(t *testing.T) {
	p, made := scripted(t, fmt.Errorf("%w: page 3", errWrong))
	if err := p.Prove(t.Context(), ByAuto, source.Shared); err == nil {
		t.Fatal("a wrong page is right")
	}
	b, err := p.open(ByAuto, source.Shared)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(b.file)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []func(*written){func(w *written) { w.BootID = "x" }, func(w *written) { w.Binary = "x" }, func(w *written) { w.Schema = "x" }} {
		var w written
		if err := json.Unmarshal(text, &w); err != nil || w.Outcome != Refuted {
			t.Fatalf("%v: %s", err, text)
		}
		change(&w)
		other, err := json.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(b.file, other, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.Known(ByAuto, source.Shared); !errors.Is(err, capture.ErrUntried) {
			t.Errorf("believed: %s: %v", other, err)
		}
	}
	if *made != 1 {
		t.Errorf("%d trials", *made)
	}
}

// TestWaiting: whoever waits for another process's trial can be cancelled.
func TestWaiting(t *testing.T) {
	p, made := scripted(t)
	b, err := p.open(ByAuto, source.Anonymous)
	if err != nil {
		t.Fatal(err)
	}
	held, err := flock.Try(b.lock())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := p.Prove(ctx, ByAuto, source.Anonymous); !errors.Is(err, context.DeadlineExceeded) || *made != 0 {
		t.Errorf("%v after %d trials", err, *made)
	}
	if err := p.Known(ByAuto, source.Anonymous); !errors.Is(err, capture.ErrUntried) { // it does not wait
		t.Error(err)
	}
}

// TestSwept: builds that come and go do not fill the directory, and what is asked for stays.
func TestSwept(t *testing.T) {
	p := prover(t)
	p.try = func(context.Context, []string, way, effort) (uint64, error) { return 0, nil }
	if err := p.Prove(t.Context(), ByAuto, source.Anonymous); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for i := range maxFiles + 10 {
		path := filepath.Join(p.dir, fmt.Sprintf("%d-%s-shared.json", i, ByAuto))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Prove(t.Context(), ByAuto, source.Shared); err != nil {
		t.Fatal(err)
	}
	if n := len(files(t, p)); n > maxFiles || p.Known(ByAuto, source.Anonymous) != nil || p.Known(ByAuto, source.Shared) != nil {
		t.Errorf("%d files of at most %d", n, maxFiles)
	}
}
