package pager

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sort"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/pager/order"
	"github.com/ckagent/ckagent/uffd"
)

// errReleased: the range is not registered any more; another worker has finished
// the job.
var errReleased = errors.New("memory is not registered any more")

const (
	faultBatch = 4  // messages read at once: what queues behind one thread
	aheadLimit = 32 // pages a fault thread reads ahead for a walking vCPU
	zeroAhead  = 16 // zero pages mapped per fault
	hintQueue  = 256

	hugeBytes = 2 << 20
	minFreed  = 4 << 20 / PageBytes // a row of zero pages worth a mapping of its own
	maxFreed  = 256                 // of them per block
)

// hint is a fault, told to the drain.
type hint struct {
	block int
	page  uint64
}

// server is the worker's heart: fault threads, drainers and the retrier over one
// userfaultfd. Blocks are numbered as in lazy.
//
// Concurrency: need and lazy are shared without locks (lazy does not change); zero
// belongs to load and, after the drain, to collapse; planMu guards the planner and is never held across I/O or a
// system call that waits; nothing else is locked.
type server struct {
	cfg   *Config
	ctl   *control
	h     *uffd.Handle
	src   PageSource
	pidfd int

	lazy  []Block  // sorted by HVA
	zero  []bitmap // pages recorded as zero
	anon  []bool   // private memory without a file
	need  *order.Need
	known atomic.Bool // load has seen everything
	zeros *pinned     // one page of zeros

	planMu sync.Mutex
	plan   *order.Planner
	hints  chan hint

	faultNS  atomic.Int64 // when the last fault was served
	bad      chan badPage
	poisoned int64               // pages settled as memory errors; the retrier's
	onDamage func(*damage) error // publishes; called by the retrier
	kick     chan struct{}       // something became available to the drain
	stop     *uffd.Stop
	threads  []threadState

	failOnce sync.Once
	fail     chan error // first reason to end
}

// bitmap has one bit a page.
type bitmap []uint64

func (b bitmap) has(page uint64) bool { return b[page/64]>>(page%64)&1 == 1 }

func (b bitmap) add(first, pages uint64) {
	for p := first; p < first+pages; {
		if p%64 == 0 && first+pages-p >= 64 {
			b[p/64] = ^uint64(0)
			p += 64
			continue
		}
		b[p/64] |= 1 << (p % 64)
		p++
	}
}

// run is how many pages from first on, but before end, are set.
func (b bitmap) run(first, end uint64) (n uint64) {
	for p := first; p < end; {
		word := ^b[p/64] >> (p % 64)
		if word != 0 {
			p += uint64(bits.TrailingZeros64(word))
			return min(p, end) - first
		}
		p = p - p%64 + 64
	}
	return max(end, first) - first
}

// threadState lets the heartbeat see a fault thread that hangs in its own code.
type threadState struct {
	busyNS atomic.Int64 // since when it serves; 0: it waits for faults
	source atomic.Bool  // it waits for the source, which a new worker would too
	_      [48]byte
}

func newServer(cfg *Config, ctl *control, h *uffd.Handle, src PageSource, pidfd int) (*server, error) {
	s := &server{cfg: cfg, ctl: ctl, h: h, src: src, pidfd: pidfd, lazy: cfg.lazy(),
		hints: make(chan hint, hintQueue), bad: make(chan badPage, hintQueue), kick: make(chan struct{}, 1),
		threads: make([]threadState, cfg.Workers), fail: make(chan error, 1)}
	sort.Slice(s.lazy, func(i, j int) bool { return s.lazy[i].HVA < s.lazy[j].HVA })
	var err error
	if s.zeros, err = newPinned(PageBytes); err != nil {
		return nil, err
	}
	if s.stop, err = uffd.NewStop(); err != nil {
		s.zeros.free()
		return nil, err
	}
	return s, nil
}

func (s *server) close() {
	s.zeros.free()
	s.stop.Close()
}

// prepare checks the blocks against the source and makes room for what load will
// find out.
func (s *server) prepare(maps *mappings) error {
	have := s.src.Blocks()
	pages := make([]uint64, len(s.lazy))
	s.zero = make([]bitmap, len(s.lazy))
	byImage := map[int]int{}
	for i, b := range s.lazy {
		if b.ImageBlock >= len(have) || b.Pages() > have[b.ImageBlock] {
			return problem.New(problem.Integrity, opPageIn, b.Name, "%d pages to bring in, but block %d of the checkpoint has fewer", b.Pages(), b.ImageBlock)
		}
		pages[i] = b.Pages()
		s.zero[i] = make(bitmap, (pages[i]+63)/64)
		byImage[b.ImageBlock] = i
		s.anon = append(s.anon, maps.allAnonymous(b.HVA, b.HVA+b.Bytes))
	}
	s.need = order.NewNeed(pages)
	hot := s.cfg.Hot
	if hot == nil {
		hot = s.src.Hot()
	}
	var ours []Run
	for _, r := range hot {
		if i, ok := byImage[r.Block]; ok && len(ours) < maxHot {
			ours = append(ours, Run{Block: i, First: r.First, Pages: r.Pages})
		}
	}
	s.plan = order.NewPlanner(s.need, ours, s.cfg.plannerOptions())
	return nil
}

