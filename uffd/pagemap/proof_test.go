package pagemap

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
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

func TestDiscardAnonymous(t *testing.T) {
	r := newRegion(t, anon, 2*span)
	r.populate()
	r.arm()
	r.madvise(3*PageBytes, PageBytes, unix.MADV_DONTNEED)
	r.quiet()
	r.mustNotBeArmed(3*PageBytes, PageBytes)
	r.mustNotBeArmed(0, span)
	r.mustBeArmed(0, 3*PageBytes)
	// And a whole page table's worth.
	r.madvise(span, span, unix.MADV_DONTNEED)
	r.quiet()
	r.mustNotBeArmed(span, span)
	if r.pm.CanScan() {
		t.Logf("scan for written pages after discarding 4 MiB: %v", r.written(span, span))
	}
	// What comes back after the discard is unprotected and says so.
	if r.read(span) != 0 {
		t.Error("content after the discard")
	}
	r.mustNotBeArmed(span, PageBytes)
	// The lazy variant keeps content and mark until the page is reclaimed.
	r.madvise(8*PageBytes, PageBytes, unix.MADV_FREE)
	r.quiet()
	r.mustBeArmed(8*PageBytes, PageBytes)
	if r.read(8*PageBytes) == 0 {
		t.Error("MADV_FREE dropped the page at once")
	}
}

// TestDiscardPrivateFile: the discard of a private copy leaves the marker, and
// the file's content shows again. AllArmed is fooled; AllIntact is not.
func TestDiscardPrivateFile(t *testing.T) {
	r := newRegion(t, tmpfsPriv, span)
	r.populate()
	r.arm()
	if !r.intact(0, span) {
		t.Fatal("not intact")
	}
	r.madvise(3*PageBytes, PageBytes, unix.MADV_DONTNEED)
	r.quiet()
	r.mustBeArmed(3*PageBytes, PageBytes)
	if r.intact(3*PageBytes, PageBytes) {
		t.Fatal("a discarded page counts as intact")
	}
	if r.read(3*PageBytes) != 0 {
		t.Fatal("the private copy survived the discard")
	}
	r.mustBeArmed(3*PageBytes, PageBytes)
	if r.intact(3*PageBytes, PageBytes) {
		t.Fatal("the file's page counts as the intact private copy")
	}
}

// TestDiscardShared: unmapping shared pages is harmless (marker and content
// stay). A punched hole is not, and neither the mark nor the mapping tells once
// somebody has read the page again, be it the copier itself.
func TestDiscardShared(t *testing.T) {
	for name, punch := range discards {
		t.Run(name, func(t *testing.T) {
			r := newRegion(t, sharedMemfd, span)
			r.populate()
			r.arm()
			r.madvise(5*PageBytes, PageBytes, unix.MADV_DONTNEED)
			r.quiet()
			r.mustBeArmed(5*PageBytes, PageBytes)
			if r.intact(5*PageBytes, PageBytes) {
				t.Error("an unmapped page counts as intact")
			}
			if r.read(5*PageBytes) == 0 {
				t.Fatal("content of shared memory lost by MADV_DONTNEED")
			}
			if !r.intact(0, span) {
				t.Fatal("not intact")
			}
			if err := punch(r, 3*PageBytes, PageBytes); err != nil {
				t.Fatal(err)
			}
			r.quiet()
			r.mustBeArmed(3*PageBytes, PageBytes)
			if name != "write(2)" && r.intact(3*PageBytes, PageBytes) {
				t.Fatal("a discarded page counts as intact before anybody read it")
			}
			if r.read(3*PageBytes) != 0 {
				t.Fatal("content survived")
			}
			r.mustBeArmed(3*PageBytes, PageBytes)
			if !r.intact(3*PageBytes, PageBytes) {
				t.Error("this kernel shows the discard: the package comment can promise more")
			}
		})
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

// TestRemoveEvents: with EVENT_REMOVE every discard by madvise announces itself,
// and waits until the message is read; among them the pair of calls QEMU makes
// for a balloon in a memfd (punch, then MADV_DONTNEED).
func TestRemoveEvents(t *testing.T) {
	for _, c := range []struct {
		name, kind string
		silent     bool
		discard    func(r *region, off, length int) error
	}{
		{"anonymous MADV_DONTNEED", anon, false, func(r *region, off, n int) error { return unix.Madvise(r.b[off:off+n], unix.MADV_DONTNEED) }},
		{"anonymous MADV_FREE", anon, false, func(r *region, off, n int) error { return unix.Madvise(r.b[off:off+n], unix.MADV_FREE) }},
		{"private file MADV_DONTNEED", tmpfsPriv, false, func(r *region, off, n int) error { return unix.Madvise(r.b[off:off+n], unix.MADV_DONTNEED) }},
		{"shared MADV_REMOVE", sharedMemfd, false, discards["MADV_REMOVE"]},
		{"shared punch hole", sharedMemfd, true, discards["punch hole"]},
		{"shared punch hole and MADV_DONTNEED", sharedMemfd, false, func(r *region, off, n int) error {
			if err := discards["punch hole"](r, off, n); err != nil {
				return err
			}
			return unix.Madvise(r.b[off:off+n], unix.MADV_DONTNEED)
		}},
		{"shared write(2)", sharedMemfd, true, discards["write(2)"]},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRegion(t, c.kind, span)
			r.populate()
			want := syncWP | uffd.FeatureEventRemove
			if have, err := uffd.Probe(); err == nil && !have.Has(uffd.FeatureWPUnpopulated) {
				want &^= uffd.FeatureWPUnpopulated
			}
			r.track(want)
			if err := r.h.WriteProtect(r.start, span); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- c.discard(r, 3*PageBytes, 2*PageBytes) }()
			if c.silent {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				r.quiet()
				return
			}
			stop, err := uffd.NewStop()
			if err != nil {
				t.Fatal(err)
			}
			defer stop.Close()
			if err := r.h.Wait(stop); err != nil {
				t.Fatal(err)
			}
			// The content goes only after the message was read.
			select {
			case err := <-done:
				t.Fatalf("the discard did not wait: %v", err)
			default:
			}
			var m [1]uffd.Msg
			if _, err := r.h.Read(m[:]); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if s, e := m[0].Removed(); m[0].Event != uffd.EventRemove || s != r.start+3*PageBytes || e != r.start+5*PageBytes {
				t.Fatalf("%+v", m[0])
			}
		})
	}
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

