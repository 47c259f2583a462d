package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The legacy LZ4 frame (lz4 -l), which the kernel build uses: a magic number,
// then blocks of at most 8 MiB of content, each preceded by its compressed
// size. Format: lz4_Block_format.md and lz4_Frame_format.md of the LZ4 project.
const (
	lz4LegacyMagic = 0x184c2102
	lz4LegacyBlock = 8 << 20
)

var errLZ4 = errors.New("malformed LZ4 data")

// unlz4Legacy returns the content of a legacy LZ4 frame of at most limit bytes.
// Like lz4 itself it ends at what cannot be a block header: in a bzImage the
// content's size follows the frame.
func unlz4Legacy(src []byte, limit int) ([]byte, error) {
	if len(src) < 4 || binary.LittleEndian.Uint32(src) != lz4LegacyMagic {
		return nil, fmt.Errorf("%w: no legacy frame", errLZ4)
	}
	src = src[4:]
	var out []byte
	for len(src) >= 4 {
		n := int(binary.LittleEndian.Uint32(src))
		if n > len(src)-4 {
			break
		}
		var err error
		if out, err = unlz4Block(out, src[4:4+n], min(limit, len(out)+lz4LegacyBlock)); err != nil {
			return nil, err
		}
		src = src[4+n:]
	}
	return out, nil
}

// unlz4Block appends the content of one block to dst, which may not grow beyond
// limit bytes. Matches may not reach back before the block.
func unlz4Block(dst, src []byte, limit int) ([]byte, error) {
	begin, i := len(dst), 0
	length := func(n int) (int, error) {
		if n != 15 {
			return n, nil
		}
		for i < len(src) {
			b := src[i]
			i++
			n += int(b)
			if b != 255 {
				return n, nil
			}
		}
		return 0, fmt.Errorf("%w: length runs past the end", errLZ4)
	}
	for i < len(src) {
		token := src[i]
		i++
		literals, err := length(int(token >> 4))
		if err != nil {
			return nil, err
		}
		if literals > len(src)-i || literals > limit-len(dst) {
			return nil, fmt.Errorf("%w: %d literals", errLZ4, literals)
		}
		dst = append(dst, src[i:i+literals]...)
		i += literals
		if i == len(src) {
			return dst, nil // a block ends with literals
		}
		if len(src)-i < 2 {
			return nil, fmt.Errorf("%w: no offset", errLZ4)
		}
		offset := int(binary.LittleEndian.Uint16(src[i:]))
		i += 2
		match, err := length(int(token & 15))
		if err != nil {
			return nil, err
		}
		match += 4
		if offset == 0 || offset > len(dst)-begin || match > limit-len(dst) {
			return nil, fmt.Errorf("%w: match of %d at -%d", errLZ4, match, offset)
		}
		for match > 0 { // a match may overlap what it produces
			n := min(match, offset)
			from := len(dst) - offset
			dst = append(dst, dst[from:from+n]...)
			match -= n
		}
	}
	return dst, nil
}
