package pagemap

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

const huge = 2 << 20

// region is a mapping of this process under test. It is touched only through
// system calls (see package uffd's tests for the reason).
type region struct {
	t      *testing.T
	b      []byte
	fd     int // backing file, -1 for anonymous
	start  uint64
	end    uint64
	file   *os.File // source and sink of the accesses
	pm     *Pagemap
	h      *uffd.Handle
	shared bool
}

// kinds of memory a guest can have.
const (
	anon        = "anonymous"
	anonTHP     = "anonymous, huge pages"
	sharedMemfd = "memfd, shared"
	tmpfsPriv   = "tmpfs, private"
)

func newRegion(t *testing.T, kind string, length int) *region {
	t.Helper()
	r := &region{t: t, fd: -1}
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	if kind == sharedMemfd || kind == tmpfsPriv {
		fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Ftruncate(fd, int64(length)); err != nil {
			t.Fatal(err)
		}
		r.fd, flags = fd, unix.MAP_SHARED
		if kind == tmpfsPriv {
			flags = unix.MAP_PRIVATE
		}
		r.shared = kind == sharedMemfd
	}
	// Aligned to 2 MiB: map more and place the real mapping inside.
	hold, err := unix.Mmap(-1, 0, length+huge, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(hold) })
	skip := int(-uintptr(unsafe.Pointer(&hold[0])) & (huge - 1))
	r.b = hold[skip : skip+length]
	r.start = uint64(uintptr(unsafe.Pointer(&r.b[0])))
	r.end = r.start + uint64(length)
	if _, err := unix.MmapPtr(r.fd, 0, unsafe.Pointer(&r.b[0]), uintptr(length), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	if r.fd < 0 {
		advice := unix.MADV_NOHUGEPAGE
		if kind == anonTHP {
			advice = unix.MADV_HUGEPAGE
		}
		r.madvise(0, length, advice)
	}
	sink, err := unix.MemfdCreate("touch", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	r.file = os.NewFile(uintptr(sink), "touch")
	t.Cleanup(func() { r.file.Close() })
	if r.pm, err = OpenSelf(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.pm.Close() })
	return r
}

func (r *region) madvise(off, length, advice int) {
	r.t.Helper()
	if err := unix.Madvise(r.b[off:off+length], advice); err != nil {
		r.t.Fatalf("madvise %d: %v", advice, err)
	}
}

func (r *region) write(off int, data ...byte) {
	r.t.Helper()
	if _, err := r.file.WriteAt(data, 0); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.file.ReadAt(r.b[off:off+len(data)], 0); err != nil {
		r.t.Fatal(err)
	}
}

func (r *region) read(off int) byte {
	r.t.Helper()
	if _, err := r.file.WriteAt(r.b[off:off+1], 1<<20); err != nil {
		r.t.Fatal(err)
	}
	var b [1]byte
	if _, err := r.file.ReadAt(b[:], 1<<20); err != nil {
		r.t.Fatal(err)
	}
	return b[0]
}

// populate writes one byte into every page (with huge pages: every 2 MiB).
func (r *region) populate() {
	r.t.Helper()
	for off := 0; off < len(r.b); off += PageBytes {
		r.write(off, byte(off/PageBytes)|1)
	}
}

// track registers the region for write protection with the features.
func (r *region) track(want uffd.Features) {
	r.t.Helper()
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		r.t.Fatal(err)
	}
	r.h, err = uffd.Adopt(f, want)
	if errors.Is(err, uffd.ErrUnsupported) {
		r.t.Skipf("kernel too old: %v", err)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { r.h.Close() })
	if _, err := r.h.Register(r.start, r.end-r.start, uffd.ModeWP); err != nil {
		r.t.Fatal(err)
	}
}

const (
	syncWP  uffd.Features = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated
	asyncWP               = uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated | uffd.FeatureWPAsync
)

// arm marks every page that this kernel can mark: before 6.4 that excludes
// absent anonymous ones.
func (r *region) arm() {
	r.t.Helper()
	have, err := uffd.Probe()
	if err != nil {
		r.t.Fatal(err)
	}
	want := syncWP
	if !have.Has(uffd.FeatureWPUnpopulated) {
		want &^= uffd.FeatureWPUnpopulated
	}
	r.track(want)
	if err := r.h.WriteProtect(r.start, r.end-r.start); err != nil {
		r.t.Fatal(err)
	}
}

// writeServed writes to an armed page and serves the fault.
func (r *region) writeServed(off int, data ...byte) {
	r.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.write(off, data...)
	}()
	r.serve(uint64(off))
	<-done
}

