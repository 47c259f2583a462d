package faultserver

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/bpf/cow"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// kernelEngine has the kernel copy pages before they are written (package bpf/cow).
// The guest's writes wait for nobody.
//
// A page is delivered by whoever can prove that its copy is the page as it was at the
// freeze: the ring's reader, because a record is made only of a page that bore its mark
// after it was copied; or a scanner, because it asks for the mark after its own copy. A
// page that a scanner finds without its mark is left to the ring: its record was put
// there before the mark was lifted. When the scanners have seen everything, and the ring
// is read as far as it was filled by then, a page that nobody has delivered was changed
// by somebody whom no program saw, and the capture is discarded. So whatever the
// programs may miss costs a checkpoint and never its truth.
//
// Of a page where nothing is mapped the mark alone is the proof that it is zeros, if it
// was then (noteBlank): nobody has touched it since.
type kernelEngine struct {
	s     *server
	progs *cow.Programs
	pidfd int

	base  []int  // by block: its first word in the programs' bitmaps
	armed bool   // all of RAM was, once
	epoch uint64 // of the capture, in every record
	lost  uint64 // the programs' losses before it

	reader   *ringReader
	scanners []*kernelScanner
	threads  sync.WaitGroup // reader and scanners
	scanning atomic.Int32   // scanners that are not done
	scanned  atomic.Bool    // none is left, and mark is where the ring ended then
	mark     uint64
	ending   atomic.Bool // threads are to end
}

const kernelFeatures = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated | uffd.FeatureWPAsync

func newKernelEngine(s *server, types *btf.Cache) (*kernelEngine, error) {
	unsupported := func(format string, args ...any) error {
		return &Error{Failure: Unsupported, Detail: fmt.Sprintf("engine bpf: "+format, args...)}
	}
	if len(s.tables) > cow.MaxRanges {
		return nil, unsupported("%d blocks of RAM, at most %d", len(s.tables), cow.MaxRanges)
	}
	e := &kernelEngine{s: s, pidfd: -1}
	o := cow.Options{RingBytes: s.cfg.RingBytes, Types: types}
	words := 0
	for i, t := range s.tables {
		if t.block.Kind == source.PrivateFile {
			return nil, unsupported("block %d is a private mapping of a file", i)
		}
		o.Ranges = append(o.Ranges, cow.Range{Start: t.block.HVA, Bytes: t.block.Pages * pageBytes})
		e.base = append(e.base, words)
		words += t.words()
	}
	for _, g := range s.cfg.Guest {
		o.Guest = append(o.Guest, cow.GuestRange(g))
	}
	var err error
	if e.progs, err = cow.Load(o); err != nil {
		return nil, &Error{Failure: Unsupported, Detail: err.Error()}
	}
	if e.pidfd, err = unix.PidfdOpen(s.cfg.QEMUPID, 0); err != nil {
		return nil, errors.Join(os.NewSyscallError("pidfd_open", err), e.close())
	}
	e.reader = &ringReader{e: e, ring: s.arena.Ring(0)}
	for i := range s.cfg.ScanThreads {
		e.scanners = append(e.scanners, &kernelScanner{e: e, scanner: scanner{s: s, id: i, ring: s.arena.Ring(1 + i)}})
	}
	return e, nil
}

func (e *kernelEngine) features() uffd.Features { return kernelFeatures }

func (e *kernelEngine) start() error {
	if err := e.progs.Attach(int(e.s.h.FD())); err != nil {
		return err
	}
	e.progs.SetMode(cow.Track, 0)
	return nil
}

// noteBlank tells the programs of the pages that held zeros at the freeze if they bear
// their mark where nothing is mapped: all of anonymous memory, because a discard takes
// the mark along, and of a file's what it has no page of. It is called while the marks
// are those of the last look: what is written and marked again after it is held.
func (e *kernelEngine) noteBlank() {
	for b, t := range e.s.tables {
		for w := range t.words() {
			m := t.full(w)
			if t.held != nil {
				m &^= t.held[w]
			}
			e.progs.Blank().Exchange(e.base[b]+w, m)
		}
	}
}

