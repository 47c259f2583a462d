package faultserver

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// phase is what a fault means. Only the command loop changes it.
type phase uint32

const (
	idle phase = iota
	tracking
	capturing
	released
)

// server is the state of one capture.
type server struct {
	cfg    Config
	arena  *arena.Arena
	src    *source.Source
	pm     *pagemap.Pagemap
	tables []*pageTable

	phase  atomic.Uint32
	h      *uffd.Handle // from prearm on
	held   bool         // the command loop's: from prearm to release
	engine engine

	failure atomic.Pointer[Error]
	failed  chan struct{} // closed once failure is set

	remaining atomic.Int64 // pages not done; 0 closes complete
	complete  chan struct{}

	stats Stats // the command loop's; threads keep their own and are read after they ended
	froze time.Time
}

func newServer(cfg Config, a *arena.Arena, types *btf.Cache) (*server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if a.Rings() != cfg.FaultThreads+cfg.ScanThreads {
		return nil, fmt.Errorf("fault server: %d rings for %d fault and %d scan threads", a.Rings(), cfg.FaultThreads, cfg.ScanThreads)
	}
	src, err := source.Open(cfg.QEMUPID, cfg.Blocks)
	if err != nil {
		return nil, err
	}
	s := &server{cfg: cfg, arena: a, src: src, pm: src.Pagemap(),
		failed: make(chan struct{}), complete: make(chan struct{})}
	pages := uint64(0)
	for _, b := range cfg.Blocks {
		for i := 0; b.Whole && i < a.Rings(); i++ {
			if a.Ring(i).MaxReserve() < hugePages {
				return nil, errors.Join(fmt.Errorf("fault server: a ring of %d pages for huge pages", a.Ring(i).Pages()), src.Close())
			}
		}
		s.tables = append(s.tables, newPageTable(b))
		pages += b.Pages
	}
	s.remaining.Store(int64(pages))
	if s.engine, err = newEngine(s, types); err != nil {
		return nil, errors.Join(err, src.Close())
	}
	return s, nil
}

// close frees what newServer opened. The engine has stopped.
func (s *server) close() error {
	return errors.Join(s.engine.close(), s.src.Close())
}

// fail records the first failure. Threads call it, pinned or not, and go on or end;
// the command loop lets go.
func (s *server) fail(f Failure, format string, args ...any) {
	s.failWith(&Error{Failure: f, Detail: fmt.Sprintf(format, args...)})
}

func (s *server) failWith(e *Error) {
	if s.failure.CompareAndSwap(nil, e) {
		close(s.failed)
	}
}

// failedWith returns the failure, if there was one.
func (s *server) failedWith() error {
	select {
	case <-s.failed:
		return s.failure.Load()
	default:
		return nil
	}
}

const (
	// Bytes armed or let go of per call. A call neither gives up its processor nor
	// the address space before it is done, some 20 ms per GiB of small pages on a
	// quiet host, and a vCPU may have to wait for either. A multiple of the huge
	// page, so that no mapping is cut within one.
	lockStep  = 16 << 20
	changeNap = 5 * time.Microsecond // while an address space changes
)

// prearm arms everything while the guest runs. Faults are let through and
// remembered; passes over what was written meanwhile shrink what is left for the
// freeze.
func (s *server) prearm(take func() (*os.File, error)) error {
	begin := time.Now()
	f, err := take()
	if err != nil {
		return &Error{Failure: Unsupported, Detail: err.Error()}
	}
	s.stats.InjectNS = time.Since(begin).Nanoseconds()
	adopt := func() (*uffd.Handle, error) { return uffd.Adopt(f, s.engine.features()) }
	if s.cfg.Kept {
		adopt = func() (*uffd.Handle, error) { return uffd.Resume(f) }
	}
	h, err := adopt()
	if err != nil {
		return &Error{Failure: Unsupported, Detail: err.Error()}
	}
	if err := h.SetNonblock(false); err != nil {
		return &Error{Failure: Broken, Detail: errors.Join(err, h.Close()).Error()}
	}
	s.h, s.held = h, true
	s.phase.Store(uint32(tracking))
	if err := s.engine.start(); err != nil {
		return &Error{Failure: Unsupported, Detail: err.Error()}
	}
	for _, t := range s.tables {
		if s.cfg.Kept { // it is registered
			break
		}
		if _, err := h.Register(t.block.HVA, t.block.Pages*pageBytes, uffd.ModeWP); err != nil {
			return &Error{Failure: Unsupported, Detail: err.Error()}
		}
		if err := s.noteHuge(t); err != nil {
			return &Error{Failure: Broken, Detail: err.Error()}
		}
	}
	armBegin := time.Now()
	for _, t := range s.tables {
		arm := s.arm
		if s.cfg.Kept && t.block.Kind == source.Anonymous {
			t.same = make([]uint64, t.words())
			arm = s.armChanged
		}
		err := inSteps(t.block, func(start, length uint64) error {
			if err := arm(t, start, length); err != nil {
				return &Error{Failure: Unsupported, Detail: err.Error()}
			}
			return s.failedWith()
		})
		if err != nil {
			return err
		}
	}
	s.stats.ArmNS = time.Since(armBegin).Nanoseconds()
	// After the arm, so that whatever becomes populated from here on faults and
	// is remembered: the two together are what is populated at the freeze.
	for i, t := range s.tables {
		if err := s.notePopulated(i, t); err != nil {
			return &Error{Failure: Broken, Detail: err.Error()}
		}
	}
	err = s.engine.settle()
	s.stats.PrearmNS = time.Since(begin).Nanoseconds()
	return err
}