// TestSwapped pages armed memory out and in again.
func TestSwapped(t *testing.T) {
	swapOn(t)
	r := newRegion(t, anon, span)
	r.populate()
	r.arm()
	r.madvise(0, span, unix.MADV_PAGEOUT)
	n, err := r.pm.CountPresent(r.start, r.end)
	if err != nil {
		t.Fatal(err)
	}
	if n == span/PageBytes {
		t.Fatal("nothing was paged out")
	}
	r.mustBeArmed(0, span)
	if r.intact(0, span) {
		t.Error("swapped out pages are not mapped")
	}
	for off := 0; off < span; off += PageBytes {
		if r.read(off) != byte(off/PageBytes)|1 {
			t.Fatal("content")
		}
	}
	r.mustBeArmed(0, span)
	if !r.intact(0, span) {
		t.Error("not intact after swapping in")
	}
	r.madvise(0, span, unix.MADV_PAGEOUT)
	r.writeServed(5*PageBytes, 1)
	r.mustNotBeArmed(5*PageBytes, PageBytes)
	r.mustBeArmed(6*PageBytes, span-6*PageBytes)
}

// swapOn gives the machine swap for the duration of a test.
func swapOn(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(path, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("/sbin/mkswap", path).CombinedOutput(); err != nil {
		t.Fatalf("mkswap: %v: %s", err, out)
	}
	if out, err := exec.Command("/sbin/swapon", path).CombinedOutput(); err != nil {
		t.Fatalf("swapon: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("/sbin/swapoff", path).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %v: %s", err, out)
		}
	})
}

// mergeOn switches same-page merging on for the duration of a test; it only ever
// touches memory that asked for it.
func mergeOn(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{"run": "1", "sleep_millisecs": "1", "pages_to_scan": "10000"} {
		path := "/sys/kernel/mm/ksm/" + name
		before, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(value), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(path, bytes.TrimSpace(before), 0); err != nil {
				t.Error(err)
			}
		})
	}
}

func vmPTE(t *testing.T) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	return statusField(string(b), "VmPTE")
}

// TestMerged lets the kernel merge equal pages. Merging replaces a page behind
// its mark; what the mark then says decides whether captures stay sound.
func TestMerged(t *testing.T) {
	mergeOn(t)
	r := newRegion(t, anon, span)
	same := bytes.Repeat([]byte("same"), PageBytes/4)
	for off := 0; off < span; off += PageBytes {
		r.write(off, same...)
	}
	r.arm()
	r.madvise(0, span, unix.MADV_MERGEABLE)
	entries := make([]Entry, span/PageBytes)
	frames := func() (distinct int) {
		if _, err := r.pm.Entries(r.start, entries); err != nil {
			t.Fatal(err)
		}
		seen := map[uint64]bool{}
		for _, e := range entries {
			seen[e.PFN()] = true
		}
		return len(seen)
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for n := frames(); n > len(entries)/2; n = frames() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("still %d frames for %d equal pages", n, len(entries))
		}
	}
	marked := 0
	for _, e := range entries {
		if e.UffdWP() {
			marked++
		}
	}
	t.Logf("%d of %d pages still marked, %d frames", marked, len(entries), frames())
	r.quiet()
	if marked == len(entries) {
		r.writeServed(7*PageBytes, 1)
		return
	}
	// The mark was lost: the page must say so, and a store must not be reported
	// as if it were protected.
	r.mustNotBeArmed(0, span)
	for i, e := range entries {
		if !e.UffdWP() {
			r.write(i*PageBytes, 1)
			r.quiet()
			r.mustNotBeArmed(i*PageBytes, PageBytes)
			return
		}
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