// settle re-arms what was written, by a look at everything, and leaves behind which
// pages freeze has to re-arm: those written since its beginning. Right after the arm
// there is no need: the log is exact, and short of being re-armed nothing is taken out.
//
// The bit of a page is set before its mark is taken off. Of a write in between neither
// look may find anything to re-arm, so its bit must not be dropped: the second look
// comes after the fault, for the bits that were dropped before the first.
func (e *kernelEngine) settle() error {
	if !e.armed {
		e.armed = true
		e.noteBlank()
		return e.s.failedWith()
	}
	e.collect()
	for _, t := range e.s.tables {
		for w, m := range t.dirty {
			t.hot[w] |= m
		}
		clear(t.dirty)
	}
	if err := e.armWritten(); err != nil {
		return err
	}
	e.collect()
	if err := e.armWritten(); err != nil {
		return err
	}
	e.noteBlank()
	e.s.stats.PrearmPasses += 2
	return e.s.failedWith()
}

// collect moves what the programs have logged to the tables.
func (e *kernelEngine) collect() {
	log := e.progs.Dirty()
	for b, t := range e.s.tables {
		for w := range t.dirty {
			if log.Load(e.base[b]+w) == 0 {
				continue
			}
			m := log.Exchange(e.base[b]+w, 0)
			t.dirty[w] |= m
			if t.populated != nil { // it was filled by the write, if it was not before
				t.populated[w] |= m
				t.held[w] |= m
				blank := e.progs.Blank()
				blank.Exchange(e.base[b]+w, blank.Load(e.base[b]+w)&^m)
			}
		}
	}
}

// armWritten arms, atomically with finding them, all pages that bear no mark.
func (e *kernelEngine) armWritten() error {
	var regions [256]pagemap.Region
	q := pagemap.Query{Flags: pagemap.WPMatching | pagemap.CheckWPAsync, Mask: pagemap.IsWritten, Return: pagemap.IsWritten}
	for _, t := range e.s.tables {
		err := inSteps(t.block, func(start, length uint64) error {
			return e.s.pm.ScanAll(start, start+length, q, regions[:], func(r pagemap.Region) bool {
				first, n := (r.Start-t.block.HVA)/pageBytes, r.Pages(pageBytes)
				e.s.stats.TrackedFaults += n
				t.changed(first, n)
				if t.populated != nil {
					setRange(t.populated, first, n)
					setRange(t.held, first, n)
				}
				return true
			})
		})
		if err != nil {
			return &Error{Failure: Broken, Detail: err.Error()}
		}
	}
	return nil
}

// freeze switches to capturing first: what QEMU itself writes meanwhile to a page that
// is armed is taken for written after the freeze, as it is with the other engine.
func (e *kernelEngine) freeze() (runs int, err error) {
	e.epoch++
	e.progs.Captured().Clear()
	l := e.progs.Losses()
	e.lost = l.Lost()
	e.progs.DropRecord(e.s.cfg.DropRecord)
	e.progs.SetMode(cow.Capture, e.epoch)
	e.collect()
	for _, t := range e.s.tables {
		n, err := t.takeDirty(func(first, n uint64) error {
			t.changed(first, n)
			return e.s.h.WriteProtect(t.block.HVA+first*pageBytes, n*pageBytes)
		})
		if runs += n; err != nil {
			return runs, &Error{Failure: Broken, Detail: err.Error()}
		}
	}
	if err := e.copyEscaped(); err != nil {
		return runs, err
	}
	e.s.phase.Store(uint32(capturing))
	if e.s.cfg.Throttle {
		e.progs.StopAbove(uint64(e.s.cfg.RingBytes) / 4 * 3)
	}
	e.threads.Go(e.reader.run)
	return runs, nil
}

// copyEscaped copies the pages that nobody sees being written, while the guest stands
// still: they need no proof.
func (e *kernelEngine) copyEscaped() error {
	for _, p := range e.s.cfg.Escaped {
		if p.Block >= len(e.s.tables) || p.Page >= e.s.tables[p.Block].block.Pages {
			return &Error{Failure: Broken, Detail: fmt.Sprintf("escaped page %+v: there is none", p)}
		}
		t := e.s.tables[p.Block]
		data, ok := e.reader.ring.Reserve(1, 0)
		if !ok || t.claim(int(p.Page/wordPages), 1<<(p.Page%wordPages)) == 0 {
			continue
		}
		if err := e.s.src.Read(p.Block, p.Page, data); err != nil {
			return &Error{Failure: Broken, Detail: err.Error()}
		}
		e.deliver(e.reader.ring, p.Block, p.Page, 1, arena.ByFault)
		e.s.stats.EscapedPages++
	}
	return nil
}

// deliver publishes claimed pages, whose content is in the ring's next pages, and tells
// the programs not to copy them.
func (e *kernelEngine) deliver(r *arena.Ring, block int, first, n uint64, origin arena.Origin) {
	r.Publish(block, first, n, origin)
	e.settled(block, first, n)
}