// inSteps calls do for the pieces of a block, which end at multiples of lockStep,
// until one fails.
func inSteps(b source.Block, do func(start, length uint64) error) error {
	for at, end := b.HVA, b.End(); at < end; {
		next := min(at&^(lockStep-1)+lockStep, end)
		if err := do(at, next-at); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// noteHuge remembers which huge pages there are.
func (s *server) noteHuge(t *pageTable) error {
	if !t.hugeOK || !s.cfg.HugeAround || t.whole {
		return nil
	}
	var regions [128]pagemap.Region
	q := pagemap.Query{Mask: pagemap.IsHuge | pagemap.IsPresent, Return: pagemap.IsHuge}
	return s.pm.ScanAll(t.block.HVA, t.block.End(), q, regions[:], func(r pagemap.Region) bool {
		first := (r.Start - t.block.HVA + hugePages*pageBytes - 1) / (hugePages * pageBytes)
		for g := first; (g+1)*hugePages*pageBytes <= r.End-t.block.HVA; g++ {
			t.markHuge(g)
			s.stats.HugeBefore++
		}
		return true
	})
}

// notePopulated remembers which pages of a file-backed block have content.
func (s *server) notePopulated(block int, t *pageTable) error {
	if t.populated == nil {
		return nil
	}
	err := s.src.Each(block, func(r source.Run) {
		if !r.Zero {
			setRange(t.populated, r.First, r.Pages)
		}
	})
	if err != nil {
		return err
	}
	const step = 1 << 15 // pages: what Held remembers is bounded by it
	for first := uint64(0); first < t.block.Pages; first += step {
		n := min(step, t.block.Pages-first)
		if err := s.src.Held(block, first, n, func(first, n uint64) { setRange(t.held, first, n) }); err != nil {
			return err
		}
	}
	return nil
}

// freeze makes the memory as it is now the checkpoint's. The guest is stopped
// and its device state saved; only QEMU itself might still write.
func (s *server) freeze() error {
	begin := time.Now()
	runs, err := s.engine.freeze()
	s.froze = time.Now()
	s.stats.FreezeRuns, s.stats.FreezeNS = runs, s.froze.Sub(begin).Nanoseconds()
	if err != nil {
		return err
	}
	return s.failedWith()
}

// leave ends a capture and leaves the marks in the guest's memory, where they are the
// next one's: whoever has another descriptor of our userfaultfd lets go of them.
func (s *server) leave() error {
	s.phase.Store(uint32(released))
	s.engine.unblock()
	s.held = false
	return s.engine.stop()
}

// release lets go of the guest's memory: the kernel drops every mark and wakes
// every waiting thread. It is safe in every phase, and idempotent.
func (s *server) release() error {
	if !s.held {
		return nil
	}
	begin := time.Now()
	s.phase.Store(uint32(released))
	stepForward() // the guest may be waiting
	s.engine.unblock()
	err := LetGo(s.h, s.cfg.Blocks)
	err = errors.Join(err, s.engine.stop())
	s.held = false // the descriptor itself goes with the process, which is about to end
	s.stats.ReleaseNS = time.Since(begin).Nanoseconds()
	return err
}

// LetGo takes the marks off memory that is registered, in steps: a vCPU may have to wait
// for the end of each.
func LetGo(h *uffd.Handle, blocks []source.Block) error {
	var errs []error
	for _, b := range blocks {
		if inSteps(b, h.Unregister) == nil {
			continue
		}
		// Something in it is unmapped, or the process may not have one mapping more,
		// as it has between two steps. An unmapped or never registered range is as
		// free as it can be.
		if err := h.Unregister(b.HVA, b.Pages*pageBytes); err != nil &&
			!errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOMEM) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// pagesDone takes n pages off what remains to be captured.
func (s *server) pagesDone(n int64) {
	if s.remaining.Add(-n) == 0 {
		close(s.complete)
	}
}

// prove checks, after the copy, that nobody wrote or discarded a page of the
// run since the freeze.
func (s *server) prove(block int, t *pageTable, first, n uint64, start, end uint64) bool {
	armed, errno := s.pm.AllArmedRaw(start, end)
	if errno != 0 {
		s.fail(Broken, "block %d, page %d: page map: %v", block, first, errno)
		return false
	}
	if !armed {
		s.fail(Unproven, "block %d: a page of %d+%d was written or discarded before it was captured", block, first, n)
		return false
	}
	return t.held == nil || s.keeps(block, t, first, n)
}

// keeps checks that nothing of the run was discarded.
func (s *server) keeps(block int, t *pageTable, first, n uint64) bool {
	ok := s.stillHeld(block, t, first, n)
	if !ok {
		s.fail(Unproven, "block %d: a page of %d+%d was discarded before it was captured", block, first, n)
	}
	return ok
}

// stillHeld reports whether every page of the run that was held at the freeze
// is held now.
func (s *server) stillHeld(block int, t *pageTable, first, n uint64) bool {
	var missing [hugeWords + 1]uint64
	base := first &^ (wordPages - 1)
	if n > hugePages {
		return s.stillHeld(block, t, first, hugePages) && s.stillHeld(block, t, first+hugePages, n-hugePages)
	}
	any := false
	for at, end := first, first+n; at < end; {
		off := at % wordPages
		k := min(end-at, wordPages-off)
		m := atomic.LoadUint64(&t.held[at/wordPages]) & maskOf(off, k)
		missing[(at-base)/wordPages] = m
		any = any || m != 0
		at += k
	}
	if !any {
		return true
	}
	if err := s.src.Held(block, first, n, func(first, n uint64) { clearRange(missing[:], first-base, n) }); err != nil {
		return false
	}
	return missing == [hugeWords + 1]uint64{}
}
