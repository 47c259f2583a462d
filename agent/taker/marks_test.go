package taker

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/source"
)

// remark is what the pretending child does with marks: it goes on from those there are, or
// makes some.
func remark(o *Order) error {
	m, f := o.Capture.Track.Give()
	if f == nil {
		var err error
		if f, err = os.Open("/dev/null"); err != nil {
			return err
		}
	} else if _, err := fmt.Fprintf(f, "%s;", m.Checkpoint); err != nil {
		return errors.Join(err, f.Close())
	}
	*o.Capture.Track = *capture.Tracked(capture.Marks{Checkpoint: m.Checkpoint + "+", Blocks: []source.Block{{HVA: 1 << 40, Pages: 7}}}, f)
	return nil
}

// What a child keeps is the next one's, and the file is never open in two places.
func TestMarksGoFromChildToChild(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cfg := config(t, "vm")
	cfg.Track = capture.Tracked(capture.Marks{Checkpoint: "a"}, w)
	for _, want := range []string{"a+", "a++"} {
		if _, said, err := take(t.Context(), cfg); err != nil || said != "" {
			t.Fatalf("%v %q", err, said)
		}
		if got := cfg.Track.Since(); got != want {
			t.Errorf("marks since %q, want %q", got, want)
		}
	}
	m, f := cfg.Track.Give()
	if f == nil || len(m.Blocks) != 1 || m.Blocks[0].Pages != 7 {
		t.Fatalf("%+v, %v", m, f)
	}
	f.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "a;a+;" {
		t.Errorf("the children had the file of %q, %v", b, err)
	}

	// Where there are none they are made.
	cfg.Track = &capture.Tracking{}
	if _, _, err := take(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if m, f := cfg.Track.Give(); f == nil || m.Checkpoint != "+" {
		t.Errorf("%+v, %v", m, f)
	} else {
		f.Close()
	}
}

// However a checkpoint fails, the marks are nobody's afterwards.
func TestMarksOfAFailureAreGone(t *testing.T) {
	for _, name := range []string{"refuse", "die early", "die"} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cfg := config(t, name)
			cfg.Track = capture.Tracked(capture.Marks{Checkpoint: "a"}, w)
			if _, _, err := take(t.Context(), cfg); err == nil {
				t.Fatal("it succeeded")
			}
			if _, f := cfg.Track.Give(); f != nil {
				t.Error("there are marks")
			}
			if b, err := io.ReadAll(r); err != nil || len(b) > 0 { // ends when nobody has it
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}
