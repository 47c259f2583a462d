package proving

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
)

// Verb is the hidden verb of our binary that leads to Main.
const Verb = "__prove"

// endPatience is for the child to take its trial down.
const endPatience = 5 * time.Second

// Apart has what checkpoints take by themselves (ByAuto) tried by a process of its own, as
// far as it was not, and returns when that has ended. An error is that some of it is not
// settled, or ctx's.
func (p *Prover) Apart(ctx context.Context) error {
	if p.settled() == nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, p.helper[0], append(p.helper[1:len(p.helper):len(p.helper)], Verb)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	// A session of its own: what a terminal sends is for whoever started it to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	held, err := cmd.StdinPipe() // its end is the child's
	if err != nil {
		return err
	}
	cmd.Cancel = held.Close
	cmd.WaitDelay = endPatience
	err = cmd.Run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("the test of engine bpf: %w: %s", err, said.Bytes())
	}
	return p.settled()
}

// settled returns nil if there is nothing left to try for ByAuto.
func (p *Prover) settled() error {
	var open []error
	for _, kind := range kinds {
		if err := p.Known(ByAuto, kind); errors.Is(err, capture.ErrUntried) {
			open = append(open, err)
		}
	}
	return errors.Join(open...)
}

// Main is the child of Apart.
func Main(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	_, err := New(nil).All(ctx, ByAuto)
	return err
}
