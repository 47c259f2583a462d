package pagemap

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// armedQuery matches pages that carry the mark for certain: something is there
// (a page, a swap entry or a marker) and it is not without the mark. Absence
// alone is not enough: where a whole page table is missing, a scan for written
// pages reports nothing, and nothing is protected. What matches returns no
// category, so that neighbours merge into one region.
var armedQuery = Query{
	CategoryInverted: IsWritten, Mask: IsWritten, AnyOf: IsPresent | IsSwapped, Return: IsWritten,
}

// Intact pages are armed, mapped, and still of the kind they were.
var (
	intactPrivate = Query{
		CategoryInverted: IsWritten | IsFile, Mask: IsWritten | IsFile | IsPresent, Return: IsWritten,
	}
	intactShared = Query{
		CategoryInverted: IsWritten, Mask: IsWritten | IsFile | IsPresent, Return: IsWritten,
	}
)

func intactQuery(shared bool) *Query {
	if shared {
		return &intactShared
	}
	return &intactPrivate
}

func intactEntry(shared bool) func(Entry) bool {
	return func(e Entry) bool { return e.UffdWP() && e.Present() && e.File() == shared }
}

// AllArmed reports whether every page of [start, end) carries the
// write-protect mark, on a page, a swap entry or a marker. Where PAGEMAP_SCAN
// is missing it reads the entries.
func (p *Pagemap) AllArmed(start, end uint64) (bool, error) {
	return p.allMatch(start, end, armedQuery, Entry.UffdWP)
}

// AllIntact reports whether every page of [start, end) carries the
// write-protect mark, is mapped, and is a page of the file (shared) or a private
// one (not shared). It is the question to ask after copying pages that had
// content when they were armed: AllArmed alone is also true of a marker left
// behind by a discard (see the package comment).
func (p *Pagemap) AllIntact(start, end uint64, shared bool) (bool, error) {
	return p.allMatch(start, end, *intactQuery(shared), intactEntry(shared))
}

func (p *Pagemap) allMatch(start, end uint64, q Query, entry func(Entry) bool) (bool, error) {
	if start >= end || start%PageBytes != 0 || end%PageBytes != 0 {
		return false, fmt.Errorf("pagemap: range [%#x,%#x) is empty or not page-aligned: %w", start, end, unix.EINVAL)
	}
	var out [1]Region
	for at := start; at < end; {
		n, next, errno := p.scan(at, end, &q, out[:])
		if errno == unix.ENOTTY {
			return p.everyEntry(at, end, entry)
		}
		if errno != 0 {
			return false, p.scanError(at, end, errno)
		}
		// A stop short of end because out is full means that the second
		// matching region follows a gap.
		if n == 0 || out[0].Start != at || out[0].End < min(next, end) || next <= at {
			return false, nil
		}
		at = out[0].End
	}
	return true, nil
}

// Armed calls yield for the runs of [start, end) that AllArmed is true of, in
// ascending order; buf is the working space. Without PAGEMAP_SCAN it is ErrUnsupported.
func (p *Pagemap) Armed(start, end uint64, buf []Region, yield func(Region) bool) error {
	return p.ScanAll(start, end, armedQuery, buf, yield)
}

// AnyWritten reports whether any page of [start, end) is without the
// write-protect mark: written, discarded or never armed since. See the package
// comment for what its being false proves.
func (p *Pagemap) AnyWritten(start, end uint64) (bool, error) {
	armed, err := p.AllArmed(start, end)
	return !armed, err
}

// AnyPresent reports whether any page of [start, end) is mapped or swapped out,
// that is: would not raise a missing fault. A write-protect marker on nothing
// counts too, though it would; ask before arming.
func (p *Pagemap) AnyPresent(start, end uint64) (bool, error) {
	var out [1]Region
	n, _, errno := p.scan(start, end, &Query{AnyOf: IsPresent | IsSwapped, Return: IsPresent, MaxPages: 1}, out[:])
	if errno == unix.ENOTTY {
		none, err := p.everyEntry(start, end, func(e Entry) bool { return !e.Present() && !e.Swapped() })
		return !none, err
	}
	if errno != 0 {
		return false, p.scanError(start, end, errno)
	}
	return n > 0, nil
}

// CountPresent is the number of 4 KiB pages of [start, end) that are mapped now
// (not swapped out ones).
func (p *Pagemap) CountPresent(start, end uint64) (uint64, error) {
	return p.Count(start, end, Query{Mask: IsPresent, Return: IsPresent})
}

// Count is the number of 4 KiB pages of [start, end) that match q. Without
// PAGEMAP_SCAN only queries of present pages can be answered.
func (p *Pagemap) Count(start, end uint64, q Query) (uint64, error) {
	var total uint64
	var buf [64]Region
	err := p.ScanAll(start, end, q, buf[:], func(r Region) bool {
		total += r.Pages(PageBytes)
		return true
	})
	if errors.Is(err, ErrUnsupported) && q.Mask == IsPresent && q.AnyOf == 0 && q.CategoryInverted == 0 {
		total = 0
		_, err = p.everyEntry(start, end, func(e Entry) bool {
			if e.Present() {
				total++
			}
			return true
		})
	}
	if err != nil {
		return 0, err
	}
	return total, nil
}

// Entries reads the pagemap words of len(out) pages from start on: what older
// kernels offer, and the only source of page frame numbers. n is less than
// len(out) only where the address space ends.
func (p *Pagemap) Entries(start uint64, out []Entry) (n int, err error) {
	if start%PageBytes != 0 {
		return 0, fmt.Errorf("pagemap: address %#x is not page-aligned: %w", start, unix.EINVAL)
	}
	b := entryBytes(out)
	done := 0
	for done < len(b) {
		m, err := unix.Pread(int(p.fd.Load()), b[done:], int64(start/PageBytes*8)+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return done / 8, fmt.Errorf("read pagemap of pid %d at %#x: %w", p.pid, start+uint64(done/8)*PageBytes, err)
		case m == 0:
			if done == 0 && len(b) > 0 {
				// A process that has exited reads as an empty file.
				return 0, fmt.Errorf("read pagemap of pid %d at %#x: %w: %w", p.pid, start, io.EOF, ErrGone)
			}
			return done / 8, nil
		}
		done += m
	}
	return done / 8, nil
}

// everyEntry reports whether ok holds for every page's entry; it stops at the
// first for which it does not.
func (p *Pagemap) everyEntry(start, end uint64, ok func(Entry) bool) (bool, error) {
	var buf [512]Entry
	for start < end {
		want := min(uint64(len(buf)), (end-start)/PageBytes)
		n, err := p.Entries(start, buf[:want])
		if err != nil {
			return false, err
		}
		if n == 0 {
			return false, nil
		}
		for _, e := range buf[:n] {
			if !ok(e) {
				return false, nil
			}
		}
		start += uint64(n) * PageBytes
	}
	return true, nil
}
