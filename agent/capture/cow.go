package capture

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/affinity"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/vm"
)

// cow is one copy-on-write capture.
type cow struct {
	srv *faultserver.Client
	d   *drainer
	// throttled: the server may stop QEMU by a signal.
	throttled bool
}

// startCOW starts the fault server; prearm waits until it is ready.
func startCOW(s *session, control *os.File) (*cow, error) {
	allowed, idle := spareProcessors()
	// Every fault wakes all fault threads. A second one pays only where there are
	// processors to spare.
	faults := max(1, min(2, len(s.target.VCPUs), allowed/4))
	if s.engine == EngineBPF {
		faults = 1
	}
	pages := int(s.o.ArenaBytes / source.PageBytes)
	scans := min(scanThreads(allowed, idle, s.o.Compress != "none"), max(1, pages/3/scanRingPages))
	throttled := s.mayThrottle()
	scanPages := min(scanRingPages, pages/3/scans)
	self, args := faultServerCommand(s.o.Helper)
	start := faultserver.Start{
		Self: self, Args: args, Control: control,
		FaultRingPages: (pages - scans*scanPages) / faults, ScanRingPages: scanPages,
		Config: faultserver.Config{
			QEMUPID: s.target.Process.PID, VCPUs: s.vcpus(), Blocks: s.blocks,
			FaultThreads: faults, ScanThreads: scans,
			// A fault waits for room at most this long; the way there and back
			// needs the rest of the budget.
			MaxStall:    s.o.MaxStall * 3 / 4,
			FaultAround: faultAround, HugeAround: true, Collapse: collapseBudget,
			Engine: faultserver.Engine(s.engine), RingBytes: kernelRingBytes, Throttle: throttled,
			Guest: guestRanges(s.target), Escaped: s.escaped,
		},
	}
	if err := s.track(&start); err != nil {
		return nil, err
	}
	start.Process = s.o.Spare.take()
	srv, err := faultserver.New(start)
	if err != nil {
		return nil, problem.New(problem.Failed, "start the fault server", s.object, "%w", err)
	}
	return &cow{srv: srv, throttled: throttled}, nil
}

const (
	// scanRingPages is as little as lets a huge page pass (half of a ring): what the
	// scanner has copied is then still in the processor's cache when it is hashed and
	// written, and so is the memory it copies into.
	scanRingPages  = 2 * source.WholePages
	faultAround    = 16
	collapseBudget = 2 * time.Second
	// kernelRingBytes is what the guest may write between two looks at the ring: 8,000
	// pages.
	kernelRingBytes = 32 << 20
)

// vcpus are the VM's vCPUs by their thread ids.
func (s *session) vcpus() (tids []int) {
	for _, c := range s.target.VCPUs {
		tids = append(tids, c.TID)
	}
	return tids
}

// mayThrottle reports whether a guest that writes faster than the store takes may be
// stopped by a signal for a moment. Not where a shell waits for QEMU: it would take a
// stopped job for one that was put into the background.
func (s *session) mayThrottle() bool {
	st, err := procstat.Read(s.target.Process.PID)
	return s.engine == EngineBPF && err == nil && st.Terminal == 0
}

// guestRanges says where a guest of KVM finds its memory.
func guestRanges(t *vm.Target) []faultserver.GuestRange {
	if t.Accel != "kvm" {
		return nil
	}
	var out []faultserver.GuestRange
	for i := range t.Blocks {
		for _, r := range t.Blocks[i].Ranges {
			out = append(out, faultserver.GuestRange{Start: r.GPA, Bytes: r.Bytes, Host: t.Blocks[i].HVA + r.Offset})
		}
	}
	return out
}

// prearm takes the userfaultfd and arms RAM while the guest runs.
func (c *cow) prearm(ctx context.Context, s *session) error {
	if err := c.srv.Ready(ctx); err != nil {
		return s.captureError("start the fault server", err)
	}
	if err := c.srv.Prearm(ctx); err != nil {
		return s.captureError("arm RAM", err)
	}
	return s.hold(c.srv)
}

// finish scans, drains and waits until nothing is armed any more.
func (c *cow) finish(ctx context.Context, s *session) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.d = &drainer{w: s.writer, vcpus: affinity.Of(s.vcpus()), pace: s.o.pace}
	drained := make(chan error, 1)
	go func() { // joined below
		err := c.d.run(ctx, c.srv.Arena())
		if err != nil {
			cancel() // the store failed: no use in waiting for the rest
		}
		drained <- err
	}()
	err := c.srv.Scan()
	if err == nil {
		err = c.srv.Wait(ctx)
	}
	if err != nil {
		err = errors.Join(err, c.release(ctx))
		cancel()
	}
	drainErr := <-drained
	switch {
	case drainErr != nil && !errors.Is(drainErr, context.Canceled):
		return drainErr // the store's failure is the cause of whatever else there is
	case err != nil:
		return s.captureError("capture RAM", err)
	}
	return drainErr
}

// release lets go of the guest's memory; after it nothing is armed, whatever
// happened before.
func (c *cow) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	return c.srv.Abort(ctx)
}

// captureError gives a fault server's failure its place in the vocabulary.
func (s *session) captureError(op string, err error) error {
	switch faultserver.FailureOf(err) {
	case faultserver.Unsupported:
		return problem.New(problem.Refused, op, s.object, "%w", err).
			WithHint("ckagent doctor shows what is missing; modes stop and buffer work without it")
	case faultserver.Unproven:
		why := "the guest's balloon or free page reporting discards memory"
		if s.engine == EngineBPF {
			why = "memory is discarded or swapped, or somebody writes to it unseen"
		}
		return problem.New(problem.Busy, op, s.object, "%w", err).WithHint("%s; it is taken again another way", why)
	case faultserver.Silent:
		return problem.New(problem.Busy, op, s.object, "%w", err).WithHint("the host is overloaded; take it again")
	case faultserver.Stalled:
		return problem.New(problem.Store, op, s.object, "%w", err).
			WithHint("the store is too slow for what the guest writes, or hangs; allow more memory or a longer stall")
	}
	code := problem.Failed
	if errors.Is(err, context.Canceled) {
		code = problem.Cancelled
	}
	return problem.New(code, op, s.object, "%w", err)
}
