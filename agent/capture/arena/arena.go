package arena

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// PageBytes is the unit of everything in an arena.
const PageBytes = 4096

const (
	magic       = 0x31414e4552414b43 // "CKARENA1"
	headerBytes = PageBytes
	ringHeader  = PageBytes
	recordBytes = 32
	// maxRingPages bounds a ring to 1 GiB, far above any sane arena.
	maxRingPages = 1 << 18
	maxRings     = 64
	populateStep = 1 << 20
)

// ErrCorrupt says that the shared memory holds what no correct peer writes.
var ErrCorrupt = errors.New("arena: shared memory is corrupt")

// Arena is one process's mapping of the shared memory. Its rings stay valid
// until Close.
type Arena struct {
	mem   []byte
	rings []*Ring
}

// Create makes an arena with one ring per entry of ringPages (data pages in each
// ring) and returns it with the memfd to hand to the peer. The memfd is sealed
// against resizing, so that neither side can make the other fault on it.
func Create(ringPages []int) (*Arena, *os.File, error) {
	if len(ringPages) == 0 || len(ringPages) > maxRings {
		return nil, nil, fmt.Errorf("arena: %d rings: want 1 to %d", len(ringPages), maxRings)
	}
	size := headerBytes
	for _, n := range ringPages {
		if n <= 0 || n > maxRingPages {
			return nil, nil, fmt.Errorf("arena: ring of %d pages: want 1 to %d", n, maxRingPages)
		}
		size += ringBytes(n)
	}
	fd, err := unix.MemfdCreate("ckagent-arena", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, fmt.Errorf("arena: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ckagent-arena")
	if err := f.Truncate(int64(size)); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("arena: size to %d bytes: %w", size, err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS,
		unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("arena: seal: %w", err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("arena: mmap %d bytes: %w", size, err)
	}
	a := &Arena{mem: mem}
	writeHeader(mem, ringPages)
	if err := a.attach(); err != nil {
		f.Close()
		return nil, nil, errors.Join(err, a.Close())
	}
	return a, f, nil
}

// Open maps an arena made by Create in another process.
func Open(f *os.File) (*Arena, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("arena: stat: %w", err)
	}
	if st.Size() < headerBytes || st.Size() > headerBytes+maxRings*int64(ringBytes(maxRingPages)) {
		return nil, fmt.Errorf("%w: %d bytes", ErrCorrupt, st.Size())
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("arena: mmap %d bytes: %w", st.Size(), err)
	}
	a := &Arena{mem: mem}
	if err := a.attach(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// attach builds the rings over the mapping from its header.
func (a *Arena) attach() error {
	ringPages, err := readHeader(a.mem)
	if err != nil {
		return err
	}
	off := headerBytes
	for _, n := range ringPages {
		a.rings = append(a.rings, newRing(a.mem[off:off+ringBytes(n)], n))
		off += ringBytes(n)
	}
	return nil
}

// Rings is the number of rings.
func (a *Arena) Rings() int { return len(a.rings) }

// Ring returns ring i.
func (a *Arena) Ring(i int) *Ring { return a.rings[i] }

// Populate makes every page of the mapping present, so that no page fault of
// our own is served while a guest waits.
func (a *Arena) Populate() error {
	// In steps: each holds the address space, which starting a thread needs too.
	for at := 0; at < len(a.mem); at += populateStep {
		step := a.mem[at:min(at+populateStep, len(a.mem))]
		if err := unix.Madvise(step, unix.MADV_POPULATE_WRITE); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("arena: populate %d bytes: %w", len(step), err)
		}
	}
	return nil
}

// Close unmaps the arena. No ring may be in use.
func (a *Arena) Close() error {
	a.rings = nil
	mem := a.mem
	a.mem = nil
	if mem == nil {
		return nil
	}
	return unix.Munmap(mem)
}

// ringBytes is what a ring of n data pages occupies: its header, as many record
// slots as it could hold single pages, and the data, each page aligned.
func ringBytes(n int) int {
	return ringHeader + pageAlign(recordSlots(n)*recordBytes) + n*PageBytes
}

// recordSlots leaves room for records without data (zero runs) beside the data.
func recordSlots(n int) int { return 2*n + 64 }

func pageAlign(n int) int { return (n + PageBytes - 1) &^ (PageBytes - 1) }
