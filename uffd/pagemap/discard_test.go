package pagemap

import (
	"testing"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

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
