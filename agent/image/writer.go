package image

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// WriterOptions tune a Writer. The zero value is right for most.
type WriterOptions struct {
	// Compress is none (default), s2 or zstd.
	Compress string
	// Lanes is how many calls write at once, each to a segment of its own.
	// Default: GOMAXPROCS, from 2 to 8.
	Lanes int
	// SegmentBytes bounds a segment file. Default 4 GiB, at least 16 MiB.
	SegmentBytes uint64
	// WritebackBytes is after how much data per lane the kernel is asked to start
	// writing, so that the final sync is short. Default 8 MiB; negative: never.
	WritebackBytes int64
	// Direct has pages written past the page cache, where the file system can. They take no
	// memory from the guests and little time from the processors, and are not in memory
	// for a restore.
	Direct bool
	// FS is where the files go. Default: the host's file system.
	FS fsys.FS

	// Key makes the tags of pages, which a child of this image needs. Without it there
	// are none, and no Parent and no Dedup.
	Key *TagKey
	// Parent is the image that unchanged pages are taken over from; see Usable. Like a
	// donor it has to stay open until NewWriter has returned, and no longer.
	Parent *Reader
	// Dedup has the content of each page looked for among those of the parent, of the
	// donors and of this image.
	Dedup  bool
	Donors []*Reader
	// VM is the name of the VM that the image is of: segments of others are marked.
	VM string

	merge      bool // the Writer rewrites its Parent, in its directory
	generation int  // in the names of files; 0: none
}

const (
	defaultSegmentBytes = 4 << 30
	minSegmentBytes     = 16 << 20
	defaultWriteback    = 8 << 20
	maxLanes            = 64
)

// ErrTwice says that a page was given to a Writer a second time: a bug in the
// capture, because one of the two contents is not of the checkpoint's instant.
var ErrTwice = errors.New("page written twice")

// ErrClosed says that a Writer or Reader was finished, aborted or closed.
var ErrClosed = errors.New("closed")

// ErrIncomplete says that a checkpoint lacks pages or its device state.
var ErrIncomplete = errors.New("incomplete")

// Writer stores the pages of one checkpoint. See the package documentation.
type Writer struct {
	fs     fsys.FS
	dir    string
	o      WriterOptions
	codec  codec // 0: none
	blocks []Block
	layout layout

	key     *TagKey
	tagsRef TagsRef // its scope and key
	tags    []byte  // TagBytes per entry; nil: none are kept
	index   *tagIndex
	base    []Segment // taken over: they come first in the table
	moved   map[*Reader][]int

	entries []byte     // the pagemap's entries as they go to disk
	claimed [][]uint64 // per block one bit a page, set atomically
	zeroSum []uint64   // per block: checksum of a zero page

	life   sync.RWMutex // read-held by every call that writes; Finish and Abort take it
	closed bool         // guarded by life
	failed atomic.Pointer[problem.Error]

	lanes struct {
		sync.Mutex
		idle *sync.Cond
		free []*lane
		made int
	}
	segs struct {
		sync.Mutex
		list []*segment
	}
	state struct {
		sync.Mutex
		ref     FileRef
		f       fsys.File
		written bool
	}
	pages, zeroPages, storedBytes, unchangedPages, sharedPages atomic.Uint64
}

// segment is one file being written; its lane owns size and started.
type segment struct {
	index   int
	path    string
	name    string
	kind    SegmentKind
	f       fsys.File
	size    uint64
	started uint64 // bytes whose writeback was asked for
}

