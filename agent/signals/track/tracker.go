package track

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/bpf/dirty"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

const pageBytes = pagemap.PageBytes

// features make the kernel resolve the faults itself, and absent pages carry the
// mark, so that what appears is told from what was there.
const features = uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated | uffd.FeatureWPAsync

// Take makes a userfaultfd in a process (agent/vm/inject).
type Take func(ctx context.Context, pid int, vcpus []int) (*os.File, error)

// Config says what to track.
type Config struct {
	PID    int
	VCPUs  []int // threads that are not to be borrowed
	Blocks []vm.RAMBlock
	Take   Take
	// Counter is the live counter, or nil without one.
	Counter *dirty.Counter
	// CollapseBudget is the time Close may spend on making huge pages whole.
	CollapseBudget time.Duration
}

// Block is a tracked block. Pages of all blocks are numbered through, from First on.
type Block struct {
	Name         string
	Start, Bytes uint64
	First        uint64
	Main         bool
}

// Pages is the block's size.
func (b *Block) Pages() uint64 { return b.Bytes / pageBytes }

// Skipped is a block that is not tracked.
type Skipped struct {
	Name   string
	Bytes  uint64
	Reason string
}

// Tracker knows what is written in one VM.
type Tracker struct {
	Blocks  []Block
	Skipped []Skipped

	c       Config
	object  string
	h       *uffd.Handle
	pm      *pagemap.Pagemap
	pidfd   int
	live    *dirty.Target
	pages   uint64
	huge    []uint64 // addresses of huge pages before the first arm
	regions []pagemap.Region
}

// Open registers the blocks. Nothing is armed yet.
func Open(ctx context.Context, c Config) (t *Tracker, err error) {
	t = &Tracker{c: c, object: fmt.Sprintf("pid %d", c.PID), pidfd: -1, regions: make([]pagemap.Region, 4096)}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
			t = nil
		}
	}()
	if t.pidfd, err = unix.PidfdOpen(c.PID, 0); err != nil {
		return t, problem.New(problem.NotFound, "track", t.object, "%w", err)
	}
	if t.pm, err = pagemap.Open(c.PID); err != nil {
		return t, t.wrap(err)
	}
	if !t.pm.CanScan() {
		return t, problem.New(problem.Refused, "track", t.object, "%w", pagemap.ErrUnsupported).
			WithHint("dirty rates need Linux 6.7 or later")
	}
	f, err := c.Take(ctx, c.PID, c.VCPUs)
	if err != nil {
		return t, err
	}
	if t.h, err = uffd.Adopt(f, features); err != nil {
		return t, problem.New(problem.Refused, "track", t.object, "%w", err).
			WithHint("dirty rates need Linux 6.7 or later")
	}
	if err := t.register(c.Blocks); err != nil {
		return t, err
	}
	if err := t.noteHuge(); err != nil {
		return t, t.wrap(err)
	}
	return t, t.count()
}

// register takes the blocks' mappings, or finds that somebody else has them.
func (t *Tracker) register(blocks []vm.RAMBlock) error {
	for i := range blocks {
		b := &blocks[i]
		n := (b.TotalBytes + pageBytes - 1) &^ (pageBytes - 1)
		// Main memory counts as read-only if a part of it shows as ROM (shadowed BIOS).
		if b.ReadOnly && !b.Main {
			t.Skipped = append(t.Skipped, Skipped{b.Name, n, "the guest cannot write it"})
			continue
		}
		_, err := t.h.Register(b.HVA, n, uffd.ModeWP)
		switch {
		case err == nil:
			t.Blocks = append(t.Blocks, Block{Name: b.Name, Start: b.HVA, Bytes: n, First: t.pages, Main: b.Main})
			t.pages += n / pageBytes
		case errors.Is(err, unix.EBUSY):
			return problem.New(problem.Busy, "track", t.object, "its memory is being tracked by somebody else (a checkpoint, a migration): %w", err).
				WithHint("try again when that is over")
		case errors.Is(err, uffd.ErrGone):
			return t.wrap(err)
		case b.Main:
			return problem.New(problem.Refused, "track", t.object, "RAMBlock %s: %w", b.Name, err).
				WithHint("this kind of memory backend cannot be write-protected from outside; use memory-backend-ram or -memfd")
		default:
			t.Skipped = append(t.Skipped, Skipped{b.Name, n, err.Error()})
		}
	}
	if len(t.Blocks) == 0 {
		return problem.New(problem.Refused, "track", t.object, "no memory that can be tracked: %+v", t.Skipped)
	}
	return nil
}

// count starts the live counter on the largest blocks, main memory first.
func (t *Tracker) count() (err error) {
	if t.c.Counter == nil {
		return nil
	}
	if len(t.Blocks) > dirty.MaxRanges {
		// Which blocks the counter leaves out would have to be told everywhere.
		t.Skipped = append(t.Skipped, Skipped{Name: "live counter", Reason: fmt.Sprintf("%d blocks are more than it follows", len(t.Blocks))})
		return nil
	}
	var ranges []dirty.Range
	for _, b := range t.Blocks {
		ranges = append(ranges, dirty.Range{Start: b.Start, Bytes: b.Bytes})
	}
	if t.live, err = t.c.Counter.Track(t.c.PID, ranges); errors.Is(err, dirty.ErrTracked) {
		return problem.New(problem.Busy, "track", t.object, "%w", err)
	}
	return err
}

