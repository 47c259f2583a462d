package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/guestagent"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/taker"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/restore"
	"github.com/ckagent/ckagent/restore/pager"
)

// helperMain runs this process as one of our helpers if the arguments ask for
// one. They are dispatched by hand because a VM may be waiting for them.
func helperMain(args []string) (code int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	ctx := context.Background()
	var err error
	switch args[0] {
	case capture.FaultServerVerb:
		var h faultServerHooks
		err = faultserver.Main(faultserver.Deps{Take: h.takeUserfaultfd, OpenControl: h.openBeat})
	case guardian.Verb:
		err = guardian.Main(ctx, args[1:])
	case taker.Verb:
		moreThreads()
		err = taker.Main(ctx, agent.Take)
	case proving.Verb:
		err = proving.Main(ctx)
	case proving.SubjectVerb:
		err = proving.Subject(args[1:])
	case guestagent.GuardVerb:
		err = guestagent.GuardMain(ctx, args[1:])
	case pager.VerbWorker:
		err = pager.Main(ctx, args[1:], restore.Openers())
	case pager.VerbSupervisor:
		err = pager.SuperviseMain(ctx, args[1:], restore.Keepers())
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "ckagent %s: %v\n", args[0], err)
	}
	return problem.ExitCode(err), true
}

// faultServerHooks are what a fault server needs from packages above it.
type faultServerHooks struct{ control *guardian.Control }

// injectTimeout bounds an injection: a QEMU that somebody freezes in the middle of
// one answers only when it is thawed.
const injectTimeout = 10 * time.Second

// takeUserfaultfd makes a userfaultfd in QEMU and leaves nothing there. Should this
// process die meanwhile, or the injection break off, the control page tells the
// guardian to tidy up.
func (h *faultServerHooks) takeUserfaultfd(pid int, vcpus []int) (*os.File, error) {
	h.control.Injecting.Store(1)
	ctx, cancel := context.WithTimeout(context.Background(), injectTimeout)
	defer cancel()
	f, _, err := inject.Userfaultfd(ctx, pid, inject.Options{VCPUs: vcpus,
		Borrow: func(tid int) { h.control.Injecting.Store(uint32(tid)) }})
	if err == nil {
		h.control.Injecting.Store(0)
	}
	return f, err
}

// openBeat maps the control page for a fault server, which leaves its heartbeat
// there. It stays mapped until the process ends.
func (h *faultServerHooks) openBeat(f *os.File) (func(), error) {
	c, err := guardian.OpenControl(f)
	if err != nil {
		return nil, err
	}
	h.control = c
	return c.BeatServer, nil
}
