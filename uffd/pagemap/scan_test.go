package pagemap

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

// TestHeader compares with linux/fs.h where that is new enough (6.7).
func TestHeader(t *testing.T) {
	if unsafe.Sizeof(scanArg{}) != scanArgBytes || unsafe.Sizeof(Region{}) != 24 {
		t.Fatal("layout")
	}
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc on this machine: the installed headers cannot be compared")
	}
	// _IOWR('f', 16, 96 bytes) needs no header of a certain age.
	src := `#include <sys/ioctl.h>
#include <linux/fs.h>
struct arg { char b[96]; };
_Static_assert(_IOWR('f', 16, struct arg) == 0xC0606610u, "number");
#ifdef PAGEMAP_SCAN
_Static_assert(PAGEMAP_SCAN == 0xC0606610u && sizeof(struct pm_scan_arg) == 96, "header");
_Static_assert(PAGE_IS_WRITTEN == 2 && PAGE_IS_PRESENT == 8 && PM_SCAN_WP_MATCHING == 1, "bits");
#endif
int main(void) { return 0; }
`
	file := filepath.Join(t.TempDir(), "v.c")
	if err := os.WriteFile(file, []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(gcc, "-fsyntax-only", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestAsyncTracking: report and re-arm in one step, resumable at any buffer and
// page limit.
func TestAsyncTracking(t *testing.T) {
	for _, kind := range []string{anon, sharedMemfd, tmpfsPriv} {
		t.Run(kind, func(t *testing.T) {
			r := newRegion(t, kind, span)
			r.populate()
			r.track(asyncWP)
			if err := r.h.WriteProtect(r.start, span); err != nil {
				t.Fatal(err)
			}
			want := NewSet(span / PageBytes)
			for p := uint64(0); p < span/PageBytes; p += 3 {
				r.write(int(p*PageBytes), 1)
				want.Add(p)
			}
			r.quiet()
			q := Query{Flags: WPMatching | CheckWPAsync, Mask: IsWritten, Return: IsWritten, MaxPages: 7}
			got := NewSet(want.Len())
			steps := 0
			for at := r.start; at < r.end; steps++ {
				var out [5]Region
				n, next, err := r.pm.Scan(at, r.end, q, out[:])
				if err != nil {
					t.Fatal(err)
				}
				if next <= at {
					t.Fatalf("no progress at %#x", at)
				}
				for _, x := range out[:n] {
					got.AddRegion(r.start, x)
				}
				at = next
			}
			if !got.Contains(want) || !want.Contains(got) {
				t.Fatalf("%d pages reported, %d written", got.Count(), want.Count())
			}
			if steps < int(want.Count()/5) {
				t.Errorf("limits ignored: %d steps", steps)
			}
			r.mustBeArmed(0, span)
			// Arming without reporting.
			r.write(0, 1)
			if _, _, err := r.pm.Scan(r.start, r.end, Query{Flags: WPMatching, Mask: IsWritten, Return: 0}, nil); err != nil {
				t.Fatal(err)
			}
			r.mustBeArmed(0, span)
		})
	}
}

func TestQueries(t *testing.T) {
	r := newRegion(t, anon, span)
	if any, err := r.pm.AnyPresent(r.start, r.end); any || err != nil {
		t.Fatal(any, err)
	}
	r.write(9*PageBytes, 1)
	r.write(100*PageBytes, 1)
	if any, err := r.pm.AnyPresent(r.start, r.end); !any || err != nil {
		t.Fatal(any, err)
	}
	if any, err := r.pm.AnyPresent(r.start, r.start+9*PageBytes); any || err != nil {
		t.Fatal(any, err)
	}
	if n, err := r.pm.CountPresent(r.start, r.end); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	var seen []Region
	var buf [1]Region
	var e [16]Entry
	if n, err := r.pm.Entries(r.start, e[:]); n != 16 || err != nil || !e[9].Present() || e[8].Present() || e[9].File() || e[9].Swapped() {
		t.Fatal(n, err, e)
	}
	if os.Geteuid() == 0 && e[9].PFN() == 0 {
		t.Error("no frame number")
	}
	r.needScan()
	if err := r.pm.ScanAll(r.start, r.end, Query{Mask: IsPresent, Return: IsPresent}, buf[:], func(x Region) bool {
		seen = append(seen, x)
		return true
	}); err != nil || len(seen) != 2 || seen[1].Start != r.start+100*PageBytes || seen[1].Pages(PageBytes) != 1 {
		t.Fatal(seen, err)
	}
	r.track(uffd.FeaturePagefaultFlagWP)
	_, _, err := r.pm.Scan(r.start, r.end, Query{Flags: CheckWPAsync | WPMatching, Mask: IsWritten, Return: IsWritten}, buf[:])
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("re-arming without WP_ASYNC: %v", err)
	}
	if _, err := r.pm.AllArmed(r.start, r.start); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
	if _, err := r.pm.Entries(r.start+1, e[:]); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
}

// TestARegionOfManySteps: what is found in several calls is one region, and what lies
// between two regions is in neither.
func TestARegionOfManySteps(t *testing.T) {
	const length = 2*scanStep + scanStep/2
	r := newRegion(t, anon, length)
	r.needScan()
	r.populate()
	hole := int(scanStep - r.start%scanStep - PageBytes) // the last page before a step's end
	r.madvise(hole, PageBytes, unix.MADV_DONTNEED)
	var seen []Region
	var buf [3]Region
	err := r.pm.ScanAll(r.start, r.end, Query{Mask: IsPresent, Return: IsPresent}, buf[:], func(x Region) bool {
		seen = append(seen, x)
		return true
	})
	at := r.start + uint64(hole)
	if err != nil || len(seen) != 2 || seen[0].Start != r.start || seen[0].End != at || seen[1].Start != at+PageBytes || seen[1].End != r.end {
		t.Fatal(seen, err)
	}
	calls := 0
	if err := r.pm.ScanAll(r.start, r.end, Query{Mask: IsPresent, Return: IsPresent}, buf[:], func(Region) bool {
		calls++
		return false
	}); err != nil || calls != 1 {
		t.Fatal(calls, err)
	}
}

// TestOldKernel: with a descriptor on which PAGEMAP_SCAN is not known, the
// helpers answer from the entries, as they do before 6.7.
func TestOldKernel(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old := &Pagemap{}
	old.fd.Store(int64(f.Fd()))
	if old.CanScan() {
		t.Fatal("a plain file scans")
	}
	words := []Entry{entryPresent | entryUffdWP, entryPresent | entryUffdWP, entryUffdWP, entryPresent, 0, entrySwapped}
	if _, err := f.Write(entryBytes(words)); err != nil {
		t.Fatal(err)
	}
	const pg = PageBytes
	for _, c := range []struct {
		end    uint64
		armed  bool
		intact bool
	}{{1 * pg, true, true}, {2 * pg, true, true}, {3 * pg, true, false}, {4 * pg, false, false}, {5 * pg, false, false}} {
		if got, err := old.AllArmed(0, c.end); got != c.armed || err != nil {
			t.Errorf("AllArmed(0,%#x) %v %v", c.end, got, err)
		}
		if got, err := old.AllIntact(0, c.end, false); got != c.intact || err != nil {
			t.Errorf("AllIntact(0,%#x) %v %v", c.end, got, err)
		}
	}
	if n, err := old.CountPresent(0, 6*pg); n != 3 || err != nil {
		t.Error(n, err)
	}
	if any, err := old.AnyPresent(4*pg, 5*pg); any || err != nil {
		t.Error(any, err)
	}
	if any, err := old.AnyPresent(4*pg, 6*pg); !any || err != nil {
		t.Error(any, err)
	}
	if _, _, err := old.Scan(0, pg, Query{Mask: IsWritten, Return: IsWritten}, make([]Region, 1)); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "6.7") {
		t.Error(err)
	}
	if _, errno := old.AllArmedRaw(0, pg); errno != unix.ENOTTY {
		t.Error(errno)
	}
}

func TestRawAllocatesNothing(t *testing.T) {
	r := newRegion(t, anon, span)
	r.needScan()
	r.populate()
	r.arm()
	if n := testing.AllocsPerRun(100, func() {
		if ok, errno := r.pm.AllArmedRaw(r.start, r.start+PageBytes); !ok || errno != 0 {
			t.Fatal(ok, errno)
		}
		if any, errno := r.pm.AnyWrittenRaw(r.start, r.end); any || errno != 0 {
			t.Fatal(any, errno)
		}
		if ok, errno := r.pm.AllIntactRaw(r.start, r.end, false); !ok || errno != 0 {
			t.Fatal(ok, errno)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
