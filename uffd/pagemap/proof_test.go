package pagemap

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

// The tests of this file establish, case by case, what "still armed" proves; the
// table in the package comment is their summary.

const span = 2 * huge

func TestPopulated(t *testing.T) {
	for _, kind := range []string{anon, sharedMemfd, tmpfsPriv} {
		t.Run(kind, func(t *testing.T) {
			r := newRegion(t, kind, span)
			r.populate()
			r.mustNotBeArmed(0, span)
			r.arm()
			r.mustBeArmed(0, span)
			if !r.intact(0, span) {
				t.Fatal("not intact")
			}
			if r.read(5*PageBytes) == 0 {
				t.Fatal("content")
			}
			r.mustBeArmed(0, span)
			r.writeServed(7*PageBytes, 9)
			r.mustNotBeArmed(0, span)
			r.mustNotBeArmed(7*PageBytes, PageBytes)
			r.mustBeArmed(0, 7*PageBytes)
			r.mustBeArmed(8*PageBytes, span-8*PageBytes)
			// Written and armed anew: the mark is the mark of now, not of then.
			if err := r.h.WriteProtect(r.start+7*PageBytes, PageBytes); err != nil {
				t.Fatal(err)
			}
			r.mustBeArmed(0, span)
		})
	}
}

// TestAbsent: markers on pages that do not exist, page tables included.
func TestAbsent(t *testing.T) {
	for _, kind := range []string{anon, anonTHP, sharedMemfd, tmpfsPriv} {
		t.Run(kind, func(t *testing.T) {
			length := 2 << 30 // a whole level-3 table at least
			r := newRegion(t, kind, length)
			before := vmPTE(t)
			if r.fd < 0 {
				r.track(syncWP) // skips where absent pages cannot be marked
				if err := r.h.WriteProtect(r.start, uint64(length)); err != nil {
					t.Fatal(err)
				}
			} else {
				r.arm()
			}
			r.mustBeArmed(0, length)
			if r.intact(0, PageBytes) {
				t.Error("a marker is not intact content")
			}
			if n, err := r.pm.CountPresent(r.start, r.end); err != nil || n != 0 {
				t.Fatalf("%d present, %v", n, err)
			}
			t.Logf("page tables for 2 GiB of markers: %d KiB", (vmPTE(t)-before)>>10)
			// Reading maps zeros (or the file) and keeps the mark.
			if r.read(huge+PageBytes) != 0 {
				t.Fatal("content")
			}
			r.mustBeArmed(0, length)
			r.writeServed(huge+PageBytes, 1)
			r.mustNotBeArmed(0, length)
			r.mustBeArmed(0, huge+PageBytes)
			r.mustBeArmed(huge+2*PageBytes, length-huge-2*PageBytes)
		})
	}
}

// TestAbsentWithoutUnpopulated: what kernels before 6.4 do with absent anonymous
// pages, and what a scan for written pages hides there.
func TestAbsentWithoutUnpopulated(t *testing.T) {
	r := newRegion(t, anon, span)
	r.track(uffd.FeaturePagefaultFlagWP)
	if err := r.h.WriteProtect(r.start, span); err != nil {
		t.Fatal(err)
	}
	r.mustNotBeArmed(0, span)
	if r.pm.CanScan() {
		t.Logf("a scan for written pages reports memory without page tables: %v", r.written(0, span))
	}
	r.write(PageBytes, 1)
	r.quiet()
	r.mustNotBeArmed(PageBytes, PageBytes)
	if !r.written(0, span) {
		t.Error("a written page is not reported")
	}
}

func TestHugeZeroPage(t *testing.T) {
	r := newRegion(t, anonTHP, span)
	r.needScan()
	if r.read(0) != 0 || r.read(huge) != 0 {
		t.Fatal("content")
	}
	n, err := r.pm.Count(r.start, r.end, Query{Mask: IsPFNZero | IsHuge, Return: IsPFNZero})
	if err != nil {
		t.Fatal(err)
	}
	if n != span/PageBytes {
		t.Skipf("this kernel mapped %d of %d pages by the huge zero page", n, span/PageBytes)
	}
	r.arm()
	r.mustBeArmed(0, span)
	r.writeServed(3*PageBytes, 5)
	r.mustNotBeArmed(3*PageBytes, PageBytes)
	r.mustBeArmed(0, 3*PageBytes)
	r.mustBeArmed(4*PageBytes, span-4*PageBytes)
}

// TestHugePages: armed whole they stay huge; the first write splits only the one
// it hits; unprotecting a whole range keeps it huge.
func TestHugePages(t *testing.T) {
	r := newRegion(t, anonTHP, 4*huge)
	r.populate()
	if got := r.smaps("AnonHugePages"); got != 4*huge {
		t.Skipf("only %d of %d bytes in huge pages", got, 4*huge)
	}
	r.arm()
	r.mustBeArmed(0, 4*huge)
	if got := r.smaps("AnonHugePages"); got != 4*huge {
		t.Errorf("arming split pages: %d bytes huge", got)
	}
	r.writeServed(huge+5*PageBytes, 7)
	if got := r.smaps("AnonHugePages"); got != 3*huge {
		t.Errorf("one write left %d bytes huge, want %d", got, 3*huge)
	}
	if err := unix.Madvise(r.b[huge:2*huge], unix.MADV_COLLAPSE); !errors.Is(err, unix.EINVAL) {
		t.Errorf("collapsing armed memory: %v", err)
	}
	r.mustNotBeArmed(huge+5*PageBytes, PageBytes)
	r.mustBeArmed(0, huge+5*PageBytes)
	r.mustBeArmed(huge+6*PageBytes, 3*huge-6*PageBytes)
	if err := r.h.Unprotect(r.start+2*huge, huge, true); err != nil {
		t.Fatal(err)
	}
	if got := r.smaps("AnonHugePages"); got != 3*huge {
		t.Errorf("unprotecting a whole huge page left %d bytes huge", got)
	}
	r.mustNotBeArmed(2*huge, huge)
	// A discard of a whole huge page leaves a hole without a page table, which a
	// scan for written pages does not report.
	r.madvise(3*huge, huge, unix.MADV_DONTNEED)
	r.quiet()
	r.mustNotBeArmed(3*huge, huge)
	if r.pm.CanScan() && r.written(3*huge, huge) {
		t.Log("this kernel reports a discarded huge page as written")
	}
	// Once let go, the split page can be made whole again.
	if err := r.h.Unregister(r.start, 4*huge); err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(r.b[huge:2*huge], unix.MADV_COLLAPSE); err != nil {
		if !r.pm.CanScan() && errors.Is(err, unix.EINVAL) {
			t.Skip("Linux 6.1 does not make a page whole that was split while armed")
		}
		t.Errorf("collapse after letting go: %v", err)
	}
	if got := r.smaps("AnonHugePages"); got != 3*huge {
		t.Errorf("collapsing left %d bytes huge", got)
	}
}

