package dirty

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

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
