package pagemap

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