func (r *region) serve(off uint64) {
	r.t.Helper()
	stop, err := uffd.NewStop()
	if err != nil {
		r.t.Fatal(err)
	}
	defer stop.Close()
	if err := r.h.Wait(stop); err != nil {
		r.t.Fatal(err)
	}
	var m [1]uffd.Msg
	if _, err := r.h.Read(m[:]); err != nil {
		r.t.Fatal(err)
	}
	if want := (r.start + off) &^ (PageBytes - 1); m[0].Address != want || m[0].Flags&uffd.FaultWP == 0 {
		r.t.Fatalf("fault %+v, want at %#x", m[0], want)
	}
	if err := r.h.Unprotect(m[0].Address, PageBytes, true); err != nil {
		r.t.Fatal(err)
	}
}

// quiet checks that no fault is waiting: what was just done went unreported.
func (r *region) quiet() {
	r.t.Helper()
	var m [1]uffd.Msg
	if n, err := r.h.Read(m[:]); !errors.Is(err, uffd.ErrAgain) {
		r.t.Fatalf("unexpected message %d %+v %v", n, m[0], err)
	}
}

// armed asks all three ways (ioctl, raw ioctl, entries) and checks that they
// agree.
func (r *region) armed(off, length int) bool {
	r.t.Helper()
	s, e := r.start+uint64(off), r.start+uint64(off+length)
	all, err := r.pm.AllArmed(s, e)
	if err != nil {
		r.t.Fatal(err)
	}
	raw, errno := r.pm.AllArmedRaw(s, e)
	if errno == unix.ENOTTY && !r.pm.CanScan() {
		raw = all // Linux before 6.7
	} else if errno != 0 {
		r.t.Fatal(errno)
	}
	byEntry, err := r.pm.everyEntry(s, e, Entry.UffdWP)
	if err != nil {
		r.t.Fatal(err)
	}
	if all != raw || all != byEntry {
		r.t.Fatalf("[%#x,+%#x): AllArmed %v, raw %v, entries %v", s, length, all, raw, byEntry)
	}
	any, err := r.pm.AnyWritten(s, e)
	if err != nil || any == all {
		r.t.Fatalf("AnyWritten %v %v", any, err)
	}
	return all
}

func (r *region) mustBeArmed(off, length int) {
	r.t.Helper()
	if !r.armed(off, length) {
		r.t.Fatalf("[+%#x,+%#x) should be armed", off, off+length)
	}
}

func (r *region) mustNotBeArmed(off, length int) {
	r.t.Helper()
	if r.armed(off, length) {
		r.t.Fatalf("[+%#x,+%#x) should not be armed", off, off+length)
	}
}

// written is the naive question: does PAGEMAP_SCAN report any page as written?
func (r *region) written(off, length int) bool {
	r.t.Helper()
	r.needScan()
	var out [1]Region
	n, _, err := r.pm.Scan(r.start+uint64(off), r.start+uint64(off+length), Query{Mask: IsWritten, Return: IsWritten}, out[:])
	if err != nil {
		r.t.Fatal(err)
	}
	return n > 0
}

func (r *region) needScan() {
	r.t.Helper()
	if !r.pm.CanScan() {
		r.t.Skip("Linux before 6.7: no PAGEMAP_SCAN")
	}
}

func (r *region) intact(off, length int) bool {
	r.t.Helper()
	s, e := r.start+uint64(off), r.start+uint64(off+length)
	ok, err := r.pm.AllIntact(s, e, r.shared)
	if err != nil {
		r.t.Fatal(err)
	}
	raw, errno := r.pm.AllIntactRaw(s, e, r.shared)
	if errno == unix.ENOTTY && !r.pm.CanScan() {
		raw = ok
	} else if errno != 0 {
		r.t.Fatal(errno)
	}
	if raw != ok {
		r.t.Fatalf("AllIntact %v, raw %v %v", ok, raw, errno)
	}
	old, err := r.pm.everyEntry(s, e, intactEntry(r.shared))
	if err != nil || old != ok {
		r.t.Fatalf("AllIntact %v, by entries %v %v", ok, old, err)
	}
	return ok
}

// smaps sums a field of /proc/self/smaps over the region, in bytes.
func (r *region) smaps(field string) uint64 {
	r.t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		r.t.Fatal(err)
	}
	return smapsField(string(b), r.start, r.end, field)
}

func smapsField(text string, start, end uint64, field string) uint64 {
	var sum uint64
	inside := false
	for line := range strings.Lines(text) {
		var a, b uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &a, &b); n == 2 {
			inside = a < end && b > start
			continue
		}
		if v, ok := strings.CutPrefix(line, field+":"); ok && inside {
			var kib uint64
			if _, err := fmt.Sscanf(v, "%d kB", &kib); err == nil {
				sum += kib << 10
			}
		}
	}
	return sum
}

func statusField(text, field string) uint64 {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			var kib uint64
			if _, err := fmt.Sscanf(v, "%d kB", &kib); err == nil {
				return kib << 10
			}
		}
	}
	return 0
}
