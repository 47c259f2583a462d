package torture

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Campaign runs rounds until they or the time is over.
type Campaign struct {
	Binary string
	Dir    string        // scratch; removed by Close
	Log    io.Writer     // one line a round
	Record func(Outcome) // each outcome
	ground *Ground
	failed int
	done   int
}

// Open prepares: this process becomes the reaper of all it starts.
func (c *Campaign) Open() error {
	if err := becomeReaper(); err != nil {
		return err
	}
	abs, err := filepath.Abs(c.Binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(abs); err != nil {
		return fmt.Errorf("ckagent binary: %w", err)
	}
	if c.Dir, err = os.MkdirTemp(c.Dir, "torture-"); err != nil {
		return err
	}
	c.ground = &Ground{Binary: abs, Dir: c.Dir}
	return nil
}

// Close removes what the campaign made.
func (c *Campaign) Close() { os.RemoveAll(c.Dir) }

// Failed is how many rounds had exceptions so far, Done how many were run.
func (c *Campaign) Failed() int { return c.failed }
func (c *Campaign) Done() int   { return c.done }

func (c *Campaign) note(o *Outcome) {
	c.done++
	state := "ok"
	switch {
	case len(o.Exceptions) > 0:
		c.failed++
		state = "EXCEPTION"
	case o.Busy:
		state = "busy"
	case !o.Acted && o.Victim != Nobody:
		state = "missed" // the run was over before, or the victim not there
	}
	fmt.Fprintf(c.Log, "%4d %-9s %s: %s; silence %v, settled %v, exit %d\n", c.done, state, o.Size, o.Round,
		o.Silence.Round(time.Millisecond), o.Settled.Round(time.Millisecond), o.Exit)
	for _, e := range o.Exceptions {
		fmt.Fprintf(c.Log, "     %s\n", e)
	}
	if c.Record != nil {
		c.Record(*o)
	}
}

// Survey learns the steps of a checkpoint.
func (c *Campaign) Survey(ctx context.Context, size Size) (*Survey, error) {
	b, err := NewBed(ctx, c.ground, size)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	o := b.Run(ctx, Round{Kind: "survey", Victim: Nobody, Action: None, Mode: "cow"})
	if len(o.Exceptions) > 0 {
		return nil, fmt.Errorf("survey: %v", o.Exceptions)
	}
	n := min(len(o.Steps), len(o.Present))
	return &Survey{Steps: o.Steps[:n], Present: o.Present[:n], Took: b.typ}, nil
}

// roundsPerBed bounds the console that is read at the end of a bed.
const roundsPerBed = 60

// maxRepeats of a round that missed a bound on a host without time.
const maxRepeats = 3

// Checkpoints runs rounds that harm a checkpoint.
func (c *Campaign) Checkpoints(ctx context.Context, size Size, rounds []Round) error {
	var b *Bed
	used := 0
	end := func() {
		if b == nil {
			return
		}
		o := b.lastWords()
		c.note(o)
		b.Close()
		b = nil
	}
	defer end()
	for _, r := range rounds {
		if ctx.Err() != nil {
			return nil // the time is over
		}
		if b == nil {
			var err error
			if b, err = NewBed(ctx, c.ground, size); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("new guest: %w", err)
			}
			used = 0
		}
		if !b.cage.supports(r.Action) {
			continue
		}
		o := b.Run(context.WithoutCancel(ctx), r)
		for n := 1; n <= maxRepeats && !o.Acted && len(o.Exceptions) == 0 && (r.Kind == "random" || r.Kind == "pause"); n++ {
			c.note(o) // the instant did not come: an earlier one
			r.Fraction *= 0.7
			o = b.Run(context.WithoutCancel(ctx), r)
		}
		for n := 1; n <= maxRepeats && o.hostTooSlow(); n++ {
			fmt.Fprintf(c.Log, "     again: %v, but the host kept a thread of ours waiting %v\n", o.Exceptions, o.Starved.Round(time.Millisecond))
			o = b.Run(context.WithoutCancel(ctx), r)
			o.Repeated = n
		}
		c.note(o)
		if used++; used >= roundsPerBed || !b.vm.Alive() || len(o.Exceptions) > 0 {
			end()
		}
	}
	return nil
}

// lastWords is what the guest had to say about its memory.
func (b *Bed) lastWords() *Outcome {
	o := &Outcome{Round: Round{Kind: "guest", Victim: Nobody, Action: None}, Size: b.size.Name}
	rep := b.vm.Report()
	if err := rep.Check(); err != nil {
		o.fail("the guest says: %v", err)
	}
	if rep.Writes == 0 || rep.Verified == 0 {
		o.fail("the guest wrote %d pages and verified %d: it did not work", rep.Writes, rep.Verified)
	}
	return o
}

// Recorder appends outcomes to a file of JSON lines.
type Recorder struct {
	mu sync.Mutex
	f  *os.File
}

// NewRecorder opens it.
func NewRecorder(path string) (*Recorder, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return &Recorder{f: f}, nil
}

// Record writes one outcome; one write a line, so that several campaigns may
// share a file.
func (r *Recorder) Record(o Outcome) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err = r.f.Write(append(b, '\n'))
	return err
}

// Close ends it.
func (r *Recorder) Close() error { return r.f.Close() }
