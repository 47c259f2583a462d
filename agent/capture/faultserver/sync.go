package faultserver

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
)

// syncEngine makes the guest's writes wait until the page is copied. Of its threads
// each owns one ring.
type syncEngine struct {
	s        *server
	faults   []*faultThread
	scanners []*scanner
	scans    sync.WaitGroup // those that run
}

// syncFeatures are those every synchronous capture needs. WP_UNPOPULATED makes absent
// pages carry the mark, without which a page that appears after the arm could not be
// told from one that was there.
const syncFeatures = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated

const (
	enoughRuns   = 32 // as few dirty runs as this are left for the freeze
	prearmPasses = 6  // bound on the passes; a guest that writes faster than we arm never gets there
)

func newSyncEngine(s *server) *syncEngine {
	e := &syncEngine{s: s}
	for i := range s.cfg.FaultThreads {
		e.faults = append(e.faults, &faultThread{s: s, e: e, ring: s.arena.Ring(i), around: 1})
	}
	for i := range s.cfg.ScanThreads {
		e.scanners = append(e.scanners, &scanner{s: s, id: i, ring: s.arena.Ring(s.cfg.FaultThreads + i)})
	}
	return e
}

func (e *syncEngine) features() uffd.Features { return syncFeatures }

func (e *syncEngine) start() error {
	for _, t := range e.faults {
		go t.run() // ends with the process
	}
	return nil
}

// settle lets passes over what was written shrink it, until one finds little.
func (e *syncEngine) settle() error {
	for range prearmPasses {
		runs, err := e.rearm()
		if err != nil {
			return err
		}
		e.s.stats.PrearmPasses++
		if runs <= enoughRuns {
			break
		}
	}
	return e.s.failedWith()
}

// rearm arms the pages that were written since they were armed.
func (e *syncEngine) rearm() (runs int, err error) {
	for _, t := range e.s.tables {
		n, err := t.takeDirty(func(first, n uint64) error {
			return e.s.h.WriteProtect(t.block.HVA+first*pageBytes, n*pageBytes)
		})
		if runs += n; err != nil {
			return runs, &Error{Failure: Broken, Detail: err.Error()}
		}
	}
	return runs, nil
}

func (e *syncEngine) freeze() (runs int, err error) {
	for _, t := range e.faults {
		t.mu.Lock()
	}
	if runs, err = e.rearm(); err == nil {
		e.s.phase.Store(uint32(capturing))
	}
	for _, t := range e.faults {
		t.mu.Unlock()
	}
	return runs, err
}

// scan starts the scanners. Nothing but them runs for long until release.
func (e *syncEngine) scan() {
	stepBack()
	for _, c := range e.scanners {
		c.ring.SetSlack(c.ring.Pages() / 2)
		e.scans.Go(c.run)
	}
}

// unblock has nothing to do: unregistering wakes all who wait.
func (e *syncEngine) unblock() {}

func (e *syncEngine) stop() error {
	e.scans.Wait()
	for _, t := range e.faults {
		t.addTo(&e.s.stats)
	}
	return nil
}

func (e *syncEngine) close() error { return nil }

// captureRun is the heart of it: copy, prove, release. The pages [first,
// first+n) are claimed by the caller; data is n pages of its ring. It reports
// whether the copy is the content at the freeze.
func (s *server) captureRun(block int, t *pageTable, first, n uint64, data []byte) bool {
	start, end := t.block.HVA+first*pageBytes, t.block.HVA+(first+n)*pageBytes
	// A private page of hugetlbfs that is discarded is there again once it is read.
	if t.whole && !s.keeps(block, t, first, n) {
		return false
	}
	if err := s.src.Read(block, first, data); err != nil {
		s.fail(Broken, "block %d, page %d: %v", block, first, err)
		return false
	}
	return s.prove(block, t, first, n, start, end) && s.unprotect(block, t, first, n)
}

// unprotect lifts the marks of a captured run, wakes who waits for it, and makes
// it done.
func (s *server) unprotect(block int, t *pageTable, first, n uint64) bool {
	errno := s.h.UnprotectRaw(t.block.HVA+first*pageBytes, n*pageBytes, true)
	for errno == unix.EAGAIN { // the address space is being changed
		nap(changeNap)
		errno = s.h.UnprotectRaw(t.block.HVA+first*pageBytes, n*pageBytes, true)
	}
	if errno != 0 {
		// A fault thread may come too late with a page that was done: everything
		// is captured, let go of, and nobody waits any more.
		if phase(s.phase.Load()) != released {
			s.fail(Broken, "block %d, page %d: unprotect %d pages: %v", block, first, n, errno)
		}
		return false
	}
	setRange(t.done, first, n)
	return true
}
