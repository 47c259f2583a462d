package source

import (
	"errors"
	"fmt"
	"os"

	"github.com/ckagent/ckagent/uffd/pagemap"
)

// PageBytes is the page size of the RAM a Source reads.
const PageBytes = 4096

// Kind is what backs a RAMBlock, as far as reading it is concerned.
type Kind uint8

const (
	Anonymous Kind = iota
	PrivateFile
	Shared
)

// Block is one RAMBlock as it lies in the process.
type Block struct {
	HVA   uint64 // address of its first byte, page aligned
	Pages uint64 // length in pages
	Kind  Kind
	// Whole says that it lies in pages of 2 MiB from hugetlbfs, which the kernel
	// protects, maps and discards as wholes only.
	Whole bool
}

// WholePages is the length of a page of hugetlbfs, in pages.
const WholePages = 2 << 20 / PageBytes

// End is the address after the block's last byte.
func (b Block) End() uint64 { return b.HVA + b.Pages*PageBytes }

// Run is a run of pages of one block that all have content, or all read as zero.
type Run struct {
	First, Pages uint64
	Zero         bool
}

// Source reads the RAM of one process.
type Source struct {
	pid    int
	pm     *pagemap.Pagemap
	blocks []source
}

type source struct {
	Block
	file       *os.File // what a file-backed block maps; nil for Anonymous
	fd         int      // its descriptor
	inMemory   bool     // it is on tmpfs
	fileOffset int64    // offset in file of the block's first byte
}

// Open prepares reading blocks of the process.
func Open(pid int, blocks []Block) (*Source, error) {
	pm, err := pagemap.Open(pid)
	if err != nil {
		return nil, fmt.Errorf("open the page map of %d: %w", pid, err)
	}
	s := &Source{pid: pid, pm: pm, blocks: make([]source, len(blocks))}
	for i, b := range blocks {
		if b.HVA%PageBytes != 0 || b.Pages == 0 || b.Pages > 1<<40/PageBytes {
			return nil, errors.Join(fmt.Errorf("block %d: %d pages at %#x", i, b.Pages, b.HVA), s.Close())
		}
		if b.Whole && (b.HVA%(WholePages*PageBytes) != 0 || b.Pages%WholePages != 0 || b.Kind == Anonymous) {
			return nil, errors.Join(fmt.Errorf("block %d: %d pages at %#x are no hugetlbfs memory", i, b.Pages, b.HVA), s.Close())
		}
		s.blocks[i].Block = b
		if b.Kind == Anonymous {
			continue
		}
		if s.blocks[i].file, s.blocks[i].fileOffset, err = openMapped(pid, b.HVA); err != nil {
			return nil, errors.Join(fmt.Errorf("block %d: open what is mapped at %#x: %w", i, b.HVA, err), s.Close())
		}
		s.blocks[i].fd = int(s.blocks[i].file.Fd())
		s.blocks[i].inMemory = livesInMemory(s.blocks[i].fd)
	}
	return s, nil
}

// Close lets go of the process.
func (s *Source) Close() error {
	errs := []error{s.pm.Close()}
	for _, b := range s.blocks {
		if b.file != nil {
			errs = append(errs, b.file.Close())
		}
	}
	return errors.Join(errs...)
}

// Blocks is the number of blocks.
func (s *Source) Blocks() int { return len(s.blocks) }

// Block returns block i.
func (s *Source) Block(i int) Block { return s.blocks[i].Block }

// Pagemap is the page map the Source reads from.
func (s *Source) Pagemap() *pagemap.Pagemap { return s.pm }

// Read copies the pages from first on into dst, whose length is a multiple of
// the page size. Shared memory is read through its file: reading a hole through
// the mapping would fill it, and hide that it was punched.
func (s *Source) Read(block int, first uint64, dst []byte) error {
	b := &s.blocks[block]
	if first+uint64(len(dst)/PageBytes) > b.Pages {
		return fmt.Errorf("read %d bytes at page %d of a block of %d pages", len(dst), first, b.Pages)
	}
	if b.Kind == Shared {
		return readFile(b.fd, b.fileOffset+int64(first*PageBytes), dst)
	}
	return ReadMemory(s.pid, b.HVA+first*PageBytes, dst)
}

// Held calls yield for each run among the pages [first, first+n) that holds
// something a discard (balloon, MADV_DONTNEED, a punched hole) would lose
// without leaving a trace in the page's write-protect mark: pages of the file for
// Shared, private copies for PrivateFile, what is mapped of hugetlbfs. Anonymous memory
// needs none of this, a discard takes the mark along.
func (s *Source) Held(block int, first, n uint64, yield func(first, n uint64)) error {
	b := &s.blocks[block]
	if first+n > b.Pages || n == 0 {
		return fmt.Errorf("held pages of %d at page %d of a block of %d pages", n, first, b.Pages)
	}
	switch {
	case b.Whole:
		return s.present(b, first, n, func(pagemap.Entry) bool { return true }, yield)
	case b.Kind == Shared:
		var buf [8]Run
		runs, err := b.fileRuns(first, n, buf[:0])
		for _, r := range runs {
			if !r.Zero {
				yield(r.First, r.Pages)
			}
		}
		return err
	case b.Kind == PrivateFile: // what is the process's own
		return s.present(b, first, n, func(e pagemap.Entry) bool { return !e.File() }, yield)
	}
	return nil
}

