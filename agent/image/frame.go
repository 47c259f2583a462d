package image

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// A frame is up to frameContent bytes of consecutive pages of one block,
// compressed together: a header of frameHeaderBytes, the payload, zeros up to a
// multiple of frameAlign.
const (
	frameMagic       = 0x31464b43 // "CKF1"
	frameHeaderBytes = 32
	frameContent     = 64 << 10
)

type codec byte

const (
	codecS2   codec = 1
	codecZstd codec = 2
)

// framePages is how many pages of this size a frame holds at most.
func framePages(pageBytes uint64) int { return int(max(frameContent/pageBytes, 1)) }

// maxFrameContent is the largest uncompressed content of a frame.
const maxFrameContent = max(frameContent, MaxPageBytes)

// frameHeader is a decoded header whose own checksum matched.
type frameHeader struct {
	codec   codec
	pages   int
	shift   uint // log2 of the page size
	payload int  // bytes
	sum     uint64
}

func (h frameHeader) contentBytes() int { return h.pages << h.shift }

// frameBytes is the length of the whole frame in the segment.
func (h frameHeader) frameBytes() int { return alignFrame(frameHeaderBytes + h.payload) }

func alignFrame(n int) int { return (n + frameAlign - 1) &^ (frameAlign - 1) }

// putFrameHeader fills the header of a frame whose payload is at b[32:].
func putFrameHeader(b []byte, c codec, pages int, shift uint, payload int) {
	le := binary.LittleEndian
	le.PutUint32(b, frameMagic)
	b[4], b[5], b[6], b[7] = byte(c), byte(pages), byte(shift), 0
	le.PutUint32(b[8:], uint32(payload))
	le.PutUint32(b[12:], 0)
	le.PutUint64(b[16:], uint64(Sum(b[frameHeaderBytes:frameHeaderBytes+payload])))
	le.PutUint64(b[24:], uint64(Sum(b[:24])))
}

// parseFrameHeader decodes and bounds a header.
func parseFrameHeader(b []byte) (frameHeader, error) {
	le := binary.LittleEndian
	if len(b) < frameHeaderBytes {
		return frameHeader{}, fmt.Errorf("frame header of %d bytes", len(b))
	}
	if m := le.Uint32(b); m != frameMagic {
		return frameHeader{}, fmt.Errorf("frame magic %#08x: expected %#08x", m, frameMagic)
	}
	if got, want := le.Uint64(b[24:]), uint64(Sum(b[:24])); got != want {
		return frameHeader{}, fmt.Errorf("frame header checksum %016x: its content gives %016x", got, want)
	}
	h := frameHeader{codec: codec(b[4]), pages: int(b[5]), shift: uint(b[6]), sum: le.Uint64(b[16:])}
	payload := le.Uint32(b[8:])
	switch {
	case h.codec != codecS2 && h.codec != codecZstd:
		return frameHeader{}, fmt.Errorf("unknown codec %d", h.codec)
	case h.shift < pageShift(MinPageBytes) || h.shift > pageShift(MaxPageBytes):
		return frameHeader{}, fmt.Errorf("pages of 2^%d bytes", h.shift)
	case h.pages < 1 || h.pages > framePages(1<<h.shift):
		return frameHeader{}, fmt.Errorf("%d pages of 2^%d bytes in a frame", h.pages, h.shift)
	case payload == 0 || payload >= uint32(h.contentBytes()):
		// What does not shrink is stored raw, so a frame is always smaller.
		return frameHeader{}, fmt.Errorf("payload of %d bytes for %d", payload, h.contentBytes())
	case b[7] != 0 || le.Uint32(b[12:]) != 0:
		return frameHeader{}, fmt.Errorf("reserved bytes of the frame header are set")
	}
	h.payload = int(payload)
	return h, nil
}

// decompress expands a payload into dst, whose length is the content's. Nothing
// is allocated by what the payload claims.
func decompress(dec *zstd.Decoder, c codec, dst, payload []byte) error {
	switch c {
	case codecS2:
		n, err := s2.DecodedLen(payload)
		if err != nil {
			return fmt.Errorf("s2: %w", err)
		}
		if n != len(dst) {
			return fmt.Errorf("s2: content of %d bytes: expected %d", n, len(dst))
		}
		if _, err := s2.Decode(dst, payload); err != nil {
			return fmt.Errorf("s2: %w", err)
		}
	case codecZstd:
		out, err := dec.DecodeAll(payload, dst[:0:len(dst)])
		if err != nil {
			return fmt.Errorf("zstd: %w", err)
		}
		if len(out) != len(dst) {
			return fmt.Errorf("zstd: content of %d bytes: expected %d", len(out), len(dst))
		}
	default:
		return fmt.Errorf("unknown codec %d", c)
	}
	return nil
}

// newZstdDecoder makes a decoder that never grows beyond the caller's buffer.
func newZstdDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(2*maxFrameContent), zstd.WithDecoderMaxWindow(2*maxFrameContent),
		zstd.WithDecodeAllCapLimit(true))
}

// compressor is the encoder of one lane.
type compressor struct {
	codec codec
	zstd  *zstd.Encoder
	buf   []byte // room for one frame at its largest
}

func newCompressor(c codec) (*compressor, error) {
	k := &compressor{codec: c}
	worst := s2.MaxEncodedLen(maxFrameContent)
	if c == codecZstd {
		enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
			zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, err
		}
		k.zstd = enc
		worst = enc.MaxEncodedSize(maxFrameContent)
	}
	k.buf = make([]byte, alignFrame(frameHeaderBytes+worst))
	return k, nil
}

// frame compresses whole pages into a frame; nil if that does not pay. The
// result is valid until the next call.
func (k *compressor) frame(pages []byte, shift uint) []byte {
	room := k.buf[frameHeaderBytes:frameHeaderBytes:len(k.buf)]
	var payload []byte
	if k.codec == codecS2 {
		payload = s2.Encode(room[:cap(room)], pages)
	} else {
		payload = k.zstd.EncodeAll(pages, room)
	}
	n := alignFrame(frameHeaderBytes + len(payload))
	if len(payload) == 0 || n > len(pages)-len(pages)/8 || len(payload) > math.MaxUint32 {
		return nil // saves less than an eighth: raw pages are read faster
	}
	putFrameHeader(k.buf, k.codec, len(pages)>>shift, shift, len(payload))
	clear(k.buf[frameHeaderBytes+len(payload) : n])
	return k.buf[:n]
}

func (k *compressor) close() {
	if k.zstd != nil {
		k.zstd.Close()
	}
}
