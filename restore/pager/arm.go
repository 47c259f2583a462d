package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// openTarget holds the process by pidfd and makes sure that it is the one meant.
func openTarget(cfg *Config) (pidfd int, err error) {
	pidfd, err = unix.PidfdOpen(cfg.QEMUPID, 0)
	if err != nil {
		return -1, gone(fmt.Errorf("pidfd of %d: %w", cfg.QEMUPID, err))
	}
	qemu, err := procstat.Read(cfg.QEMUPID)
	if err == nil && cfg.QEMUStart != 0 && qemu.StartTicks != cfg.QEMUStart {
		err = fmt.Errorf("%w: pid %d is another process now", uffd.ErrGone, cfg.QEMUPID)
	}
	if err != nil {
		unix.Close(pidfd)
		return -1, gone(err)
	}
	return pidfd, nil
}

// takeUserfaultfd gets the descriptor out of the process and does the handshake if
// nobody has yet.
func takeUserfaultfd(pidfd, remote int) (*uffd.Handle, error) {
	get := func() (*os.File, error) {
		fd, err := unix.PidfdGetfd(pidfd, remote, 0)
		if err == unix.EBADF {
			return nil, fmt.Errorf("descriptor %d is closed: %w", remote, errReleased)
		}
		if err != nil {
			return nil, gone(fmt.Errorf("take descriptor %d: %w", remote, err))
		}
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err == nil && link != "anon_inode:[userfaultfd]" {
			err = fmt.Errorf("descriptor %d is %s: %w", remote, link, errReleased)
		}
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
		return os.NewFile(uintptr(fd), link), nil
	}
	f, err := get()
	if err != nil {
		return nil, err
	}
	h, err := uffd.Resume(f)
	if err != nil {
		if f, err = get(); err != nil {
			return nil, err
		}
		if h, err = uffd.Adopt(f, 0); err != nil {
			return nil, err
		}
	}
	if err := h.SetNonblock(true); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// arm registers the lazy blocks and then proves that nothing is there yet: a page
// that is present would never fault and its wrong content would be read.
func (s *server) arm(pm *pagemap.Pagemap) error {
	for i := range s.lazy {
		b := &s.lazy[i]
		ioctls, err := s.h.Register(b.HVA, b.Bytes, uffd.ModeMissing)
		if err != nil {
			return problem.New(problem.Refused, "arm", b.Name, "%w", err).
				WithHint("restore this block eagerly")
		}
		if !ioctls.Has(uffd.IoctlCopy | uffd.IoctlZeroPage | uffd.IoctlWake) {
			return problem.New(problem.Refused, "arm", b.Name, "pages of this kind of memory cannot be placed (%#x)", uint64(ioctls)).
				WithHint("restore this block eagerly")
		}
	}
	maps, err := readMappings(s.cfg.QEMUPID, s.lazy) // registering may have split or joined them
	if err != nil {
		return gone(err)
	}
	for i := range s.lazy {
		b := &s.lazy[i]
		present, err := pm.AnyPresent(b.HVA, b.HVA+b.Bytes)
		if err != nil {
			return gone(err)
		}
		if !present {
			present, err = maps.fileHasData(b.HVA, b.HVA+b.Bytes)
			if err != nil {
				return gone(err)
			}
		}
		if present {
			return problem.New(problem.Refused, "arm", b.Name, "pages are there before the first was brought in").
				WithHint("start the process without prealloc and mem-lock and with fresh memory, or restore this block eagerly")
		}
	}
	return nil
}

// relearn takes out of need what an earlier worker brought in. Pages that it
// misses only cost a vain copy.
func (s *server) relearn(pm *pagemap.Pagemap) error {
	buf := make([]pagemap.Region, 512)
	for i := range s.lazy {
		b := &s.lazy[i]
		q := pagemap.Query{AnyOf: pagemap.IsPresent | pagemap.IsSwapped}
		err := pm.ScanAll(b.HVA, b.HVA+b.Bytes, q, buf, func(r pagemap.Region) bool {
			s.need.Settle(Run{Block: i, First: (r.Start - b.HVA) / PageBytes, Pages: (r.End - r.Start) / PageBytes})
			return true
		})
		if errors.Is(err, pagemap.ErrUnsupported) {
			err = s.relearnEntries(pm, i)
		}
		if err != nil {
			return gone(err)
		}
	}
	s.ctl.leftPages.Store(s.need.Left())
	return nil
}

// relearnEntries is relearn on kernels before 6.7.
func (s *server) relearnEntries(pm *pagemap.Pagemap, block int) error {
	b := &s.lazy[block]
	entries := make([]pagemap.Entry, 4096)
	for at := uint64(0); at < b.Pages(); {
		n, err := pm.Entries(b.HVA+at*PageBytes, entries[:min(uint64(len(entries)), b.Pages()-at)])
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		for k, e := range entries[:n] {
			if e.Present() || e.Swapped() {
				s.need.SettlePage(block, at+uint64(k))
			}
		}
		at += uint64(n)
	}
	return nil
}

// wakeAll makes every waiting thread repeat its access: faults that a dead worker
// had read but not served come again.
func (s *server) wakeAll() error {
	for i := range s.lazy {
		if err := s.h.Wake(s.lazy[i].HVA, s.lazy[i].Bytes); err != nil {
			return err
		}
		s.ctl.wokenRanges.Add(1)
	}
	return nil
}

// unarm lets the blocks go. What was not brought in reads as zeros from now on,
// which is right: only pages recorded as zero were left out.
func (s *server) unarm() error {
	for i := range s.lazy {
		if err := s.h.Unregister(s.lazy[i].HVA, s.lazy[i].Bytes); err != nil {
			return err
		}
	}
	return nil
}

// freeZeros unregisters large rows of zero pages right away: they read as zeros
// without our help, and the kernel may use huge pages for them. Bounded, because
// each row splits a mapping in three until the end.
func (s *server) freeZeros(ctx context.Context) error {
	const align = hugeBytes / PageBytes
	for i := range s.lazy {
		b := &s.lazy[i]
		if !s.anon[i] {
			continue
		}
		skew := b.HVA / PageBytes % align // of page 0 within a huge page
		freed := 0
		for at := uint64(0); at < b.Pages() && freed < maxFreed; {
			first := (at+skew+align-1)/align*align - skew
			n := s.zero[i].run(first, b.Pages()) / align * align
			if n < minFreed {
				at = max(at, first) + max(n, align)
				continue
			}
			if freed == 0 {
				ok, err := s.seed(ctx, i)
				if err != nil {
					return err
				}
				if !ok {
					break
				}
			}
			if err := s.h.Unregister(b.HVA+first*PageBytes, n*PageBytes); err != nil {
				return gone(err)
			}
			freed++
			at = first + n
		}
	}
	return nil
}

// seed brings in one page with content before a mapping is split. The parts of a
// mapping split while it is empty get reverse maps (anon_vma) of their own and can
// never become one mapping again, and others know a RAMBlock by its mapping.
func (s *server) seed(ctx context.Context, block int) (bool, error) {
	b := &s.lazy[block]
	r, ok := s.need.Next(Run{Block: block, Pages: b.Pages()})
	if !ok {
		// Everything with content is in already, if there is any.
		return s.zero[block].run(0, b.Pages()) < b.Pages() && s.need.Held() == 0, nil
	}
	buf, err := newPinned(PageBytes)
	if err != nil {
		return false, err
	}
	defer buf.free()
	if n, _ := s.src.ReadRun(ctx, Ahead, b.ImageBlock, r.First, buf.mem); n != 1 {
		return false, nil // the drain will find out why
	}
	_, err = s.placeRun(buf, 0, Run{Block: block, First: r.First, Pages: 1})
	return true, err
}

// collapse asks for huge pages again where most of 2 MiB is in use: memory that
// was placed page by page has none. Bounded in time; the kernel's own daemon does
// the rest.
func (s *server) collapse(budget time.Duration) (bytes uint64) {
	const huge = hugeBytes
	deadline := time.Now().Add(budget)
	for i := range s.lazy {
		b := &s.lazy[i]
		for at := (b.HVA + huge - 1) &^ (huge - 1); at+huge <= b.HVA+b.Bytes; at += huge {
			if time.Now().After(deadline) {
				return bytes
			}
			first, zeros := (at-b.HVA)/PageBytes, 0
			for p := first; p < first+huge/PageBytes; p++ {
				if s.zero[i].has(p) {
					zeros++
				}
			}
			if zeros > huge/PageBytes/2 {
				continue
			}
			switch err := adviseRemote(s.pidfd, at, huge, unix.MADV_COLLAPSE); {
			case err == nil:
				bytes += huge
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBUSY):
				// This one is in use just now.
			default:
				// No huge pages for this memory, no right, or no such call.
				return bytes
			}
		}
	}
	return bytes
}
