package proving

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/capture"
)

// childDir tells a pretended child where answers go, childEnd how it ends.
const (
	childDir = "CKAGENT_TEST_PROVING_DIR"
	childEnd = "CKAGENT_TEST_PROVING_END"
)

// pretend is a child that makes no trial.
func pretend() error {
	p := New(nil)
	p.dir = os.Getenv(childDir)
	var end error
	switch os.Getenv(childEnd) {
	case "late":
		end = errTooFew
	case "failed":
		return errors.New("last words")
	case "hangs":
		_, err := io.Copy(io.Discard, os.Stdin)
		return errors.Join(err, os.WriteFile(p.dir, nil, 0o600)) // it ended by itself
	}
	p.try = func(context.Context, []string, way, effort) (uint64, error) { return 0, end }
	_, err := p.All(context.Background(), ByAuto)
	return err
}

// TestApart: what a child finds out is known afterwards; what it did not is told.
func TestApart(t *testing.T) {
	for _, c := range []struct {
		end, says string
		untried   bool
	}{{"", "<nil>", false}, {"late", "not tried", true}, {"failed", "last words", false}} {
		p := prover(t)
		t.Setenv(childDir, p.dir)
		t.Setenv(childEnd, c.end)
		err := p.Apart(t.Context())
		if !strings.Contains(fmt.Sprint(err), c.says) || errors.Is(err, capture.ErrUntried) != c.untried {
			t.Errorf("%q: %v", c.end, err)
		}
		for _, kind := range kinds {
			if known := p.Known(ByAuto, kind); (known == nil) != (c.end == "") {
				t.Errorf("%q: known %v", c.end, known)
			}
		}
		if err == nil { // nothing is left to do
			t.Setenv(childEnd, "failed")
			if err := p.Apart(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestApartIsGivenUp: the child ends when it is no longer wanted.
func TestApartIsGivenUp(t *testing.T) {
	p := prover(t)
	t.Setenv(childDir, p.dir)
	t.Setenv(childEnd, "hangs")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Apart(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), endPatience/50)
	defer cancel()
	if err := p.Apart(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if _, err := os.Stat(p.dir); err != nil {
		t.Errorf("the child was killed: %v", err)
	}
}
