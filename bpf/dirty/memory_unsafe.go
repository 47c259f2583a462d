package dirty

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// words is an array map of 64-bit words, mapped: programs and we look at the same
// memory.
type words struct {
	raw []byte
	w   []uint64
}

func mapWords(fd int, n uint64) (*words, error) {
	size := (int(n)*8 + PageBytes - 1) &^ (PageBytes - 1)
	raw, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map words: %w", err)
	}
	return &words{raw: raw, w: unsafe.Slice((*uint64)(unsafe.Pointer(&raw[0])), n)}, nil
}

func (w *words) load(i int) uint64 { return atomic.LoadUint64(&w.w[i]) }

func (w *words) exchange(i int, v uint64) uint64 { return atomic.SwapUint64(&w.w[i], v) }

func (w *words) unmap() error {
	w.w = nil
	return unix.Munmap(w.raw)
}

// scratch maps pages of memory that nobody has touched.
func scratch(pages int) (b []byte, start uint64, err error) {
	b, err = unix.Mmap(-1, 0, pages*PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, 0, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Madvise(b, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		return nil, 0, errors.Join(fmt.Errorf("madvise: %w", err), unix.Munmap(b))
	}
	return b, uint64(uintptr(unsafe.Pointer(&b[0]))), nil
}

func unmapScratch(b []byte) { _ = unix.Munmap(b) } // our own mapping: it cannot fail
