package image

import (
	"context"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// verifyBytes is the unit of work of one verifying goroutine.
const verifyBytes = 1 << 20

// Verify reads everything: every page against its checksum, the whole pagemap,
// the device state, the tags, and of the segments written for this checkpoint every
// byte that no page accounts for. It
// uses at most four goroutines. progress, if not nil, is called now and then with
// the bytes of RAM checked so far and in all, never concurrently.
func (r *Reader) Verify(ctx context.Context, progress func(done, total uint64)) error {
	const op = "verify"
	if _, err := r.DeviceState(ctx); err != nil {
		return err
	}
	if r.manifest.Tags != nil {
		if err := r.checkTags(); err != nil {
			return err
		}
	}
	v := verifier{r: r, progress: progress, total: r.manifest.Stats.RAMBytes, pagesIn: make([]uint64, len(r.manifest.Segments))}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(min(runtime.GOMAXPROCS(0), 4))
	for i, b := range r.manifest.Blocks {
		// Whole chunks, so that no two goroutines read the same one.
		step := max(verifyBytes/b.PageBytes, 1)
		step = (step + chunkEntries - 1) / chunkEntries * chunkEntries
		for first := uint64(0); first < b.Pages(); first += step {
			n := min(step, b.Pages()-first)
			g.Go(func() error {
				if gctx.Err() != nil {
					return gctx.Err()
				}
				return v.pages(gctx, i, first, n)
			})
		}
	}
	err := g.Wait()
	if ctx.Err() != nil {
		return cancelled(op, r.dir, ctx.Err())
	}
	if err != nil {
		return err
	}
	return v.finish()
}

type verifier struct {
	r        *Reader
	progress func(done, total uint64)
	total    uint64
	zeros    atomic.Uint64

	mu      sync.Mutex
	done    uint64
	extents []extent
	pagesIn []uint64 // per segment
}

// extent is a part of a segment that pages account for.
type extent struct {
	segment   int
	off, size uint64
}

func (v *verifier) pages(ctx context.Context, block int, first, n uint64) error {
	r := v.r
	size := r.manifest.Blocks[block].PageBytes
	buf := make([]byte, min(max(verifyBytes, size), n*size))
	var extents []extent
	pagesIn := make([]uint64, len(v.pagesIn))
	for done := uint64(0); done < n; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		k := min(uint64(len(buf))/size, n-done)
		zeros, err := r.ReadRun(block, first+done, buf[:k*size])
		if err != nil {
			return err
		}
		v.zeros.Add(zeros)
		if extents, err = r.appendExtents(extents, pagesIn, block, first+done, k); err != nil {
			return err
		}
		done += k
		v.mu.Lock()
		v.done += k * size
		if v.progress != nil {
			v.progress(v.done, v.total)
		}
		v.mu.Unlock()
	}
	v.mu.Lock()
	v.extents = append(v.extents, extents...)
	for i, n := range pagesIn {
		v.pagesIn[i] += n
	}
	v.mu.Unlock()
	return nil
}

// appendExtents adds where n pages lie in the checkpoint's own segments, joining
// neighbours, and counts the pages of each segment.
func (r *Reader) appendExtents(out []extent, pagesIn []uint64, block int, first, n uint64) ([]extent, error) {
	if err := r.enter("verify"); err != nil {
		return nil, err
	}
	defer r.life.RUnlock()
	size := r.manifest.Blocks[block].PageBytes
	for p := first; p < first+n; p++ {
		l, _, err := r.entry(block, p)
		if err != nil {
			return nil, err
		}
		if l.kind() == kindZero {
			continue
		}
		pagesIn[l.segment()]++
		if r.manifest.Segments[l.segment()].Owner != "" {
			continue // what else lies there is for others to account for
		}
		var e extent
		switch l.kind() {
		case kindRaw:
			e = extent{l.segment(), l.rawOffset(), size}
		default:
			// A frame counts once, with its first page: a Writer refers to each.
			off, index := l.frame()
			if index > 0 {
				continue
			}
			h, err := r.frameHeader(l.segment(), off)
			if err != nil {
				return nil, err
			}
			e = extent{l.segment(), off, uint64(h.frameBytes())}
		}
		if last := len(out) - 1; last >= 0 && out[last].segment == e.segment && out[last].off+out[last].size == e.off {
			out[last].size += e.size
		} else {
			out = append(out, e)
		}
	}
	return out, nil
}

// frameHeader reads a header alone.
func (r *Reader) frameHeader(segment int, off uint64) (frameHeader, error) {
	path := r.path(r.manifest.Segments[segment].Name)
	var b [frameHeaderBytes]byte
	if err := readFull("read frame", path, r.segments[segment], b[:], int64(off)); err != nil {
		return frameHeader{}, err
	}
	h, err := parseFrameHeader(b[:])
	if err != nil {
		return h, corrupt("read frame", at(path, int64(off)), "%w", err)
	}
	return h, nil
}

// finish compares the sums with the manifest and looks at what no page covers:
// the format leaves no such byte, so one there is damage (or a hiding place).
func (v *verifier) finish() error {
	r := v.r
	const op = "verify"
	if z := v.zeros.Load(); z != r.manifest.Stats.ZeroPages {
		return corrupt(op, r.path(ManifestName), "%d zero pages: the pagemap has %d", r.manifest.Stats.ZeroPages, z)
	}
	sort.Slice(v.extents, func(i, j int) bool {
		a, b := v.extents[i], v.extents[j]
		if a.segment != b.segment {
			return a.segment < b.segment
		}
		return a.off < b.off
	})
	next := 0
	chain := r.manifest.needsChain() // there, pages share places
	for s, seg := range r.manifest.Segments {
		if chain && seg.Pages != v.pagesIn[s] {
			return corrupt(op, r.path(ManifestName), "%d pages in %s: the pagemap has %d", seg.Pages, seg.Name, v.pagesIn[s])
		}
		if seg.Owner != "" {
			continue
		}
		var end uint64
		for ; next < len(v.extents) && v.extents[next].segment == s; next++ {
			e := v.extents[next]
			if e.off > end || e.off < end && !chain {
				return corrupt(op, at(r.path(seg.Name), int64(min(e.off, end))), "%s by the pagemap", map[bool]string{
					true: "bytes not accounted for", false: "bytes accounted for twice"}[e.off > end])
			}
			end = max(end, e.off+e.size)
		}
		if end != seg.Bytes {
			return corrupt(op, at(r.path(seg.Name), int64(end)), "%d bytes not accounted for by the pagemap", seg.Bytes-end)
		}
	}
	return nil
}