// present finds the pages that are in memory and of a kind, or swapped out.
func (s *Source) present(b *source, first, n uint64, kind func(pagemap.Entry) bool, yield func(first, n uint64)) error {
	var entries [512]pagemap.Entry
	for end := first + n; first < end; {
		k, err := s.pm.Entries(b.HVA+first*PageBytes, entries[:min(end-first, uint64(len(entries)))])
		if err != nil {
			return err
		}
		if k == 0 {
			return fmt.Errorf("page map of page %d: nothing there", first)
		}
		for _, e := range entries[:k] {
			if e.Present() && kind(e) || e.Swapped() && e&swapTypeMask != swapTypeMarker {
				yield(first, 1)
			}
			first++
		}
	}
	return nil
}

// Runs appends to out the runs that make up the pages [first, first+n) of block.
func (s *Source) Runs(block int, first, n uint64, out []Run) ([]Run, error) {
	b := &s.blocks[block]
	if first+n > b.Pages || n == 0 {
		return out, fmt.Errorf("runs of %d pages at page %d of a block of %d pages", n, first, b.Pages)
	}
	var err error
	mark := len(out)
	if b.Whole {
		// A hugetlbfs file does not tell its holes, and a page on the move looks like
		// one that is not there.
		return appendRun(out, mark, Run{First: first, Pages: n}), nil
	}
	switch b.Kind {
	case Anonymous:
		out, err = s.mappedRuns(b, first, n, out)
	case Shared:
		out, err = b.fileRuns(first, n, out)
	case PrivateFile:
		var mapped []Run
		if mapped, err = s.mappedRuns(b, first, n, nil); err != nil {
			break
		}
		for _, r := range mapped {
			if !r.Zero {
				out = appendRun(out, mark, r)
			} else if out, err = b.fileRunsFrom(mark, r.First, r.Pages, out); err != nil {
				break
			}
		}
	}
	return out, err
}

// eachPages is how many pages Each looks at in one step.
const eachPages = 1 << 15

// Each calls yield for the runs of a whole block, in ascending order. It takes the
// same memory for a block of any size, however fragmented; for that, runs end at
// multiples of 128 MiB.
func (s *Source) Each(block int, yield func(Run)) error {
	var out []Run
	for first, end := uint64(0), s.blocks[block].Pages; first < end; first += eachPages {
		var err error
		if out, err = s.Runs(block, first, min(eachPages, end-first), out[:0]); err != nil {
			return err
		}
		for _, r := range out {
			yield(r)
		}
	}
	return nil
}

// appendRun adds r to out, merging it with the last run since mark if they are
// alike.
func appendRun(out []Run, mark int, r Run) []Run {
	if r.Pages == 0 {
		return out
	}
	if n := len(out); n > mark && out[n-1].Zero == r.Zero && out[n-1].First+out[n-1].Pages == r.First {
		out[n-1].Pages += r.Pages
		return out
	}
	return append(out, r)
}

// mappedRuns answers from the page table: content is what is present, except for
// mappings of the zero page, and what is swapped out or migrating. Kernels
// without PAGEMAP_SCAN do not tell the zero page apart: there it is content.
func (s *Source) mappedRuns(b *source, first, n uint64, out []Run) ([]Run, error) {
	var regions [128]pagemap.Region
	mark := len(out)
	at, end := b.HVA+first*PageBytes, b.HVA+(first+n)*PageBytes
	page := func(addr uint64) uint64 { return (addr - b.HVA) / PageBytes }
	run := func(from, to uint64, zero bool) Run {
		return Run{First: page(from), Pages: page(to) - page(from), Zero: zero}
	}
	q := pagemap.Query{AnyOf: pagemap.IsPresent | pagemap.IsSwapped,
		Return: pagemap.IsSwapped | pagemap.IsPFNZero}
	err := s.pm.ScanAll(at, end, q, regions[:], func(r pagemap.Region) bool {
		out = appendRun(out, mark, run(at, r.Start, true))
		at = r.End
		if r.Categories&pagemap.IsSwapped == 0 {
			out = appendRun(out, mark, run(r.Start, r.End, r.Categories&pagemap.IsPFNZero != 0))
			return true
		}
		// A write-protect marker on nothing is reported as swapped too; only
		// the entries tell them apart.
		out = s.entryRuns(b, page(r.Start), page(r.End), mark, out)
		return true
	})
	if errors.Is(err, pagemap.ErrUnsupported) { // Linux before 6.7
		return s.entryRuns(b, first, first+n, mark, out[:mark]), nil
	}
	if err != nil {
		return out[:mark], err
	}
	return appendRun(out, mark, run(at, end, true)), nil
}

// entryRuns classifies the pages [first, end) by their pagemap entries. What
// cannot be read counts as content: reading it will tell.
func (s *Source) entryRuns(b *source, first, end uint64, mark int, out []Run) []Run {
	var entries [512]pagemap.Entry
	for first < end {
		n, err := s.pm.Entries(b.HVA+first*PageBytes, entries[:min(end-first, uint64(len(entries)))])
		if err != nil || n == 0 {
			return appendRun(out, mark, Run{First: first, Pages: end - first})
		}
		for _, e := range entries[:n] {
			zero := !e.Present() && (!e.Swapped() || e&swapTypeMask == swapTypeMarker)
			out = appendRun(out, mark, Run{First: first, Pages: 1, Zero: zero})
			first++
		}
	}
	return out
}

// The low bits of a swapped entry are the swap type. The kernel gives real swap
// files the lowest types and PTE markers the last of the 32
// (include/linux/swap.h, SWP_PTE_MARKER).
const (
	swapTypeMask   = 1<<5 - 1
	swapTypeMarker = 31
)

func (b *source) fileRuns(first, n uint64, out []Run) ([]Run, error) {
	return b.fileRunsFrom(len(out), first, n, out)
}