// settled notes that claimed pages are delivered.
func (e *kernelEngine) settled(block int, first, n uint64) {
	bits := e.progs.Captured()
	for at, end := first, first+n; at < end; {
		off := at % wordPages
		k := min(end-at, wordPages-off)
		bits.Or(e.base[block]+int(at/wordPages), maskOf(off, k))
		at += k
	}
	e.s.pagesDone(int64(n))
}

// locate finds the page with a number of the programs'.
func (e *kernelEngine) locate(number uint64) (block int, page uint64) {
	w := int(number / wordPages)
	for block < len(e.base)-1 && w >= e.base[block+1] {
		block++
	}
	return block, number - uint64(e.base[block])*wordPages
}

func (e *kernelEngine) scan() {
	stepBack()
	e.scanning.Store(int32(len(e.scanners)))
	for _, c := range e.scanners {
		c.ring.SetSlack(c.ring.Pages() / 2)
		e.threads.Go(func() {
			c.run()
			if e.scanning.Add(-1) == 0 {
				e.mark = e.progs.Mark()
				e.scanned.Store(true)
			}
		})
	}
}

// judge ends a capture of which pages are missing when nothing can come any more. The
// ring's reader calls it when it has read everything.
func (e *kernelEngine) judge() {
	l := e.progs.Losses()
	if n := l.Lost() - e.lost; n > 0 {
		e.s.fail(Unproven, "%s", lossText(l, n))
		return
	}
	if !e.scanned.Load() || e.progs.Behind(e.mark) || e.s.remaining.Load() == 0 || e.s.failedWith() != nil {
		return
	}
	missing := &Error{Failure: Unproven}
	count := uint64(0)
	for b, t := range e.s.tables {
		for w := range t.claimed {
			for m := t.full(w) &^ atomic.LoadUint64(&t.claimed[w]); m != 0; {
				off, n := lowestRun(m)
				m &^= maskOf(off, n)
				count += n
				for p := off; p < off+n && len(missing.Escaped) <= MaxEscaped; p++ {
					missing.Escaped = append(missing.Escaped, Page{Block: b, Page: uint64(w)*wordPages + p})
				}
			}
		}
	}
	if len(missing.Escaped) == 0 { // the last came in between
		return
	}
	first := missing.Escaped[0]
	missing.Detail = fmt.Sprintf("%d pages (block %d, page %d, ...) were written or discarded and no program saw by whom (of what they saw, %d were not mapped, %d without a mark; %s)",
		count, first.Block, first.Page, l.Absent, l.Unmarked, e.missed())
	if count > MaxEscaped {
		missing.Escaped = nil
	}
	e.s.failWith(missing)
}

// missed says how many faults the kernel kept from the programs.
func (e *kernelEngine) missed() string {
	n, err := e.progs.Missed()
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("the kernel kept %d faults of the host from them", n)
}

func lossText(l cow.Losses, n uint64) string {
	return fmt.Sprintf("%d pages were about to be written and could not be copied (ring full %d, unreadable %d, changing %d, odd I/O %d, dropped %d)",
		n, l.Full, l.Unreadable, l.Changing, l.OddIO, l.Dropped)
}

func (e *kernelEngine) unblock() {
	e.progs.StopAbove(0)
	e.progs.SetMode(cow.Off, 0)
	e.resume()
}

// resume ends a stop by the programs, if there is one.
func (e *kernelEngine) resume() {
	if e.progs.Stopped() {
		e.progs.Continuing()
		// The guardian would do it as well; a process that is gone waits for nothing.
		_ = unix.PidfdSendSignal(e.pidfd, unix.SIGCONT, nil, 0)
	}
}

func (e *kernelEngine) stop() error {
	e.ending.Store(true)
	e.threads.Wait()
	// A program that was at work when the mode changed may have stopped the guest since.
	err := e.progs.Detach()
	e.resume()
	st := &e.s.stats
	st.Faults, st.FaultPages = e.reader.records, e.reader.pages
	for _, c := range e.scanners {
		st.ScanPages += c.pages
		st.SamePages += c.same
	}
	l := e.progs.Losses()
	st.RingPeakBytes, st.Stops, st.StopMaxNS = e.reader.peak, l.Stops, e.reader.longest
	return err
}

func (e *kernelEngine) close() error {
	err := e.progs.Close()
	if e.pidfd >= 0 {
		err = errors.Join(err, unix.Close(e.pidfd))
	}
	return err
}
