package image

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Checksum is an xxHash64 (seed 0). It finds what disks, cables and software do
// to data by accident; it is no defence against somebody who forges an image.
type Checksum uint64

const checksumPrefix = "xxh64:"

// Sum is the checksum of data.
func Sum(data []byte) Checksum { return Checksum(xxhash.Sum64(data)) }

func (c Checksum) String() string { return fmt.Sprintf("%s%016x", checksumPrefix, uint64(c)) }

// MarshalText implements encoding.TextMarshaler.
func (c Checksum) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler; it takes the one form that
// MarshalText writes.
func (c *Checksum) UnmarshalText(text []byte) error {
	digits, ok := strings.CutPrefix(string(text), checksumPrefix)
	if !ok || len(digits) != 16 || strings.ToLower(digits) != digits {
		return fmt.Errorf("checksum %.40q is not %s and 16 lower-case hex digits", text, checksumPrefix)
	}
	v, err := strconv.ParseUint(digits, 16, 64)
	if err != nil {
		return fmt.Errorf("checksum %.40q: %w", text, err)
	}
	*c = Checksum(v)
	return nil
}
