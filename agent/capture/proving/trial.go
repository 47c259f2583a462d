package proving

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/procstat"
)

const (
	rounds    = 2
	ringBytes = 32 << 20 // holds the whole subject: a busy host is no reason to fail
)

// trial captures a new subject's memory several times, within ctx. It returns how many
// pages came by the kernel's ring.
func trial(ctx context.Context, helper []string, w way, e effort) (byRing uint64, err error) {
	s, err := startSubject(ctx, helper, w, e.nice)
	if err != nil {
		return 0, err
	}
	defer s.end()
	for range rounds {
		n, err := s.capture(ctx, helper, e)
		if byRing += n; err != nil {
			return byRing, err
		}
	}
	return byRing, nil
}

// capture takes one capture and compares it.
func (s *subject) capture(ctx context.Context, helper []string, e effort) (byRing uint64, err error) {
	control, page, err := guardian.CreateControl()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, control.Close(), page.Close()) }()
	pid := s.cmd.Process.Pid
	blocks := []source.Block{{HVA: s.place.HVA, Pages: uint64(s.way.pages), Kind: s.way.kind}}
	var guest []faultserver.GuestRange
	if s.way.accel == KVM {
		guest = []faultserver.GuestRange{{Bytes: blocks[0].Pages * pageBytes, Host: s.place.HVA}}
	}
	srv, err := faultserver.New(faultserver.Start{
		Self: helper[0], Args: append(helper[1:len(helper):len(helper)], capture.FaultServerVerb), Control: page,
		FaultRingPages: 2048, ScanRingPages: 1024,
		Config: faultserver.Config{QEMUPID: pid, Blocks: blocks, FaultThreads: 1, ScanThreads: 1, FaultAround: 1,
			MaxStall: time.Second, Engine: faultserver.Kernel, RingBytes: ringBytes, Guest: guest},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, srv.Close()) }()
	if err := srv.Ready(ctx); err != nil {
		return 0, err
	}
	if err := srv.Prearm(ctx); err != nil {
		return 0, err
	}
	if err := srv.Rearm(ctx); err != nil {
		return 0, err
	}
	want, err := s.freeze(ctx, srv, blocks, e)
	if err != nil {
		return 0, err
	}
	return s.compare(ctx, srv, newComparison(s.way, want), e)
}

// compare has the rest captured while the subject writes, and looks at what comes.
func (s *subject) compare(ctx context.Context, srv *faultserver.Client, c *comparison, e effort) (byRing uint64, err error) {
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	drained := make(chan error, 1)
	go func() { // joined below
		err := c.drain(ctx, srv.Arena())
		if err != nil {
			giveUp() // the server would wait for room
		}
		drained <- err
	}()
	lull := time.NewTimer(e.writing())
	defer lull.Stop()
	select { // the scan would be faster than the subject
	case <-c.enough:
	case <-lull.C: // a server that has failed says so when it is asked
	case <-ctx.Done():
	}
	err = srv.Scan()
	if err == nil {
		err = srv.Wait(ctx)
	}
	if err != nil {
		giveUp()
	}
	// What ends the one ends the other; a wrong page is always the cause.
	if drainErr := <-drained; err == nil || errors.Is(err, context.Canceled) || errors.Is(drainErr, errWrong) {
		err = drainErr
	}
	if err == nil {
		err = c.whole()
	}
	return c.byRing(), err
}

// freeze stops the subject, has the server freeze, and lets the subject go on. It
// returns the memory at that instant.
func (s *subject) freeze(ctx context.Context, srv *faultserver.Client, blocks []source.Block, e effort) (want []byte, err error) {
	pid := s.cmd.Process.Pid
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return nil, fmt.Errorf("stop the subject: %w", err)
	}
	defer func() {
		if e := unix.Kill(pid, unix.SIGCONT); e != nil {
			err = errors.Join(err, fmt.Errorf("let the subject go on: %w", e))
		}
	}()
	if err := awaitStopped(ctx, pid, e.stopping()); err != nil {
		return nil, err
	}
	src, err := source.Open(pid, blocks)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	want = make([]byte, s.way.pages*pageBytes)
	var reads []error
	err = src.Each(0, func(r source.Run) {
		if !r.Zero {
			reads = append(reads, src.Read(0, r.First, want[r.First*pageBytes:][:r.Pages*pageBytes]))
		}
	})
	return want, errors.Join(err, errors.Join(reads...), srv.Freeze(ctx))
}

// awaitStopped waits until every thread stands still.
func awaitStopped(ctx context.Context, pid int, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		stopped := true
		tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
		if err != nil {
			return err
		}
		for _, path := range tasks {
			b, err := os.ReadFile(path)
			if err != nil { // the thread has ended
				continue
			}
			st, err := procstat.Parse(b)
			stopped = stopped && err == nil && st.Stopped()
		}
		if stopped && len(tasks) > 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the subject does not stop: %w", ctx.Err())
		}
	}
}

// comparison looks at each captured page as it comes.
type comparison struct {
	way  way
	want []byte

	mu             sync.Mutex
	seen           []bool
	stores, copies uint64 // pages that came by the ring, by who wrote them
	enough         chan struct{}
	once           sync.Once
}

func newComparison(w way, want []byte) *comparison {
	return &comparison{way: w, want: want, seen: make([]bool, w.pages), enough: make(chan struct{})}
}

func (c *comparison) byRing() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stores + c.copies
}

// drain compares what comes until every ring has ended, or one brought what is wrong.
func (c *comparison) drain(ctx context.Context, a *arena.Arena) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	errs := make(chan error, a.Rings())
	for i := range a.Rings() {
		go func() { errs <- c.ring(ctx, a.Ring(i)) }()
	}
	var all []error
	for range a.Rings() {
		err := <-errs
		if all = append(all, err); err != nil {
			stop()
		}
	}
	return errors.Join(all...)
}

func (c *comparison) ring(ctx context.Context, r *arena.Ring) error {
	for ctx.Err() == nil {
		rec, ok, done, err := r.Next(20 * time.Millisecond)
		if err != nil || done {
			return err
		}
		if !ok {
			continue
		}
		if err := c.compare(rec); err != nil {
			return err
		}
		r.Done()
	}
	return ctx.Err()
}

var zeroPage [pageBytes]byte

func (c *comparison) compare(rec arena.Record) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range rec.Pages {
		page := rec.First + i
		if page >= uint64(c.way.pages) || c.seen[page] {
			return fmt.Errorf("%w: page %d came twice or does not exist", errWrong, page)
		}
		c.seen[page] = true
		got := zeroPage[:]
		if rec.Data != nil {
			got = rec.Data[i*pageBytes:][:pageBytes]
		}
		if !bytes.Equal(got, c.want[page*pageBytes:][:pageBytes]) {
			return fmt.Errorf("%w: page %d is not what it was at the freeze", errWrong, page)
		}
		if rec.Origin != arena.ByFault {
			continue
		}
		if page < uint64(c.way.kernelFirst) {
			c.stores++
		} else {
			c.copies++
		}
		if c.stores >= c.way.enoughStores && c.copies >= c.way.enoughCopies {
			c.once.Do(func() { close(c.enough) })
		}
	}
	return nil
}

// whole reports whether every page came, and enough of them by the ring.
func (c *comparison) whole() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for page, seen := range c.seen {
		if !seen {
			return fmt.Errorf("%w: page %d did not come", errWrong, page)
		}
	}
	if c.stores < c.way.enoughStores || c.copies < c.way.enoughCopies {
		return fmt.Errorf("%w: %d that threads wrote, %d that the kernel wrote", errTooFew, c.stores, c.copies)
	}
	return nil
}