// wrap tells a VM that has ended from everything else.
func (t *Tracker) wrap(err error) error {
	code := problem.Failed
	if errors.Is(err, uffd.ErrGone) || errors.Is(err, pagemap.ErrGone) || errors.Is(err, os.ErrNotExist) {
		code = problem.NotFound
	}
	return problem.New(code, "track", t.object, "%w", err)
}

// Pages is the number of pages tracked.
func (t *Tracker) Pages() uint64 { return t.pages }

// Live is the live counter, nil without one.
func (t *Tracker) Live() *dirty.Target { return t.live }

// BlockOf is the block that holds a page.
func (t *Tracker) BlockOf(page uint64) *Block {
	i, found := slices.BinarySearchFunc(t.Blocks, page, func(b Block, page uint64) int {
		switch {
		case b.First > page:
			return 1
		case b.First < page:
			return -1
		}
		return 0
	})
	if !found {
		i--
	}
	return &t.Blocks[i]
}

// Address is where a page lies in QEMU's memory.
func (t *Tracker) Address(page uint64) uint64 {
	b := t.BlockOf(page)
	return b.Start + (page-b.First)*pageBytes
}

// armStep bounds one call, so that none holds the address space's lock for long.
const armStep = 64 << 20

// ArmAll marks every page.
func (t *Tracker) ArmAll() error {
	for _, b := range t.Blocks {
		if err := t.arm(b.Start, b.Start+b.Bytes); err != nil {
			return err
		}
	}
	return nil
}

// Arm marks count pages from first on. They may belong to several blocks.
func (t *Tracker) Arm(first, count uint64) error {
	return t.eachPart(first, count, func(b *Block, start, end uint64) error { return t.arm(start, end) })
}

func (t *Tracker) arm(start, end uint64) error {
	for at := start; at < end; at += armStep {
		if err := t.h.WriteProtect(at, min(armStep, end-at)); err != nil {
			return t.wrap(err)
		}
	}
	return nil
}

func (t *Tracker) eachPart(first, count uint64, do func(b *Block, start, end uint64) error) error {
	for count > 0 {
		if first >= t.pages {
			return fmt.Errorf("track: page %d of %d", first, t.pages)
		}
		b := t.BlockOf(first)
		n := min(count, b.First+b.Pages()-first)
		start := b.Start + (first-b.First)*pageBytes
		if err := do(b, start, start+n*pageBytes); err != nil {
			return err
		}
		first, count = first+n, count-n
	}
	return nil
}

// takeQuery reports what was written and marks it again in one step.
var takeQuery = pagemap.Query{
	Flags: pagemap.WPMatching | pagemap.CheckWPAsync,
	Mask:  pagemap.IsWritten, Return: pagemap.IsWritten,
}

// lookQuery reports what was written and leaves it so.
var lookQuery = pagemap.Query{Mask: pagemap.IsWritten, Return: pagemap.IsWritten}

// TakeAll calls yield for every run of pages written since they were marked, and
// marks them again.
func (t *Tracker) TakeAll(yield func(first, count uint64)) error {
	for i := range t.Blocks {
		b := &t.Blocks[i]
		if err := t.scan(b, b.Start, b.Start+b.Bytes, takeQuery, yield); err != nil {
			return err
		}
	}
	return nil
}

// Look calls yield for every run of pages of [first, first+count) written since
// they were marked.
func (t *Tracker) Look(first, count uint64, yield func(first, count uint64)) error {
	return t.eachPart(first, count, func(b *Block, start, end uint64) error {
		return t.scan(b, start, end, lookQuery, yield)
	})
}

func (t *Tracker) scan(b *Block, start, end uint64, q pagemap.Query, yield func(first, count uint64)) error {
	err := t.pm.ScanAll(start, end, q, t.regions, func(r pagemap.Region) bool {
		yield(b.First+(r.Start-b.Start)/pageBytes, r.Pages(pageBytes))
		return true
	})
	if errors.Is(err, unix.EPERM) {
		// Somebody had QEMU map the block anew: our registration is gone from it.
		return problem.New(problem.Busy, "track", t.object, "RAMBlock %s was mapped anew meanwhile: %w", b.Name, err)
	}
	if err != nil {
		return t.wrap(err)
	}
	return nil
}

// Read copies pages of the VM's memory, len(buf)/4096 of them from first on, all of
// one block.
func (t *Tracker) Read(first uint64, buf []byte) error {
	at := t.Address(first)
	n, err := unix.ProcessVMReadv(t.c.PID, []unix.Iovec{iovec(buf)}, []unix.RemoteIovec{{Base: uintptr(at), Len: len(buf)}}, 0)
	if err == nil && n != len(buf) {
		err = fmt.Errorf("%d of %d bytes", n, len(buf))
	}
	if err != nil {
		return t.wrap(fmt.Errorf("read guest memory at %#x: %w", at, err))
	}
	return nil
}

// Close lets go of the VM's memory.
func (t *Tracker) Close() error {
	var errs []error
	if t.live != nil {
		errs = append(errs, t.live.Untrack())
		t.live = nil
	}
	if t.h != nil {
		errs = append(errs, t.h.Close())
		t.collapse()
		t.h = nil
	}
	if t.pm != nil {
		errs = append(errs, t.pm.Close())
		t.pm = nil
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
		t.pidfd = -1
	}
	return errors.Join(errs...)
}
