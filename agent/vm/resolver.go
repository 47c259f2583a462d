package vm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// resolver is the state of one attempt.
type resolver struct {
	p     *Process
	q     Monitor
	lines []ramblockLine
	vmas  []VMA
	seed  uint64            // where a block's record may be, or 0
	host  map[string]uint64 // block name -> HVA
	how   map[string]string
}

// claim notes that a block lies at hva. Two methods that contradict each other
// end the attempt: a guess between them could cost the guest its memory.
func (r *resolver) claim(b *ramblockLine, hva uint64, how string) error {
	if vmasAt(r.vmas, hva, b.mapBytes()) == nil {
		return fmt.Errorf("%w: block %q (%d bytes) at 0x%x by %s: no mapping of that size starts there",
			errMoved, b.name, b.total, hva, how)
	}
	if old, ok := r.host[b.name]; ok {
		if old != hva {
			return fmt.Errorf("%w: block %q is at 0x%x by %s but at 0x%x by %s", errAmbiguous, b.name, old, r.how[b.name], hva, how)
		}
		return nil
	}
	r.host[b.name], r.how[b.name] = hva, how
	return nil
}

// claimDirect uses what needs no guest address: the monitor's own column, then
// QEMU's records.
func (r *resolver) claimDirect() error {
	var missing []ramblockLine
	for i := range r.lines {
		b := &r.lines[i]
		if b.hva == 0 {
			missing = append(missing, *b)
			continue
		}
		if err := r.claim(b, b.hva, HowMonitor); err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	found, err := newRecordFinder(processMemory{r.p.PID}, r.vmas).find(missing, r.seed)
	if err != nil {
		return err
	}
	for i := range missing {
		if hva, ok := found[missing[i].name]; ok {
			if err := r.claim(&missing[i], hva, HowRecord); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *resolver) full(ctx context.Context) ([]RAMBlock, error) {
	var err error
	if r.vmas, err = r.p.ReadSmaps(); err != nil {
		return nil, err
	}
	if err = r.claimDirect(); err != nil {
		return nil, err
	}
	ranges, err := r.claimMapped(ctx)
	if err != nil {
		return nil, err
	}
	if err = r.claimBySize(); err != nil {
		return nil, err
	}
	blocks, err := r.prove(true)
	if err != nil {
		return nil, err
	}
	main, err := mainBlocks(ctx, r.q, blocks)
	if err != nil {
		return nil, err
	}
	for i := range blocks {
		b := &blocks[i]
		b.Main = main[b.Name]
		for _, g := range ranges[b.Name] {
			b.Ranges = append(b.Ranges, g.GPARange)
			if g.Offset == 0 && b.GPA < 0 {
				b.GPA = int64(g.GPA)
			}
			if g.kind == "rom" {
				b.ReadOnly = true
			}
		}
	}
	return blocks, nil
}

// fast trusts the hints for what is not needed to find memory, and proves the
// rest: HVA by the monitor or QEMU's records, one guest address of the largest
// mapped block asked independently.
func (r *resolver) fast(ctx context.Context, hints []RAMBlock, a *ahead) ([]RAMBlock, error) {
	r.vmas, r.seed = a.vmas, a.seed
	if err := r.claimDirect(); err != nil {
		return nil, err
	}
	byName := make(map[string]*RAMBlock, len(hints))
	for i := range hints {
		byName[hints[i].Name] = &hints[i]
	}
	if a.probe != nil {
		_, hva, ok, err := parseGPA2HVA(a.answer, uint64(a.probe.GPA))
		if err != nil {
			return nil, err
		}
		if ok {
			if err := r.claim(r.line(a.probe.Name), hva, HowGPA); err != nil {
				return nil, err
			}
		}
	}
	for i := range r.lines {
		if _, ok := r.host[r.lines[i].name]; !ok {
			// No record of a block: take the long way.
			return r.full(ctx)
		}
	}
	blocks, err := r.prove(false)
	if err != nil {
		return nil, err
	}
	for i := range blocks {
		b, h := &blocks[i], byName[blocks[i].Name]
		b.GPA, b.Ranges, b.Main, b.ReadOnly = h.GPA, slices.Clone(h.Ranges), h.Main, b.ReadOnly || h.ReadOnly
	}
	return blocks, nil
}

func (r *resolver) line(name string) *ramblockLine {
	for i := range r.lines {
		if r.lines[i].name == name {
			return &r.lines[i]
		}
	}
	return nil
}

type kindRange struct {
	GPARange
	kind string
}

// maxGPAQueries bounds the monitor calls of one resolution; a machine has a
// dozen ranges, one with many DIMMs some hundreds.
const maxGPAQueries = 1024

// claimMapped asks QEMU for the host address of every range of guest memory,
// which proves blocks found otherwise and finds others, and returns the ranges by
// block.
func (r *resolver) claimMapped(ctx context.Context) (map[string][]kindRange, error) {
	text, err := r.q.HMP(ctx, "info mtree -f")
	if err != nil {
		return nil, err
	}
	flat, err := parseFlatView(text)
	if err != nil {
		return nil, err
	}
	if len(flat) > maxGPAQueries {
		return nil, fmt.Errorf("info mtree -f: %w: %d RAM ranges", errHMP, len(flat))
	}
	out := make(map[string][]kindRange)
	for _, f := range flat {
		text, err := r.q.HMP(ctx, fmt.Sprintf("gpa2hva 0x%x", f.gpa))
		if err != nil {
			return nil, err
		}
		region, hva, ok, err := parseGPA2HVA(text, f.gpa)
		if err != nil {
			return nil, err
		}
		if !ok || region != f.region || hva < f.offset {
			continue // remapped since, or a flash in command mode
		}
		b := r.blockOfRegion(region, hva-f.offset, f.offset+f.bytes)
		if b == nil {
			continue // memory that is no block, such as a device's own
		}
		if err := r.claim(b, hva-f.offset, HowGPA); err != nil {
			return nil, err
		}
		out[b.name] = append(out[b.name], kindRange{GPARange{GPA: f.gpa, Offset: f.offset, Bytes: f.bytes}, f.kind})
	}
	return out, nil
}

// blockOfRegion finds the block whose memory region is called region and starts
// at hva. A block's name is the region's, perhaps behind a device path.
func (r *resolver) blockOfRegion(region string, hva, atLeast uint64) *ramblockLine {
	for i := range r.lines {
		if h, ok := r.host[r.lines[i].name]; ok && h == hva {
			return &r.lines[i]
		}
	}
	var match *ramblockLine
	for i := range r.lines {
		b := &r.lines[i]
		if _, done := r.host[b.name]; done || b.total < atLeast || vmasAt(r.vmas, hva, b.mapBytes()) == nil {
			continue
		}
		if b.name != region && !strings.HasSuffix(b.name, "/"+region) {
			continue
		}
		if match != nil {
			return nil // two of that name and size: left to the other methods
		}
		match = b
	}
	return match
}

// claimBySize gives remaining blocks the only unclaimed RAM mapping of their
// size, or, for read-only blocks whose candidates all hold the same bytes, any.
// RAM mappings are those QEMU excludes from fork (VmFlags dc).
func (r *resolver) claimBySize() error {
	want := make(map[uint64][]*ramblockLine)
	var sizes []uint64
	for i := range r.lines {
		b := &r.lines[i]
		if _, ok := r.host[b.name]; !ok {
			if len(want[b.mapBytes()]) == 0 {
				sizes = append(sizes, b.mapBytes())
			}
			want[b.mapBytes()] = append(want[b.mapBytes()], b)
		}
	}
	if len(want) == 0 {
		return nil
	}
	claimed := make(map[uint64]bool)
	for _, h := range r.host {
		claimed[h] = true
	}
	have := make(map[uint64][]uint64)
	for i := range r.vmas {
		if v := &r.vmas[i]; v.Is("dc") && v.Writable() && !claimed[v.Start] {
			have[v.Bytes()] = append(have[v.Bytes()], v.Start)
		}
	}
	for _, size := range sizes {
		blocks, at := want[size], have[size]
		if len(blocks) != len(at) {
			return fmt.Errorf("block %q: %w: %d mappings of %d bytes for %d blocks", blocks[0].name, errAmbiguous, len(at), size, len(blocks))
		}
		how := HowSize
		if len(blocks) > 1 {
			how = HowContent
			for _, b := range blocks {
				if !romName(b.name) {
					return fmt.Errorf("block %q: %w: it can be written and %d mappings have its size", b.name, errAmbiguous, len(at))
				}
			}
			if err := r.sameContent(at, size); err != nil {
				return fmt.Errorf("block %q: %w", blocks[0].name, err)
			}
		}
		for i, b := range blocks {
			if err := r.claim(b, at[i], how); err != nil {
				return err
			}
		}
	}
	return nil
}

// sameContent proves that mappings of one size hold the same bytes.
func (r *resolver) sameContent(at []uint64, size uint64) error {
	mem := processMemory{r.p.PID}
	const chunk = 64 << 10
	first, other := make([]byte, chunk), make([]byte, chunk)
	for off := uint64(0); off < size; off += chunk {
		n := min(chunk, size-off)
		for i, a := range at {
			dst := other[:n]
			if i == 0 {
				dst = first[:n]
			}
			if _, err := io.ReadFull(io.NewSectionReader(mem, int64(a+off), int64(n)), dst); err != nil {
				return fmt.Errorf("read 0x%x: %w", a+off, err)
			}
			if i > 0 && !bytes.Equal(first[:n], dst) {
				return fmt.Errorf("%w: the mappings at 0x%x and 0x%x differ", errAmbiguous, at[0], a)
			}
		}
	}
	return nil
}

// prove turns claims into blocks: each has an address, an unbroken writable
// mapping of its size, to itself alone, with a known backing. flags says that
// vmas come from smaps.
func (r *resolver) prove(flags bool) ([]RAMBlock, error) {
	out := make([]RAMBlock, 0, len(r.lines))
	for i := range r.lines {
		l := &r.lines[i]
		hva, ok := r.host[l.name]
		if !ok {
			return nil, fmt.Errorf("block %q: %w: nothing says where it is", l.name, errAmbiguous)
		}
		vmas := vmasAt(r.vmas, hva, l.mapBytes())
		if vmas == nil {
			return nil, fmt.Errorf("%w: block %q at 0x%x", errMoved, l.name, hva)
		}
		v := &vmas[0]
		if !v.Readable() {
			return nil, fmt.Errorf("block %q: %w: its mapping is %s", l.name, errAmbiguous, v.Perms)
		}
		if flags && !v.Is("dc") {
			return nil, fmt.Errorf("block %q: %w: the mapping at 0x%x is not marked as guest memory", l.name, errAmbiguous, hva)
		}
		b := RAMBlock{Name: l.name, UsedBytes: l.used, TotalBytes: l.total, HVA: hva, GPA: -1, PageBytes: l.pageBytes,
			Shared: v.Shared(), ReadOnly: l.readOnly || romName(l.name) || !v.Writable(), How: r.how[l.name], VMAs: slices.Clone(vmas)}
		var err error
		if b.Backing, b.FileType, b.FilePath, err = r.p.backingOf(v); err != nil {
			return nil, err
		}
		if flags && v.PageBytes != l.pageBytes && b.Backing == Hugetlb {
			return nil, fmt.Errorf("block %q: %w: pages of %d bytes by QEMU, %d by the kernel", l.name, errAmbiguous, l.pageBytes, v.PageBytes)
		}
		out = append(out, b)
	}
	sorted := slices.Clone(out)
	slices.SortFunc(sorted, func(a, b RAMBlock) int {
		switch {
		case a.HVA < b.HVA:
			return -1
		case a.HVA > b.HVA:
			return 1
		}
		return 0
	})
	for i := 1; i < len(sorted); i++ {
		if a, b := &sorted[i-1], &sorted[i]; a.HVA+a.TotalBytes > b.HVA {
			return nil, fmt.Errorf("blocks %q and %q: %w: both lie at 0x%x", a.Name, b.Name, errAmbiguous, b.HVA)
		}
	}
	return out, nil
}