// NewWriter starts a checkpoint of these blocks in an empty directory. It
// allocates everything a page costs in memory (16 bytes and a bit each, 16 more with a
// key, and what an index takes), so that WritePages has nothing to allocate.
func NewWriter(dir string, blocks []Block, o WriterOptions) (*Writer, error) {
	const op = "start image"
	if err := ValidateBlocks(blocks); err != nil {
		return nil, problem.New(problem.Refused, op, dir, "%w", err)
	}
	w := &Writer{dir: dir, blocks: append([]Block(nil), blocks...), fs: o.FS}
	switch o.Compress {
	case "", "none":
	case "s2":
		w.codec = codecS2
	case "zstd":
		w.codec = codecZstd
	default:
		return nil, problem.New(problem.Usage, op, dir, "compression %q: none, s2 or zstd", o.Compress)
	}
	if w.fs == nil {
		w.fs = fsys.OS{}
	}
	if o.Lanes <= 0 {
		o.Lanes = min(max(runtime.GOMAXPROCS(0), 2), 8)
	}
	o.Lanes = min(o.Lanes, maxLanes)
	if o.SegmentBytes == 0 {
		o.SegmentBytes = defaultSegmentBytes
	}
	o.SegmentBytes = min(max(o.SegmentBytes, minSegmentBytes), maxSegmentBytes)
	if o.WritebackBytes == 0 {
		o.WritebackBytes = defaultWriteback
	}
	w.o = o
	w.layout = layoutOf(w.blocks)
	w.entries = make([]byte, w.layout.entries*entryBytes)
	w.claimed = make([][]uint64, len(w.blocks))
	w.zeroSum = make([]uint64, len(w.blocks))
	for i, b := range w.blocks {
		w.claimed[i] = make([]uint64, (b.Pages()+63)/64)
		w.zeroSum[i] = xxhash.Sum64(zeroPage[:b.PageBytes])
	}
	w.lanes.idle = sync.NewCond(&w.lanes)
	w.lanes.free = make([]*lane, 0, o.Lanes)
	if o.Key == nil && !o.merge {
		if o.Parent != nil || o.Dedup {
			return nil, problem.New(problem.Failed, op, dir, "a parent or deduplication without a key")
		}
		return w, nil
	}
	if o.merge {
		w.tagsRef = TagsRef{Scope: o.Parent.manifest.Tags.Scope, Key: o.Parent.manifest.Tags.Key}
	} else {
		w.key, w.tagsRef = o.Key, TagsRef{Scope: o.Key.scope, Key: o.Key.id}
	}
	w.tags = make([]byte, w.layout.entries*TagBytes)
	if err := w.inherit(&o); err != nil {
		w.giveBack()
		return nil, err
	}
	w.o.Parent, w.o.Donors, w.moved = nil, nil, nil // they may be closed now
	return w, nil
}

// Blocks are the blocks the Writer was made for. Do not change them.
func (w *Writer) Blocks() []Block { return w.blocks }

// WritePages stores whole consecutive pages of a block, from page firstPage on.
// When it returns, data may be reused; until then its content must not change
// (it is hashed and then written from where it lies, without a copy). Pages of
// zeros are recorded and not stored. Safe for concurrent use; allocates nothing.
func (w *Writer) WritePages(block int, firstPage uint64, data []byte) error {
	w.life.RLock()
	defer w.life.RUnlock()
	r := Run{Block: block, First: firstPage, Data: data}
	n, err := w.claimRun(r)
	if err != nil || n == 0 {
		return err
	}
	l, err := w.takeLane()
	if err != nil {
		return w.fail(err)
	}
	l.run1[0] = r
	return w.written(l, l.run1[:], n)
}

// Run is consecutive pages of a block, with their content.
type Run struct {
	Block int
	First uint64
	Data  []byte
}

// WriteRuns is WritePages for several runs, which need not have anything to do with
// each other: pages that come singly, as the guest writes to them, cost one write for
// many.
func (w *Writer) WriteRuns(runs []Run) error {
	w.life.RLock()
	defer w.life.RUnlock()
	var pages uint64
	for _, r := range runs {
		n, err := w.claimRun(r)
		if err != nil {
			return err
		}
		pages += n
	}
	if pages == 0 {
		return nil
	}
	l, err := w.takeLane()
	if err != nil {
		return w.fail(err)
	}
	return w.written(l, runs, pages)
}

// claimRun checks a run and marks its pages as written.
func (w *Writer) claimRun(r Run) (pages uint64, err error) {
	if r.Block < 0 || r.Block >= len(w.blocks) {
		return 0, w.misuse(r.Block, r.First, "no such block")
	}
	pageBytes := w.blocks[r.Block].PageBytes
	if uint64(len(r.Data))%pageBytes != 0 {
		return 0, w.misuse(r.Block, r.First, "data is not whole pages")
	}
	pages = uint64(len(r.Data)) / pageBytes
	if pages == 0 {
		return 0, nil
	}
	return pages, w.claim(r.Block, r.First, pages)
}

// written writes claimed runs by a lane, which it gives back, and counts them.
func (w *Writer) written(l *lane, runs []Run, pages uint64) error {
	zeros, stored, err := l.write(w, runs)
	w.putLane(l)
	if err != nil {
		return w.fail(err)
	}
	w.pages.Add(pages)
	w.zeroPages.Add(zeros)
	w.storedBytes.Add(stored)
	return nil
}