// load asks the source which pages there are. It takes time in proportion to the
// memory, so faults are served meanwhile: a page that comes in before load marks it
// as needed only costs a vain copy later. A page whose record cannot be read is
// needed and bad.
func (s *server) load(ctx context.Context) error {
	const step = 1 << 16 // pages between looks at ctx
	for i, b := range s.lazy {
		for at, total := uint64(0), b.Pages(); at < total; {
			if err := ctx.Err(); err != nil {
				return err
			}
			zero, n, err := s.src.Extent(b.ImageBlock, at, min(step, total-at))
			switch {
			case err != nil || n == 0 || n > total-at:
				s.report(i, at, err)
				at++
				continue
			case zero:
				s.zero[i].add(at, n)
			default:
				s.need.Add(Run{Block: i, First: at, Pages: n})
			}
			at += n
		}
	}
	s.known.Store(true)
	s.ctl.leftPages.Store(s.need.Left())
	return nil
}

// locate finds the block an address lies in.
func (s *server) locate(addr uint64) (block int, page uint64, ok bool) {
	for i := range s.lazy {
		b := &s.lazy[i]
		if addr-b.HVA < b.Bytes {
			return i, (addr - b.HVA) / PageBytes, true
		}
	}
	return 0, 0, false
}

// end stops everything for this reason; the first one counts.
func (s *server) end(err error) {
	s.failOnce.Do(func() {
		s.fail <- err
		_ = s.stop.Signal()
	})
}

// serve is one fault thread, until stopped.
func (s *server) serve(ctx context.Context, index int) {
	faultThread(!s.cfg.NoRealtime)
	buf, err := newPinned((1 + aheadLimit) * PageBytes)
	if err != nil {
		s.end(err)
		return
	}
	defer buf.free()
	waiter, err := newWaiter(s.h, s.stop)
	if err != nil {
		s.end(err)
		return
	}
	defer waiter.close()
	var (
		msgs   [faultBatch]uffd.Msg
		stream order.Stream
		me     = &s.threads[index]
	)
	for {
		n, errno := s.h.ReadRaw(msgs[:])
		switch errno {
		case 0:
		case unix.EAGAIN:
			me.busyNS.Store(0)
			more, err := waiter.wait(s.stop)
			if err != nil {
				s.end(err)
			}
			if !more {
				return
			}
			continue
		case unix.EINTR:
			continue
		default:
			s.end(fmt.Errorf("read faults: %w", errno))
			return
		}
		t0 := nowNS()
		me.busyNS.Store(t0)
		for i := range msgs[:n] {
			m := &msgs[i]
			if m.Event != uffd.EventPagefault {
				continue
			}
			block, page, ok := s.locate(m.Address)
			if !ok {
				continue // of a range that was eager, or of nobody
			}
			if err := s.fault(ctx, me, buf, block, page, m.Flags&uffd.FaultWrite != 0); err != nil {
				s.end(err)
				return
			}
			now := nowNS()
			s.ctl.faults.Add(1)
			s.ctl.record(now - t0)
			s.faultNS.Store(now)
			select {
			case s.hints <- hint{block, page}:
			default: // the drain has enough to think about
			}
			if i == n-1 {
				if ahead := stream.Fault(block, page, aheadLimit); ahead > 0 {
					if err := s.ahead(ctx, me, buf, Run{Block: block, First: page + 1, Pages: ahead}); err != nil {
						s.end(err)
						return
					}
				}
			}
		}
	}
}

// fault brings in one page for a waiting thread. An error ends the worker; a page
// that cannot be had is not an error: its thread waits.
func (s *server) fault(ctx context.Context, me *threadState, buf *pinned, block int, page uint64, write bool) error {
	b := &s.lazy[block]
	dst := b.HVA + page*PageBytes
	zero, zeros, err := s.src.Extent(b.ImageBlock, page, zeroAhead)
	if err == nil && zero {
		return s.zeroFault(block, page, zeros, write)
	}
	if s.need.IsHeld(block, page) {
		return nil // known to be bad; the retrier is at it
	}
	me.source.Store(true)
	n := 0
	if err == nil {
		n, err = s.src.ReadRun(ctx, Demand, b.ImageBlock, page, buf.mem[:PageBytes])
	}
	me.source.Store(false)
	if n < 1 {
		s.ctl.readErrors.Add(1)
		s.report(block, page, err)
		return nil
	}
	return s.settle(block, page, s.place(dst, buf, PageBytes))
}

