package pagemap

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// PageBytes is the base page size of the architectures supported (x86-64).
const PageBytes = 4096

// ErrUnsupported: this kernel has no PAGEMAP_SCAN (it came with 6.7).
var ErrUnsupported = errors.New("PAGEMAP_SCAN is not supported by this kernel (6.7 or later)")

// ErrGone: the target has exited.
var ErrGone = errors.New("target address space is gone")

// Pagemap is an open /proc/PID/pagemap. Methods may be called from any
// goroutine at once; Close comes last. It stays bound to the address space the
// process had when it was opened, even if the pid is reused or executes another
// program.
type Pagemap struct {
	fd  atomic.Int64
	pid int
}

// Open opens the pagemap of a process. It needs the right to trace it.
func Open(pid int) (*Pagemap, error) {
	return open("/proc/"+strconv.Itoa(pid)+"/pagemap", pid)
}

// OpenSelf opens the pagemap of this process.
func OpenSelf() (*Pagemap, error) { return open("/proc/self/pagemap", os.Getpid()) }

func open(path string, pid int) (*Pagemap, error) {
	// Not os.Open: nothing here must go through the Go poller.
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		p := &Pagemap{pid: pid}
		p.fd.Store(int64(fd))
		return p, nil
	}
}

// Close closes the file.
func (p *Pagemap) Close() error {
	fd := p.fd.Swap(-1)
	if fd < 0 {
		return nil
	}
	if err := unix.Close(int(fd)); err != nil {
		return fmt.Errorf("close pagemap: %w", err)
	}
	return nil
}

// Query is what a scan looks for. A page is reported if, with the bits of
// CategoryInverted flipped, it has all of Mask and (unless AnyOf is 0) one of
// AnyOf. Return selects the categories reported, not flipped; neighbours that
// agree in them are merged.
type Query struct {
	Flags            uint64
	CategoryInverted uint64
	Mask             uint64
	AnyOf            uint64
	Return           uint64
	MaxPages         uint64 // stop after so many pages reported; 0: no limit
}

// Scan reports pages of [start, end) that match q into out. It may stop early,
// when out is full or MaxPages is reached: next is where to go on, end when all
// was seen. An empty out with WPMatching arms without reporting.
func (p *Pagemap) Scan(start, end uint64, q Query, out []Region) (n int, next uint64, err error) {
	n, next, errno := p.scan(start, end, &q, out)
	if errno != 0 {
		return 0, start, p.scanError(start, end, errno)
	}
	return n, next, nil
}

// scanStep is how much is scanned in one call. A call holds the lock of the address
// space, some 10 ms per GiB of small pages, and whoever wants to change a mapping
// meanwhile makes every page fault wait behind it. A power of two.
const scanStep = 64 << 20

// ScanAll calls yield for every region of [start, end) that matches q, in
// ascending order, resuming as often as needed. buf is the working space (at
// least one region). q.MaxPages bounds each step, not the whole. It stops when
// yield returns false.
func (p *Pagemap) ScanAll(start, end uint64, q Query, buf []Region, yield func(Region) bool) error {
	if len(buf) == 0 {
		return errors.New("pagemap scan: no buffer")
	}
	var last Region // found, and not yielded yet: it may go on in the next step
	for start < end {
		n, next, err := p.Scan(start, min(start&^(scanStep-1)+scanStep, end), q, buf)
		if err != nil {
			return err
		}
		for _, r := range buf[:n] {
			switch {
			case last.End == r.Start && last.Categories == r.Categories && last.End != 0:
				last.End = r.End
				continue
			case last.End != 0 && !yield(last):
				return nil
			}
			last = r
		}
		if next <= start {
			return fmt.Errorf("pagemap scan of pid %d: no progress at %#x", p.pid, start)
		}
		start = next
	}
	if last.End != 0 {
		yield(last)
	}
	return nil
}

func (p *Pagemap) scanError(start, end uint64, errno unix.Errno) error {
	kind := error(nil)
	switch errno {
	case unix.ENOTTY:
		kind = ErrUnsupported
	case unix.ESRCH:
		kind = ErrGone
	}
	if kind != nil {
		return fmt.Errorf("pagemap scan of pid %d [%#x,%#x): %w: %w", p.pid, start, end, errno, kind)
	}
	return fmt.Errorf("pagemap scan of pid %d [%#x,%#x): %w", p.pid, start, end, errno)
}

// CanScan reports whether this kernel has PAGEMAP_SCAN.
func (p *Pagemap) CanScan() bool {
	_, _, errno := p.scan(0, PageBytes, &Query{Mask: IsPresent, Return: IsPresent}, make([]Region, 1))
	return errno == 0
}