var discards = map[string]func(r *region, off, length int) error{
	"MADV_REMOVE": func(r *region, off, length int) error {
		return unix.Madvise(r.b[off:off+length], unix.MADV_REMOVE)
	},
	"punch hole": func(r *region, off, length int) error {
		return unix.Fallocate(r.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(length))
	},
	"write(2)": func(r *region, off, length int) error {
		_, err := unix.Pwrite(r.fd, make([]byte, length), int64(off))
		return err
	},
}

// TestSharedInCacheOnly: pages of a memfd that exist but are not mapped get
// markers, and keep the mark when a read maps them.
func TestSharedInCacheOnly(t *testing.T) {
	r := newRegion(t, sharedMemfd, span)
	for off := 0; off < span; off += PageBytes {
		if _, err := unix.Pwrite(r.fd, []byte{42}, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.pm.CountPresent(r.start, r.end); err != nil || n != 0 {
		t.Fatalf("%d pages mapped already, %v", n, err)
	}
	r.arm()
	r.mustBeArmed(0, span)
	if r.read(9*PageBytes) != 42 {
		t.Fatal("content")
	}
	r.mustBeArmed(0, span)
	if !r.intact(9*PageBytes, PageBytes) || r.intact(0, span) {
		t.Fatal("intact must mean mapped")
	}
	r.writeServed(9*PageBytes, 1)
	r.mustNotBeArmed(9*PageBytes, PageBytes)
	// Never mapped, never read: the first access is the write.
	r.writeServed(20*PageBytes, 1)
	r.mustNotBeArmed(20*PageBytes, PageBytes)
}

// TestOtherMapping: stores through another mapping of the same memory are
// invisible, which is why memory that other processes map is refused.
func TestOtherMapping(t *testing.T) {
	r := newRegion(t, sharedMemfd, span)
	r.populate()
	r.arm()
	other, err := unix.Mmap(r.fd, 0, span, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(other)
	other[PageBytes] = 99
	r.quiet()
	r.mustBeArmed(0, span)
	if r.read(PageBytes) != 99 {
		t.Fatal("content")
	}
}

// TestForeignWrite: what others write into the target by way of its mappings
// faults like its own stores.
func TestForeignWrite(t *testing.T) {
	r := newRegion(t, anon, span)
	r.populate()
	r.arm()
	done := make(chan error, 1)
	go func() {
		src := []byte{1, 2, 3}
		_, err := unix.ProcessVMWritev(os.Getpid(), []unix.Iovec{{Base: &src[0], Len: 3}},
			[]unix.RemoteIovec{{Base: uintptr(r.start) + 4*PageBytes, Len: 3}}, 0)
		done <- err
	}()
	r.serve(4 * PageBytes)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.mustNotBeArmed(4*PageBytes, PageBytes)
}

// TestProtectionAndMoves: what the target does with its mappings meanwhile.
func TestProtectionAndMoves(t *testing.T) {
	r := newRegion(t, anon, span)
	r.populate()
	r.arm()
	for _, prot := range []int{unix.PROT_READ, unix.PROT_NONE, unix.PROT_READ | unix.PROT_WRITE} {
		if err := unix.Mprotect(r.b, prot); err != nil {
			t.Fatal(err)
		}
	}
	r.mustBeArmed(0, span)
	r.writeServed(0, 3)

	// A new mapping over the old one has no mark.
	if _, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&r.b[huge]), huge, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	r.mustNotBeArmed(huge, huge)
	r.mustBeArmed(PageBytes, huge-PageBytes)
	if err := unix.MunmapPtr(unsafe.Pointer(&r.b[PageBytes]), PageBytes); err != nil {
		t.Fatal(err)
	}
	r.mustNotBeArmed(PageBytes, PageBytes)
	if armed, err := r.pm.AllArmed(r.start+2*PageBytes, r.start+3*PageBytes); err != nil || !armed {
		t.Fatal(armed, err)
	}
}

// TestMarksLeft: unregistering alone takes the marks off.
func TestMarksLeft(t *testing.T) {
	for _, kind := range []string{anon, sharedMemfd} {
		r := newRegion(t, kind, span)
		r.populate()
		r.arm()
		if err := r.h.Unregister(r.start, span); err != nil {
			t.Fatal(err)
		}
		r.mustNotBeArmed(0, PageBytes)
		r.write(PageBytes, 1)
		r.quiet()
		if n, err := r.pm.everyEntry(r.start, r.end, func(e Entry) bool { return !e.UffdWP() }); err != nil || !n {
			t.Errorf("%s: marks left: %v", kind, err)
		}
	}
}
