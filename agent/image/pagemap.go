package image

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// The pagemap: a head (header, one record per block, one checksum per chunk),
// padded to pagemapAlign, then one entry per page. FORMAT.md has the picture.
const (
	pagemapMagic   = "CKPGMAP\x00"
	pagemapVersion = 1
	pagemapAlign   = 4096
	headerBytes    = 64
	recordBytes    = 32
	entryBytes     = 16
	chunkEntries   = 1024
	chunkBytes     = chunkEntries * entryBytes
)

// layout is where everything lies in the pagemap of given blocks. It follows
// from the blocks alone, so a reader computes it and believes no offset.
type layout struct {
	firstEntry []uint64 // per block
	firstChunk []uint64 // per block
	entries    uint64
	chunks     uint64
	headBytes  uint64
}

func layoutOf(blocks []Block) layout {
	l := layout{firstEntry: make([]uint64, len(blocks)), firstChunk: make([]uint64, len(blocks))}
	for i, b := range blocks {
		l.firstEntry[i], l.firstChunk[i] = l.entries, l.chunks
		l.entries += b.Pages()
		l.chunks += (b.Pages() + chunkEntries - 1) / chunkEntries
	}
	head := headerBytes + recordBytes*uint64(len(blocks)) + 8*l.chunks
	l.headBytes = (head + pagemapAlign - 1) &^ (pagemapAlign - 1)
	return l
}

func (l layout) fileBytes() uint64 { return l.headBytes + l.entries*entryBytes }

// chunkTable is the offset of the table of chunk checksums in the head.
func chunkTable(blocks int) uint64 { return headerBytes + recordBytes*uint64(blocks) }

// encodeHead renders the head; sums has one checksum per chunk.
func encodeHead(blocks []Block, l layout, segments int, sums []uint64) []byte {
	le := binary.LittleEndian
	h := make([]byte, l.headBytes)
	copy(h, pagemapMagic)
	le.PutUint32(h[8:], pagemapVersion)
	le.PutUint32(h[12:], chunkEntries)
	le.PutUint32(h[16:], uint32(len(blocks)))
	le.PutUint32(h[20:], uint32(segments))
	le.PutUint64(h[24:], l.chunks)
	le.PutUint64(h[32:], l.entries)
	le.PutUint64(h[40:], l.headBytes)
	for i, b := range blocks {
		r := h[headerBytes+i*recordBytes:]
		le.PutUint64(r, b.Pages())
		le.PutUint32(r[8:], uint32(pageShift(b.PageBytes)))
		le.PutUint64(r[16:], l.firstEntry[i])
		le.PutUint64(r[24:], uint64(Sum([]byte(b.Name))))
	}
	t := h[chunkTable(len(blocks)):]
	for i, s := range sums {
		le.PutUint64(t[i*8:], s)
	}
	return h
}

// decodeHead checks a head against the manifest's blocks and returns the chunk
// checksums. The caller has checked the head's own checksum.
func decodeHead(path string, h []byte, blocks []Block, segments int) ([]uint64, error) {
	const op = "read pagemap"
	l := layoutOf(blocks)
	if uint64(len(h)) != l.headBytes {
		return nil, corrupt(op, path, "head of %d bytes: expected %d", len(h), l.headBytes)
	}
	// The head follows from the blocks but for the chunk checksums: build the
	// expected one and compare, so that no field goes unchecked.
	table := chunkTable(len(blocks))
	sums := make([]uint64, l.chunks)
	for i := range sums {
		sums[i] = binary.LittleEndian.Uint64(h[table+8*uint64(i):])
	}
	want := encodeHead(blocks, l, segments, sums)
	for off := range want {
		if want[off] != h[off] {
			return nil, corrupt(op, at(path, int64(off)), "byte %#02x: expected %#02x from the manifest", h[off], want[off])
		}
	}
	return sums, nil
}

func pageShift(pageBytes uint64) uint { return uint(bits.TrailingZeros64(pageBytes)) }

// An entry is a location and the checksum of the page's content.
//
//	bits 63-61  kind
//	bits 60-48  segment
//	bits 47-0   raw:   offset in the segment / 4096
//	            frame: offset in the segment / 64 << 8 | page within the frame
type location uint64

const (
	kindAbsent = 0 // never stored: an error in a finished checkpoint
	kindZero   = 1
	kindRaw    = 2
	kindFrame  = 3
	kindParent = 4 // reserved, and used nowhere: what the parent had is referred to where it lies

	kindShift    = 61
	segmentShift = 48
	segmentBits  = kindShift - segmentShift
	placeMask    = 1<<segmentShift - 1
	rawUnit      = 4096
	frameAlign   = 64
)

func rawLocation(segment int, off uint64) location {
	return kindRaw<<kindShift | location(segment)<<segmentShift | location(off/rawUnit)
}

func frameLocation(segment int, off uint64, page int) location {
	return kindFrame<<kindShift | location(segment)<<segmentShift | location(off/frameAlign)<<8 | location(page)
}

const zeroLocation = location(kindZero << kindShift)

func (l location) kind() int         { return int(l >> kindShift) }
func (l location) segment() int      { return int(l >> segmentShift & (MaxSegments - 1)) }
func (l location) rawOffset() uint64 { return uint64(l&placeMask) * rawUnit }
func (l location) frame() (off uint64, page int) {
	return uint64(l&placeMask) >> 8 * frameAlign, int(l & 0xff)
}

// check bounds a location by the segments there are.
func (l location) check(segments []Segment, pageBytes uint64) error {
	switch l.kind() {
	case kindZero:
		if l != zeroLocation {
			return fmt.Errorf("location %#016x: a zero page has no place", uint64(l))
		}
		return nil
	case kindAbsent:
		return fmt.Errorf("location %#016x: the page was never stored", uint64(l))
	case kindParent:
		return fmt.Errorf("location %#016x: refers to a parent, which version %d.%d does not do", uint64(l), FormatMajor, FormatMinor)
	case kindRaw, kindFrame:
	default:
		return fmt.Errorf("location %#016x: unknown kind %d", uint64(l), l.kind())
	}
	if l.segment() >= len(segments) {
		return fmt.Errorf("location %#016x: segment %d of %d", uint64(l), l.segment(), len(segments))
	}
	s := segments[l.segment()]
	if l.kind() == kindRaw {
		// No overflow: 48 bits times 4096 plus 2 MiB.
		if s.Kind != SegmentRaw || l.rawOffset()+pageBytes > s.Bytes {
			return fmt.Errorf("location %#016x: offset %d in %s (%s, %d bytes)", uint64(l), l.rawOffset(), s.Name, s.Kind, s.Bytes)
		}
		return nil
	}
	off, page := l.frame()
	if s.Kind != SegmentFrames || off+frameHeaderBytes > s.Bytes || page >= framePages(pageBytes) {
		return fmt.Errorf("location %#016x: page %d of the frame at %d in %s (%s, %d bytes)", uint64(l), page, off, s.Name, s.Kind, s.Bytes)
	}
	return nil
}

func putEntry(e []byte, l location, sum uint64) {
	_ = e[entryBytes-1]
	binary.LittleEndian.PutUint64(e, uint64(l))
	binary.LittleEndian.PutUint64(e[8:], sum)
}

func getEntry(e []byte) (location, uint64) {
	_ = e[entryBytes-1]
	return location(binary.LittleEndian.Uint64(e)), binary.LittleEndian.Uint64(e[8:])
}
