// Package mapped looks at the contents of mmapable BPF maps without system calls:
// the programs and we share the memory.
//
// A mapping is made once and lives until Close, after which nothing of it may be
// used. Words are read and written atomically, by any goroutine and by programs at
// the same time.
package mapped

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const pageBytes = 4096

// Words is an array map of 64-bit words.
type Words struct {
	raw []byte
	w   []uint64
}

// MapWords maps the n words of the map with this descriptor.
func MapWords(fd int, n uint64) (*Words, error) {
	raw, err := Bytes(fd, n*8)
	if err != nil {
		return nil, err
	}
	return &Words{raw: raw, w: unsafe.Slice((*uint64)(unsafe.Pointer(&raw[0])), n)}, nil
}

// Bytes maps the first bytes of a map's content, in whole pages. unix.Munmap frees it.
func Bytes(fd int, n uint64) ([]byte, error) {
	size := (int(n) + pageBytes - 1) &^ (pageBytes - 1)
	raw, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of a BPF map: %w", size, err)
	}
	return raw, nil
}

// Len is the number of words.
func (w *Words) Len() int { return len(w.w) }

// Load reads word i.
func (w *Words) Load(i int) uint64 { return atomic.LoadUint64(&w.w[i]) }

// Exchange writes word i and returns what it was.
func (w *Words) Exchange(i int, v uint64) uint64 { return atomic.SwapUint64(&w.w[i], v) }

// Or sets bits of word i and returns what it was.
func (w *Words) Or(i int, bits uint64) uint64 { return atomic.OrUint64(&w.w[i], bits) }

// Clear sets every word to 0.
func (w *Words) Clear() {
	for i := range w.w {
		if w.Load(i) != 0 {
			w.Exchange(i, 0)
		}
	}
}

// Close unmaps the words.
func (w *Words) Close() error {
	w.w = nil
	return unix.Munmap(w.raw)
}