// WriteZero records n pages of zeros. Safe for concurrent use.
func (w *Writer) WriteZero(block int, firstPage, n uint64) error {
	w.life.RLock()
	defer w.life.RUnlock()
	if block < 0 || block >= len(w.blocks) {
		return w.misuse(block, firstPage, "no such block")
	}
	if n == 0 {
		return nil
	}
	if err := w.claim(block, firstPage, n); err != nil {
		return err
	}
	e := w.entriesOf(block, firstPage, n)
	for ; len(e) > 0; e = e[entryBytes:] {
		putEntry(e, zeroLocation, w.zeroSum[block])
	}
	w.pages.Add(n)
	w.zeroPages.Add(n)
	return nil
}

func (w *Writer) entriesOf(block int, first, n uint64) []byte {
	from := (w.layout.firstEntry[block] + first) * entryBytes
	return w.entries[from : from+n*entryBytes]
}

// claim marks pages as written, each at most once.
func (w *Writer) claim(block int, first, n uint64) error {
	if err := w.usable(); err != nil {
		return err
	}
	if pages := w.blocks[block].Pages(); first > pages || n > pages-first {
		return w.misuse(block, first, "pages beyond the end of the block")
	}
	words := w.claimed[block]
	for p, end := first, first+n; p < end; {
		upto := min((p|63)+1, end)
		mask := ^uint64(0) << (p & 63)
		if upto&63 != 0 {
			mask &= 1<<(upto&63) - 1
		}
		if old := atomic.OrUint64(&words[p>>6], mask) & mask; old != 0 {
			twice := p&^63 + uint64(bits.TrailingZeros64(old))
			return w.fail(problem.New(problem.Failed, "write pages", w.object(block, twice), "%w", ErrTwice))
		}
		p = upto
	}
	return nil
}

func (w *Writer) object(block int, page uint64) string {
	return fmt.Sprintf("RAMBlock %s page %d", w.blocks[block].Name, page)
}

func (w *Writer) misuse(block int, page uint64, what string) error {
	return w.fail(problem.New(problem.Failed, "write pages", fmt.Sprintf("block %d page %d", block, page), "%s", what))
}

// fail keeps the first error: whatever was lost then stays lost.
func (w *Writer) fail(err error) error {
	p, ok := errors.AsType[*problem.Error](err)
	if !ok {
		p = problem.New(problem.Failed, "write image", w.dir, "%w", err)
	}
	w.failed.CompareAndSwap(nil, p)
	return p
}

// usable needs life held.
func (w *Writer) usable() error {
	if w.closed {
		return problem.New(problem.Failed, "write image", w.dir, "%w", ErrClosed)
	}
	if p := w.failed.Load(); p != nil {
		return p
	}
	return nil
}

// Missing lists the pages of a block that nobody wrote.
func (w *Writer) Missing(block int) []PageRun {
	if block < 0 || block >= len(w.blocks) {
		return nil
	}
	var out []PageRun
	pages := w.blocks[block].Pages()
	for i := range w.claimed[block] {
		word := ^atomic.LoadUint64(&w.claimed[block][i]) // set: missing
		if word == 0 {
			continue
		}
		for p := uint64(i) * 64; p < min(uint64(i)*64+64, pages); p++ {
			if word>>(p&63)&1 == 0 {
				continue
			}
			if n := len(out); n > 0 && out[n-1].End() == p {
				out[n-1].Pages++
			} else {
				out = append(out, PageRun{Block: block, First: p, Pages: 1})
			}
		}
	}
	return out
}

// Progress is how far a Writer is.
type Progress struct {
	Pages, ZeroPages, StoredBytes uint64
	UnchangedPages                uint64 // taken over from the same place of the parent
	SharedPages                   uint64 // found elsewhere
}

// Progress may be called at any time.
func (w *Writer) Progress() Progress {
	return Progress{w.pages.Load(), w.zeroPages.Load(), w.storedBytes.Load(), w.unchangedPages.Load(), w.sharedPages.Load()}
}

func cancelled(op, object string, err error) error {
	return problem.New(problem.Cancelled, op, object, "%w", err)
}

// zeroPage is what a page of zeros is compared with.
var zeroPage [MaxPageBytes]byte

// IsZero reports whether p, at most MaxPageBytes long, is all zeros. bytes.Equal
// compares 64 bytes at a time: 51 ns for 4 KiB of zeros, against 64 ns for a loop
// over words; content that is not zero ends both at its first bytes.
func IsZero(p []byte) bool { return bytes.Equal(p, zeroPage[:len(p)]) }