// zeroFault answers a fault of a page recorded as zero, and spares a thread that
// goes on into the zero pages behind it most of its faults: mapped to the kernel's
// zero page they take no memory, and a later write is an ordinary one.
func (s *server) zeroFault(block int, page, zeros uint64, write bool) error {
	s.ctl.zeroFaults.Add(1)
	dst := s.lazy[block].HVA + page*PageBytes
	var errno unix.Errno
	if write {
		errno = s.place(dst, s.zeros, PageBytes)
	} else {
		errno = s.placeZero(dst)
	}
	if errno == unix.ENOENT {
		// freeZeros was faster; unregistering has woken the thread.
		return nil
	}
	if err := s.settle(block, page, errno); err != nil {
		return err
	}
	if s.anon[block] && zeros > 1 {
		// Stops at the first page that is there; nobody waits for any of them.
		_, _ = s.h.ZeroPageRaw(dst+PageBytes, (zeros-1)*PageBytes, 0)
	}
	return nil
}

// settle books a page as being there.
func (s *server) settle(block int, page uint64, errno unix.Errno) error {
	switch errno {
	case 0:
	case unix.EEXIST:
		s.ctl.late.Add(1)
	default:
		return s.placeError(errno)
	}
	s.need.SettlePage(block, page)
	return nil
}

// placeError makes an ending of what the kernel refused.
func (s *server) placeError(errno unix.Errno) error {
	switch errno {
	case unix.ESRCH:
		return uffd.ErrGone
	case unix.ENOENT:
		return errReleased
	}
	return fmt.Errorf("place page: %w", errno)
}

// place copies bytes of buf to dst. EEXIST is answered only for a single page, and
// after its waiters were woken: the kernel does not when it refuses, and whoever
// put the page there may still be in the middle of a longer copy.
func (s *server) place(dst uint64, buf *pinned, bytes uint64) unix.Errno {
	return s.retry(dst, func() unix.Errno {
		_, errno := s.h.CopyRaw(dst, buf.ptr(), bytes, 0)
		return errno
	})
}

func (s *server) placeZero(dst uint64) unix.Errno {
	return s.retry(dst, func() unix.Errno {
		_, errno := s.h.ZeroPageRaw(dst, PageBytes, 0)
		return errno
	})
}

// againLimit bounds how often EAGAIN (mappings are changing) is repeated on the
// spot; after that the waiter is woken and faults again.
const againLimit = 1000

func (s *server) retry(dst uint64, once func() unix.Errno) unix.Errno {
	for range againLimit {
		switch errno := once(); errno {
		case unix.EAGAIN, unix.EINTR:
			continue
		case unix.EEXIST:
			if e := s.h.WakeRaw(dst, PageBytes); e != 0 {
				return e
			}
			return unix.EEXIST
		default:
			return errno
		}
	}
	if e := s.h.WakeRaw(dst, PageBytes); e != 0 {
		return e
	}
	return unix.EEXIST
}

// ahead reads on behind a fault for a vCPU that walks through memory, while that
// vCPU runs again.
func (s *server) ahead(ctx context.Context, me *threadState, buf *pinned, want Run) error {
	for want.Pages > 0 {
		r, ok := s.need.Next(want)
		if !ok {
			return nil
		}
		want = Run{Block: r.Block, First: r.End(), Pages: want.End() - min(want.End(), r.End())}
		b := &s.lazy[r.Block]
		me.source.Store(true)
		n, _ := s.src.ReadRun(ctx, Ahead, b.ImageBlock, r.First, buf.mem[:r.Pages*PageBytes])
		me.source.Store(false)
		if n < 1 {
			return nil // the drain or a fault will find out why
		}
		placed, err := s.placeRun(buf, 0, Run{Block: r.Block, First: r.First, Pages: uint64(n)})
		s.ctl.aheadPages.Add(placed)
		if err != nil {
			return err
		}
	}
	return nil
}

// placeRun copies the pages of r, which begin at off in buf, around those that are
// there by now, and books them. It returns how many it placed itself.
func (s *server) placeRun(buf *pinned, off uint64, r Run) (placed uint64, err error) {
	base := s.lazy[r.Block].HVA
	for done := uint64(0); done < r.Pages; {
		left := Run{Block: r.Block, First: r.First + done, Pages: r.Pages - done}
		bytes, err := s.h.Copy(base+left.First*PageBytes, buf.mem[off+done*PageBytes:off+r.Pages*PageBytes], 0)
		n := uint64(bytes) / PageBytes
		s.need.Settle(Run{Block: r.Block, First: left.First, Pages: n})
		done, placed = done+n, placed+n
		switch {
		case err == nil:
		case errors.Is(err, uffd.ErrExists):
			// Somebody was faster with this one; Copy has woken its waiters.
			s.need.SettlePage(r.Block, r.First+done)
			done++
		case errors.Is(err, uffd.ErrAgain):
			return placed, nil // put back, and taken again later
		case errors.Is(err, unix.ENOENT):
			return placed, errReleased
		default:
			return placed, err
		}
	}
	return placed, nil
}

// stuck reports a fault thread that has been serving for so long without waiting
// for the source: then the heartbeat stops, and the worker is replaced.
func (s *server) stuck(ns int64) bool {
	now := nowNS()
	for i := range s.threads {
		t := &s.threads[i]
		if since := t.busyNS.Load(); since != 0 && now-since > ns && !t.source.Load() && t.busyNS.Load() == since {
			return true
		}
	}
	return false
}
