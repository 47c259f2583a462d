package image

import (
	"sync"

	"github.com/klauspost/compress/zstd"
)

// frameSlots is how many decoded frames a Reader keeps: enough for a prefetcher
// and the vCPUs to walk their own frames, 1 MiB with 4 KiB pages.
const frameSlots = 16

// frameCache keeps the last decoded frames, so that sixteen pages of one frame
// cost one decompression. Each slot has its own lock: readers of different
// frames seldom meet.
type frameCache struct{ slots [frameSlots]frameSlot }

type frameSlot struct {
	sync.Mutex
	filled  bool
	segment int
	off     uint64
	pages   int
	content []byte
	in      []byte // compressed
	dec     *zstd.Decoder
}

// page copies one page of the frame at off out of the cache, decoding the frame
// first if need be.
func (c *frameCache) page(r *Reader, segment int, off uint64, shift uint, index int, dst []byte) error {
	// Consecutive frames differ in their low bits: mix before choosing a slot.
	s := &c.slots[((off/frameAlign+uint64(segment)<<20)*0x9e3779b97f4a7c15)>>60%frameSlots]
	s.Lock()
	defer s.Unlock()
	if !s.filled || s.segment != segment || s.off != off || len(s.content) != s.pages<<shift {
		s.filled = false
		if err := s.load(r, segment, off, shift); err != nil {
			return err
		}
	}
	if index >= s.pages {
		return corrupt("read frame", at(r.path(r.manifest.Segments[segment].Name), int64(off)), "page %d of a frame of %d", index, s.pages)
	}
	copy(dst, s.content[index<<shift:])
	return nil
}

func (s *frameSlot) load(r *Reader, segment int, off uint64, shift uint) error {
	content := framePages(1<<shift) << shift
	if need := alignFrame(frameHeaderBytes + content); len(s.in) < need {
		s.in = make([]byte, need)
	}
	if cap(s.content) < content {
		s.content = make([]byte, content)
	}
	h, payload, err := r.readFrame(segment, off, shift, s.in[:alignFrame(frameHeaderBytes+content)])
	if err != nil {
		return err
	}
	where := at(r.path(r.manifest.Segments[segment].Name), int64(off))
	if h.codec == codecZstd && s.dec == nil {
		if s.dec, err = newZstdDecoder(); err != nil {
			return corrupt("read frame", where, "%w", err)
		}
	}
	s.content = s.content[:h.contentBytes()]
	if err := decompress(s.dec, h.codec, s.content, payload); err != nil {
		return corrupt("read frame", where, "%w", err)
	}
	s.segment, s.off, s.pages, s.filled = segment, off, h.pages, true
	return nil
}

func (c *frameCache) close() {
	for i := range c.slots {
		s := &c.slots[i]
		s.Lock()
		if s.dec != nil {
			s.dec.Close()
		}
		s.dec, s.filled, s.content, s.in = nil, false, nil, nil
		s.Unlock()
	}
}
